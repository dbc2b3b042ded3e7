"""Exports a run, a probe or an ensemble as a predictor that needs torch, numpy and Pillow only."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from data_prep.common.atomic_writes import write_bytes
from data_prep.common.errors import BadInput
from train.data.seen import SEEN_FILE, inherited_record
from train.evaluation.exporting.network_export import are_close, example_images, record_facts
from train.evaluation.predicting.image_predictor import ImagePredictor
from train.run import predictor

FILES = ("network.pt2", "predictor.json", "predictor.py", SEEN_FILE)


class PredictorNetwork(nn.Module):
    """All networks of a predictor as one: a list of the same images by size -> "rates" and/or "classes", logits.

    Args:
        opened: the predictor.
    """

    def __init__(self, opened: ImagePredictor):
        super().__init__()
        self._sizes, self._size_of = opened.image_sizes, [network.image_size for network in opened.networks]
        self.networks = nn.ModuleList(network.module for network in opened.networks)
        self._combines = opened.combination is not None
        if opened.combination is not None:
            self.register_buffer("weights", torch.from_numpy(opened.combination.weights))
            self.register_buffer("offset", torch.from_numpy(opened.combination.offset))

    def forward(self, images: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Images, uint8 (b, 3, size, size) of each size of `ImagePredictor.image_sizes`."""
        by_size = dict(zip(self._sizes, images, strict=True))
        outputs = [network(by_size[size]) for network, size in zip(self.networks, self._size_of, strict=True)]
        if not self._combines:
            return outputs[0]
        rates = self.get_buffer("offset").expand(len(images[0]), -1)
        for output, weight in zip(outputs, self.get_buffer("weights"), strict=True):
            rates = rates + output["rates"] * weight
        return {"rates": rates.float()}


def write_predictor(opened: ImagePredictor, out: Path) -> list[Path]:
    """Write `network.pt2`, `predictor.json`, `predictor.py` (`train/run/predictor.py`) and `seen.npz`.

    Returns:
        The files.

    Raises:
        BadInput: torch.export cannot export a network.
    """
    network = PredictorNetwork(opened).eval()
    images = [example_images(size) for size in opened.image_sizes]
    program = _exported(network, images, opened)
    with torch.no_grad():
        expected = opened.outputs(dict(zip(opened.image_sizes, images, strict=True)))
        if not are_close(program.module()(images), expected):
            raise RuntimeError(f"the exported network does not predict what {opened.path} predicts")
    content = io.BytesIO()
    torch.export.save(program, content)
    record = inherited_record(opened.path)
    facts = {
        "kind": opened.kind,
        "site_ids": opened.site_ids,
        "classes": opened.classes,
        "units": opened.units,
        "image_sizes": opened.image_sizes,
        "recording": opened.recording,
        "torch": torch.__version__,
        "seen": record_facts(record),
    }
    contents = (
        content.getvalue(),
        json.dumps(facts, indent=1).encode(),
        Path(predictor.__file__).read_bytes(),
        record.content(),
    )
    paths = [out / name for name in FILES]
    for path, data in zip(paths, contents, strict=True):
        write_bytes(path, data)
    return paths


def _exported(
    network: PredictorNetwork, images: list[torch.Tensor], opened: ImagePredictor
) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("images", min=1, max=4096)
    try:
        with torch.no_grad():
            return torch.export.export(network, (images,), dynamic_shapes=([{0: batch} for _ in images],), strict=False)
    except Exception as error:  # torch.export raises many kinds
        reason = str(error).splitlines()[0][:200]
        raise BadInput(
            f"--format predictor: torch.export cannot export {opened.path} ({type(error).__name__}: {reason}); use "
            "spiketune.load instead"
        ) from None
