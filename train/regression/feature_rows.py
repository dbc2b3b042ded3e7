"""The features of this rank's stimuli, row after row, where a layer has few enough of them to be regressed on directly.

They stay on disk as they are, and are scaled as they are read: each module of several to a mean square, and by
the root of a window over the map.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from train.distributed.runtime import Runtime
from train.models.windows import Window
from train.regression.feature_slices import StoredActivations

BLOCK_COPIES = 4  # of a block of rows in memory at a time, in float32


class FeatureRows:
    """The rows of a matrix, float32 (stimuli of this rank, features of all modules), read as they are asked for.

    Attributes:
        shape: of the matrix.
        dtype: of its elements.
        positions: of this rank's stimuli among all.

    Args:
        activations: of all stimuli.
        modules: names, whose features follow one another.
        scale: of the features, float32 (features,); 1 where None.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, activations: StoredActivations, modules: Sequence[str], scale: np.ndarray | None = None):
        self._activations, self._modules, self._scale = activations, modules, scale
        self._widths = [activations.width(module) for module in modules]
        self._ranges = [part for part in activations.row_ranges() if part.rank == activations.runtime.rank]
        self.positions = np.concatenate([np.arange(part.count) + part.position for part in self._ranges])
        self.shape = (len(self.positions), sum(self._widths))

    def scaled(self, scale: np.ndarray) -> "FeatureRows":
        """The same features, each times its scale."""
        return FeatureRows(self._activations, self._modules, scale.astype(np.float32))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Some consecutive rows, a fresh array."""
        first, stop, _ = rows.indices(len(self))
        features, start = np.empty((max(stop - first, 0), self.shape[1]), np.float32), 0
        for part in self._ranges:
            begin, end = max(first, start), min(stop, start + part.count)
            if begin < end:
                self._read(features[begin - first : end - first], part.split, begin - start)
            start += part.count
        if self._scale is not None:
            features *= self._scale
        return features

    def _read(self, out: np.ndarray, split: int, first_row: int) -> None:
        column, store = 0, self._activations.own_stores[split]
        for module, width in zip(self._modules, self._widths, strict=True):
            store.read_columns(module, 0, out[:, column : column + width], first_row)
            column += width


def mean_squares(rows: FeatureRows, runtime: Runtime, stimuli: int, memory_bytes: float) -> np.ndarray:
    """The variance of each feature over the stimuli of all ranks, float64 (features,)."""
    height = max(int(memory_bytes / (BLOCK_COPIES * rows.dtype.itemsize * rows.shape[1])), 1)
    blocks = [slice(start, start + height) for start in range(0, len(rows), height)]

    def sum_over_ranks(sums: np.ndarray) -> np.ndarray:
        return runtime.sum(torch.from_numpy(sums).to(runtime.device)).cpu().numpy()

    total = np.zeros(rows.shape[1])
    for block in blocks:
        total += rows[block].sum(axis=0, dtype=np.float64)
    mean = sum_over_ranks(total) / stimuli
    squares = np.zeros(rows.shape[1])
    for block in blocks:
        centred = rows[block] - mean.astype(np.float32)
        squares += np.einsum("nf,nf->f", centred, centred, dtype=np.float64)
    return sum_over_ranks(squares) / stimuli


def window_scale(
    window: Window,
    map_sizes: Mapping[str, tuple[int, int]],
    widths: Mapping[str, int],
    variance: np.ndarray,
    modules: Mapping[str, float],
) -> np.ndarray:
    """The scale of each feature through a window, float64 (features,): the root of the window at its position.

    Several modules are each also brought to a mean square.

    Args:
        window: over the map.
        map_sizes: (rows, columns) of positions of each module, which vary fastest among its features.
        widths: number of features of each module, in order.
        variance: of each feature, float64 (features,).
        modules: the mean square of each.
    """
    scales, start = [], 0
    for module, width in widths.items():
        weights = window.weights(*map_sizes[module]).astype(np.float64)
        of_features = np.tile(weights, width // len(weights))
        if len(widths) > 1:
            of_features /= (of_features @ variance[start : start + width]) or 1.0
            of_features *= modules[module]
        scales.append(np.sqrt(of_features))
        start += width
    return np.concatenate(scales)
