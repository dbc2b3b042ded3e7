"""Source `it-h5`: IT_data.h5 of the EPFL course NX-414, normalised HvM images and rates of 168 IT sites.

The images in the file are float (N, 3, H, W), (x / 255 - mean) / std with ImageNet's mean and std. They are brought
back to the uint8 they were made from; how far the values are from whole numbers tells whether they ever were.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import tyro
from pydantic import BaseModel

from data_prep.common.errors import BadInput
from data_prep.common.image_decoding import encode_png
from data_prep.recording import SPLITS, Recording, Stimulus
from data_prep.sources.files import hdf5

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# In uint8 steps. float32 leaves about 1e-4 and float16 up to 0.06; images that never were uint8 reach 0.5.
ROUNDING_WARNING = 0.1
RANGE_TOLERANCE = 0.5
PROBES = 4  # images per split that `open` looks at

_BLOCK_IMAGES = 16


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
        with hdf5.reading(self.source) as file:
            size = {split: _check_images(hdf5.dataset(file, f"stimulus_{split}")) for split in SPLITS}
            _check_equal(self.source, "image sizes", {split: shape[1:] for split, shape in size.items()})
            count = {split: shape[0] for split, shape in size.items()}
            objects = {split: _objects(hdf5.dataset(file, f"object_{split}"), count[split]) for split in SPLITS}
            sites, answered = {}, {}
            for split in SPLITS:
                if split == "test" and not hdf5.has(file, "spikes_test"):
                    answered[split] = False
                    continue
                sites[split], answered[split] = _check_spikes(hdf5.dataset(file, f"spikes_{split}"), count[split])
            _check_equal(self.source, "numbers of sites", sites)
            error = max(_probe(hdf5.dataset(file, f"stimulus_{split}")) for split in SPLITS)
        height, width = size["train"][2:]
        provenance = {
            "source": "it-h5",
            "path": str(self.source.resolve()),
            "images": f"float (3, {height}, {width}), ImageNet normalisation undone, rounded to uint8, lossless PNG",
            "probed_uint8_rounding_error": error,
            "warnings": [rounding_warning(error)] if error > ROUNDING_WARNING else [],
        }
        return ItH5Recording(
            name=self.name or self.source.stem,
            provenance=provenance,
            sites=[{"id": f"site_{i:03d}", "region": "IT"} for i in range(sites["train"])],
            stimulus_ids=[f"{split}_{i:05d}" for split in SPLITS for i in range(count[split])],
            splits=[split for split in SPLITS for _ in range(count[split])],
            objects=[name for split in SPLITS for name in objects[split]],
            path=self.source,
            answered=answered,
        )


@dataclass(kw_only=True)
class ItH5Recording(Recording):
    """A file that `ItH5.open` has checked.

    Attributes (beside those of `Recording`):
        path: the HDF5 file.
    """

    path: Path
    response_window_ms: tuple[float, float] | None = (70.0, 170.0)

    def read(self, indices: Sequence[int]) -> Iterator[Stimulus]:
        """Yield the stimuli at `indices`; consecutive ones are read from the file in small blocks.

        `meta["uint8_rounding_error"]` is the largest distance of a value from a whole number, in uint8 steps.

        Raises:
            BadInput: an image with NaN or with values that cannot be ImageNet-normalised.
        """
        first = {split: self.splits.index(split) for split in set(self.splits)}
        with hdf5.reading(self.path) as file:
            for run in self._blocks(file, indices, first):
                split = self.splits[run[0]]
                rows = slice(run[0] - first[split], run[-1] + 1 - first[split])
                images = hdf5.dataset(file, f"stimulus_{split}")[rows]
                rates = None
                if self.answered[split]:
                    rates = hdf5.dataset(file, f"spikes_{split}")[rows].astype(np.float32)
                for k, i in enumerate(run):
                    where = f"{self.path}: image {rows.start + k} of stimulus_{split}"
                    uint8, error = denormalise(images[k], where)
                    yield Stimulus(
                        id=self.stimulus_ids[i],
                        image=encode_png(uint8.transpose(1, 2, 0)),
                        encoding="png",
                        rates=None if rates is None else rates[k],
                        meta={"object": self.objects[i], "uint8_rounding_error": error},
                    )

    def _blocks(self, file: h5py.File, indices: Sequence[int], first: dict[str, int]) -> Iterator[list[int]]:
        """Cut `indices` into runs of consecutive stimuli of one split that lie in one block of the file."""
        length = {split: _block_length(hdf5.dataset(file, f"stimulus_{split}")) for split in first}
        run: list[int] = []
        for i in indices:
            split = self.splits[i]
            fits = run and i == run[-1] + 1 and self.splits[run[-1]] == split
            if run and not (fits and (i - first[split]) % length[split]):
                yield run
                run = []
            run.append(int(i))
        if run:
            yield run


def denormalise(image: np.ndarray, where: str) -> tuple[np.ndarray, float]:
    """Undo the ImageNet normalisation of float (3, H, W).

    Returns:
        uint8 (3, H, W), and the largest rounding error in uint8 steps, 0 to 0.5.

    Raises:
        BadInput: NaN or infinite values, or values outside 0..255 once undone; the message starts with `where`.
    """
    steps = _to_steps(image)
    if not np.isfinite(steps).all():
        raise BadInput(f"{where} has values that are NaN or infinite")
    low, high = float(steps.min()), float(steps.max())
    if low < -RANGE_TOLERANCE or high > 255 + RANGE_TOLERANCE:
        raise BadInput(
            f"{where} cannot be ImageNet-normalised: undone, its values go from {low:.1f} to {high:.1f} instead of "
            "0 to 255; expected is (x / 255 - mean) / std per channel"
        )
    whole = np.clip(np.rint(steps), 0, 255)
    return whole.astype(np.uint8), float(np.abs(steps - whole).max())


def rounding_warning(error: float) -> str:
    """What an error above `ROUNDING_WARNING` means."""
    return (
        f"the images differ from whole uint8 steps by up to {error:.2f}: they never were uint8 (resized in floating "
        "point, say), so the packed images are rounded ones"
    )


def _to_steps(image: np.ndarray) -> np.ndarray:
    """float (..., 3, H, W), normalised -> float32, same shape, in uint8 steps."""
    mean = np.float32(255) * np.array(IMAGENET_MEAN, np.float32)[:, None, None]
    std = np.float32(255) * np.array(IMAGENET_STD, np.float32)[:, None, None]
    with np.errstate(over="ignore", invalid="ignore"):  # inf and NaN are reported by the caller
        return image.astype(np.float32) * std + mean


# ---- the file's structure ------------------------------------------------------------------------------------------


def _check_equal(path: Path, what: str, values: dict[str, Any]) -> None:
    if len(set(values.values())) > 1:
        raise BadInput(f"{path}: the splits have different {what}: {values}")


def _check_images(dataset: h5py.Dataset) -> tuple[int, ...]:
    """The shape (N, 3, H, W) of a dataset of images."""
    shape = dataset.shape or ()
    if dataset.dtype.kind != "f" or len(shape) != 4 or shape[1] != 3 or not all(shape):
        raise BadInput(f"{hdf5.at(dataset)} is {dataset.dtype} {shape}; expected is float (stimuli, 3, height, width)")
    return shape


def _check_spikes(dataset: h5py.Dataset, n: int) -> tuple[int, bool]:
    """The number of sites, and whether anything was recorded."""
    shape = dataset.shape or ()
    if dataset.dtype.kind not in "fiu" or len(shape) != 2 or shape[0] != n or not all(shape):
        raise BadInput(f"{hdf5.at(dataset)} is {dataset.dtype} {shape}; expected are numbers, shape ({n}, sites)")
    with np.errstate(over="ignore"):
        rates = dataset[()].astype(np.float32)
    if np.isinf(rates).any():
        row, site = np.argwhere(np.isinf(rates))[0]
        raise BadInput(
            f"{hdf5.at(dataset)}: the response of site {site} to stimulus {row} is infinite; use NaN if missing"
        )
    return shape[1], not bool(np.isnan(rates).all())


def _objects(dataset: h5py.Dataset, n: int) -> list[str]:
    """The object names: latin-1 bytes, unless the file itself declares UTF-8."""
    if not hdf5.is_text(dataset):
        raise BadInput(f"{hdf5.at(dataset)} is of type {dataset.dtype}; expected are latin-1 strings, shape ({n},)")
    if dataset.shape not in ((n,), (n, 1)):
        raise BadInput(f"{hdf5.at(dataset)} has the shape {dataset.shape}; expected is ({n},), one name per image")
    declared = h5py.check_string_dtype(dataset.dtype)
    encoding = "utf-8" if declared and declared.encoding == "utf-8" else "latin-1"
    names = [bytes(n).decode(encoding, "replace").strip("\x00 \t\r\n") for n in dataset[()].reshape(-1)]
    if "" in names:
        raise BadInput(f"{hdf5.at(dataset)}: the object of stimulus {names.index('')} is empty; every image needs one")
    return names


def _block_length(dataset: h5py.Dataset) -> int:
    """How many images to read at once: whole chunks, so that none is decompressed twice, and never much memory."""
    image_bytes = max(1, dataset.dtype.itemsize * int(np.prod(dataset.shape[1:])))
    chunk = dataset.chunks[0] if dataset.chunks else 1
    length = chunk * -(-_BLOCK_IMAGES // chunk)
    return max(1, min(length, hdf5.BLOCK_BYTES // image_bytes))


def _probe(dataset: h5py.Dataset) -> float:
    """Look at a few evenly spaced images: their largest rounding error, in uint8 steps.

    Raises:
        BadInput: values in another scale. Those of 0..1 and -1..1 fall into 0..255 when ImageNet's normalisation is
            undone, so the range alone does not tell: images are judged by which scale makes whole uint8 steps.
    """
    rows = np.unique(np.linspace(0, len(dataset) - 1, PROBES).round().astype(int))
    images = np.stack([dataset[int(row)] for row in rows]).astype(np.float32)
    error = max(
        denormalise(image, f"{hdf5.at(dataset)}: image {row}")[1] for row, image in zip(rows, images, strict=True)
    )
    if error > ROUNDING_WARNING:
        in_unit = images.min() >= 0 and images.max() <= 1
        if in_unit or (np.abs(images).max() <= 1 and _distance_to_whole(images * 127.5 + 127.5) < 0.01):
            raise BadInput(
                f"{hdf5.at(dataset)} cannot be ImageNet-normalised: its values lie in "
                f"{'0..1' if in_unit else '-1..1'}; expected is (x / 255 - mean) / std per channel"
            )
    return error


def _distance_to_whole(steps: np.ndarray) -> float:
    return float(np.abs(steps - np.rint(steps)).max())
