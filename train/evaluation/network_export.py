"""Fine-tuned networks for other programs: a timm checkpoint, or a self-contained predictor."""

import io
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
from train.models.network import Network
from train.run import predictor
from train.run.checkpoint import Progress, checked_tensors
from train.run.recipe import Recipe

TOLERANCE = 1e-4  # by which what is written may differ from the network, relative to the outputs' spread
EXAMPLES = 3  # images that an exported network is tried on


@dataclass
class Trained:
    """A fine-tuned network in evaluation mode, on the CPU, with what its outputs are."""

    network: Network
    recipe: Recipe
    manifest: Manifest
    progress: Progress

    @property
    def image_size(self) -> int:
        """Side in pixels of the images that it sees."""
        return self.progress.image_size

    @property
    def timm_name(self) -> str:
        """Of the architecture, without the name of weights."""
        return self.recipe.backbone.name.split(".")[0]

    @property
    def head(self) -> str | None:
        """The output that one linear layer gives from pooled features: "rates", else "classes", else None."""
        linear = self.recipe.readout.kind == "linear" and self.recipe.loss.responses != "poisson"
        if "rates" in self.network.heads:
            return "rates" if linear else None
        return "classes"

    def examples(self) -> torch.Tensor:
        """Random images to try it on, uint8 (EXAMPLES, 3, size, size)."""
        generator = torch.Generator().manual_seed(0)
        shape = (EXAMPLES, 3, self.image_size, self.image_size)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def load_trained(
    recipe: Recipe, checkpoint: Path, progress: Progress, manifest: Manifest, rows: slice = slice(None)
) -> Trained:
    """The network of a run; of a run of several recordings, with one's readout (see `Progress.rows_of`)."""
    network = Network(recipe.for_evaluation(), manifest, progress.image_size)
    network.load_state_dict(checked_tensors(network, checkpoint, "network", rows))
    return Trained(network.eval(), recipe, manifest, progress)


class InUnits(nn.Module):
    """Images, uint8 (b, 3, size, size) -> "rates" (b, sites) in the recording's units, and/or "classes", logits."""

    def __init__(self, network: Network):
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """See the class."""
        outputs = self.network(images)
        if "rates" in outputs:
            outputs["rates"] = self.network.objective.responses.in_units(outputs["rates"])
        return outputs


def _close(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        (found[name] - expected[name]).abs().max() <= TOLERANCE * expected[name].std().clamp(min=1e-6)
        for name in expected
    )


# ----------------------------------------------------------------------------------------------------- predictor


def write_predictor(trained: Trained, out: Path) -> list[Path]:
    """Write `network.pt2`, `predictor.json` and `predictor.py`: all that `train/run/predictor.py` promises.

    Raises:
        BadInput: torch.export cannot follow the network.
    """
    network = InUnits(trained.network).eval()
    program = _exported(network, trained)
    with torch.no_grad():
        if not _close(program.module()(trained.examples()), network(trained.examples())):
            raise RuntimeError("the exported network does not predict what the run predicts")
    content = io.BytesIO()
    torch.export.save(program, content)
    progress = trained.progress
    facts = {
        "site_ids": progress.site_ids if "rates" in trained.network.heads else None,
        "classes": progress.classes if "classes" in trained.network.heads else None,
        "units": trained.manifest.rates.units,
        "image_size": trained.image_size,
        "recording": trained.manifest.name,
        "simulated": trained.manifest.simulated,
        "torch": torch.__version__,
    }
    files = {
        "network.pt2": content.getvalue(),
        "predictor.json": json.dumps(facts, indent=1).encode(),
        "predictor.py": Path(predictor.__file__).read_bytes(),
    }
    return [_write(out / name, data) for name, data in files.items()]


def _exported(network: InUnits, trained: Trained) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("images", min=1, max=4096)
    try:
        with torch.no_grad():
            return torch.export.export(network, (trained.examples(),), dynamic_shapes=({0: batch},), strict=False)
    except Exception as error:  # torch.export raises many kinds
        raise BadInput(
            f"torch.export cannot follow {trained.recipe.backbone.name} ({type(error).__name__}: "
            f"{str(error).splitlines()[0][:200]}); --format timm may work"
        ) from None


def _write(path: Path, content: bytes) -> Path:
    write_bytes(path, content)
    return path


# ---------------------------------------------------------------------------------------------------------- timm


def write_timm(trained: Trained, out: Path) -> tuple[list[Path], str]:
    """Write the backbone, with the readout where timm has a place for it, as a checkpoint that timm loads.

    Returns:
        The files, and how to load them.

    Raises:
        BadInput: a network that is not timm's.
    """
    backbone, name = trained.network.backbone, trained.recipe.backbone.name
    if type(backbone.net).__module__.startswith("train."):
        raise BadInput(f"--format timm: {name} is Spiketune's own network, which timm does not have; use predictor")
    tensors = {key: tensor.contiguous() for key, tensor in backbone.net.state_dict().items()}
    weights = out / "model.safetensors"
    if backbone.cut is not None:
        _write(weights, save(tensors))
        return [weights], (
            f"the network is cut at {backbone.cut}, so only the tensors up to there are in it: "
            f"timm.create_model({name!r}, num_classes=0).load_state_dict(load_file({str(weights)!r}), strict=False)"
        )
    options = {"img_size": trained.image_size} if hasattr(backbone.net, "set_input_size") else {}
    whole = _with_readout(trained, tensors, options)
    head = "without a classifier" if whole is None else f"its {whole.num_classes} outputs are the {trained.head}"
    config = {
        "architecture": trained.timm_name,
        "num_classes": 0 if whole is None else whole.num_classes,
        "model_args": options,
        "pretrained_cfg": _pretrained_cfg(backbone.net, trained, 0 if whole is None else whole.num_classes),
        "site_ids": trained.progress.site_ids,
    }
    _write(weights, save(tensors if whole is None else _contiguous(whole)))
    _write(out / "config.json", json.dumps(config, indent=1).encode())
    folder = str(out.resolve())
    return [weights, out / "config.json"], f"timm.create_model('local-dir:{folder}', pretrained=True)  # {head}"


def _contiguous(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in net.state_dict().items()}


def _pretrained_cfg(net: nn.Module, trained: Trained, classes: int) -> dict[str, Any]:
    """What timm needs to prepare images for the network."""
    side = trained.image_size
    return {
        "mean": list(net.pretrained_cfg["mean"]),
        "std": list(net.pretrained_cfg["std"]),
        "input_size": [3, side, side],
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "num_classes": classes,
        "classifier": net.pretrained_cfg.get("classifier"),
        "first_conv": net.pretrained_cfg.get("first_conv"),
    }


def _with_readout(
    trained: Trained, tensors: Mapping[str, torch.Tensor], options: Mapping[str, Any]
) -> nn.Module | None:
    """timm's network with our linear readout as its classifier: to the sites, in the recording's units, or to classes.

    None where there is no such readout, the units are no linear function of its outputs, or timm's own classifier sits
    elsewhere: it is tried whether both predict the same.
    """
    network, name = trained.network, trained.head
    if name is None:
        return None
    readout = network.heads[name].sites if name == "rates" else network.heads[name]
    whole = timm.create_model(trained.timm_name, num_classes=readout.out_features, **options).eval()
    classifier = whole.get_classifier()
    if not isinstance(classifier, nn.Linear) or classifier.weight.shape != readout.weight.shape:
        return None
    whole.load_state_dict(dict(tensors), strict=False)
    with torch.no_grad():
        offset, scale = torch.zeros_like(readout.bias), torch.ones_like(readout.bias)
        if name == "rates":
            in_units = network.objective.responses.in_units
            scale, offset = in_units(scale) - in_units(offset), in_units(offset)
        classifier.weight.copy_(readout.weight * scale[:, None])
        classifier.bias.copy_(readout.bias * scale + offset)
        images, backbone = trained.examples(), network.backbone
        found = whole((images.float() - backbone.mean) / backbone.std)
        same = _close({name: found}, {name: InUnits(network)(images)[name]})
    return whole if same else None
