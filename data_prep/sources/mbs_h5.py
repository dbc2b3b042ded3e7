"""Source `mbs-h5`: HDF5 with responses per split, subject and region, a format for model-brain comparisons.

    /{split}/stimulus_ids                       (stimuli,), or a group with one such dataset per subject
    /{split}/neural_data/{subject}/{region}     (stimuli, sites)
    /noise_ceilings/{subject}/{region}          (sites,), in percent of the attribute max_nc; optional

If an id is repeated in a split, its rows are trials. The images are files named by id, or an array in this or another
HDF5 file: beside the ids of a split, with its own ids, or indexed by ids that are numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress, groupby, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tyro

from data_prep.common.errors import BadInput
from data_prep.recording import SPLITS, Recording
from data_prep.sources.files import hdf5
from data_prep.sources.files.held_out import HeldOutVal
from data_prep.sources.files.ids import safe_ids, select_sites, source_id
from data_prep.sources.files.image_files import EncodedImage, ImageFiles
from data_prep.sources.files.named_images_recording import ImageStore, NamedImagesRecording
from data_prep.sources.files.presentations import (
    gather_trials,
    pad_repetitions,
    rates_and_trials,
    rows_by_stimulus,
    rows_in_memory,
)
from data_prep.splits import Dealt

if TYPE_CHECKING:
    import h5py

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
    """Name of the array of images in the HDF5 file. Default: stimuli, images, pictures or imgBrick."""
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
        with hdf5.open_file(self.source) as file:
            file_splits = [split for split in SPLITS if hdf5.contains(file, split)]
            if not file_splits:
                content = ", ".join(sorted(file)) or "nothing"
                raise BadInput(f"{self.source}: expected groups train, val, test; it holds {content}")
            areas = self._areas(file, file_splits)
            subjects = list(dict.fromkeys(area.subject for area in areas))
            rows = {(split, subject): _rows(file, split, subject) for split in file_splits for subject in subjects}
            for area in areas:
                area.check(file, rows)
            split_of = self._split_of_stimuli(rows)
            images, image_names = self._find_images(file, split_of)
            sites = [site for area in areas for site in area.sites(file)]
            recorded = {split for split in file_splits if any(hdf5.contains(file, area.path(split)) for area in areas)}
        names, ids = list(split_of), safe_ids(list(split_of))
        meta = [source_id(name, safe_id) for name, safe_id in zip(names, ids, strict=True)]
        dealt = self._splits(list(split_of.values()), file_splits, meta)
        return MbsH5Recording(
            name=self.name or self.source.stem,
            provenance={
                "source": "mbs-h5",
                "path": str(self.source.resolve()),
                "selected": {"subject": self.subject, "region": self.region},
                "split": dealt.rule,
            },
            sites=sites,
            units=self.units,
            stimulus_ids=ids,
            splits=dealt.splits,
            deal=dealt.deal,
            group_by=self.group_by,
            images=images,
            image_names=image_names,
            meta=meta,
            path=self.source,
            areas=areas,
            rows=rows,
            origin=list(split_of.items()),
            recorded=recorded,
            split_has_responses={
                split: file_split in recorded for split, file_split in zip(dealt.splits, split_of.values(), strict=True)
            },
        )

    def _areas(self, file: h5py.File, file_splits: Sequence[str]) -> list[Area]:
        """The areas of the selected subjects and regions, in the order in which they first occur."""
        areas: dict[tuple[str, str], Area] = {}
        for split in file_splits:
            neural = hdf5.subgroup(file, f"{split}/neural_data")
            for subject in neural:
                for region in hdf5.subgroup(neural, subject):
                    shape = hdf5.numeric_dataset(neural, f"{subject}/{region}", 2).shape
                    areas.setdefault((subject, region), Area(subject, region, shape[1]))
        facts = [{"subject": subject, "region": region} for subject, region in areas]
        keep = select_sites(facts, "subject", self.subject, "--subject", self.source)
        keep &= select_sites(facts, "region", self.region, "--region", self.source)
        if not keep.any():
            raise BadInput(f"{self.source}: no responses of subject {self.subject} in region {self.region}")
        return list(compress(areas.values(), keep))

    def _split_of_stimuli(self, rows: Rows) -> dict[str, str]:
        """{stimulus: the split it is in}, in the file's order."""
        split_of: dict[str, str] = {}
        for (split, _), stimuli in rows.items():
            for name in stimuli:
                if (first := split_of.setdefault(name, split)) != split:
                    raise BadInput(
                        f"{self.source}: stimulus {name!r} is in both {first} and {split}; it must be in one split"
                    )
        return split_of

    def _splits(self, in_file: list[str], file_splits: Sequence[str], meta: list[dict[str, Any]]) -> Dealt:
        """The split of every stimulus; val is taken from train if the file has none."""
        if "val" in file_splits:
            self.refuse_split_options(f"{self.source} has a split val")
        training = [i for i, split in enumerate(in_file) if split == "train"]
        if "val" in file_splits or not training:
            return Dealt(in_file, "as in the file")
        return self.assign([meta[i] for i in training], self.source).within(in_file, training)

    def _find_images(self, file: h5py.File, split_of: Mapping[str, str]) -> tuple[ImageStore, list[str]]:
        """Where the images are stored, and the name of each stimulus's image there."""
        import h5py

        if self.images is None:
            return ImageArrays(self.source), _image_rows(file, split_of, self.image_dataset)
        if self.images.is_file() and h5py.is_hdf5(self.images):
            with hdf5.open_file(self.images) as image_file:
                return ImageArrays(self.images), _image_rows(image_file, split_of, self.image_dataset)
        files = ImageFiles(self.images)
        return files, files.find_all({name: [name] for name in split_of})


# ---- responses -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Area:
    """One subject's region, recorded at a number of sites."""

    subject: str
    region: str
    site_count: int

    def path(self, split: str) -> str:
        """Where its responses are in the file."""
        return f"{split}/neural_data/{self.subject}/{self.region}"

    def check(self, file: h5py.File, rows: Rows) -> None:
        """Refuse responses whose shape does not fit the ids of their split, or differs between splits."""
        for (split, subject), stimuli in rows.items():
            if subject != self.subject or not hdf5.contains(file, self.path(split)):
                continue
            shape = hdf5.numeric_dataset(file, self.path(split), 2).shape
            expected = (sum(map(len, stimuli.values())), self.site_count)
            if shape != expected:
                raise BadInput(
                    f"{file.filename}: {self.path(split)} has the shape {shape}; expected {expected}, "
                    "one row per stimulus id and the same sites in every split"
                )

    def sites(self, file: h5py.File) -> list[dict[str, Any]]:
        """The facts about its sites, with the noise ceiling as a fraction of the variance."""
        sites: list[dict[str, Any]] = [
            {"id": f"{self.subject}_{self.region}_{k:04d}", "subject": self.subject, "region": self.region}
            for k in range(self.site_count)
        ]
        path = f"noise_ceilings/{self.subject}/{self.region}"
        if not hdf5.contains(file, path):
            return sites
        data = hdf5.numeric_dataset(file, path)
        if data.size != self.site_count:
            raise BadInput(f"{hdf5.location(data)} has {data.size} values for {self.site_count} sites")
        ceilings = data[()].ravel().astype(np.float64) / float(file.attrs.get("max_nc", 100.0))
        for site, ceiling in zip(sites, ceilings.tolist(), strict=True):
            if np.isfinite(ceiling):
                site["noise_ceiling"] = ceiling
        return sites


@dataclass(kw_only=True)
class MbsH5Recording(NamedImagesRecording):
    """A file that `MbsH5.open` has checked.

    Attributes (beside those of `NamedImagesRecording`):
        path: the HDF5 file.
        areas: in the order of the sites.
        rows: {(split, subject): {stimulus: its rows}}.
        origin: each stimulus's id in the file and the split it is in there.
        recorded: the splits of the file that have responses.
    """

    path: Path
    areas: list[Area]
    rows: Rows
    origin: list[tuple[str, str]]
    recorded: set[str]

    def responses(self, indices: Sequence[int]) -> Iterator[tuple[np.ndarray | None, np.ndarray | None]]:
        """Yield rates and trials; NaN for the sites of a subject that did not see the stimulus."""
        repetitions = max(len(rows) for stimuli in self.rows.values() for rows in stimuli.values())
        block = rows_in_memory(len(self.sites) * repetitions)
        with hdf5.open_file(self.path) as file:
            for split, consecutive in groupby((self.origin[i] for i in indices), key=lambda origin: origin[1]):
                names = [name for name, _ in consecutive]
                if split not in self.recorded:
                    yield from ((None, None) for _ in names)
                    continue
                for start in range(0, len(names), block):
                    trials = self._trials(file, split, names[start : start + block])
                    yield from rates_and_trials(trials, repetitions)

    def _trials(self, file: h5py.File, split: str, names: list[str]) -> Iterator[np.ndarray]:
        """Yield the trials of stimuli over all sites: float32 (presentations, sites)."""
        trials_per_area = [self._area_trials(file, area, split, names) for area in self.areas]
        for area_trials in zip(*trials_per_area, strict=True):
            repetitions = max(map(len, area_trials))
            yield np.concatenate([pad_repetitions(trials, repetitions) for trials in area_trials], axis=1)

    def _area_trials(self, file: h5py.File, area: Area, split: str, names: list[str]) -> Iterator[np.ndarray]:
        if not hdf5.contains(file, area.path(split)):
            return repeat(np.empty((0, area.site_count), np.float32), len(names))
        responses = hdf5.numeric_dataset(file, area.path(split), 2)
        not_shown = np.empty(0, np.int64)
        rows = [self.rows[split, area.subject].get(name, not_shown) for name in names]
        return gather_trials(responses.__getitem__, rows, area.site_count, hdf5.rows_at_once(responses))


def _rows(file: h5py.File, split: str, subject: str) -> dict[str, np.ndarray]:
    """The rows of every stimulus that a subject saw in a split."""
    ids = hdf5.member(file, f"{split}/stimulus_ids")
    if not hdf5.is_group(ids):
        return rows_by_stimulus(hdf5.read_texts(hdf5.dataset(file, f"{split}/stimulus_ids")))
    if not hdf5.contains(ids, subject):
        return {}
    return rows_by_stimulus(hdf5.read_texts(hdf5.dataset(ids, subject)))


# ---- images in HDF5 ------------------------------------------------------------------------------------------------


@dataclass
class ImageArrays:
    """Arrays of images, uint8 (images, H, W, 3), in an HDF5 file; an image's name is DATASET#ROW."""

    path: Path

    @contextmanager
    def reading(self) -> Iterator[Callable[[str], EncodedImage]]:
        """Open for reading: a function from an image's name to the image, as lossless PNG."""
        with hdf5.open_file(self.path) as file:
            yield lambda name: _load_image(file, name)


def _load_image(file: h5py.File, name: str) -> EncodedImage:
    from data_prep.common.image_decoding import encode_png  # slow to import

    path, _, row = name.rpartition("#")
    return EncodedImage(encode_png(hdf5.dataset(file, path)[int(row)]), "png", f"{file.filename}: {path}, row {row}")


def _image_rows(file: h5py.File, split_of: Mapping[str, str], named: str | None) -> list[str]:
    """The name, DATASET#ROW, of every stimulus's image."""
    candidates = IMAGE_NAMES if named is None else (named,)
    splits = dict.fromkeys(split_of.values())
    for name in candidates:
        if hdf5.contains(file, name):
            row_of = _rows_in_array(file, name)
            image_names = {stimulus: f"{name}#{row_of[stimulus]}" for stimulus in split_of if stimulus in row_of}
        elif all(hdf5.contains(file, f"{split}/{name}") for split in splits):
            row_of_split = {split: _rows_in_split_array(file, split, name) for split in splits}
            image_names = {
                stimulus: f"{split}/{name}#{row_of_split[split][stimulus]}"
                for stimulus, split in split_of.items()
                if stimulus in row_of_split[split]
            }
        else:
            continue
        if missing := [stimulus for stimulus in split_of if stimulus not in image_names]:
            raise BadInput(
                f"{file.filename}: {len(missing)} of {len(split_of)} stimuli have no image in {name}, "
                f"e.g. {missing[0]!r}"
            )
        return list(image_names.values())
    raise BadInput(
        f"{file.filename}: there is no array of images named {' or '.join(candidates)}, neither at the top level "
        "nor in the splits; name one with --image-dataset, or a folder of images with --images"
    )


def _rows_in_array(file: h5py.File, name: str) -> dict[str, int]:
    """{stimulus: its row} in an array at the top of the file: by the ids beside it, else by number."""
    images = hdf5.dataset(file, name)
    ids_name = next((ids for ids in IMAGE_IDS if hdf5.contains(file, ids)), None)
    if ids_name is None:
        ids = [str(row) for row in range(len(images))]
    else:
        ids = hdf5.read_texts(hdf5.dataset(file, ids_name))
    _check_images(images, len(ids))
    return {stimulus: row for row, stimulus in enumerate(ids)}


def _rows_in_split_array(file: h5py.File, split: str, name: str) -> dict[str, int]:
    """{stimulus: its row} in the array of a split, which is in the order of its ids."""
    ids = hdf5.read_texts(hdf5.dataset(file, f"{split}/stimulus_ids"))
    _check_images(hdf5.dataset(file, f"{split}/{name}"), len(ids))
    return {stimulus: row for row, stimulus in enumerate(ids)}


def _check_images(images: h5py.Dataset, count: int) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[0] != count or images.shape[3] != 3:
        raise BadInput(
            f"{hdf5.location(images)} is {images.dtype} {images.shape}; expected uint8 ({count}, height, width, 3)"
        )
