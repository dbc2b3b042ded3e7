"""The options of train/plan.py."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from data_prep.common.option_fields import OFTEN_CHANGED, FolderLocation
from train.run.recipe import MOST_RECORDINGS, MOST_STIMULI, ProbeRecipe, Recipe
from train.run.yaml_files import read_yaml

OF_PROBES = "layers"  # the setting that only probes have, and that every recipe of a probe names
MOST_FILES = 100  # of rates
MOST_RUNS, MOST_REPETITIONS, MOST_SITES = 10_000, 1_000, 1_000_000


class Plan(Recipe):
    """Estimate what a recipe needs of each GPU under every strategy, and how long it takes; recommend a strategy.

    With --runs RUN ... it tells what a recording, or a larger one, could decide about models: --runs --help.
    """

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


class PowerPlan(BaseModel):
    """Tell what a design would show of models that were scored on a recording: intervals, power, and the cheapest."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    runs: Annotated[list[Path], Field(min_length=1, max_length=MOST_RUNS)]
    """Runs, probes and ensembles that were scored on the recording, or recordings: one for its score, two for their
    difference, more for that of the two best; runs on parts of train (--subset) tell how scores grow."""
    split: Annotated[Literal["val", "test", "cv"], OFTEN_CHANGED] = "val"
    """Stimuli that they were scored on."""
    scored: Annotated[int | None, OFTEN_CHANGED] = Field(None, ge=10, le=MOST_STIMULI)
    """Scored stimuli of the design; by default as many as in the runs. Nothing is planned for fewer than ten."""
    repetitions: Annotated[int | None, OFTEN_CHANGED] = Field(None, ge=1, le=MOST_REPETITIONS)
    """Presentations of each stimulus in the design; needs single trials. By default as many as were recorded."""
    sites: Annotated[int | None, OFTEN_CHANGED] = Field(None, ge=1, le=MOST_SITES)
    """Sites of the design; by default as many as in the runs."""
    stimuli: Annotated[int | None, OFTEN_CHANGED] = Field(None, ge=2, le=MOST_STIMULI)
    """Training stimuli of the design; needs runs on three or more numbers of them. By default as in the runs."""
    difference: Annotated[float | None, OFTEN_CHANGED] = Field(None, gt=0, lt=2)
    """True difference to be found, as it shows with the recorded number of repetitions; by default the measured one."""
    presentations: Annotated[int | None, OFTEN_CHANGED] = Field(None, ge=4, le=10**12)
    """Stimuli times repetitions, of training too: also find the design that makes the most of them."""
    held_out: float | None = Field(None, gt=0, le=1)
    """Share of the stimuli that is scored, for --presentations; by default as in the runs."""
    population: Literal["stimuli", "sites", "both"] = "stimuli"
    """What is to be told: other stimuli at these sites, other sites with these stimuli, or other stimuli and sites."""
    power: float = Field(0.8, ge=0.05, lt=1)
    """Power that is wanted."""
    comparisons: int | None = Field(None, ge=1, le=10**6)
    """Comparisons that are looked at, for which the level of each is corrected; by default all pairs of the runs."""
    metric: Literal["r2", "explained_variance", "pearson_r"] = "r2"
    """The score that is planned."""
    data: Annotated[list[FolderLocation], Field(min_length=1, max_length=MOST_RECORDINGS)] | None = None
    """Shard folders or their URLs with the single trials; by default those on this machine that the runs were made
    from."""


def is_power(words: Sequence[str]) -> bool:
    """Whether a command line asks what a design would show: it names runs."""
    return any(word.partition("=")[0] == "--runs" for word in words)


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
