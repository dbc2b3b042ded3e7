"""Recording: the common form in which all sources deliver images and responses.

A source knows its file format but not the shards; the packer knows `Recording` but no file formats.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import numpy as np

SPLITS = ("train", "val", "test")
CONSTANT = 1e-15  # a variance below this part of the squared mean is what float32 rounding makes of a constant
OTHER_FORMAT = "other"  # an encoded image that is neither JPEG nor PNG; it becomes PNG when it is packed


@dataclass(frozen=True)
class Stimulus:
    """One stimulus with the responses to it.

    Attributes:
        id: unique in the recording; letters, digits, `_` and `-` only (it becomes a file name inside a tar).
        image: the encoded image; the source's own bytes wherever it has an encoded file.
        encoding: "jpg", "png", OTHER_FORMAT, or "image.npy" for raw pixels, uint8 (H, W, 3).
        rates: float32 (sites,), trial-averaged responses; NaN = not recorded; None if the split has no responses.
        trials: float32 (repetitions, sites), single-trial responses padded with NaN; None without single trials.
        truth: float32 (sites,), the noise-free mean rates; known for simulated recordings only.
        meta: JSON-able facts about the stimulus; `object` and `category` if known.
        location: where the image lies, for messages; None if the stimulus's id says enough.
    """

    id: str
    image: bytes
    encoding: str
    rates: np.ndarray | None = None
    trials: np.ndarray | None = None
    truth: np.ndarray | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    location: str | None = None


class Deal(Protocol):
    """How stimuli were dealt to splits at random, so that they can be dealt again once copies among them are known."""

    def __call__(self, copies: np.ndarray) -> list[str]:
        """The split of every stimulus, dealt so that copies of an image stay together.

        Args:
            copies: for each stimulus, the position of the first one with the same image, int64 (stimuli,).

        Raises:
            BadInput: that leaves no training stimuli.
        """


@dataclass(kw_only=True, eq=False)
class Recording(ABC):
    """Images, sites and responses of one recording, read lazily.

    Instances are pickled to the packing processes, so they hold plain data and open their files in `read`.

    Attributes:
        name: short name, e.g. "majaj2015".
        provenance: JSON-able; where the recording comes from, how it was processed, warnings about it.
        simulated: True if no brain was recorded.
        sites: one dict per site, each with at least `id`; `region`, `subject` ... if known.
        response_window_ms: (start, end) after stimulus onset; None if unknown.
        units: of the rates, e.g. "spikes/s", or "as recorded" if unknown.
        stimulus_ids: all ids, in the source's order.
        splits: one of `SPLITS` per stimulus.
        objects: the object shown, per stimulus; None if the source has no labels.
        group_by: the fact in `meta` whose groups each stay within one split; None if there is none.
        truth: facts known only for a simulation, e.g. `{"reliability": [...]}` per site.
        meta: per stimulus, the part of `Stimulus.meta` that is known before the stimulus is read; None if nothing is.
        split_has_responses: per split, whether its stimuli have responses; None if all do.
        deal: how the splits were dealt; None if the source gives them.
    """

    name: str
    provenance: dict[str, Any]
    simulated: bool = False
    sites: list[dict[str, Any]]
    response_window_ms: tuple[float, float] | None = None
    units: str = "as recorded"
    stimulus_ids: list[str]
    splits: list[str]
    objects: list[str] | None = None
    group_by: str | None = None
    truth: dict[str, Any] | None = None
    meta: list[dict[str, Any]] | None = None
    split_has_responses: dict[str, bool] | None = None
    deal: Deal | None = None

    @abstractmethod
    def read(self, indices: Sequence[int]) -> Iterator[Stimulus]:
        """Yield the stimuli at `indices` (positions in `stimulus_ids`), in that order, without holding them all."""

    def known_meta(self, index: int) -> dict[str, Any]:
        """The facts about a stimulus that are known before it is read."""
        return {} if self.meta is None else self.meta[index]

    def has_responses(self, index: int) -> bool:
        """Whether the split of a stimulus has responses."""
        return self.split_has_responses is None or self.split_has_responses.get(self.splits[index], True)

    def dealt_again(self, splits: list[str]) -> Self:
        """The recording with other splits, which its `deal` made."""
        other = copy.copy(self)
        other.splits = splits
        with_responses = {split for position, split in enumerate(splits) if self.has_responses(position)}
        other.split_has_responses = {split: split in with_responses for split in SPLITS}
        rule = self.provenance.get("split")
        other.provenance = self.provenance | {
            "split": rule | {"copies": "together"} if isinstance(rule, dict) else rule
        }
        return other


def trial_average(trials: np.ndarray) -> np.ndarray:
    """Mean over the recorded repetitions.

    Args:
        trials: float (..., repetitions, sites), NaN = missing.

    Returns:
        float32 (..., sites); NaN where a site has no repetition at all.
    """
    recorded = ~np.isnan(trials)
    count = recorded.sum(axis=-2)
    total = np.where(recorded, trials, 0.0).sum(axis=-2, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (total / count).astype(np.float32)


def varies(count: np.ndarray, squares: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Which sites respond differently to different stimuli: no others can be predicted, or have an R2.

    Args:
        count: recorded responses, (sites,).
        squares: sum of (response - mean)^2, likewise.
        mean: of the responses, likewise; NaN where there are none.

    Returns:
        bool (sites,).
    """
    with np.errstate(invalid="ignore"):
        return (count >= 2) & (squares > CONSTANT * count * mean**2)
