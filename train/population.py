"""Make a population of probes of several recordings: what their sites read, with which a new recording is read.

python train/population.py PROBE [PROBE ...] --out DIR
"""

from pathlib import Path
from typing import Annotated

import tyro
from pydantic import BaseModel, ConfigDict, Field

from data_prep.common.command_line import parse
from data_prep.common.errors import run_command

EXAMPLES = (
    "runs/monkey_a runs/monkey_b --out runs/population",
    "runs/probes/* --out runs/population --licence CC-BY-4.0",
)


class PopulationCommand(BaseModel):
    """Make a population of probes of several recordings: what their sites read, with which a new recording is read.

    The probes must read the same modules of the same network at the same image size. train/probe.py --population DIR
    reads a new recording with it.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    probes: Annotated[list[Path], tyro.conf.Positional] = Field(min_length=1, max_length=1000)
    """Folders that train/probe.py made, one for each recording."""
    out: Path
    """Folder to create."""
    licence: str | None = Field(None, min_length=1, max_length=1000)
    """Under which the recordings, and so what is derived from them, may be handed on; for the card."""


def main() -> None:
    """Parse, check, write."""
    options = parse(PopulationCommand, examples=EXAMPLES)

    from train.probing.population_making import make_population

    facts = make_population(options.probes, options.out, options.licence)
    print(f"{options.out}: {facts.sites:,} sites of {len(facts.recordings)} recordings")


if __name__ == "__main__":
    run_command(main)
