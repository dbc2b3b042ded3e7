"""A new folder that appears complete or not at all.

It is filled under a hidden name beside the target and renamed at the end. A killed process leaves at most the hidden
folder, which the next process with the same target removes.
"""

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.common import locks
from data_prep.common.errors import BadInput


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that becomes `out` if the block succeeds and is removed if it fails.

    Raises:
        BadInput: `out` exists, cannot be created, or is being created by another process.
    """
    if out.exists():
        raise BadInput(f"{out} already exists; choose another --out, or remove it to pack again")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        hidden, lock = _create_hidden(out)
    except OSError as error:
        raise BadInput(f"{out} cannot be created ({error.strerror}); choose another --out") from None
    try:
        yield hidden
        hidden.chmod(0o755)
        try:
            hidden.rename(out)
        except OSError:
            raise BadInput(f"{out} was created by another process meanwhile; choose another --out") from None
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        os.close(lock)


def _create_hidden(out: Path) -> tuple[Path, int]:
    """A hidden folder and the descriptor of its lock, which distinguishes it from the leftover of a dead process."""
    with locks.exclusive(out.parent):  # or another process could take a folder that is not locked yet for a leftover
        _remove_leftovers(out)
        hidden = Path(tempfile.mkdtemp(prefix=f".{out.name}.packing-", dir=out.parent))
        descriptor = locks.open_lock(hidden)
        locks.lock(descriptor)
        return hidden, descriptor


def _remove_leftovers(out: Path) -> None:
    for leftover in out.parent.glob(f".{glob.escape(out.name)}.packing-*"):
        try:
            in_use = locks.is_locked(leftover)
        except FileNotFoundError:  # just finished or removed
            continue
        if in_use:
            raise BadInput(f"another process is packing to {out}; wait for it, or choose another --out")
        shutil.rmtree(leftover, ignore_errors=True)
