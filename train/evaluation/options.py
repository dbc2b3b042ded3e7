"""The options of train/evaluate.py and train/export.py."""

from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field

from data_prep.common.option_fields import Place
from train.run.recipe import MOST_RECORDINGS

Combine = Literal["mean", "stack"]


class Evaluate(BaseModel):
    """Score a fine-tuned run on a split, or join several runs and probes into an ensemble and score that."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    runs: Annotated[list[Path], tyro.conf.Positional] = Field(min_length=1)
    """Run folder made by train/finetune.py; for an ensemble several, among which may be probes and ensembles."""
    split: Literal["train", "val", "test", "left_out"] = "val"
    """Which stimuli to predict; on a split without responses the predictions alone are written. left_out are the
    training stimuli that the run was not fitted on, its inner split."""
    out: Path | None = None
    """Folder of the ensemble; needed with several runs."""
    combine: Combine = "mean"
    """An ensemble's prediction: the mean over all runs; or a sum whose weights each site learns on left_out."""
    checkpoint: Literal["best", "last"] = "best"
    """Which epoch's weights."""
    data: Annotated[list[Place], Field(min_length=1, max_length=MOST_RECORDINGS)] | None = None
    """Shard folder or its URL; by default the one the run was trained on. Of a run of several recordings those that are
    to be scored; by default all."""
    shard_cache: str | None = None
    """Of remote shards: folder for copies; by default the recipe's."""
    batch_size: int | None = Field(None, ge=1, le=1_000_000)
    """Stimuli per forward pass; by default the recipe's."""
    workers: int | None = Field(None, ge=0, le=256)
    """Decoding processes per rank; by default the recipe's."""
    on_bad_sample: Literal["stop", "skip"] | None = None
    """Whether a stimulus that cannot be read stops the evaluation or is left out, which metrics.json then says; by
    default the recipe's."""


class Export(BaseModel):
    """Export a run: its predictions (netcdf, mat), or its network (timm, predictor)."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    run: tyro.conf.Positional[Path]
    """Run folder; predictions may also be a probe's."""
    out: Path
    """Folder for the files; what is there is never overwritten."""
    format: Annotated[list[Literal["netcdf", "mat", "timm", "predictor"]], Field(min_length=1)]
    """One or more: predictions as NetCDF (xarray, BrainIO) or MATLAB; the network as a timm checkpoint, or as a Python
    class that needs torch only."""
    split: Literal["train", "val", "test", "cv"] = "val"
    """Whose predictions, for netcdf and mat; they must have been scored before."""
    checkpoint: Literal["best", "last"] = "best"
    """Which epoch."""
    recording: str | None = None
    """Of a run of several recordings: whose predictions, or the network with whose readout."""
    data: Path | None = None
    """Shard folder; by default the one the run was trained on."""
