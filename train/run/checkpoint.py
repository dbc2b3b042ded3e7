"""Checkpoints that know nothing of ranks or strategies: safetensors and JSON.

    checkpoints/step_N/network.safetensors      the network that was scored: weights, BatchNorm statistics, each site's
                                                mean and standard deviation
    checkpoints/step_N/training.safetensors     the trained weights, where those above are their running average
    checkpoints/step_N/optimizer.safetensors    `<parameter>|<key>`, e.g. `heads.rates.sites.weight|exp_avg`
    checkpoints/step_N/statistics.safetensors   `<file>|<name>`: BatchNorm's statistics of each rank, in mid-epoch
    checkpoints/step_N/progress.json            where the run stands, and what the network predicts
    checkpoints/step_N/sha256.json              of the files above
    checkpoints/{last,best} -> step_N

A checkpoint is written under a temporary name and renamed when it is whole; `last` and `best` are links that are
replaced in one go. What the disk does to it later, the sums find out: a run goes on from the newest whole checkpoint.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data_prep.common.errors import BadInput
from data_prep.common.safe_reading import parse_json, read_regular_file
from data_prep.shards.manifest import LARGEST_SIDE, Manifest, Name

SUMS = "sha256.json"
_FILE = re.compile(r"[a-z]+\.(safetensors|json)")  # what a checkpoint consists of
_CHECKPOINT = re.compile(r"step_[0-9]+")


class Progress(BaseModel):
    """Where a run stands.

    Attributes:
        epoch: epochs completed.
        step: optimizer steps done.
        losses: of the epoch under way, the sum over its steps so far of each rank's part; empty between epochs.
        left_out: steps of the epoch under way whose loss or gradient was not finite.
        best: best value of the selection metric so far, and the epoch (counted from 1; 0 is the start) and step that it
            was reached in.
        improved: for each epoch, whether it was the best until then.
        recording: fingerprint of the shards, see `data_prep.shards.manifest.Manifest.fingerprint`.
        selection_metric, selection_split: what chooses the best epoch, and on which stimuli.
        site_ids: of the outputs, in order.
        recordings: by name, how many of the outputs are its sites, in order; checkpoints of earlier versions have none.
        classes: of the outputs, in order, or None.
        image_size: side in pixels of the images the network was trained on.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    epoch: int = Field(0, ge=0)
    step: int = Field(0, ge=0)
    losses: list[float] = []
    left_out: int = Field(0, ge=0)
    best: float | None = None
    best_epoch: int = Field(0, ge=0)
    best_step: int = Field(0, ge=0)
    improved: list[bool] = []
    recording: str
    selection_metric: str
    selection_split: str
    site_ids: list[Name]
    recordings: dict[Name, Annotated[int, Field(ge=0)]] = {}
    classes: list[Name] | None
    image_size: int = Field(ge=1, le=LARGEST_SIDE)

    @property
    def epochs_without_improvement(self) -> int:
        """In a row, up to now."""
        return self.epoch - self.best_epoch

    @property
    def is_of_several(self) -> bool:
        """Whether it was trained on several recordings."""
        return len(self.recordings) > 1

    def rows_of(self, recording: str, where: str) -> slice:
        """Which of the outputs are a recording's sites.

        Args:
            recording: its name.
            where: who asks for it, for the message.

        Raises:
            BadInput: the run was not trained on it.
        """
        if recording not in self.recordings:
            raise BadInput(
                f"{where}: the run was not trained on a recording {recording!r}, but on {', '.join(self.recordings)}"
            )
        names, sites = list(self.recordings), list(self.recordings.values())
        first = sum(sites[: names.index(recording)])
        return slice(first, first + self.recordings[recording])

    def of(self, recording: str, where: str) -> "Progress":
        """The same, as if it had been trained on one of its recordings alone; arguments as of `rows_of`."""
        site_ids = self.site_ids[self.rows_of(recording, where)]
        return self.model_copy(update={"site_ids": site_ids, "recordings": {recording: len(site_ids)}})

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


Tensors = Mapping[str, Mapping[str, torch.Tensor]]  # by file and name


def save_checkpoint(folder: Path, tensors: Tensors, progress: Progress, keep: int) -> None:
    """Write checkpoint `step_N` and make it `last`, and `best` if it is; remove old ones.

    Args:
        folder: RUN/checkpoints.
        tensors: by file ("network", "optimizer", "training", "statistics") and name; a file without any is not written.
        progress: of the run.
        keep: how many of the last to keep, beside the best of each.

    Raises:
        OSError: it cannot be written; the checkpoints before are untouched.
    """
    folder.mkdir(exist_ok=True)
    target, temporary = _folder_of(folder, progress.step), folder / f".step_{progress.step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write(temporary, tensors, progress)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _point(folder / "last", target.name)
    if progress.best_step == progress.step:
        _point(folder / "best", target.name)
    _remove_old(folder, keep)


def _write(folder: Path, tensors: Tensors, progress: Progress) -> None:
    folder.mkdir()
    for name, content in tensors.items():
        if content:
            plain = {key: tensor.detach().cpu().contiguous() for key, tensor in content.items()}
            save_file(plain, folder / f"{name}.safetensors")
    (folder / "progress.json").write_text(progress.model_dump_json(indent=1))
    (folder / SUMS).write_text(json.dumps({file.name: _sum(file) for file in sorted(folder.iterdir())}, indent=1))
    for file in folder.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _point(link: Path, target: str) -> None:
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)


def _folder_of(folder: Path, step: int) -> Path:
    return folder / f"step_{step}"


def _newest_first(folder: Path) -> list[Path]:
    found = (path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdigit())
    return sorted(found, key=lambda path: -int(path.name.removeprefix("step_")))


def _remove_old(folder: Path, keep: int) -> None:
    last = _newest_first(folder)[:keep]
    kept = {checkpoint.name for checkpoint in last}
    for checkpoint in last:
        with contextlib.suppress(BadInput):  # damaged: no run goes on from there
            kept.add(f"step_{load_progress(checkpoint).best_step}")
    for old in _newest_first(folder):
        if old.name not in kept:
            shutil.rmtree(old, ignore_errors=True)


def current(folder: Path, which: str) -> Path:
    """The checkpoint that `last` or `best` is now: a run in progress may make it another one the next moment.

    Args:
        folder: RUN/checkpoints.
        which: "last" or "best".

    Raises:
        BadInput: a link that leads elsewhere.
    """
    link = folder / which
    if not link.is_symlink():
        return link
    if not _CHECKPOINT.fullmatch(target := os.readlink(link)):
        raise BadInput(f"{link} leads to {target}; it must lead to a checkpoint beside it, such as step_100")
    return folder / target


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, and a sentence for each newer one that is damaged.

    Args:
        folder: RUN/checkpoints.

    Returns:
        The newest one whose files are what was written; None where there is none.
    """
    faults = []
    for checkpoint in _newest_first(folder):
        try:
            for file in _sums(checkpoint):
                _check(checkpoint / file)
        except BadInput as fault:
            faults.append(str(fault))
        else:
            return checkpoint, faults
    return None, faults


def forget_newer(folder: Path, progress: Progress) -> None:
    """Remove the checkpoints after the one that a run goes on from, which are damaged."""
    for checkpoint in _newest_first(folder):
        if int(checkpoint.name.removeprefix("step_")) > progress.step:
            shutil.rmtree(checkpoint, ignore_errors=True)
    _point(folder / "last", f"step_{progress.step}")
    if progress.best is not None:
        _point(folder / "best", f"step_{progress.best_step}")


def _sums(checkpoint: Path) -> dict[str, str]:
    try:
        sums = parse_json(read_regular_file(checkpoint / SUMS))
        if not isinstance(sums, dict) or not all(_FILE.fullmatch(file) for file in sums):
            raise ValueError("it must tell the hash of each file beside it")
    except (OSError, ValueError) as error:
        raise BadInput(f"{checkpoint} is no whole checkpoint ({SUMS}: {error})") from None
    return sums


def _check(path: Path) -> None:
    """Refuse a file that is not what was written.

    Raises:
        BadInput: naming it.
    """
    expected = _sums(path.parent).get(path.name)
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise BadInput(f"{path} is no regular file")
        same = _sum(path) == expected
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror})") from None
    if not same:
        raise BadInput(f"{path} is damaged: its content is not what was written")


def load_progress(checkpoint: Path) -> Progress:
    """What a checkpoint says of its run.

    Raises:
        BadInput: there is no checkpoint, or it is damaged.
    """
    path = checkpoint / "progress.json"
    try:
        return Progress.model_validate_json(read_regular_file(path))
    except OSError:
        raise BadInput(f"{checkpoint} is no checkpoint (no progress.json); did the run complete an epoch?") from None
    except ValidationError as error:
        fault = error.errors()[0]
        raise BadInput(f"{path} is damaged ({'.'.join(map(str, fault['loc']))}: {fault['msg']})") from None
    except ValueError as error:
        raise BadInput(f"{path} is damaged ({error})") from None


def load_tensors(checkpoint: Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors of "network", "training", "optimizer" or "statistics".

    Raises:
        BadInput: the file is missing or damaged.
    """
    path = checkpoint / f"{name}.safetensors"
    _check(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path} cannot be read ({error})") from None


def checked_tensors(
    network: torch.nn.Module, checkpoint: Path, name: str, rows: slice = slice(None)
) -> dict[str, torch.Tensor]:
    """The tensors of "network" or "training" that fit a network: every one is there in its shape, and no other.

    Args:
        network: to give them to.
        checkpoint: folder.
        name: of the file.
        rows: for a network of one of a run's recordings, which outputs are its sites. Whatever has a row per site (and
            hence another shape in that network) is cut to these.

    Raises:
        BadInput: the checkpoint is of another network, or holds what is no number.
    """
    expected = network.state_dict()
    tensors = load_tensors(checkpoint, name)
    for key in expected.keys() & tensors.keys():
        if tensors[key].ndim and tensors[key].shape != expected[key].shape:
            tensors[key] = tensors[key][rows]
    odd = [key for key in {**expected, **tensors} if _shape(expected, key) != _shape(tensors, key)]
    if odd:
        raise BadInput(f"{checkpoint} is a checkpoint of another network: {odd[0]} differs, and {len(odd) - 1} more")
    if odd := [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise BadInput(f"{checkpoint / name}.safetensors: {odd[0]} holds NaN or infinity, and {len(odd) - 1} more do")
    return tensors


def _shape(tensors: dict[str, torch.Tensor], name: str) -> Any:
    return (tensors[name].shape, tensors[name].is_floating_point()) if name in tensors else None
