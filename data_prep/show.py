"""Print what a shard folder holds, and draw a contact sheet of its pictures.

python data_prep/show.py DIR [--index] [--verify] [--contact-sheet PNG]
"""

import sys
from pathlib import Path

import tyro
from pydantic import BaseModel, ConfigDict

from data_prep.command_line import parse
from data_prep.errors import BadInput, run_command
from data_prep.overview import contact_sheet, summary
from data_prep.progress import Progress
from data_prep.shards import ShardFolder, reindex


class Show(BaseModel):
    """Print what a shard folder holds, and draw a contact sheet of its pictures."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    folder: tyro.conf.Positional[Path]
    """A shard folder made by data_prep/pack.py, or a folder of tars that others wrote."""
    index: bool = False
    """Read the tars anew and write the index. Not needed for tars of others: that happens when they have changed."""
    verify: bool = False
    """Rehash every shard and compare it with the manifest and the index."""
    contact_sheet: Path | None = None
    """Where to put the contact sheet; by default contact_sheet.png in the folder."""


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
    split = next(iter(folder.manifest.splits))
    sheet = contact_sheet(folder.split(split))
    try:
        sheet.save(path, format="PNG")
    except OSError as error:
        raise BadInput(f"{path} cannot be written ({error.strerror}); choose another --contact-sheet") from None
    print(f"  contact sheet of the {split} split: {path}")


def main() -> None:
    """Parse the command line, print, draw and verify."""
    options = parse(Show)
    if options.index:
        reindex(options.folder)
    folder = ShardFolder(options.folder)
    print(summary(folder))
    if options.verify:
        _verify(folder)
    _draw_contact_sheet(folder, options.contact_sheet or options.folder / "contact_sheet.png")


if __name__ == "__main__":
    run_command(main)
