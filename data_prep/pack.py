"""Pack a recording into a folder of WebDataset shards.

    python data_prep/pack.py {simulated,folder,it-h5,brainio,nwb,tvsd,cowley2023,mbs-h5,joined} [SOURCE] --out DIR [...]

`python data_prep/pack.py folder --help` lists the options of a source.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import Field

from data_prep.common.command_line import parse
from data_prep.common.errors import run_command
from data_prep.common.worker_processes import usable_cores
from data_prep.shards.image_rules import ImageRules
from data_prep.sources.brainio import Brainio
from data_prep.sources.cowley2023 import Cowley2023
from data_prep.sources.folder import Folder
from data_prep.sources.it_h5 import ItH5
from data_prep.sources.joined import Joined
from data_prep.sources.mbs_h5 import MbsH5
from data_prep.sources.nwb import Nwb
from data_prep.sources.simulated import Simulated
from data_prep.sources.tvsd import Tvsd
from data_prep.split_options import SplitOptions

EXAMPLES = (
    "folder my_recording --out data/mine",
    "simulated --out data/simulated --stimuli 1000 --sites 50",
)


class Pack(SplitOptions, ImageRules):
    """Pack a recording into a folder of WebDataset shards."""

    source: (
        Annotated[Simulated, tyro.conf.subcommand("simulated")]
        | Annotated[Folder, tyro.conf.subcommand("folder")]
        | Annotated[ItH5, tyro.conf.subcommand("it-h5")]
        | Annotated[Brainio, tyro.conf.subcommand("brainio")]
        | Annotated[Nwb, tyro.conf.subcommand("nwb")]
        | Annotated[Tvsd, tyro.conf.subcommand("tvsd")]
        | Annotated[Cowley2023, tyro.conf.subcommand("cowley2023")]
        | Annotated[MbsH5, tyro.conf.subcommand("mbs-h5")]
        | Annotated[Joined, tyro.conf.subcommand("joined")]
    )
    out: Path
    """The shard folder to create; it must not exist yet."""
    stimuli_per_shard: int = Field(256, ge=1, le=1_000_000)
    """Stimuli in one tar file."""
    workers: int = Field(default_factory=usable_cores, ge=1, le=1024)
    """Processes that read, encode and write; by default one for each core that this process may use."""


def parse_options(words: Sequence[str] | None = None) -> Pack:
    """The options in the words of a command line, by default those of this process."""
    return parse(Pack, words, examples=EXAMPLES)


def main() -> None:
    """Parse the command line, pack, and print what was packed."""
    options = parse_options()
    from data_prep.shards.packing import pack
    from data_prep.shards.summary import summary

    recording = options.open_recording(options.source)
    folder = pack(recording, options.out, options.stimuli_per_shard, options.workers, options.image_rules())
    print(summary(folder))


if __name__ == "__main__":
    run_command(main)
