"""Exports a run, a probe or an ensemble as a predictor that needs torch, numpy and Pillow only."""

import io
import json
import zipfile
from pathlib import Path

import torch

from data_prep.common.atomic_writes import write_bytes
from data_prep.common.errors import BadInput
from train.data.seen import SEEN_FILE, inherited_record
from train.evaluation.exporting.network_export import are_close, example_images, record_facts
from train.evaluation.predicting.image_predictor import ImagePredictor
from train.run import predictor

ARCHIVE = "predictor.zip"
NETWORK, FACTS, PROGRAM = "network.pt2", "predictor.json", "predictor.py"
FILES = (NETWORK, FACTS, PROGRAM, SEEN_FILE)


def write_predictor(opened: ImagePredictor, out: Path) -> list[Path]:
    """Write `network.pt2`, `predictor.json`, `predictor.py` (`train/run/predictor.py`) and `seen.npz`.

    Returns:
        The files.

    Raises:
        BadInput: torch.export cannot export a network.
    """
    contents = _contents(opened)
    for name, content in contents.items():
        write_bytes(out / name, content)
    return [out / name for name in contents]


def write_archive(opened: ImagePredictor, out: Path) -> list[Path]:
    """Write the same files as one, a zip archive without compression, from which Python imports `predictor`.

    Returns:
        The file.

    Raises:
        BadInput: torch.export cannot export a network.
    """
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as members:
        for name, content in _contents(opened).items():
            members.writestr(name, content)
    write_bytes(out / ARCHIVE, archive.getvalue())
    return [out / ARCHIVE]


def _contents(opened: ImagePredictor) -> dict[str, bytes]:
    """The files of a predictor by name."""
    images = [example_images(size) for size in opened.network.image_sizes]
    program = _exported(opened, images)
    with torch.no_grad():
        if not are_close(program.module()(images), opened.network(images)):
            raise RuntimeError(f"the exported network does not predict what {opened.path} predicts")
    content = io.BytesIO()
    torch.export.save(program, content)
    record = inherited_record(opened.path)
    facts = {
        "kind": opened.kind,
        "site_ids": opened.site_ids,
        "classes": opened.classes,
        "units": opened.units,
        "image_sizes": opened.network.image_sizes,
        "recording": opened.recording,
        "torch": torch.__version__,
        "seen": record_facts(record),
    }
    return {
        NETWORK: content.getvalue(),
        FACTS: json.dumps(facts, indent=1).encode(),
        PROGRAM: Path(predictor.__file__).read_bytes(),
        SEEN_FILE: record.content(),
    }


def _exported(opened: ImagePredictor, images: list[torch.Tensor]) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("images", min=1, max=4096)
    try:
        with torch.no_grad():
            shapes = ([{0: batch} for _ in images],)
            return torch.export.export(opened.network, (images,), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises many kinds
        reason = str(error).splitlines()[0][:200]
        raise BadInput(
            f"--format predictor: torch.export cannot export {opened.path} ({type(error).__name__}: {reason}); use "
            "spiketune.load instead"
        ) from None
