"""Source `tvsd`: the THINGS ventral stream spiking dataset (Papale et al. 2025), one monkey's THINGS_normMUA.mat.

MATLAB v7.3 files are HDF5 with the axes reversed: MATLAB's (1024, 22248) is (22248, 1024) here. Files that other
programs rewrote may have the opposite order; the axis of 1024 channels shows which it is.

    train_MUA      (22248, 1024)     one presentation each
    test_MUA_reps  (30, 100, 1024)   single presentations of the test stimuli
    reliab         (435, 1024)       correlations of all pairs of repetitions; their mean is a channel's reliability
    SNR_max, oracle (1024, 1)
    things_imgs.mat: train_imgs, test_imgs with `things_path`, references to text such as aardvark\\aardvark_01b.jpg

The responses are normalised per day, averaged over a window that depends on the region (norm_MUA.m of the dataset).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import tyro
from pydantic import Field

from data_prep.common.errors import BadInput
from data_prep.recording import Recording
from data_prep.sources.files import hdf5
from data_prep.sources.files.held_out import HeldOutVal
from data_prep.sources.files.ids import safe_ids, select_sites
from data_prep.sources.files.image_files import ImageFiles
from data_prep.sources.files.named_images_recording import NamedImagesRecording
from data_prep.sources.files.presentations import gather_trials, rates_and_trials

if TYPE_CHECKING:
    import h5py

CHANNELS = 1024
REGIONS = {  # first and last channel + 1, counted from 0
    "F": {"V1": (0, 512), "IT": (512, 832), "V4": (832, 1024)},
    "N": {"V1": (0, 512), "V4": (512, 768), "IT": (768, 1024)},
}
WINDOWS_MS = {"V1": (25.0, 125.0), "V4": (50.0, 150.0), "IT": (75.0, 175.0)}
QUALITIES = {"SNR_max": "snr_max", "oracle": "oracle"}  # names of the datasets, and ours


class Tvsd(HeldOutVal):
    """The THINGS ventral stream spiking dataset: one monkey's normalised multi-unit activity."""

    source: tyro.conf.Positional[Path]
    """The file THINGS_normMUA.mat of one monkey."""
    image_list: Path | None = None
    """The file things_imgs.mat. Default: SOURCE's folder, or _logs in it."""
    images: Path
    """Folder of the THINGS images (object_images, with a folder per concept), or a zip of it without a password."""
    monkey: Literal["F", "N"] | None = None
    """The monkey. Default: as named by monkeyF or monkeyN in SOURCE's path."""
    region: tuple[Literal["V1", "V4", "IT"], ...] = ()
    """Only these regions."""
    min_reliability: float | None = Field(None, ge=-1, le=1)
    """Only channels whose mean correlation between repetitions is at least this, e.g. 0.3."""
    name: str | None = None
    """Name of the recording. Default: tvsd-F or tvsd-N."""

    def open(self) -> Recording:
        """Check the files against each other and find the images.

        Raises:
            BadInput: naming the file, the dataset or option, and what would be right.
        """
        monkey = self._monkey()
        paths = _image_paths(self._image_list())
        train_stimuli, test_stimuli = len(paths["train"]), len(paths["test"])
        with hdf5.open_file(self.source) as file:
            _check_shape(file, "train_MUA", (train_stimuli, CHANNELS))
            repetitions, _, _ = _check_shape(file, "test_MUA_reps", (None, test_stimuli, CHANNELS))
            qualities = _channel_qualities(file)
        channels = self._select_channels(monkey, qualities)
        sites = [_site(monkey, channel, qualities) for channel in channels.tolist()]
        names = paths["train"] + paths["test"]
        meta = [{"object": Path(name).parent.name or Path(name).stem, "things_path": name} for name in names]
        in_file = ["train"] * train_stimuli + ["test"] * test_stimuli
        dealt = self.assign(meta[:train_stimuli], self.source).within(in_file, range(train_stimuli))
        images = ImageFiles(self.images)
        regions = {site["region"] for site in sites}
        return TvsdRecording(
            name=self.name or f"tvsd-{monkey}",
            provenance={
                "source": "tvsd",
                "path": str(self.source.resolve()),
                "monkey": monkey,
                "selected": {"region": self.region, "min_reliability": self.min_reliability},
                "split": {"test": "as in the dataset", **dealt.rule},
            },
            sites=sites,
            response_window_ms=WINDOWS_MS[regions.pop()] if len(regions) == 1 else None,
            units="normalised multi-unit activity",
            stimulus_ids=safe_ids([Path(name).stem for name in names]),
            splits=dealt.splits,
            deal=dealt.deal,
            objects=[facts["object"] for facts in meta],
            group_by=self.group_by,
            images=images,
            image_names=images.find_all({name: [name] for name in names}),
            meta=meta,
            path=self.source,
            channels=channels,
            train_stimuli=train_stimuli,
            repetitions=repetitions,
        )

    def _monkey(self) -> str:
        if self.monkey is not None:
            return self.monkey
        named = [monkey for monkey in REGIONS if f"monkey{monkey}" in str(self.source.resolve())]
        if len(named) != 1:
            raise BadInput(f"{self.source}: the path does not name the monkey; add --monkey F or --monkey N")
        return named[0]

    def _image_list(self) -> Path:
        folder = self.source.parent
        defaults = [folder / "_logs" / "things_imgs.mat", folder / "things_imgs.mat"]
        candidates = [self.image_list] if self.image_list else defaults
        for path in candidates:
            if path.is_file():
                return path
        raise BadInput(f"{candidates[0]}: no such file; name the dataset's things_imgs.mat with --image-list")

    def _select_channels(self, monkey: str, qualities: dict[str, np.ndarray]) -> np.ndarray:
        """The selected channels, counted from 0."""
        regions = [{"region": _region(monkey, channel)} for channel in range(CHANNELS)]
        keep = select_sites(regions, "region", self.region, "--region", self.source)
        if self.min_reliability is not None:
            keep &= qualities["reliability"] >= self.min_reliability
            if not keep.any():
                raise BadInput(f"{self.source}: no channel has a reliability of {self.min_reliability:g} or more")
        return np.flatnonzero(keep)


@dataclass(kw_only=True)
class TvsdRecording(NamedImagesRecording):
    """Files that `Tvsd.open` has checked; the training stimuli come first, then the test stimuli.

    Attributes (beside those of `NamedImagesRecording`):
        path: THINGS_normMUA.mat.
        channels: the selected ones, counted from 0.
        train_stimuli: number of training stimuli.
        repetitions: of a test stimulus.
    """

    path: Path
    channels: np.ndarray
    train_stimuli: int
    repetitions: int

    def responses(self, indices: Sequence[int]) -> Iterator[tuple[np.ndarray | None, np.ndarray | None]]:
        """Yield the single response to a training stimulus; average and trials of a test stimulus."""
        with hdf5.open_file(self.path) as file:
            for is_train, consecutive in groupby(indices, key=lambda i: i < self.train_stimuli):
                if is_train:
                    yield from rates_and_trials(self._train_responses(file, list(consecutive)), 1)
                else:
                    trials = (self._test_trials(file, i - self.train_stimuli) for i in consecutive)
                    yield from rates_and_trials(trials, self.repetitions)

    def _train_responses(self, file: h5py.File, indices: list[int]) -> Iterator[np.ndarray]:
        responses = hdf5.numeric_dataset(file, "train_MUA", 2)
        stimulus_axis = 0 if responses.shape[1] == CHANNELS else 1

        def read(rows: slice) -> np.ndarray:
            return (responses[rows] if stimulus_axis == 0 else responses[:, rows].T)[:, self.channels]

        rows = [np.array([i]) for i in indices]
        return gather_trials(read, rows, len(self.channels), hdf5.rows_at_once(responses, stimulus_axis))

    def _test_trials(self, file: h5py.File, stimulus: int) -> np.ndarray:
        """float32 (repetitions, sites)."""
        responses = hdf5.numeric_dataset(file, "test_MUA_reps", 3)
        trials = responses[:, stimulus]
        return (trials if responses.shape[2] == CHANNELS else trials.T)[:, self.channels].astype(np.float32)


# ---- channels ------------------------------------------------------------------------------------------------------


def _region(monkey: str, channel: int) -> str:
    return next(region for region, (first, end) in REGIONS[monkey].items() if first <= channel < end)


def _site(monkey: str, channel: int, qualities: dict[str, np.ndarray]) -> dict[str, Any]:
    """The facts about a channel."""
    region = _region(monkey, channel)
    site = {
        "id": f"{monkey}_{channel:04d}",
        "region": region,
        "subject": monkey,
        "channel": channel,
        "window_ms": list(WINDOWS_MS[region]),
    }
    known = {name: float(values[channel]) for name, values in qualities.items()}
    return site | {name: value for name, value in known.items() if np.isfinite(value)}


def _channel_qualities(file: h5py.File) -> dict[str, np.ndarray]:
    """The file's quality measures of each channel: float64 (1024,), NaN if unknown."""
    pairs = hdf5.numeric_dataset(file, "reliab", 2)
    correlations = pairs[()].astype(np.float64)
    if CHANNELS not in correlations.shape:
        raise BadInput(
            f"{hdf5.location(pairs)} has the shape {pairs.shape}; expected (pairs of repetitions, {CHANNELS})"
        )
    if correlations.shape[1] != CHANNELS:
        correlations = correlations.T
    known = ~np.isnan(correlations)
    with np.errstate(invalid="ignore"):
        qualities = {"reliability": np.where(known, correlations, 0).sum(axis=0) / known.sum(axis=0)}
    for name, fact in QUALITIES.items():
        if hdf5.contains(file, name):
            values = hdf5.numeric_dataset(file, name)
            if values.size == CHANNELS:
                qualities[fact] = values[()].astype(np.float64).ravel()
    return qualities


# ---- arrays --------------------------------------------------------------------------------------------------------


def _check_shape(file: h5py.File, name: str, expected: tuple[int | None, ...]) -> tuple[int, ...]:
    """Refuse an array of another shape, in either orientation; returns its shape in the order of `expected`."""
    data = hdf5.numeric_dataset(file, name, len(expected))
    for shape in (data.shape, data.shape[::-1]):
        if all(length in (None, actual) for length, actual in zip(expected, shape, strict=True)):
            return shape
    axes = ", ".join("repetitions" if length is None else str(length) for length in expected)
    raise BadInput(
        f"{hdf5.location(data)} has the shape {data.shape}; expected ({axes}), or the reverse "
        f"({CHANNELS} channels, and the stimuli of things_imgs.mat)"
    )


def _image_paths(path: Path) -> dict[str, list[str]]:
    """{split: the images' paths below the THINGS folder}, in the order of the responses."""
    with hdf5.open_file(path) as file:
        return {split: _referenced_texts(file, f"{split}_imgs/things_path") for split in ("train", "test")}


def _referenced_texts(file: h5py.File, name: str) -> list[str]:
    """MATLAB's cell array of text: references to arrays of UTF-16 codes. Backslashes become slashes."""
    import h5py

    references = hdf5.dataset(file, name)
    location = hdf5.location(references)
    if h5py.check_ref_dtype(references.dtype) is not h5py.Reference:
        raise BadInput(f"{location} is {references.dtype}; expected references to text, as MATLAB v7.3 writes them")
    texts = []
    for k, reference in enumerate(references[()].ravel()):
        codes = file[reference] if reference else None
        if not isinstance(codes, h5py.Dataset) or codes.dtype != np.uint16:
            raise BadInput(f"{location}: entry {k} does not refer to text")
        hdf5.check_stored_inside(codes)
        texts.append(codes[()].tobytes().decode("utf-16-le", "replace").replace("\\", "/"))
    return texts
