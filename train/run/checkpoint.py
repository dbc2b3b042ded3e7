"""Checkpoints that do not depend on the number of processes or the strategy: safetensors and JSON.

    checkpoints/step_N/network.safetensors      the network that was scored: weights, BatchNorm statistics, mean and
                                                standard deviation of each site
    checkpoints/step_N/training.safetensors     the weights in training, if those above are their running average
    checkpoints/step_N/optimizer.safetensors    `<parameter>|<key>`, e.g. `heads.rates.sites.weight|exp_avg`
    checkpoints/step_N/statistics.safetensors   `<file>|<name>`: BatchNorm statistics of each rank, within an epoch
    checkpoints/step_N/progress.json            how far the run has come, and what the network predicts
    checkpoints/step_N/sha256.json              checksums of the files above
    checkpoints/{last,best} -> step_N

A checkpoint is written under a temporary name and renamed when it is complete. One of the same step that is already
there exchanges names with it, so there is a complete one at any moment; where the file system cannot exchange names, it
is `.step_N.old` meanwhile, and a run that was killed then finds it when it resumes. The links `last` and `best` are
replaced atomically. The checksums reveal later damage on disk: a run resumes from the newest intact checkpoint.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data_prep.common.atomic_writes import exchange
from data_prep.common.errors import BadInput
from data_prep.common.safe_reading import parse_json, read_regular_file
from data_prep.common.validation_messages import first_fault
from train.run.progress import Progress

CHECKSUMS = "sha256.json"
_FILE = re.compile(r"[a-z]+\.(safetensors|json)")  # the names of a checkpoint's files
_CHECKPOINT = re.compile(r"step_([0-9]+)")

TensorFiles = Mapping[str, Mapping[str, torch.Tensor]]  # by name of the file (without .safetensors) and of the tensor


# ------------------------------------------------------------------------------------------------------------ saving


def save_checkpoint(folder: Path, tensors: TensorFiles, progress: Progress, keep: int) -> None:
    """Write checkpoint `step_N`, make it `last`, and `best` if it is; remove old ones.

    Args:
        folder: RUN/checkpoints.
        tensors: of the files network, optimizer, training and statistics; a file without tensors is not written.
        progress: of the run.
        keep: number of recent checkpoints to keep; the one that was the best at each of them is kept too.

    Raises:
        OSError: it cannot be written; earlier checkpoints are unchanged.
    """
    folder.mkdir(exist_ok=True)
    target, temporary = folder / f"step_{progress.step}", folder / f".step_{progress.step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write(temporary, tensors, progress)
        _put_in_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _link(folder / "last", target.name)
    if progress.best_step == progress.step:
        _link(folder / "best", target.name)
    _remove_old(folder, keep)


def _put_in_place(new: Path, target: Path) -> None:
    """Give a checkpoint its name; an earlier one of that name is removed, here or with the temporary name."""
    if not target.exists():
        new.rename(target)
    elif not exchange(new, target):
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        new.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def restore_checkpoints(folder: Path) -> None:
    """Give back their names to checkpoints that were being replaced when the run was killed.

    Args:
        folder: RUN/checkpoints.
    """
    for old in folder.glob(".step_*.old"):
        target = folder / old.name.removeprefix(".").removesuffix(".old")
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(target)


def _write(folder: Path, tensors: TensorFiles, progress: Progress) -> None:
    folder.mkdir()
    for name, content in tensors.items():
        if content:
            on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in content.items()}
            save_file(on_cpu, folder / f"{name}.safetensors")
    (folder / "progress.json").write_text(progress.model_dump_json(indent=1))
    checksums = {file.name: checksum(file) for file in sorted(folder.iterdir())}
    (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=1))
    for file in folder.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _link(link: Path, target: str) -> None:
    """Point a link at `target`, atomically."""
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)


def _remove_old(folder: Path, keep: int) -> None:
    recent = _newest_first(folder)[:keep]
    needed = {checkpoint.name for checkpoint in recent}
    for checkpoint in recent:
        with contextlib.suppress(BadInput):  # damaged: no run resumes from it
            needed.add(f"step_{load_progress(checkpoint).best_step}")
    for checkpoint in _newest_first(folder):
        if checkpoint.name not in needed:
            shutil.rmtree(checkpoint, ignore_errors=True)


def remove_newer(folder: Path, progress: Progress) -> None:
    """Remove the checkpoints after the one that a run resumes from; they are damaged."""
    for checkpoint in _newest_first(folder):
        if _step_of(checkpoint) > progress.step:
            shutil.rmtree(checkpoint, ignore_errors=True)
    _link(folder / "last", f"step_{progress.step}")
    if progress.best is not None:
        _link(folder / "best", f"step_{progress.best_step}")


# ----------------------------------------------------------------------------------------------------------- finding


def _newest_first(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step_*") if _step_of(path) >= 0), key=_step_of, reverse=True)


def _step_of(checkpoint: Path) -> int:
    """The step that a checkpoint is named after; -1 for any other name."""
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def resolve_checkpoint(folder: Path, which: str) -> Path:
    """The checkpoint that `last` or `best` points to now; a run in progress may change the link at any time.

    Args:
        folder: RUN/checkpoints.
        which: "last" or "best".

    Raises:
        BadInput: the link points elsewhere.
    """
    link = folder / which
    if not link.is_symlink():
        return link
    target = os.readlink(link)
    if not _CHECKPOINT.fullmatch(target):
        raise BadInput(f"{link} points to {target}; it must point to a checkpoint beside it, such as step_100")
    return folder / target


def newest_intact(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are intact, or None; and what is wrong with each newer one.

    Args:
        folder: RUN/checkpoints.
    """
    faults = []
    for checkpoint in _newest_first(folder):
        try:
            for file in _checksums(checkpoint):
                _check_intact(checkpoint / file)
        except BadInput as fault:
            faults.append(str(fault))
        else:
            return checkpoint, faults
    return None, faults


def _checksums(checkpoint: Path) -> dict[str, str]:
    try:
        checksums = parse_json(read_regular_file(checkpoint / CHECKSUMS))
        if not isinstance(checksums, dict) or not all(_FILE.fullmatch(file) for file in checksums):
            raise ValueError("it must contain the checksum of each file beside it")
    except (OSError, ValueError) as error:
        raise BadInput(f"{checkpoint} is not a complete checkpoint ({CHECKSUMS}: {error})") from None
    return checksums


def network_checksum(checkpoint: Path) -> str:
    """SHA-256 of a checkpoint's network, as it was written.

    Raises:
        BadInput: the checkpoint is not complete.
    """
    return str(_checksums(checkpoint).get("network.safetensors", ""))


def _check_intact(path: Path) -> None:
    """Refuse a file that has changed since it was written.

    Raises:
        BadInput: naming it.
    """
    expected = _checksums(path.parent).get(path.name)
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait forever
            raise BadInput(f"{path} is not a regular file")
        intact = checksum(path) == expected
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror})") from None
    if not intact:
        raise BadInput(f"{path} is damaged: its content is not what was written")


# ----------------------------------------------------------------------------------------------------------- loading


def load_progress(checkpoint: Path) -> Progress:
    """The progress of the run when a checkpoint was saved.

    Raises:
        BadInput: there is no checkpoint, or it is damaged.
    """
    path = checkpoint / "progress.json"
    try:
        content = read_regular_file(path)
        progress = Progress.model_validate_json(content)
        parse_json(content)  # refuses what pydantic lets pass, such as numbers of 400 digits
    except OSError:
        raise BadInput(
            f"{checkpoint} is not a checkpoint (no progress.json); has the run completed an epoch?"
        ) from None
    except ValidationError as error:
        raise BadInput(f"{path} is damaged ({first_fault(error)})") from None
    except ValueError as error:
        raise BadInput(f"{path} is damaged ({error})") from None
    return progress


def load_tensors(checkpoint: Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors of one file of a checkpoint: network, training, optimizer or statistics.

    Raises:
        BadInput: the file is missing or damaged.
    """
    path = checkpoint / f"{name}.safetensors"
    _check_intact(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path} cannot be read ({error})") from None


def load_matching_tensors(
    network: torch.nn.Module, checkpoint: Path, name: str, rows: slice = slice(None)
) -> dict[str, torch.Tensor]:
    """The tensors of network or training, checked to be exactly those of a network, in the same shapes.

    Args:
        network: will load them.
        checkpoint: its folder.
        name: of the file.
        rows: for a network of a single recording of the run, the outputs for its sites. Tensors with a row per site,
            whose shape differs in that network, are cut to these rows.

    Raises:
        BadInput: the checkpoint is of another network, or contains NaN or infinity.
    """
    expected = network.state_dict()
    tensors = load_tensors(checkpoint, name)
    for key in expected.keys() & tensors.keys():
        if tensors[key].ndim and tensors[key].shape != expected[key].shape:
            tensors[key] = tensors[key][rows]
    different = [key for key in expected | tensors if _shape(expected, key) != _shape(tensors, key)]
    if different:
        more = len(different) - 1
        raise BadInput(f"{checkpoint} is a checkpoint of another network: {different[0]} differs, and {more} more")
    not_finite = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if not_finite:
        path, more = checkpoint / f"{name}.safetensors", len(not_finite) - 1
        raise BadInput(f"{path}: {not_finite[0]} contains NaN or infinity, and {more} more do")
    return tensors


def _shape(tensors: Mapping[str, torch.Tensor], name: str) -> tuple[torch.Size, bool] | None:
    """The shape of a tensor and whether it is floating-point; None if there is no such tensor."""
    return (tensors[name].shape, tensors[name].is_floating_point()) if name in tensors else None
