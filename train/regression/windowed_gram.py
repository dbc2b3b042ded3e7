"""Inner products of a layer through many windows over its map at once.

Through a window g they are sum_p g_p K_p, K_p being the inner products of the features at position p
(`train/models/windows.py`). On a map of no more positions than there are windows the K_p are made once, which costs as
many multiplications as the whole map does, and then mixed; on a larger one (pixels) each window has its own products.

What is held. Matrices of n x n numbers for each window and position are too many at once where n is large; a bound on
memory tells how many of their rows are made at a time. The activations are read again for each such stripe.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from train.models.windows import Window
from train.regression.gram import COLUMNS, Activations, float32_products

WINDOW_BYTES, POSITION_BYTES = 8, 12  # of one number of a matrix: a sum, and with it the summand


def products_through(
    windows: Sequence[Window],
    parts: Sequence[str],
    maps: Mapping[str, tuple[int, int]],
    activations: Activations,
) -> Iterator[torch.Tensor]:
    """Inner products of one or several modules read together, centred on the mean of all stimuli.

    Several modules are each brought to the same mean square, through each window, or the loudest would be read alone.

    Args:
        windows: through which they are looked at.
        parts: the modules.
        maps: rows and columns of positions of each module.
        activations: of all stimuli.

    Yields:
        From top to bottom, float64 (windows, rows, n): the sum of it over ranks is some rows of the matrices.
    """
    weights = {part: _weights(windows, part, maps, activations, scaled=len(parts) > 1) for part in parts}
    stimuli, device = activations.stimuli, activations.runtime.device
    positions = max((own.shape[1] for own in weights.values() if own.shape[1] <= len(windows)), default=0)
    row = stimuli * (WINDOW_BYTES * len(windows) + POSITION_BYTES * positions)
    height = max(int(activations.memory * 2**30 / row), 1)
    for start in range(0, stimuli, height):
        rows = slice(start, min(start + height, stimuli))
        total = torch.zeros(len(windows), rows.stop - start, stimuli, dtype=torch.float64, device=device)
        for part, own in weights.items():
            add = _add_mixed if own.shape[1] <= len(windows) else _add_one_by_one
            add(total, rows, own, part, activations)
        yield total


def _weights(
    windows: Sequence[Window],
    part: str,
    maps: Mapping[str, tuple[int, int]],
    activations: Activations,
    scaled: bool,
) -> torch.Tensor:
    """g, float64 (windows, positions); divided by the mean square that the features then have where `scaled`."""
    device = activations.runtime.device
    weights = torch.from_numpy(np.stack([window.weights(*maps[part]) for window in windows])).to(device).double()
    if not scaled:
        return weights
    squares = torch.zeros(weights.shape[1], dtype=torch.float64, device=device)
    for received in activations.slices(part, unit=len(squares)):
        lengths = torch.linalg.vector_norm(received, dim=0, dtype=torch.float64)
        squares += lengths.square().view(-1, len(squares)).sum(0)
    through = weights @ activations.runtime.sum(squares) / activations.stimuli
    return weights / torch.where(through > 0, through, 1.0)[:, None]


def _add_mixed(total: torch.Tensor, rows: slice, weights: torch.Tensor, part: str, activations: Activations) -> None:
    """Make the products at each position, and mix them."""
    positions, stimuli = weights.shape[1], activations.stimuli
    at = torch.zeros(positions, *total.shape[1:], dtype=torch.float64, device=total.device)
    for received in activations.slices(part, unit=positions):
        features = received.view(stimuli, -1, positions).permute(2, 0, 1).contiguous()
        at += _product(features[:, rows], features, activations)
    total.flatten(1).addmm_(weights, at.flatten(1))


def _add_one_by_one(
    total: torch.Tensor, rows: slice, weights: torch.Tensor, part: str, activations: Activations
) -> None:
    """Weigh the features by each window, and multiply those."""
    roots = weights.sqrt().float()
    for received in activations.slices(part, unit=weights.shape[1]):
        for own, root in zip(total, roots.repeat(1, received.shape[1] // weights.shape[1]), strict=True):
            for columns in (received * root).split(COLUMNS, dim=1):
                own += _product(columns[rows], columns, activations)


def _product(some: torch.Tensor, features: torch.Tensor, activations: Activations) -> torch.Tensor:
    """some @ features.T of matrices or stacks of them, in the precision of `train.regression.gram.multiplied`."""
    if activations.precision == "float64":
        return some.double() @ features.double().mT
    with float32_products(activations.precision):
        return some @ features.mT
