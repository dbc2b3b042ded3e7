"""Source `tvsd`: the THINGS ventral stream spiking dataset (Papale et al. 2025), one monkey's THINGS_normMUA.mat.

MATLAB v7.3 files are HDF5 with the axes reversed: what MATLAB calls (1024, 22248) is (22248, 1024) here. Files that
were written again by other programs may have them the other way round; the 1024 channels tell which.

    train_MUA      (22248, 1024)     one presentation each
    test_MUA_reps  (30, 100, 1024)   single presentations of the test stimuli
    reliab         (435, 1024)       correlations of all pairs of repetitions; their mean is a channel's reliability
    SNR_max, oracle (1024, 1)
    things_imgs.mat: train_imgs, test_imgs with `things_path`, references to text such as aardvark\\aardvark_01b.jpg

The responses are normalised per day, averaged over a window that depends on the region (norm_MUA.m of the dataset).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import tyro
from pydantic import Field

from data_prep.common.errors import BadInput
from data_prep.recording import Recording
from data_prep.sources.files import hdf5
from data_prep.sources.files.image_files import ImageFiles
from data_prep.sources.files.presentations import HeldOutVal, PresentedRecording
from data_prep.sources.files.trials import gather_trials, rates_and_trials, safe_ids, select_sites

CHANNELS = 1024
REGIONS = {  # first and last channel + 1, counted from 0
    "F": {"V1": (0, 512), "IT": (512, 832), "V4": (832, 1024)},
    "N": {"V1": (0, 512), "V4": (512, 768), "IT": (768, 1024)},
}
WINDOWS_MS = {"V1": (25.0, 125.0), "V4": (50.0, 150.0), "IT": (75.0, 175.0)}
QUALITIES = {"SNR_max": "snr_max", "oracle": "oracle"}


class Tvsd(HeldOutVal):
    """The THINGS ventral stream spiking dataset: one monkey's normalised multi-unit activity."""

    source: tyro.conf.Positional[Path]
    """The file THINGS_normMUA.mat of one monkey."""
    image_list: Path | None = None
    """The file things_imgs.mat. Default: SOURCE's folder, or _logs in it."""
    images: Path
    """Folder of the THINGS images (object_images, with a folder per concept), or a zip of it without a password."""
    monkey: Literal["F", "N"] | None = None
    """Whose file it is. Default: F or N where SOURCE's path says monkeyF or monkeyN."""
    region: tuple[Literal["V1", "V4", "IT"], ...] = ()
    """Only these regions."""
    min_reliability: float | None = Field(None, ge=-1, le=1)
    """Only channels whose mean correlation between repetitions is at least this, 0.3 say."""
    name: str | None = None
    """Name of the recording. Default: tvsd-F or tvsd-N."""

    def open(self) -> Recording:
        """Check the files against each other and find the images.

        Raises:
            BadInput: naming the file, the dataset or option, and what would be right.
        """
        monkey = self._monkey()
        paths = _things_paths(self._images())
        count = {split: len(names) for split, names in paths.items()}
        with hdf5.reading(self.source) as file:
            _check(file, "train_MUA", (count["train"], CHANNELS))
            repetitions = _check(file, "test_MUA_reps", (None, count["test"], CHANNELS))[0]
            qualities = _qualities(file)
        sites = _sites(monkey, qualities)
        keep = select_sites(sites, "region", self.region, "--region", self.source)
        if self.min_reliability is not None:
            keep &= qualities["reliability"] >= self.min_reliability
            if not keep.any():
                raise BadInput(f"{self.source}: no channel has a reliability of {self.min_reliability:g} or more")
        kept = [site for site, chosen in zip(sites, keep, strict=True) if chosen]
        names = [name for split in ("train", "test") for name in paths[split]]
        meta = [{"object": Path(name).parent.name or Path(name).stem, "things_path": name} for name in names]
        dealt, rule = self.deal(meta[: count["train"]], self.source)
        images = ImageFiles(self.images)
        regions = {site["region"] for site in kept}
        return TvsdRecording(
            name=self.name or f"tvsd-{monkey}",
            provenance={
                "source": "tvsd",
                "path": str(self.source.resolve()),
                "monkey": monkey,
                "selected": {"region": self.region, "min_reliability": self.min_reliability},
                "split": {"test": "as in the dataset", **rule},
            },
            sites=kept,
            response_window_ms=WINDOWS_MS[regions.pop()] if len(regions) == 1 else None,
            units="normalised multi-unit activity",
            stimulus_ids=safe_ids([Path(name).stem for name in names]),
            splits=[*dealt, *["test"] * count["test"]],
            objects=[facts["object"] for facts in meta],
            group_by=self.group_by,
            images=images,
            image_names=images.find_all({name: [name] for name in names}),
            meta=meta,
            path=self.source,
            channels=np.flatnonzero(keep),
            trained=count["train"],
            repetitions=repetitions,
        )

    def _monkey(self) -> str:
        if self.monkey is not None:
            return self.monkey
        said = [monkey for monkey in REGIONS if f"monkey{monkey}" in str(self.source.resolve())]
        if len(said) != 1:
            raise BadInput(f"{self.source}: the path does not say whose file it is; say --monkey F or --monkey N")
        return said[0]

    def _images(self) -> Path:
        beside = self.source.parent
        choices = (
            [self.image_list] if self.image_list else [beside / "_logs" / "things_imgs.mat", beside / "things_imgs.mat"]
        )
        found = next((path for path in choices if path.is_file()), None)
        if found is None:
            raise BadInput(f"{choices[0]}: no such file; name the dataset's things_imgs.mat with --image-list")
        return found


@dataclass(kw_only=True)
class TvsdRecording(PresentedRecording):
    """Files that `Tvsd.open` has checked; the training stimuli come first, then the test stimuli.

    Attributes (beside those of `PresentedRecording`):
        path: THINGS_normMUA.mat.
        channels: those that are kept, counted from 0.
        trained: number of training stimuli.
        repetitions: of a test stimulus.
    """

    path: Path
    channels: np.ndarray
    trained: int
    repetitions: int

    def responses(self, indices: Sequence[int]) -> Iterator[tuple[np.ndarray | None, np.ndarray | None]]:
        """Yield the single response to a training stimulus; average and trials of a test stimulus."""
        with hdf5.reading(self.path) as file:
            for is_train, run in groupby(indices, key=lambda i: i < self.trained):
                if is_train:
                    yield from rates_and_trials(self._single(file, list(run)), 1)
                else:
                    trials = (self._repeated(file, i - self.trained) for i in run)
                    yield from rates_and_trials(trials, self.repetitions)

    def _single(self, file: h5py.File, indices: list[int]) -> Iterator[np.ndarray]:
        found = hdf5.numbers(file, "train_MUA", 2)
        axis = 0 if found.shape[1] == CHANNELS else 1

        def read(rows: slice) -> np.ndarray:
            return (found[rows] if axis == 0 else found[:, rows].T)[:, self.channels]

        rows = [np.array([i]) for i in indices]
        return gather_trials(read, rows, len(self.channels), hdf5.rows_at_once(found, axis))

    def _repeated(self, file: h5py.File, stimulus: int) -> np.ndarray:
        found = hdf5.numbers(file, "test_MUA_reps", 3)
        trials = found[:, stimulus]
        return (trials if found.shape[2] == CHANNELS else trials.T)[:, self.channels].astype(np.float32)


def _check(file: h5py.File, name: str, expected: tuple[int | None, ...]) -> tuple[int, ...]:
    """Refuse an array of another shape, in either orientation; returns its shape as `expected` has it."""
    found = hdf5.numbers(file, name, len(expected))
    for shape in (found.shape, found.shape[::-1]):
        if all(want in (None, have) for want, have in zip(expected, shape, strict=True)):
            return shape
    raise BadInput(
        f"{hdf5.at(found)} has the shape {found.shape}; expected is {expected}, or the reverse "
        f"({CHANNELS} channels, and as many stimuli as things_imgs.mat lists)".replace("None", "repetitions")
    )


def _qualities(file: h5py.File) -> dict[str, np.ndarray]:
    """What the file tells of each channel: float64 (1024,), NaN where it has no value."""
    pairs = hdf5.numbers(file, "reliab", 2)
    values = pairs[()].astype(np.float64)
    if CHANNELS not in values.shape:
        raise BadInput(f"{hdf5.at(pairs)} has the shape {pairs.shape}; expected is (pairs of repetitions, {CHANNELS})")
    values = values if values.shape[1] == CHANNELS else values.T
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        qualities = {"reliability": np.where(known, values, 0).sum(axis=0) / known.sum(axis=0)}
    for name, fact in QUALITIES.items():
        if hdf5.has(file, name) and (found := hdf5.numbers(file, name)).size == CHANNELS:
            qualities[fact] = found[()].astype(np.float64).ravel()
    return qualities


def _sites(monkey: str, qualities: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """The facts of all channels, in their order."""
    sites: list[dict[str, Any]] = [{} for _ in range(CHANNELS)]
    for region, (first, end) in REGIONS[monkey].items():
        for channel in range(first, end):
            sites[channel] = {
                "id": f"{monkey}_{channel:04d}",
                "region": region,
                "subject": monkey,
                "channel": channel,
                "window_ms": list(WINDOWS_MS[region]),
            }
            known = {name: float(values[channel]) for name, values in qualities.items()}
            sites[channel] |= {name: value for name, value in known.items() if np.isfinite(value)}
    return sites


def _things_paths(path: Path) -> dict[str, list[str]]:
    """{split: the images' paths below the THINGS folder}, in the order of the responses."""
    with hdf5.reading(path) as file:
        return {split: _referenced_texts(file, f"{split}_imgs/things_path") for split in ("train", "test")}


def _referenced_texts(file: h5py.File, name: str) -> list[str]:
    """MATLAB's cell array of text: references to arrays of UTF-16 codes. Backslashes become slashes."""
    found = hdf5.dataset(file, name)
    if h5py.check_ref_dtype(found.dtype) is not h5py.Reference:
        raise BadInput(
            f"{hdf5.at(found)} is {found.dtype}; expected are references to text, as MATLAB v7.3 writes them"
        )
    texts = []
    for k, reference in enumerate(found[()].ravel()):
        codes = file[reference] if reference else None
        if not isinstance(codes, h5py.Dataset) or codes.dtype != np.uint16:
            raise BadInput(f"{hdf5.at(found)}: entry {k} does not refer to text")
        texts.append(hdf5.contained(codes)[()].tobytes().decode("utf-16-le", "replace").replace("\\", "/"))
    return texts
