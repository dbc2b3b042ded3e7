"""Print a summary of a shard folder, verify it, and draw a contact sheet of its images.

python data_prep/show.py DIR [--index] [--verify] [--near-copies] [--contact-sheet PNG]
python data_prep/show.py URL [--verify] [--contact-sheet PNG] [--shard-cache DIR]
"""

from pathlib import Path

import tyro
from pydantic import BaseModel, ConfigDict, Field

from data_prep.common.command_line import parse
from data_prep.common.errors import run_command
from data_prep.common.option_fields import FolderLocation

EXAMPLES = (
    "data/it",
    "data/it --verify --contact-sheet sheet.png",
)


class Show(BaseModel):
    """Print a summary of a shard folder, and draw a contact sheet of its images."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    folder: tyro.conf.Positional[FolderLocation]
    """A shard folder made by data_prep/pack.py, or its URL, or a local folder of other WebDataset tars."""
    index: bool = False
    """Read the tars again and rewrite the tables beside them; local folders only. Tars that pack.py did not write do
    not need this: they are read again whenever they change."""
    verify: bool = False
    """Rehash every shard and compare it with the manifest and the index. Remote shards that are not in the cache are
    fetched."""
    near_copies: bool = False
    """Look for images that look alike without being the same, such as another file of one photograph, and tell which of
    them are in train and held out."""
    contact_sheet: Path | None = None
    """File for the contact sheet; by default contact_sheet.png in the folder, or in the working folder for a URL."""
    shard_cache: Path | None = None
    """Folder for copies of remote shards; by default in ~/.cache."""
    shard_cache_gib: float | None = Field(None, gt=0, le=1e6)
    """Size limit of these copies in GiB; by default half of the free disk space."""


def main() -> None:
    """Parse the command line, print, verify and draw."""
    options = parse(Show, examples=EXAMPLES)
    from data_prep.remote.cache import FetchSettings
    from data_prep.shards.folder import ShardFolder
    from data_prep.shards.near_copies import near_copies
    from data_prep.shards.reindexing import reindex
    from data_prep.shards.summary import print_verification, summary, write_contact_sheet

    if options.index:
        reindex(options.folder)
    shards = ShardFolder(options.folder, FetchSettings(options.shard_cache, options.shard_cache_gib))
    print(summary(shards))
    if options.verify:
        print_verification(shards)
    if options.near_copies:
        print(near_copies(shards))
    default = Path() if shards.is_remote else Path(options.folder)
    write_contact_sheet(shards, options.contact_sheet or default / "contact_sheet.png")


if __name__ == "__main__":
    run_command(main)
