"""Source `it-h5`: IT_data.h5 of the EPFL course NX-414, normalised HvM images and rates of 168 IT sites.

The images in the file are float (N, 3, H, W), (x / 255 - mean) / std with ImageNet's mean and std. They are converted
back to uint8; the distance of the values from whole numbers shows whether they ever were uint8.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tyro
from pydantic import BaseModel

from data_prep.common.errors import BadInput
from data_prep.recording import SPLITS, Recording, Stimulus
from data_prep.sources.files import hdf5

if TYPE_CHECKING:
    import h5py

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# In uint8 steps. float32 leaves about 1e-4 and float16 up to 0.06; images that were never uint8 reach 0.5.
ROUNDING_WARNING = 0.1
RANGE_TOLERANCE = 0.5
PROBES = 4  # images per split that `open` checks


class ItH5(BaseModel, extra="forbid", use_attribute_docstrings=True):
    """The EPFL course's IT recording, IT_data.h5."""

    source: tyro.conf.Positional[Path]
    """The file IT_data.h5, with stimulus_*, object_* and spikes_* for train, val and test."""
    name: str | None = None
    """Name of the recording. Default: the file's name without its ending."""

    def open(self) -> Recording:
        """Check the file's structure, and a few images of each split.

        Raises:
            BadInput: naming the file, the dataset, and what would be right.
        """
        if not self.source.is_file():
            raise BadInput(f"{self.source}: no such file; SOURCE must be the course's IT_data.h5")
        with hdf5.open_file(self.source) as file:
            contents = {split: _check_split(file, split) for split in SPLITS}
            self._check_equal("image sizes", {split: content.image_shape for split, content in contents.items()})
            sites = {split: content.sites for split, content in contents.items() if content.sites is not None}
            self._check_equal("numbers of sites", sites)
            error = max(_probe_rounding_error(hdf5.dataset(file, f"stimulus_{split}")) for split in SPLITS)
        _, height, width = contents["train"].image_shape
        images = f"float (3, {height}, {width}), ImageNet normalisation undone, rounded to uint8, lossless PNG"
        return ItH5Recording(
            name=self.name or self.source.stem,
            provenance={
                "source": "it-h5",
                "path": str(self.source.resolve()),
                "images": images,
                "probed_uint8_rounding_error": error,
                "warnings": [rounding_warning(error)] if error > ROUNDING_WARNING else [],
            },
            sites=[{"id": f"site_{i:03d}", "region": "IT"} for i in range(sites["train"])],
            response_window_ms=(70.0, 170.0),
            stimulus_ids=[f"{split}_{i:05d}" for split in SPLITS for i in range(len(contents[split].objects))],
            splits=[split for split in SPLITS for _ in contents[split].objects],
            objects=[name for split in SPLITS for name in contents[split].objects],
            path=self.source,
            split_has_responses={split: content.has_responses for split, content in contents.items()},
        )

    def _check_equal(self, quantity: str, values: dict[str, Any]) -> None:
        if len(set(values.values())) > 1:
            raise BadInput(f"{self.source}: the splits have different {quantity}: {values}")


@dataclass(kw_only=True)
class ItH5Recording(Recording):
    """A file that `ItH5.open` has checked.

    Attributes (beside those of `Recording`):
        path: the HDF5 file.
    """

    path: Path

    def read(self, indices: Sequence[int]) -> Iterator[Stimulus]:
        """Yield the stimuli at `indices`; consecutive ones are read from the file in small blocks.

        `meta["uint8_rounding_error"]` is the largest distance of a value from a whole number, in uint8 steps.

        Raises:
            BadInput: an image with NaN or with values that cannot be ImageNet-normalised.
        """
        first = {split: self.splits.index(split) for split in set(self.splits)}
        with hdf5.open_file(self.path) as file:
            for block in self._blocks(file, indices, first):
                split = self.splits[block[0]]
                rows = slice(block[0] - first[split], block[-1] + 1 - first[split])
                yield from self._read_block(file, split, rows, block)

    def _read_block(self, file: h5py.File, split: str, rows: slice, block: list[int]) -> Iterator[Stimulus]:
        """The stimuli of a block, which are `rows` of a split."""
        from data_prep.common.image_decoding import encode_png  # slow to import

        assert self.objects is not None
        images = hdf5.dataset(file, f"stimulus_{split}")[rows]
        rates = None
        if self.has_responses(block[0]):
            rates = hdf5.dataset(file, f"spikes_{split}")[rows].astype(np.float32)
        for k, i in enumerate(block):
            pixels, error = denormalise(images[k], f"{self.path}: image {rows.start + k} of stimulus_{split}")
            yield Stimulus(
                id=self.stimulus_ids[i],
                image=encode_png(pixels.transpose(1, 2, 0)),
                encoding="png",
                rates=None if rates is None else rates[k],
                meta={"object": self.objects[i], "uint8_rounding_error": error},
            )

    def _blocks(self, file: h5py.File, indices: Sequence[int], first: dict[str, int]) -> Iterator[list[int]]:
        """Cut `indices` into runs of consecutive stimuli of one split that lie in one block of the file."""
        length = {split: hdf5.rows_at_once(hdf5.dataset(file, f"stimulus_{split}")) for split in first}
        block: list[int] = []
        for i in indices:
            split = self.splits[i]
            consecutive = block and i == block[-1] + 1 and self.splits[block[-1]] == split
            if block and not (consecutive and (i - first[split]) % length[split]):
                yield block
                block = []
            block.append(int(i))
        if block:
            yield block


# ---- images --------------------------------------------------------------------------------------------------------


def denormalise(image: np.ndarray, location: str) -> tuple[np.ndarray, float]:
    """Undo the ImageNet normalisation of float (3, H, W).

    Returns:
        uint8 (3, H, W), and the largest rounding error in uint8 steps, 0 to 0.5.

    Raises:
        BadInput: NaN or infinite values, or values outside 0..255 once undone; the message starts with `location`.
    """
    steps = _to_uint8_steps(image)
    if not np.isfinite(steps).all():
        raise BadInput(f"{location} has values that are NaN or infinite")
    low, high = float(steps.min()), float(steps.max())
    if low < -RANGE_TOLERANCE or high > 255 + RANGE_TOLERANCE:
        raise BadInput(
            f"{location} cannot be ImageNet-normalised: undone, its values range from {low:.1f} to {high:.1f} instead "
            "of 0 to 255; expected (x / 255 - mean) / std per channel"
        )
    whole = np.clip(np.rint(steps), 0, 255)
    return whole.astype(np.uint8), float(np.abs(steps - whole).max())


def rounding_warning(error: float) -> str:
    """The warning for an error above `ROUNDING_WARNING`."""
    return (
        f"the images differ from whole uint8 steps by up to {error:.2f}: they were never uint8 (perhaps resized in "
        "floating point), so the packed images are rounded"
    )


def _to_uint8_steps(image: np.ndarray) -> np.ndarray:
    """float (..., 3, H, W), normalised -> float32, same shape, in uint8 steps."""
    mean = np.float32(255) * np.array(IMAGENET_MEAN, np.float32)[:, None, None]
    std = np.float32(255) * np.array(IMAGENET_STD, np.float32)[:, None, None]
    with np.errstate(over="ignore", invalid="ignore"):  # inf and NaN are reported by the caller
        return image.astype(np.float32) * std + mean


def _probe_rounding_error(images: h5py.Dataset) -> float:
    """The largest rounding error of a few evenly spaced images, in uint8 steps.

    Raises:
        BadInput: values in another scale. Values in 0..1 and -1..1 fall into 0..255 when ImageNet's normalisation is
            undone, so the range alone is no proof: the right scale is the one that gives whole uint8 steps.
    """
    rows = np.unique(np.linspace(0, len(images) - 1, PROBES).round().astype(int))
    probes = np.stack([images[int(row)] for row in rows]).astype(np.float32)
    location = hdf5.location(images)
    error = max(denormalise(image, f"{location}: image {row}")[1] for row, image in zip(rows, probes, strict=True))
    if error > ROUNDING_WARNING:
        in_unit = probes.min() >= 0 and probes.max() <= 1
        if in_unit or (np.abs(probes).max() <= 1 and _distance_to_whole(probes * 127.5 + 127.5) < 0.01):
            raise BadInput(
                f"{location} cannot be ImageNet-normalised: its values lie in {'0..1' if in_unit else '-1..1'}; "
                "expected (x / 255 - mean) / std per channel"
            )
    return error


def _distance_to_whole(steps: np.ndarray) -> float:
    return float(np.abs(steps - np.rint(steps)).max())


# ---- the file's structure ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _SplitContents:
    """The content of a split of the file; `sites` is None if it has no spikes."""

    image_shape: tuple[int, ...]
    objects: list[str]
    sites: int | None
    has_responses: bool


def _check_split(file: h5py.File, split: str) -> _SplitContents:
    shape = _check_images(hdf5.dataset(file, f"stimulus_{split}"))
    objects = _objects(hdf5.dataset(file, f"object_{split}"), shape[0])
    if split == "test" and not hdf5.contains(file, "spikes_test"):
        return _SplitContents(shape[1:], objects, None, False)
    sites, has_responses = _check_spikes(hdf5.dataset(file, f"spikes_{split}"), shape[0])
    return _SplitContents(shape[1:], objects, sites, has_responses)


def _check_images(images: h5py.Dataset) -> tuple[int, ...]:
    """The shape (N, 3, H, W) of a dataset of images."""
    shape: tuple[int, ...] = images.shape or ()
    if images.dtype.kind != "f" or len(shape) != 4 or shape[1] != 3 or not all(shape):
        raise BadInput(f"{hdf5.location(images)} is {images.dtype} {shape}; expected float (stimuli, 3, height, width)")
    return shape


def _check_spikes(spikes: h5py.Dataset, stimuli: int) -> tuple[int, bool]:
    """The number of sites, and whether anything was recorded."""
    shape: tuple[int, ...] = spikes.shape or ()
    if spikes.dtype.kind not in "fiu" or len(shape) != 2 or shape[0] != stimuli or not all(shape):
        raise BadInput(
            f"{hdf5.location(spikes)} is {spikes.dtype} {shape}; expected numbers of shape ({stimuli}, sites)"
        )
    with np.errstate(over="ignore"):
        rates = spikes[()].astype(np.float32)
    if np.isinf(rates).any():
        row, site = np.argwhere(np.isinf(rates))[0]
        raise BadInput(
            f"{hdf5.location(spikes)}: the response of site {site} to stimulus {row} is infinite; use NaN if missing"
        )
    return shape[1], not bool(np.isnan(rates).all())


def _objects(data: h5py.Dataset, stimuli: int) -> list[str]:
    """The object names: latin-1, unless the file declares UTF-8."""
    import h5py

    location = hdf5.location(data)
    if not hdf5.is_text(data):
        raise BadInput(f"{location} is of type {data.dtype}; expected latin-1 strings of shape ({stimuli},)")
    if data.shape not in ((stimuli,), (stimuli, 1)):
        raise BadInput(f"{location} has the shape {data.shape}; expected ({stimuli},), one name per image")
    declared = h5py.check_string_dtype(data.dtype)
    encoding = "utf-8" if declared and declared.encoding == "utf-8" else "latin-1"
    names = [bytes(name).decode(encoding, "replace").strip("\x00 \t\r\n") for name in data[()].reshape(-1)]
    if "" in names:
        raise BadInput(f"{location}: the object of stimulus {names.index('')} is empty; every image needs one")
    return names
