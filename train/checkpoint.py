"""Checkpoints that know nothing of ranks or strategies: safetensors and JSON.

    checkpoints/step_N/network.safetensors      the network that was scored: weights, BatchNorm statistics, each site's
                                                mean and standard deviation
    checkpoints/step_N/training.safetensors     the trained weights, where those above are their running average
    checkpoints/step_N/optimizer.safetensors    `<parameter>|<key>`, e.g. `heads.rates.sites.weight|exp_avg`
    checkpoints/step_N/progress.json            where the run stands, and what the network predicts
    checkpoints/{last,best} -> step_N

A checkpoint is written under a temporary name and renamed when it is whole; `last` and `best` are links that are
replaced in one go. So `last` names a whole checkpoint at any moment.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data_prep.errors import BadInput
from data_prep.manifest import Manifest


class Progress(BaseModel):
    """Where a run stands.

    Attributes:
        epoch: epochs completed.
        step: optimizer steps done.
        best: best value of the selection metric so far, and the epoch it was reached in (counted from 1).
        improved: for each epoch, whether it was the best until then.
        recording: fingerprint of the shards, see `data_prep.manifest.Manifest.fingerprint`.
        selection_metric, selection_split: what chooses the best epoch, and on which stimuli.
        site_ids: of the outputs, in order.
        classes: of the outputs, in order, or None.
        image_size: side in pixels of the pictures the network was trained on.
    """

    model_config = ConfigDict(extra="forbid")

    epoch: int = 0
    step: int = 0
    best: float | None = None
    best_epoch: int = 0
    improved: list[bool] = []
    recording: str
    selection_metric: str
    selection_split: str
    site_ids: list[str]
    classes: list[str] | None
    image_size: int

    @property
    def epochs_without_improvement(self) -> int:
        """In a row, up to now."""
        return self.epoch - self.best_epoch

    def check_fits(self, manifest: Manifest, where: str) -> None:
        """Refuse data with other sites or classes than the network predicts.

        Raises:
            BadInput: naming the first that differs.
        """
        for what, ours, theirs in (
            ("site", self.site_ids, manifest.site_ids),
            ("class", self.classes, manifest.classes),
        ):
            if ours is None or ours == theirs:
                continue
            pairs = zip(ours, theirs or [], strict=False)
            first = next(
                (f"{a!r} is {b!r} there" for a, b in pairs if a != b), f"{len(ours)} against {len(theirs or [])}"
            )
            raise BadInput(f"{where}: its {what} list is not the one the network was trained for: {first}")


def save_checkpoint(folder: Path, tensors: dict[str, dict[str, torch.Tensor]], progress: Progress, best: bool) -> None:
    """Write checkpoint `step_N`, make it `last` (and `best`), and remove those that neither names any more.

    Args:
        folder: RUN/checkpoints.
        tensors: by file ("network", "optimizer", "training") and name.
        progress: of the run.
        best: whether this is the best so far.
    """
    folder.mkdir(exist_ok=True)
    target, temporary = folder / f"step_{progress.step}", folder / f".step_{progress.step}.tmp"
    for leftover in (target, temporary):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    for name, content in tensors.items():
        save_file(_plain(content), temporary / f"{name}.safetensors")
    (temporary / "progress.json").write_text(progress.model_dump_json(indent=1))
    for file in temporary.iterdir():
        _sync(file)
    temporary.rename(target)
    for name in ("last", "best") if best else ("last",):
        _point(folder / name, target.name)
    kept = {os.readlink(folder / name) for name in ("last", "best") if (folder / name).is_symlink()}
    for old in folder.glob("step_*"):
        if old.name not in kept:
            shutil.rmtree(old, ignore_errors=True)


def _plain(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _point(link: Path, target: str) -> None:
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)


def load_progress(checkpoint: Path) -> Progress:
    """What a checkpoint says of its run.

    Raises:
        BadInput: there is no checkpoint, or it is damaged.
    """
    path = checkpoint / "progress.json"
    try:
        return Progress.model_validate_json(path.read_bytes())
    except OSError:
        raise BadInput(f"{checkpoint} is no checkpoint (no progress.json); did the run complete an epoch?") from None
    except ValidationError as error:
        raise BadInput(f"{path} is damaged ({error.errors()[0]['msg']})") from None


def load_tensors(checkpoint: Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors of "network", "training" or "optimizer".

    Raises:
        BadInput: the file is missing or damaged.
    """
    path = checkpoint / f"{name}.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path} cannot be read ({error})") from None


def checked_tensors(network: torch.nn.Module, checkpoint: Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors of "network" or "training" that fit a network: every one is there in its shape, and no other.

    Raises:
        BadInput: the checkpoint is of another network.
    """
    tensors = load_tensors(checkpoint, name)
    expected = network.state_dict()
    odd = [key for key in {**expected, **tensors} if _shape(expected, key) != _shape(tensors, key)]
    if odd:
        raise BadInput(f"{checkpoint} is a checkpoint of another network: {odd[0]} differs, and {len(odd) - 1} more")
    return tensors


def _shape(tensors: dict[str, torch.Tensor], name: str) -> Any:
    return tensors[name].shape if name in tensors else None
