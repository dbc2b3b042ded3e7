"""How far a run has come, and what its network predicts: progress.json of a checkpoint."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from data_prep.common.errors import BadInput
from data_prep.shards.manifest import LARGEST_SIDE, Manifest, Name


class Progress(BaseModel):
    """How far a run has come, and what its network predicts.

    Attributes:
        epoch: epochs completed.
        step: optimizer steps done.
        losses: each rank's part of the sum of losses over the steps of the epoch in progress; empty between epochs.
        left_out: steps of the epoch in progress that were skipped because loss or gradient was not finite.
        best: best value of the selection metric so far.
        best_epoch, best_step: the epoch (counted from 1; 0 is the start) and the step that reached it.
        improved: for each epoch, whether it was the best until then.
        recording: fingerprint of the shards, see `data_prep.shards.manifest.Manifest.fingerprint`.
        selection_metric, selection_split: what chooses the best epoch, and on which stimuli.
        site_ids: sites, in the order of the outputs.
        recordings: by name, the number of sites of each recording, in the order of the outputs; empty in checkpoints of
            earlier versions.
        units: by recording, of its responses; empty in checkpoints of earlier versions.
        classes: in the order of the outputs; None for a network without classes.
        image_size: side in pixels of the images the network was trained on.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    epoch: int = Field(0, ge=0)
    step: int = Field(0, ge=0)
    losses: list[float] = []
    left_out: int = Field(0, ge=0)
    best: float | None = None
    best_epoch: int = Field(0, ge=0)
    best_step: int = Field(0, ge=0)
    improved: list[bool] = []
    recording: str
    selection_metric: str
    selection_split: str
    site_ids: list[Name]
    recordings: dict[Name, Annotated[int, Field(ge=0)]] = {}
    units: dict[Name, Name] = {}
    classes: list[Name] | None
    image_size: int = Field(ge=1, le=LARGEST_SIDE)

    @property
    def epochs_without_improvement(self) -> int:
        """Number of epochs since the best one."""
        return self.epoch - self.best_epoch

    @property
    def has_several_recordings(self) -> bool:
        """Whether the run was trained on several recordings."""
        return len(self.recordings) > 1

    def rows_of(self, recording: str, where: str) -> slice:
        """The outputs that are the sites of a recording.

        Args:
            recording: its name.
            where: the file or option that names it, for the message.

        Raises:
            BadInput: the run was not trained on it.
        """
        if recording not in self.recordings:
            names = ", ".join(self.recordings)
            raise BadInput(f"{where}: the run was not trained on a recording {recording!r}, but on {names}")
        first = 0
        for name, sites in self.recordings.items():
            if name == recording:
                break
            first += sites
        return slice(first, first + self.recordings[recording])

    def for_recording(self, recording: str, where: str) -> "Progress":
        """This progress as if the run had been trained on that recording alone; arguments as for `rows_of`."""
        site_ids = self.site_ids[self.rows_of(recording, where)]
        return self.model_copy(update={"site_ids": site_ids, "recordings": {recording: len(site_ids)}})

    def check_fits(self, manifest: Manifest, where: str) -> None:
        """Refuse data with other sites or classes than the network predicts.

        Args:
            manifest: of the data.
            where: location of the data, for the message.

        Raises:
            BadInput: naming the first that differs.
        """
        _check_same_names("site", self.site_ids, manifest.site_ids, where)
        if self.classes is not None:
            _check_same_names("class", self.classes, manifest.classes or [], where)


def _check_same_names(kind: str, trained: list[str], in_data: list[str], where: str) -> None:
    if trained == in_data:
        return
    pairs = zip(trained, in_data, strict=False)
    differences = [f"{other!r} instead of {name!r}" for name, other in pairs if name != other]
    difference = differences[0] if differences else f"{len(in_data)} instead of {len(trained)}"
    raise BadInput(f"{where}: its {kind} list differs from the one the network was trained for: {difference}")
