"""Source `mbs-h5`: HDF5 with responses per split, subject and region, as model-brain comparisons exchange them.

    /{split}/stimulus_ids                       (stimuli,), or a group with one such dataset per subject
    /{split}/neural_data/{subject}/{region}     (stimuli, sites)
    /noise_ceilings/{subject}/{region}          (sites,), in percent of the attribute max_nc; not necessary

An id that occurs several times in a split was shown as many times: its rows are trials. The images are files named
by id, or an array in this or another HDF5 file: beside the ids of a split, or with ids of its own, or in the order of
the numbers that are the ids.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import tyro

from data_prep.common.errors import BadInput
from data_prep.common.image_decoding import encode_png
from data_prep.recording import SPLITS, Recording
from data_prep.sources.files import hdf5
from data_prep.sources.files.image_files import ImageFiles, Loaded
from data_prep.sources.files.presentations import HeldOutVal, Images, PresentedRecording
from data_prep.sources.files.trials import (
    TRIALS_BYTES,
    gather_trials,
    rates_and_trials,
    rows_by_stimulus,
    safe_ids,
    select_sites,
)

IMAGE_NAMES = ("stimuli", "images", "pictures", "imgBrick")
IMAGE_IDS = ("stimulus_ids", "ids")

Rows = dict[tuple[str, str], dict[str, np.ndarray]]  # {(split, subject): {stimulus: its rows}}


class MbsH5(HeldOutVal):
    """HDF5 with stimulus_ids and neural_data per split, subject and region."""

    source: tyro.conf.Positional[Path]
    """The HDF5 file."""
    images: Path | None = None
    """Folder or zip with an image per stimulus id, or an HDF5 file with an array of them. Default: SOURCE itself."""
    image_dataset: str | None = None
    """Name of the array of images in the HDF5 file. Default: stimuli, images, images or imgBrick."""
    subject: tuple[str, ...] = ()
    """Only these subjects."""
    region: tuple[str, ...] = ()
    """Only these regions."""
    name: str | None = None
    """Name of the recording. Default: the file's name without its ending."""
    units: str = "as recorded"
    """Units of the responses, such as spikes/s."""

    def open(self) -> Recording:
        """Check the file's structure and that every stimulus has an image.

        Raises:
            BadInput: naming the file, the dataset, and what would be right.
        """
        with hdf5.reading(self.source) as file:
            split_names = [split for split in SPLITS if hdf5.has(file, split)]
            if not split_names:
                inside = ", ".join(sorted(file)) or "nothing"
                raise BadInput(f"{self.source}: expected are groups train, val, test; it holds {inside}")
            parts = self._parts(file, split_names)
            subjects = list(dict.fromkeys(part.subject for part in parts))
            rows = {(split, subject): _rows(file, split, subject) for split in split_names for subject in subjects}
            for part in parts:
                part.check(file, rows)
            origin = _origin(rows, self.source)
            images, image_names = self._images(file, origin)
            sites = [site for part in parts for site in part.describe(file)]
            recorded = {split for split in split_names if any(hdf5.has(file, part.path(split)) for part in parts)}
        names = list(origin)
        ids = safe_ids(names)
        training = [i for i, name in enumerate(names) if origin[name] == "train"]
        meta = [{} if safe == name else {"source_id": name} for name, safe in zip(names, ids, strict=True)]
        splits, rule = list(origin.values()), "as in the file"
        if "val" in split_names:
            self.refuse_options(f"{self.source} has a split val")
        elif training:
            dealt, rule = self.deal([meta[i] for i in training], self.source)
            for i, split in zip(training, dealt, strict=True):
                splits[i] = split
        return MbsH5Recording(
            name=self.name or self.source.stem,
            provenance={
                "source": "mbs-h5",
                "path": str(self.source.resolve()),
                "selected": {"subject": self.subject, "region": self.region},
                "split": rule,
            },
            sites=sites,
            units=self.units,
            stimulus_ids=ids,
            splits=splits,
            group_by=self.group_by,
            images=images,
            image_names=image_names,
            meta=meta,
            path=self.source,
            parts=parts,
            rows=rows,
            origin=list(origin.items()),
            recorded=recorded,
            answered={split: source in recorded for split, source in zip(splits, origin.values(), strict=True)},
        )

    def _parts(self, file: h5py.File, split_names: Sequence[str]) -> list["Part"]:
        """The datasets of the subjects and regions that are asked for, in the order in which they first occur."""
        found = {}
        for split in split_names:
            neural = hdf5.subgroup(file, f"{split}/neural_data")
            for subject in neural:
                for region in hdf5.subgroup(neural, subject):
                    shape = hdf5.numbers(neural, f"{subject}/{region}", 2).shape
                    found.setdefault((subject, region), Part(subject, region, shape[1]))
        parts = list(found.values())
        facts = [{"subject": part.subject, "region": part.region} for part in parts]
        keep = select_sites(facts, "subject", self.subject, "--subject", self.source)
        keep &= select_sites(facts, "region", self.region, "--region", self.source)
        if not keep.any():
            raise BadInput(f"{self.source}: no responses of subject {self.subject} in region {self.region}")
        return [part for part, kept in zip(parts, keep, strict=True) if kept]

    def _images(self, file: h5py.File, origin: dict[str, str]) -> tuple[Images, list[str]]:
        """Where the images lie, and the name of each stimulus's there."""
        if self.images is None:
            return ImageArrays(self.source), _image_rows(file, origin, self.image_dataset)
        if self.images.is_file() and h5py.is_hdf5(self.images):
            with hdf5.reading(self.images) as other:
                return ImageArrays(self.images), _image_rows(other, origin, self.image_dataset)
        files = ImageFiles(self.images)
        return files, files.find_all({name: [name] for name in origin})


@dataclass(frozen=True)
class Part:
    """The responses of one subject's region."""

    subject: str
    region: str
    sites: int

    def path(self, split: str) -> str:
        """Where they are in the file."""
        return f"{split}/neural_data/{self.subject}/{self.region}"

    def check(self, file: h5py.File, rows: Rows) -> None:
        """Refuse responses that do not fit the ids of their split or those of another split."""
        for (split, subject), found in rows.items():
            if subject != self.subject or not hdf5.has(file, self.path(split)):
                continue
            shape = hdf5.numbers(file, self.path(split), 2).shape
            expected = (sum(map(len, found.values())), self.sites)
            if shape != expected:
                raise BadInput(
                    f"{file.filename}: {self.path(split)} has the shape {shape}; expected is {expected}, "
                    "one row per stimulus id and the same sites in every split"
                )

    def describe(self, file: h5py.File) -> list[dict[str, Any]]:
        """The facts of its sites, the noise ceiling as a fraction of the variance among them."""
        sites = [
            {"id": f"{self.subject}_{self.region}_{k:04d}", "subject": self.subject, "region": self.region}
            for k in range(self.sites)
        ]
        path = f"noise_ceilings/{self.subject}/{self.region}"
        if hdf5.has(file, path):
            found = hdf5.numbers(file, path)
            if found.size != self.sites:
                raise BadInput(f"{hdf5.at(found)} has {found.size} values for {self.sites} sites")
            ceilings = found[()].ravel().astype(np.float64) / float(file.attrs.get("max_nc", 100.0))
            for site, ceiling in zip(sites, ceilings.tolist(), strict=True):
                site |= {"noise_ceiling": ceiling} if np.isfinite(ceiling) else {}
        return sites


@dataclass(kw_only=True)
class MbsH5Recording(PresentedRecording):
    """A file that `MbsH5.open` has checked.

    Attributes (beside those of `PresentedRecording`):
        path: the HDF5 file.
        parts: the subjects' regions, in the order of the sites.
        rows: {(split, subject): {stimulus: its rows}}.
        origin: each stimulus's id in the file and the split it is in there.
        recorded: the splits of the file that have responses.
    """

    path: Path
    parts: list[Part]
    rows: Rows
    origin: list[tuple[str, str]]
    recorded: set[str]

    def responses(self, indices: Sequence[int]) -> Iterator[tuple[np.ndarray | None, np.ndarray | None]]:
        """Yield rates and trials; NaN for the sites of a subject that did not see the stimulus."""
        repetitions = max(len(rows) for found in self.rows.values() for rows in found.values())
        block = max(1, TRIALS_BYTES // (4 * len(self.sites) * repetitions))
        with hdf5.reading(self.path) as file:
            for split, run in groupby(indices, key=lambda i: self.origin[i][1]):
                run = list(run)
                if split not in self.recorded:
                    yield from ((None, None) for _ in run)
                    continue
                for start in range(0, len(run), block):
                    names = [self.origin[i][0] for i in run[start : start + block]]
                    yield from rates_and_trials(self._trials(file, split, names), repetitions)

    def _trials(self, file: h5py.File, split: str, names: list[str]) -> Iterator[np.ndarray]:
        """Yield the trials of stimuli over all sites: float32 (presentations, sites)."""
        parts = [self._part_trials(file, part, split, names) for part in self.parts]
        for pieces in zip(*parts, strict=True):
            depth = max(len(piece) for piece in pieces)
            padded = [np.pad(p, ((0, depth - len(p)), (0, 0)), constant_values=np.nan) for p in pieces]
            yield np.concatenate(padded, axis=1)

    def _part_trials(self, file: h5py.File, part: Part, split: str, names: list[str]) -> Iterator[np.ndarray]:
        none = np.empty(0, np.int64)
        if not hdf5.has(file, part.path(split)):
            return iter([np.empty((0, part.sites), np.float32)] * len(names))
        found = hdf5.numbers(file, part.path(split), 2)
        rows = [self.rows[split, part.subject].get(name, none) for name in names]
        return gather_trials(found.__getitem__, rows, part.sites, hdf5.rows_at_once(found))


def _rows(file: h5py.File, split: str, subject: str) -> dict[str, np.ndarray]:
    """The rows of every stimulus that a subject saw in a split."""
    ids = hdf5.member(file, f"{split}/stimulus_ids")
    if isinstance(ids, h5py.Group):  # one dataset per subject
        return rows_by_stimulus(hdf5.texts(hdf5.dataset(ids, subject))) if hdf5.has(ids, subject) else {}
    return rows_by_stimulus(hdf5.texts(hdf5.dataset(file, f"{split}/stimulus_ids")))


def _origin(rows: Rows, path: Path) -> dict[str, str]:
    """{stimulus: the split it is in}, in the file's order."""
    origin: dict[str, str] = {}
    for (split, _), found in rows.items():
        for name in found:
            if (before := origin.setdefault(name, split)) != split:
                raise BadInput(f"{path}: stimulus {name!r} is in {before} and in {split}; it must be in one split")
    return origin


# ---- images in HDF5 ----------------------------------------------------------------------------------------------


@dataclass
class ImageArrays:
    """Arrays of images, uint8 (images, H, W, 3), in an HDF5 file; an image's name is DATASET#ROW."""

    path: Path

    @contextmanager
    def reading(self) -> Iterator[Callable[[str], Loaded]]:
        """Open for reading: a function from an image's name to the image, as lossless PNG."""
        with hdf5.reading(self.path) as file:
            yield lambda name: self._load(file, name)

    def _load(self, file: h5py.File, name: str) -> Loaded:
        found, _, row = name.rpartition("#")
        return encode_png(hdf5.dataset(file, found)[int(row)]), "png", {}


def _image_rows(file: h5py.File, origin: dict[str, str], named: str | None) -> list[str]:
    """The name, DATASET#ROW, of every stimulus's image."""
    candidates = IMAGE_NAMES if named is None else (named,)
    for name in candidates:
        if hdf5.has(file, name):
            row_of = _ids_of_array(file, hdf5.dataset(file, name))
            paths = dict.fromkeys(origin, name)
            break
        split_paths = {split: f"{split}/{name}" for split in set(origin.values())}
        if all(hdf5.has(file, path) for path in split_paths.values()):
            row_of = {}
            for split, path in split_paths.items():
                ids = hdf5.texts(hdf5.dataset(file, f"{split}/stimulus_ids"))
                row_of |= {stimulus: row for row, stimulus in enumerate(ids)}
                _check_images(hdf5.dataset(file, path), len(ids))
            paths = {stimulus: split_paths[split] for stimulus, split in origin.items()}
            break
    else:
        raise BadInput(
            f"{file.filename}: there is no array of images called {' or '.join(candidates)}, neither at the top nor "
            "in the splits; name one with --image-dataset, or a folder of images with --images"
        )
    if missing := [stimulus for stimulus in origin if stimulus not in row_of]:
        raise BadInput(
            f"{file.filename}: {len(missing)} of {len(origin)} stimuli have no image in {name}, {missing[0]!r} for one"
        )
    return [f"{paths[stimulus]}#{row_of[stimulus]}" for stimulus in origin]


def _ids_of_array(file: h5py.File, found: h5py.Dataset) -> dict[str, int]:
    """{stimulus: its row} of an array at the top of the file: by the ids beside it, else by number."""
    ids = next((name for name in IMAGE_IDS if hdf5.has(file, name)), None)
    names = list(map(str, range(len(found)))) if ids is None else hdf5.texts(hdf5.dataset(file, ids))
    _check_images(found, len(names))
    return {name: row for row, name in enumerate(names)}


def _check_images(found: h5py.Dataset, n: int) -> None:
    if found.dtype != np.uint8 or found.ndim != 4 or found.shape[0] != n or found.shape[3] != 3:
        raise BadInput(f"{hdf5.at(found)} is {found.dtype} {found.shape}; expected is uint8 ({n}, height, width, 3)")
