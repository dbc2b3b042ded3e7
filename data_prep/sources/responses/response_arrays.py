"""Arrays of rates or trials, memory-mapped if they are in .npy files."""

import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_prep.common import safe_reading
from data_prep.common.errors import BadInput

_BLOCK_BYTES = 32 * 2**20  # responses are checked in blocks of this size


class ResponseArray(Protocol):
    """An array (stimuli, ..., sites) that is indexed by stimuli, such as numpy's."""

    def __getitem__(self, stimuli: Any, /) -> np.ndarray:
        """The responses to some stimuli."""


@dataclass(frozen=True)
class Responses:
    """A file of responses.

    Attributes:
        path: of the file.
        shape: (stimuli, sites) or (stimuli, repetitions, sites).
        array: the responses in memory, or an array that computes them; None if they are read from a .npy file.
        site_ids: if the file names its sites.
        rows: how the rows of the file were matched to stimuli, for the manifest.
        warnings: about the matching.
    """

    path: Path
    shape: tuple[int, ...]
    array: ResponseArray | None = field(default=None, repr=False)
    site_ids: list[str] | None = None
    rows: str = "in the order of the stimuli"
    warnings: tuple[str, ...] = ()

    def load(self) -> ResponseArray:
        """The responses, memory-mapped if they are in a .npy file."""
        return self.array if self.array is not None else map_npy(self.path)

    def check_shape(self, stimuli: int, axes: tuple[str, ...]) -> None:
        """Refuse a shape that does not have these axes (names, for the message) and this number of stimuli."""
        shape = self.shape
        if len(shape) == len(axes) and shape[0] == stimuli and all(shape):
            return
        expected = f"({stimuli}, {', '.join(axes[1:])}), that is ({', '.join(axes)})"
        hint = "; it may be transposed" if len(shape) == len(axes) and stimuli in shape[1:] else ""
        raise BadInput(f"{self.path}: the shape is {shape}, expected {expected}{hint}")

    def check_finite(self, stimulus_ids: list[str], site_ids: list[str]) -> np.ndarray:
        """Refuse infinite responses; reads block by block.

        Returns:
            bool (stimuli,): whether any response to the stimulus was recorded.
        """
        numbers = self.load()
        rows = max(1, _BLOCK_BYTES // max(1, numbers[0].nbytes))
        recorded = np.zeros(len(stimulus_ids), dtype=bool)
        for start in range(0, len(stimulus_ids), rows):
            block = as_float32(numbers[start : start + rows])
            if np.isinf(block).any():
                position = np.argwhere(np.isinf(block))[0]
                raise BadInput(
                    f"{self.path}: the response of site {site_ids[position[-1]]!r} to stimulus "
                    f"{stimulus_ids[start + position[0]]!r} is infinite; use NaN for missing responses"
                )
            recorded[start : start + rows] = ~np.isnan(block).reshape(len(block), -1).all(axis=1)
        return recorded


def map_npy(path: Path) -> np.ndarray:
    """A .npy file of plain numbers as a memory map; raises BadInput for anything else."""
    if zipfile.is_zipfile(path):
        raise BadInput(f"{path}: this is an .npz archive; save the one array with np.save")
    try:
        array = safe_reading.map_npy(path)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: not a readable .npy file of plain numbers ({error})") from error
    if array.dtype.kind not in "fiu":
        raise BadInput(f"{path}: the numbers are of type {array.dtype}; save float32")
    return array


def open_npy(path: Path) -> Responses:
    """A .npy file of plain numbers, not read yet; raises BadInput for anything else."""
    return Responses(path, map_npy(path).shape)


def as_float32(numbers: np.ndarray) -> np.ndarray:
    """A float32 copy; numbers too large for float32 become inf, which is refused later."""
    with np.errstate(over="ignore"):
        return np.array(numbers, dtype=np.float32)
