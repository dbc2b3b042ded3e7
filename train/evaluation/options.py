"""The options of train/evaluate.py and train/export.py."""

from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field

from data_prep.common.errors import BadInput
from data_prep.common.option_fields import FolderLocation
from train.run.recipe import MOST_RECORDINGS
from train.run.settings import Tracking

Combine = Literal["mean", "stack"]
SeenPolicy = Literal["refuse", "drop", "keep"]


class Evaluate(BaseModel):
    """Score a run, a probe or an ensemble on a split; combine several into an ensemble; or predict images."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    runs: Annotated[list[Path], tyro.conf.Positional] = Field(min_length=1)
    """Folder of a run, a probe or an ensemble. Several make an ensemble."""
    split: Literal["train", "val", "test", "left_out"] = "val"
    """Stimuli to predict; without responses, only the predictions are written. left_out: the training stimuli that the
    run was not fitted on, i.e. its inner split."""
    out: Path | None = None
    """Folder for the ensemble, or for the predictions of --images; required with either."""
    images: FolderLocation | None = None
    """Predict these images and score nothing: a folder of image files, or the --split of a shard folder, or its URL,
    whatever its sites. Every image once, over all processes."""
    format: Literal["npz", "netcdf"] = "npz"
    """File of the predictions of --images: predictions.npz, or predictions.nc for xarray."""
    recording: str | None = None
    """For --images and a predictor of several recordings: the one whose responses to predict."""
    combine: Combine = "mean"
    """How an ensemble predicts: the mean over all runs, or per site a weighted sum learned on left_out."""
    checkpoint: Literal["best", "last"] = "best"
    """Epoch whose weights are used."""
    data: Annotated[list[FolderLocation], Field(min_length=1, max_length=MOST_RECORDINGS)] | None = None
    """Shard folder or its URL; by default the one the run was trained on. For a run on several recordings: those to
    score; by default all."""
    shard_cache: str | None = None
    """Folder for copies of remote shards; by default the recipe's."""
    batch_size: int | None = Field(None, ge=1, le=1_000_000)
    """Stimuli per forward pass; by default the recipe's."""
    workers: int | None = Field(None, ge=0, le=256)
    """Decoding processes per rank; by default the recipe's."""
    on_bad_sample: Literal["stop", "skip"] | None = None
    """If a stimulus cannot be read: stop, or leave it out and list it in metrics.json; by default the recipe's."""
    seen: SeenPolicy = "refuse"
    """If stimuli of val or test were fitted, going by their images: refuse to score, drop them, or keep them. What is
    done is marked in metrics.json and tables."""
    trackers: Annotated[list[Tracking], Field(max_length=2)] | None = None
    """Trackers that the scores of fine-tuned runs are added to; by default the recipe's. None without a name."""

    @property
    def is_ensemble(self) -> bool:
        """Whether an ensemble is to be made."""
        return self.images is None and (len(self.runs) > 1 or self.out is not None)

    def check(self) -> None:
        """Refuse options that do not go together.

        Raises:
            BadInput: naming one.
        """
        if self.combine != "mean" and not self.is_ensemble:
            raise BadInput("--combine needs several runs, and only one is given")
        if self.images is None:
            for name in ("recording", "format"):
                if self._differs(name):
                    raise BadInput(f"--{name} needs --images; scores are of all recordings, in metrics.json")
            return
        if len(self.runs) > 1:
            raise BadInput("--images: give one predictor; make an ensemble of several first (--out ENSEMBLE)")
        if self.out is None:
            raise BadInput("--images: name the folder for the predictions with --out")
        for name in ("data", "seen", "trackers"):
            if self._differs(name):
                raise BadInput(f"--{name}: with --images nothing is scored; leave it out")

    def _differs(self, name: str) -> bool:
        """Whether an option is not the default."""
        return getattr(self, name) != type(self).model_fields[name].default


class Export(BaseModel):
    """Export a run: its predictions (netcdf, mat), or its network (timm, predictor)."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    run: tyro.conf.Positional[Path]
    """Folder of a run, a probe or an ensemble; timm needs a run."""
    out: Path
    """Folder for the files; existing files are never overwritten."""
    format: Annotated[list[Literal["netcdf", "mat", "timm", "predictor", "predictor-zip"]], Field(min_length=1)]
    """One or more: the predictions as NetCDF (xarray, BrainIO) or MATLAB; the network as a timm checkpoint; or the
    predictor as a Python class that needs torch, numpy and Pillow only, in a folder or in one zip archive."""
    split: Literal["train", "val", "test", "cv"] = "val"
    """Split whose predictions to export (netcdf, mat); it must have been scored before."""
    checkpoint: Literal["best", "last"] = "best"
    """Epoch to export."""
    recording: str | None = None
    """For a run or an ensemble on several recordings: the one whose predictions or readout to export."""
    data: Path | None = None
    """Shard folder; by default the one the run was trained on."""
