"""Exports a fine-tuned network as a timm checkpoint."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from torch import nn

from data_prep.common.atomic_writes import write_bytes
from data_prep.common.errors import BadInput
from data_prep.shards.manifest import Manifest
from train.data.seen import FITTED, SELECTED, TAUGHT, SeenRecord
from train.evaluation.predicting.image_predictor import NetworkInUnits
from train.models.inherited_record import metadata_of
from train.models.network import Network
from train.models.readouts import Linear
from train.run.checkpoint import load_matching_tensors
from train.run.progress import Progress
from train.run.recipe import Recipe

TOLERANCE = 1e-4  # largest difference of an exported network's outputs, relative to the spread of the outputs
EXAMPLES = 3  # images that an exported network is tried on


@dataclass(frozen=True)
class TrainedNetwork:
    """A fine-tuned network in evaluation mode, on the CPU, and what its outputs are.

    Attributes:
        network: the network.
        recipe: of the run.
        manifest: of the recording.
        progress: of the checkpoint; names sites and classes.
        record: what the network has seen.
    """

    network: Network
    recipe: Recipe
    manifest: Manifest
    progress: Progress
    record: SeenRecord

    @property
    def image_size(self) -> int:
        """Side in pixels of the images it takes."""
        return self.progress.image_size

    @property
    def timm_name(self) -> str:
        """timm's name of the architecture, without that of the weights."""
        return self.recipe.backbone.name.split(".")[0]

    @property
    def timm_output(self) -> str | None:
        """The output that one linear layer computes from pooled features, as in timm: "rates", "classes" or None."""
        if "rates" not in self.network.heads:
            return "classes"
        is_linear = self.recipe.readout.kind == "linear" and self.recipe.loss.responses != "poisson"
        return "rates" if is_linear else None


def example_images(size: int) -> torch.Tensor:
    """Random images to try a network on, uint8 (EXAMPLES, 3, size, size)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (EXAMPLES, 3, size, size), dtype=torch.uint8, generator=generator)


def load_trained(
    recipe: Recipe,
    checkpoint: Path,
    progress: Progress,
    manifest: Manifest,
    record: SeenRecord,
    rows: slice = slice(None),
) -> TrainedNetwork:
    """Load the network of a run.

    Args:
        recipe: of the run.
        checkpoint: folder.
        progress: of the checkpoint; with several recordings, of the one to export (`Progress.for_recording`).
        manifest: of the recording.
        record: what the run has seen.
        rows: of the readout, which belong to the recording (`Progress.rows_of`).
    """
    network = Network(recipe.for_evaluation(), manifest, progress.image_size)
    network.load_state_dict(load_matching_tensors(network, checkpoint, "network", rows))
    return TrainedNetwork(network.eval(), recipe, manifest, progress, record)


def are_close(outputs: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    """Whether a network puts out what is expected, but for rounding; NaN where it is expected."""
    if outputs.keys() != expected.keys():
        return False
    for name, values in expected.items():
        known = ~values.isnan()
        if not torch.equal(outputs[name].isnan(), ~known) or not known.any():
            return False
        difference = (outputs[name] - values)[known].abs().max()
        if difference > TOLERANCE * values[known].std().clamp(min=1e-6):
            return False
    return True


def record_facts(record: SeenRecord) -> dict[str, Any]:
    """A record in a few numbers, for people; the images themselves are in seen.npz or the weights' metadata."""
    facts: dict[str, Any] = {role: record.count(role) for role in (FITTED, TAUGHT, SELECTED)}
    return facts | {"unknown": list(record.unknown), "pretrained": list(record.pretrained)}


# ------------------------------------------------------------------------------------------------------------ timm


def write_timm(trained: TrainedNetwork, out: Path) -> tuple[list[Path], str]:
    """Write the backbone, and the readout if timm has a place for it, as a checkpoint that timm loads.

    Returns:
        The files, and how to load them.

    Raises:
        BadInput: the network is not one of timm's.
    """
    backbone, name = trained.network.backbone, trained.recipe.backbone.name
    if type(backbone.net).__module__.startswith("train."):
        raise BadInput(f"--format timm: {name} is Spiketune's own network, not one of timm's; use --format predictor")
    weights = out / "model.safetensors"
    if backbone.cut is not None:
        write_bytes(weights, save(_contiguous_tensors(backbone.net), metadata_of(trained.record)))
        return [weights], (
            f"the network is cut at {backbone.cut}, so the file has only the tensors up to there: "
            f"timm.create_model({name!r}, num_classes=0).load_state_dict(load_file({str(weights)!r}), strict=False)"
        )
    model_args = {"img_size": trained.image_size} if hasattr(backbone.net, "set_input_size") else {}
    classifier, output = _timm_classifier(trained, model_args), trained.timm_output
    outputs, comment = 0, "without a classifier"
    if classifier is not None and output is not None:
        outputs = _linear_layer(trained.network, output).out_features
        comment = f"its {outputs} outputs are the {output}"
    config = {
        "architecture": trained.timm_name,
        "num_classes": outputs,
        "model_args": model_args,
        "pretrained_cfg": _pretrained_cfg(backbone.net, trained.image_size, outputs),
        "site_ids": trained.progress.site_ids,
        "seen": record_facts(trained.record),
    }
    net = backbone.net if classifier is None else classifier
    write_bytes(weights, save(_contiguous_tensors(net), metadata_of(trained.record)))
    write_bytes(out / "config.json", json.dumps(config, indent=1).encode())
    loading = f"timm.create_model('local-dir:{out.resolve()}', pretrained=True)  # {comment}"
    return [weights, out / "config.json"], loading


def _contiguous_tensors(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in net.state_dict().items()}


def _pretrained_cfg(net: nn.Module, side: int, outputs: int) -> dict[str, Any]:
    """What timm needs to prepare images for the network."""
    cfg = net.pretrained_cfg
    assert isinstance(cfg, Mapping)
    return {
        "mean": list(cfg["mean"]),
        "std": list(cfg["std"]),
        "input_size": [3, side, side],
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "num_classes": outputs,
        "classifier": cfg.get("classifier"),
        "first_conv": cfg.get("first_conv"),
    }


def _timm_classifier(trained: TrainedNetwork, model_args: Mapping[str, Any]) -> nn.Module | None:
    """timm's network with our linear readout, to the sites in the recording's units or to classes, as its classifier.

    None if the readout is not linear, if the units are not a linear function of its outputs, or if timm's classifier
    sits elsewhere: whether both predict the same is tried out.
    """
    network, name = trained.network, trained.timm_output
    if name is None:
        return None
    readout = _linear_layer(network, name)
    # timm's networks have methods that nn.Module does not have.
    net: Any = timm.create_model(trained.timm_name, num_classes=readout.out_features, **model_args).eval()
    classifier = net.get_classifier()
    if not isinstance(classifier, nn.Linear) or classifier.weight.shape != readout.weight.shape:
        return None
    net.load_state_dict(_contiguous_tensors(network.backbone.net), strict=False)
    with torch.no_grad():
        offset, scale = torch.zeros_like(readout.bias), torch.ones_like(readout.bias)
        responses = network.objective.responses
        if name == "rates":
            assert responses is not None
            scale = responses.to_rates(scale) - responses.to_rates(offset)
            offset = responses.to_rates(offset)
        classifier.weight.copy_(readout.weight * scale[:, None])
        classifier.bias.copy_(readout.bias * scale + offset)
        images = example_images(trained.image_size)
        outputs = net((images.float() - network.backbone.mean) / network.backbone.std)
        same = are_close({name: outputs}, {name: NetworkInUnits(network)(images)[name]})
    return net if same else None


def _linear_layer(network: Network, output: str) -> nn.Linear:
    layer = network.heads[output]
    if isinstance(layer, Linear):
        layer = layer.sites
    assert isinstance(layer, nn.Linear), f"the readout to {output} is not linear"
    return layer
