"""The options of train/plan.py."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from data_prep.common.option_fields import OFTEN_CHANGED, FolderLocation
from train.run.recipe import MOST_RECORDINGS, MOST_STIMULI, ProbeRecipe, Recipe
from train.run.yaml_files import read_yaml

OF_PROBES = "layers"  # the setting that only probes have, and that every recipe of a probe names
MOST_FILES = 100  # of rates


class Plan(Recipe):
    """Estimate what a recipe needs of each GPU under every strategy, and how long it takes; recommend a strategy."""

    gpus: int = Field(ge=1, le=1_000_000)
    """Processes over all machines, each with a GPU of its own (or, by the rates of a machine without GPUs, on its CPU).
    """
    memory: float | None = Field(None, gt=0, le=1e6)
    """Memory of each GPU in GiB; by default that of the machine on which --rates were measured."""
    machines: int = Field(1, ge=1, le=1_000_000)
    """Machines, each with the same number of GPUs."""
    data: Annotated[list[FolderLocation], Field(min_length=1, max_length=MOST_RECORDINGS)] | None = None
    """Shard folder or its URL (or several), for the numbers of stimuli, sites and classes and the size of the images.
    """
    stimuli: int | None = Field(None, ge=2, le=MOST_STIMULI)
    """Training stimuli, where there is no shard folder."""
    sites: int | None = Field(None, ge=1, le=1_000_000)
    """Sites, where there is no shard folder; by default 168."""
    classes: int | None = Field(None, ge=1, le=1_000_000)
    """Classes, where there is no shard folder; by default 64."""
    rates: Annotated[list[Path], Field(min_length=1, max_length=MOST_FILES)] | None = None
    """Files that `launch/check.sh --json FILE` wrote on the machines to be used: also tell how long the run takes."""


class ProbePlan(ProbeRecipe):
    """Estimate the memory and disk space that a probe needs, and how long it takes."""

    gpus: int = Field(1, ge=1, le=1_000_000)
    """Processes over all machines, each with a GPU of its own, or on the CPU."""
    machines: int = Field(1, ge=1, le=1_000_000)
    """Machines, each with the same number of processes."""
    data: FolderLocation | None = None
    """Shard folder or its URL, for the numbers of stimuli and sites and the size of the images."""
    split: Annotated[Literal["val", "test", "cv"], OFTEN_CHANGED] = "val"
    """Stimuli to score, as in train/probe.py."""
    stimuli: int | None = Field(None, ge=3, le=MOST_STIMULI)
    """Stimuli to fit, where there is no shard folder."""
    scored: int | None = Field(None, ge=1, le=MOST_STIMULI)
    """Stimuli to score, where there is no shard folder; by default an eighth of --stimuli."""
    sites: int | None = Field(None, ge=1, le=1_000_000)
    """Sites, where there is no shard folder; by default 168."""
    rates: Annotated[list[Path], Field(min_length=1, max_length=MOST_FILES)] | None = None
    """Files that `launch/check.sh --json FILE` wrote on the machines to be used: also tell how long the probe takes."""


def is_probe(words: Sequence[str]) -> bool:
    """Whether a command line that may begin with a recipe is a probe's: the recipe or a flag names its layers."""
    if any(word.partition("=")[0] == f"--{OF_PROBES}" for word in words):
        return True
    if not words or words[0].startswith("-"):
        return False
    try:
        content = read_yaml(Path(words[0]))
    except (OSError, ValueError):
        return False  # whoever reads the recipe says what is wrong
    return isinstance(content, dict) and OF_PROBES in content
