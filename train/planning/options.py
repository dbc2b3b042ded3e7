"""The options of train/plan.py."""

from typing import Annotated

from pydantic import Field

from data_prep.common.option_fields import FolderLocation
from train.run.recipe import MOST_RECORDINGS, Recipe


class Plan(Recipe):
    """Estimate what a recipe needs of each GPU under every strategy, and recommend a strategy and a batch."""

    gpus: int = Field(ge=1, le=1_000_000)
    """GPUs over all machines."""
    memory: float = Field(gt=0, le=1e6)
    """Memory of each GPU in GiB."""
    machines: int = Field(1, ge=1, le=1_000_000)
    """Machines, each with the same number of GPUs."""
    data: Annotated[list[FolderLocation], Field(min_length=1, max_length=MOST_RECORDINGS)] | None = None
    """Shard folder or its URL (or several), for the numbers of sites and classes and the size of the images."""
    sites: int | None = Field(None, ge=1, le=1_000_000)
    """Sites, where there is no shard folder; by default 168."""
    classes: int | None = Field(None, ge=1, le=1_000_000)
    """Classes, where there is no shard folder; by default 64."""
