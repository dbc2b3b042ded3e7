"""The settings of a search, as SWEEP.yaml has them."""

from typing import Annotated, Any

from pydantic import Field

from train.run.settings import LARGEST_SEED, WEEK, Settings, Text

MOST_POINTS = 10_000


class Range(Settings):
    """An interval to sample from; a setting of whole numbers gets whole numbers."""

    low: int | float
    """Lowest value."""
    high: int | float
    """Highest value."""
    log: bool = False
    """Sample on a logarithmic scale."""
    step: int | float | None = Field(None, gt=0)
    """Distance between values; by default any value of the interval."""


class SweepSettings(Settings):
    """All settings of a search. Recipe settings are named with dots, e.g. `optimizer.lr`."""

    recipe: Text
    """The recipe of every trial: a path relative to this file's folder, the working folder, or Spiketune's folder of
    recipes."""
    set: dict[str, Any] = Field({})
    """Settings that all trials change in the recipe."""
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field({})
    """Values per setting; every combination is a trial."""
    space: dict[str, Any] = Field({})
    """An interval (low, high, log, step) or a list of choices per setting; TPE samples from them."""
    trials: int | None = Field(None, ge=1, le=MOST_POINTS)
    """Number of points to sample from `space`."""
    seed: int = Field(0, ge=0, le=LARGEST_SEED)
    """Seed of the sampler."""
    storage: Text | None = None
    """Database of the study, e.g. sqlite:///sweeps.db or postgresql://...; by default a journal in SWEEP_DIR."""
    stale_seconds: float = Field(120.0, ge=3, le=WEEK)
    """Seconds without a heartbeat after which another worker takes over a trial."""
