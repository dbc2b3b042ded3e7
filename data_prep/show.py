"""Print what a shard folder holds, and draw a contact sheet of its images.

python data_prep/show.py DIR [--index] [--verify] [--contact-sheet PNG]
python data_prep/show.py URL [--verify] [--contact-sheet PNG] [--shard-cache DIR]
"""

import io
import sys
from pathlib import Path

import numpy as np
import tyro
from pydantic import BaseModel, ConfigDict, Field

from data_prep.common.atomic_writes import write_bytes
from data_prep.common.command_line import parse
from data_prep.common.errors import BadInput, CannotWrite, run_command
from data_prep.common.option_fields import Place
from data_prep.common.progress import Progress
from data_prep.remote.cache import FetchSettings
from data_prep.shards.folder import ShardFolder
from data_prep.shards.reindexing import reindex
from data_prep.shards.summary import contact_sheet, summary

EXAMPLES = (
    "data/it",
    "data/it --verify --contact-sheet sheet.png",
)


class Show(BaseModel):
    """Print what a shard folder holds, and draw a contact sheet of its images."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    folder: tyro.conf.Positional[Place]
    """A shard folder made by data_prep/pack.py, or its URL, or a folder of tars that others wrote."""
    index: bool = False
    """Read the tars anew and write the tables beside them, on this machine only. Not needed for tars of others: that
    happens when they have changed."""
    verify: bool = False
    """Rehash every shard and compare it with the manifest and the index. Remote shards of which there is no verified
    copy are fetched."""
    contact_sheet: Path | None = None
    """Where to put the contact sheet; by default contact_sheet.png in the folder, of a URL in the working folder."""
    shard_cache: Path | None = None
    """Of remote shards: folder for copies; by default in ~/.cache."""
    shard_cache_gib: float | None = Field(None, gt=0, le=1e6)
    """Of remote shards: the most that is kept in that folder; by default half of what is free on its disk."""


def _verify(folder: ShardFolder) -> None:
    shards = [shard for split in folder.manifest.splits.values() for shard in split.shards]
    faults = []
    with Progress(len(shards), "verifying", "shards") as progress:
        for shard, fault in folder.verify():
            progress.advance()
            if fault:
                faults.append(f"{folder.folder / shard.file}: {fault}")
    for fault in faults:
        print(f"damaged: {fault}", file=sys.stderr)
    if faults:
        raise BadInput(f"{len(faults)} of {len(shards)} shards of {folder.folder} are damaged; copy or pack them again")
    print(f"verified: all {len(shards)} shards are as they were packed")


def _draw_contact_sheet(folder: ShardFolder, path: Path) -> None:
    name = next(iter(folder.manifest.splits))
    split, what = folder.split(name), f"the {name} split"
    positions = np.arange(len(split))
    if folder.is_remote:  # images of all shards would be the whole split
        positions, what = positions[split.shards_of(positions) == 0], f"{split.shards[0].file}"
    if not path.parent.is_dir():
        raise BadInput(f"{path} cannot be written (there is no such folder); choose another --contact-sheet")
    content = io.BytesIO()
    contact_sheet(split, among=positions).save(content, format="PNG")
    try:
        write_bytes(path, content.getvalue())
    except CannotWrite as error:
        raise BadInput(f"{error}; choose another --contact-sheet") from None
    print(f"  contact sheet of {what}: {path}")


def main() -> None:
    """Parse the command line, print, draw and verify."""
    options = parse(Show, examples=EXAMPLES)
    if options.index:
        reindex(options.folder)
    folder = ShardFolder(options.folder, FetchSettings(options.shard_cache, options.shard_cache_gib))
    print(summary(folder))
    if options.verify:
        _verify(folder)
    beside = Path() if folder.is_remote else folder.folder
    _draw_contact_sheet(folder, options.contact_sheet or beside / "contact_sheet.png")


if __name__ == "__main__":
    run_command(main)
