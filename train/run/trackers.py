"""Where the curves and figures of a run go: to TensorBoard, to Weights & Biases, to both, or nowhere."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic import BaseModel

from data_prep.common.errors import BadInput
from data_prep.common.option_fields import OFTEN_CHANGED, declared_default, leaf_fields, value_at
from train.run.settings import Tracking
from train.run.tensorboard import Pages, TensorBoard
from train.run.weights_and_biases import WeightsAndBiases, is_installed

Log = Callable[[str], object]


class Tracker(Protocol):
    """Receives the curves and figures of a run. The horizontal axis is always the number of optimizer steps done."""

    def settings(self, shown: Mapping[str, str | float], everything: Mapping[str, Any], scores: Sequence[str]) -> None:
        """Say how the run differs from others.

        Args:
            shown: settings that people compare runs by.
            everything: all settings, in sections.
            scores: names of the curves to compare runs by.
        """

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add points to curves."""

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """Add the distribution of the values."""

    def figure(self, name: str, png: bytes, step: int) -> None:
        """Add a figure."""

    def arrange(self, pages: Pages) -> None:
        """Put the most informative curves first."""

    def rewind(self, step: int) -> None:
        """Discard everything written after a step."""

    def close(self) -> None:
        """Write what is still in memory."""


class Trackers:
    """Several trackers as one; see `Tracker`."""

    def __init__(self, trackers: Sequence[Tracker]):
        self._trackers = list(trackers)

    def settings(self, shown: Mapping[str, str | float], everything: Mapping[str, Any], scores: Sequence[str]) -> None:
        for tracker in self._trackers:
            tracker.settings(shown, everything, scores)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for tracker in self._trackers:
            tracker.scalars(values, step)

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        for tracker in self._trackers:
            tracker.histogram(name, values, step)

    def figure(self, name: str, png: bytes, step: int) -> None:
        for tracker in self._trackers:
            tracker.figure(name, png, step)

    def arrange(self, pages: Pages) -> None:
        for tracker in self._trackers:
            tracker.arrange(pages)

    def rewind(self, step: int) -> None:
        for tracker in self._trackers:
            tracker.rewind(step)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


def open_trackers(names: Sequence[Tracking], run: Path, board: Path, log: Log) -> Trackers:
    """Open the trackers of a run; on one process only.

    Args:
        names: of the trackers; none is fine.
        run: folder of the run.
        board: folder for TensorBoard's files.
        log: receives notes, and a warning from each tracker that cannot be written.
    """
    trackers: list[Tracker] = []
    if "tensorboard" in names:
        trackers.append(TensorBoard(board, log))
    if "wandb" in names:
        trackers.append(WeightsAndBiases(run, log))
    return Trackers(trackers)


def check_trackers(names: Sequence[Tracking]) -> None:
    """Refuse to begin with a tracker whose package is missing.

    Raises:
        BadInput: naming it.
    """
    if "wandb" in names and not is_installed():
        raise BadInput("trackers: wandb is not installed; install it with `pip install wandb`, or leave it out")


def compared_settings(recipe: BaseModel) -> dict[str, str | float]:
    """The settings of a recipe that people compare runs by: the usual ones, and all that differ from their defaults."""
    shown: dict[str, str | float] = {}
    for name, field, _ in leaf_fields(type(recipe)):
        value = value_at(recipe, name)
        if value is not None and (OFTEN_CHANGED in field.metadata or value != declared_default(field)):
            shown[name] = value if isinstance(value, str | int | float) else " ".join(map(str, value))
    return shown
