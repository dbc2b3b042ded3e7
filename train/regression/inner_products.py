"""Inner products of the features of all stimuli, over all ranks, with more features than fit into any memory.

With n stimuli and p features, n << p, everything that regression on the features or on their principal components needs
is the n x n matrix of inner products. Each rank multiplies all stimuli of its slice of the features
(`train/regression/feature_slices.py`), and the products are summed: exact, whatever p.

Memory: half of the bound is for the sum of products. A matrix that does not fit into it is summed in parts: some of its
columns at a time, from the diagonal downwards. The activations of the stimuli below are read again for each part, so a
matrix in k parts takes about k / 2 + 1 readings. As a part is complete, its sums go to the ranks that keep its rows,
each number once, and to disk.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch

from train.distributed.runtime import Runtime
from train.regression.feature_slices import StoredActivations
from train.regression.precision import ALIGNMENT, COLUMNS_PER_PRODUCT, MIN_STRIPE_ROWS, SymmetricSum
from train.regression.row_writer import RowWriter
from train.regression.rows import stripe

SUM_BYTES = 8  # per element of a part
WORK_SHARE = 1.25  # of memory that adding to a part takes, relative to the part
CHUNK_BYTES = 2**22  # that the ranks add up at a time


def write_inner_products(
    activations: StoredActivations, modules: Mapping[str, float], bounds: Sequence[int], writer: RowWriter | None
) -> None:
    """Compute the inner products of the features of one or more modules together, and write them to disk.

    They are centred on the mean of all stimuli. The features of several modules are each brought to a mean square;
    otherwise the module with the largest activations would dominate. A single module stays as it is.

    Args:
        activations: of all stimuli.
        modules: the mean square of each module, by name.
        bounds: where the rows of each rank begin, and where those of the last end: (ranks + 1,). A rank may have none.
        writer: takes the rows of this rank; None if it has none.
    """
    runtime, stimuli = activations.runtime, activations.stimuli
    parts = parts_of(stimuli, activations.memory_bytes / 2 / min(len(modules), 2))
    block_bytes = activations.memory_bytes / 2
    scales = _scales(activations, modules, block_bytes)
    centres: dict[str, dict[int, torch.Tensor]] = {module: {} for module in modules}
    for columns in parts:
        first, *others = modules
        total = _part(activations, first, columns, block_bytes, centres[first], scales)
        for module in others:
            total += _part(activations, module, columns, block_bytes, centres[module], scales)
        _hand_out(total, columns, bounds, runtime, writer)
        del total  # before the next part is made


def _part(
    activations: StoredActivations,
    module: str,
    columns: range,
    block_bytes: float,
    centres: dict[int, torch.Tensor],
    scales: Mapping[str, float],
) -> torch.Tensor:
    """This rank's sum of some columns of a module's products, from the diagonal downwards."""
    products = SymmetricSum(activations.stimuli, activations.precision, activations.runtime.device, columns)
    for features in activations.slices(module, block_bytes=block_bytes, first=columns.start, centres=centres):
        for block in features.split(COLUMNS_PER_PRODUCT, dim=1):
            products.add(block)
    return products.total().div_(scales[module]) if module in scales else products.total()


def parts_of(stimuli: int, memory_bytes: float) -> list[range]:
    """Columns of an (n, n) matrix whose lower parts, one after the other, fit into memory, on every rank the same.

    Rows shared out among ranks do not change them.
    """
    parts, start = [], 0
    while start < stimuli:
        width = int(memory_bytes / (WORK_SHARE * SUM_BYTES * (stimuli - start))) // ALIGNMENT * ALIGNMENT
        stop = min(start + max(width, MIN_STRIPE_ROWS), stimuli)
        parts.append(range(start, stop))
        start = stop
    return parts


def _scales(activations: StoredActivations, modules: Mapping[str, float], block_bytes: float) -> dict[str, float]:
    """What the products of each module are divided by; empty for a single module, which is not scaled."""
    if len(modules) == 1:
        return {}
    scales = {}
    for module, mean_square in modules.items():
        total = torch.zeros((), dtype=torch.float64, device=activations.runtime.device)
        for features in activations.slices(module, block_bytes=block_bytes):
            total += torch.linalg.vector_norm(features, dim=0, dtype=torch.float64).square().sum()
        scales[module] = float(activations.runtime.sum(total)) / activations.stimuli or 1.0
        scales[module] /= mean_square
    return scales


def _hand_out(
    part: torch.Tensor, columns: range, bounds: Sequence[int], runtime: Runtime, writer: RowWriter | None
) -> None:
    """Add up a part over the ranks, each row on the rank that keeps it, and write it there, with its transpose.

    Args:
        part: float64 (rows from the first column on, columns); its content is lost.
        columns: of the matrix.
        bounds, writer: see `write_inner_products`.
    """
    width, first = len(columns), columns.start
    # The transpose first, because to add up destroys what is sent.
    for rank, rows in _chunks(bounds, first, columns.stop, len(part)):
        above = part[width:, rows.start - first : rows.stop - first]
        if above.numel():
            _add_up(above.T.contiguous(), rank, rows.start - bounds[rank], columns.stop, runtime, writer)
    for rank, rows in _chunks(bounds, first, first + len(part), width):
        below = part[rows.start - first : rows.stop - first]
        _add_up(below, rank, rows.start - bounds[rank], first, runtime, writer)


def _chunks(bounds: Sequence[int], first: int, stop: int, width: int) -> Iterator[tuple[int, range]]:
    """Each rank's rows from `first` to `stop`, as many at a time as the ranks add up at a time: (rank, rows)."""
    height = max(CHUNK_BYTES // (SUM_BYTES * max(width, 1)), 1)
    for rank in range(len(bounds) - 1):
        begin, end = max(bounds[rank], first), min(bounds[rank + 1], stop)
        for start in range(begin, end, height):
            yield rank, range(start, min(start + height, end))


def _add_up(block: torch.Tensor, rank: int, row: int, column: int, runtime: Runtime, writer: RowWriter | None) -> None:
    summed = runtime.reduce_to(block, rank)
    if summed is not None:
        assert writer is not None
        writer.write(row, column, summed.cpu().numpy())


def hand_out_rows(
    rows: torch.Tensor, first: int, bounds: Sequence[int], runtime: Runtime, writer: RowWriter | None
) -> None:
    """Add up whole rows of a matrix over the ranks, each on the rank that keeps it, and write them there.

    Args:
        rows: float64 (rows, n); their content is lost.
        first: position of the first of them.
        bounds, writer: see `write_inner_products`.
    """
    for rank, chunk in _chunks(bounds, first, first + len(rows), rows.shape[1]):
        _add_up(rows[chunk.start - first : chunk.stop - first], rank, chunk.start - bounds[rank], 0, runtime, writer)


def rows_of_owner(stimuli: int, owner: int, ranks: int) -> list[int]:
    """`bounds` for a matrix that one rank keeps."""
    return [0 if rank <= owner else stimuli for rank in range(ranks + 1)]


def rows_of_all(stimuli: int, ranks: int) -> list[int]:
    """`bounds` for a matrix that the ranks share."""
    return [*(stripe(stimuli, rank, ranks).start for rank in range(ranks)), stimuli]
