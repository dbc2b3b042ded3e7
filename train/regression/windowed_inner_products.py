"""Inner products of a layer through many windows over its map at once.

Through a window g they are sum_p g_p K_p, with K_p the inner products of the features at position p
(`train/models/windows.py`). On a map with at most as many positions as there are windows the K_p are computed once,
which costs as many multiplications as the whole map does, and then mixed; on a larger map (pixels) each window has
products of its own.

Memory: matrices of n x n numbers for each window and position are too many at once where n is large. Half of the bound
on memory sets how many of their rows are computed at a time, and the activations are read again for each such stripe.
The other half is for blocks of activations.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from train.models.windows import Window
from train.regression.feature_slices import StoredActivations
from train.regression.precision import COLUMNS_PER_PRODUCT, product

# Bytes per element of a matrix: a float64 sum, with a float32 term for products at a position.
WINDOW_BYTES = 8
POSITION_BYTES = 12


def windowed_inner_products(
    windows: Sequence[Window],
    modules: Mapping[str, float],
    map_sizes: Mapping[str, tuple[int, int]],
    activations: StoredActivations,
) -> Iterator[torch.Tensor]:
    """Inner products of the features of one or more modules together, centred on the mean of all stimuli.

    The features of several modules are each scaled to a mean square, through each window; otherwise the module with the
    largest activations would dominate. A single module stays as it is.

    Args:
        windows: over the map.
        modules: the mean square of each module, by name.
        map_sizes: (rows, columns) of positions of each module.
        activations: of all stimuli.

    Yields:
        From top to bottom, float64 (windows, rows, stimuli): rows of the matrices, once summed over ranks.
    """
    weights = {
        module: position_weights(
            windows, module, map_sizes[module], activations, mean_square if len(modules) > 1 else None
        )
        for module, mean_square in modules.items()
    }
    mixed = {module: module_weights.shape[1] <= len(windows) for module, module_weights in weights.items()}
    stimuli, device = activations.stimuli, activations.runtime.device
    positions = max((weights[module].shape[1] for module in modules if mixed[module]), default=0)
    row_bytes = stimuli * (WINDOW_BYTES * len(windows) + POSITION_BYTES * positions)
    height = max(int(activations.memory_bytes / 2 / row_bytes), 1)
    for start in range(0, stimuli, height):
        rows = slice(start, min(start + height, stimuli))
        total = torch.zeros(len(windows), rows.stop - start, stimuli, dtype=torch.float64, device=device)
        for module in weights:
            add_products = _add_mixed_positions if mixed[module] else _add_window_by_window
            add_products(total, rows, weights[module], module, activations)
        yield total


def position_weights(
    windows: Sequence[Window],
    module: str,
    map_size: tuple[int, int],
    activations: StoredActivations,
    mean_square: float | None,
) -> torch.Tensor:
    """How inner products through windows weigh each position of a module's map: g, float64 (windows, positions).

    Args:
        windows: over the map.
        module: name.
        map_size: (rows, columns) of positions.
        activations: of all stimuli.
        mean_square: that the features are scaled to through each window; None leaves them as they are.
    """
    device = activations.runtime.device
    weights = torch.from_numpy(np.stack([window.weights(*map_size) for window in windows])).to(device).double()
    if mean_square is None:
        return weights
    squares = torch.zeros(weights.shape[1], dtype=torch.float64, device=device)
    for features in activations.slices(module, len(squares), block_bytes=activations.memory_bytes / 2):
        lengths = torch.linalg.vector_norm(features, dim=0, dtype=torch.float64)
        squares += lengths.square().view(-1, len(squares)).sum(0)
    found = weights @ activations.runtime.sum(squares) / activations.stimuli
    return weights / torch.where(found > 0, found, 1.0)[:, None] * mean_square


def _add_mixed_positions(
    total: torch.Tensor, rows: slice, weights: torch.Tensor, module: str, activations: StoredActivations
) -> None:
    """Compute the products at each position once, and mix them."""
    positions, stimuli = weights.shape[1], activations.stimuli
    products = torch.zeros(positions, *total.shape[1:], dtype=torch.float64, device=total.device)
    for features in activations.slices(module, positions, block_bytes=activations.memory_bytes / 2):
        by_position = features.view(stimuli, -1, positions).permute(2, 0, 1).contiguous()
        products += product(by_position[:, rows], by_position, activations.precision)
    total.flatten(1).addmm_(weights, products.flatten(1))


def _add_window_by_window(
    total: torch.Tensor, rows: slice, weights: torch.Tensor, module: str, activations: StoredActivations
) -> None:
    """Weight the features by each window in turn, and multiply those."""
    roots = weights.sqrt().float()
    for features in activations.slices(module, weights.shape[1], block_bytes=activations.memory_bytes / 2):
        channels = features.shape[1] // weights.shape[1]
        for products, root in zip(total, roots.repeat(1, channels), strict=True):
            for columns in (features * root).split(COLUMNS_PER_PRODUCT, dim=1):
                products += product(columns[rows], columns, activations.precision)
