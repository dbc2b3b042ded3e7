"""Read new recordings with what the sites of others have learned to read from a network.

bash launch/foundation.sh DATA [DATA ...] --new DIR [DIR ...] --out RUNS [--compare] [-n N]

Run the same command again to go on where it was stopped, or with more --new.
"""

from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field

from data_prep.common.command_line import parse
from data_prep.common.errors import run_command
from data_prep.common.markdown import tables_as_columns

EXAMPLES = (
    "data/monkey_a data/monkey_b --new data/monkey_c --out runs/foundation --compare",
    "data/sessions/* --new data/today --networks tf_efficientnet_lite0 tf_efficientnet_lite1 --out runs/stacked",
    "data/sessions/* --out runs/foundation --licence CC-BY-4.0",
)
BEST = Path(__file__).parent / "recipes" / "probes" / "best.yaml"


class FoundationCommand(BaseModel):
    """Probe recordings, make a population of their sites, and read new recordings together with it.

    Run the same command again to go on where it was stopped, or with more --new.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    data: Annotated[list[str], tyro.conf.Positional] = Field(min_length=1, max_length=1000)
    """Shard folders of the recordings whose sites make the population, or their URLs."""
    out: Path
    """Folder to create or continue; the population is RUNS/population."""
    new: list[str] = Field([], max_length=1000)
    """Shard folders of the recordings to read with the population, or their URLs; other images than those of DATA."""
    compare: bool = False
    """Also read the new recordings without the population, for the table."""
    recipe: Path = BEST
    """Of all probes: one layer, whose modules are read together."""
    networks: list[str] = Field([], max_length=100)
    """Networks to read instead of the recipe's, by their timm names; probes of several are stacked."""
    rounds: int = Field(2, ge=1, le=2)
    """How often each of DATA is read: alone, and once more with the sites of the others."""
    split: Literal["val", "test"] = "val"
    """Stimuli to score; the probes are fitted on train."""
    licence: str | None = Field(None, min_length=1, max_length=1000)
    """Under which DATA, and so what is derived from them, may be handed on; for the population's card."""
    processes: Annotated[int | None, tyro.conf.arg(aliases=("-n",))] = Field(None, ge=1, le=1024)
    """Processes per probe; by default one per GPU, or one without GPUs."""


def main() -> None:
    """Parse, check, probe, make the population, read the new recordings."""
    options = parse(FoundationCommand, examples=EXAMPLES)

    from train.sweeping.foundation import Foundation, FoundationOptions
    from train.sweeping.queue_worker import StopRequest

    settings = FoundationOptions(
        data=options.data,
        new=options.new,
        out=options.out,
        recipe=options.recipe,
        networks=options.networks,
        rounds=options.rounds,
        split=options.split,
        compare=options.compare,
        licence=options.licence,
        processes=options.processes,
    )
    with StopRequest() as stop:
        print(f"\n{tables_as_columns(Foundation(settings, stop).run())}")


if __name__ == "__main__":
    run_command(main)
