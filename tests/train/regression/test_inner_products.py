"""Inner products that are summed in parts, over ranks, are those of the features; so are features read row by row."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peak_memory import peak_of
from thread_ranks import Meeting, ThreadRuntime, on_ranks

from train.data.order import share
from train.models.windows import WHOLE_MAP, Window
from train.regression.feature_rows import FeatureRows, mean_squares, window_scale
from train.regression.feature_slices import StoredActivations
from train.regression.feature_store import FeatureStore
from train.regression.inner_products import parts_of, rows_of_all, rows_of_owner, write_inner_products
from train.regression.row_writer import RowWriter
from train.regression.windowed_inner_products import windowed_inner_products

COUNTS = (700, 90)  # stimuli of two splits
WIDTHS = {"first": 36, "second": 20}
MEAN_SQUARES = {"first": 1.0, "second": 3.0}  # of the features together
MAPS = {"first": (2, 3), "second": (2, 2)}
SOME_MEMORY = 2**-10  # GiB; enough for 256 columns of the matrix, and for a few features at a time


@pytest.fixture(scope="module")
def features():
    """Of two modules, of different variance and not centred."""
    generator = np.random.default_rng(0)
    scales = {"first": 1.0, "second": 30.0}
    return {
        name: (generator.normal(2, scales[name], (sum(COUNTS), width))).astype(np.float32)
        for name, width in WIDTHS.items()
    }


def stored(folder, features, runtime, memory=SOME_MEMORY, precision="float64", readable=True) -> StoredActivations:
    """The activations as a probe has them on disk, each rank's share in a folder of its own."""
    stores = [
        [FeatureStore(folder / str(rank) / str(split), WIDTHS) for split in (0, 1)] for rank in range(runtime.ranks)
    ]
    first = 0
    for store, count in zip(stores[runtime.rank], COUNTS, strict=True):
        own = share(np.arange(first, first + count), runtime.rank, runtime.ranks)
        store.truncate(0)
        store.append({name: torch.from_numpy(rows[own]) for name, rows in features.items()})
        first += count
    runtime.barrier()
    known = [of_rank if readable or rank == runtime.rank else None for rank, of_rank in enumerate(stores)]
    return StoredActivations(known, COUNTS, runtime, memory, precision)


def expected_products(features, modules) -> np.ndarray:
    total = np.zeros((sum(COUNTS), sum(COUNTS)))
    for module in modules:
        centred = features[module].astype(np.float64)
        centred -= centred.mean(0)
        products = centred @ centred.T
        total += (
            products * MEAN_SQUARES[module] / (np.trace(products) / len(products)) if len(modules) > 1 else products
        )
    return total - total.mean(0) - total.mean(1)[:, None] + total.mean()


def centred(products: np.ndarray) -> np.ndarray:
    return products - products.mean(0) - products.mean(1)[:, None] + products.mean()


@pytest.mark.parametrize(("stimuli", "memory"), [(790, 2**20), (22_248, 2**29), (300, 1), (5000, 2**40)])
def test_parts_of_a_matrix_make_its_lower_triangle_and_fit_into_memory(stimuli, memory):
    parts = parts_of(stimuli, memory)
    assert [column for part in parts for column in part] == list(range(stimuli))
    largest = max(8 * len(part) * (stimuli - part.start) for part in parts)
    assert largest <= max(memory, 8 * 256 * stimuli)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("keeps", ["one", "all"])
@pytest.mark.parametrize("readable", [True, False], ids=["one machine", "several machines"])
@pytest.mark.parametrize("modules", [["first"], ["first", "second"]], ids="+".join)
def test_products_in_parts_over_ranks_are_those_of_the_features(tmp_path, features, ranks, keeps, readable, modules):
    stimuli = sum(COUNTS)
    assert len(parts_of(stimuli, SOME_MEMORY * 2**30 / 2)) > 2

    def work(runtime):
        activations = stored(tmp_path, features, runtime, readable=readable)
        squares = {module: MEAN_SQUARES[module] for module in modules}
        bounds = rows_of_all(stimuli, ranks) if keeps == "all" else rows_of_owner(stimuli, ranks - 1, ranks)
        rows = bounds[runtime.rank + 1] - bounds[runtime.rank]
        if not rows:
            write_inner_products(activations, squares, bounds, None)
            return np.empty((0, stimuli))
        path = tmp_path / f"{runtime.rank}.npy"
        with RowWriter(path, (rows, stimuli), np.dtype(np.float64)) as writer:
            write_inner_products(activations, squares, bounds, writer)
        return np.load(path)

    products = np.concatenate(on_ranks(ranks, work))
    expected = expected_products(features, modules)
    np.testing.assert_allclose(centred(products), expected, atol=1e-6 * expected.max())
    np.testing.assert_allclose(products, products.T, rtol=1e-12)


def test_products_take_the_memory_that_they_may(tmp_path):
    """A matrix of 80 MB in parts of at most 16 MB, beside as much for blocks of features."""
    memory = 2**-5
    assert peak_of(large_products, str(tmp_path), memory) < memory * 2**30 + 2**25  # what a library's products take
    products = np.load(tmp_path / "products.npy")
    assert np.array_equal(products, products.T)


def large_products(folder, memory):
    """Work that writes the products of 3,200 stimuli within some GiB of memory."""
    stimuli, width = 3200, 1500
    on_disk = FeatureStore(Path(folder), {"layer": width})
    on_disk.truncate(0)
    generator = np.random.default_rng(0)
    for _ in range(0, stimuli, 100):
        on_disk.append({"layer": torch.from_numpy(generator.normal(size=(100, width)).astype(np.float32))})

    def work():
        activations = StoredActivations([[on_disk]], [stimuli], ThreadRuntime(Meeting(1), 0), memory, "float32")
        with RowWriter(Path(folder) / "products.npy", (stimuli, stimuli), np.dtype(np.float32)) as writer:
            write_inner_products(activations, {"layer": 1.0}, [0, stimuli], writer)

    work()  # libraries take memory of their own when they are first used
    return work


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("modules", [["first"], ["first", "second"]], ids="+".join)
def test_features_read_row_by_row_through_a_window_have_its_inner_products(tmp_path, features, ranks, modules):
    windows = [WHOLE_MAP, Window(0.3, -0.2, 0.4)]

    def work(runtime):
        activations = stored(tmp_path, features, runtime)
        rows = FeatureRows(activations, modules)
        variance = mean_squares(rows, runtime, activations.stimuli, 2**12)
        squares = {module: MEAN_SQUARES[module] for module in modules}
        stripes = torch.cat(list(windowed_inner_products(windows, squares, MAPS, activations)), 1)
        products = runtime.sum(stripes).numpy()
        widths = {module: WIDTHS[module] for module in modules}
        through = [rows.scaled(window_scale(window, MAPS, widths, variance, squares)) for window in windows]
        return rows.positions, variance, [part[:] for part in through], products

    per_rank = on_ranks(ranks, work)
    positions = np.concatenate([rank[0] for rank in per_rank])
    assert sorted(positions) == list(range(sum(COUNTS)))
    whole = np.concatenate([features[module] for module in modules], 1)
    np.testing.assert_allclose(per_rank[0][1], whole.var(0), rtol=1e-4)
    for number in range(len(windows)):
        scaled = np.concatenate([rank[2][number] for rank in per_rank]).astype(np.float64)[np.argsort(positions)]
        expected = centred(per_rank[0][3][number])
        np.testing.assert_allclose(centred(scaled @ scaled.T), expected, atol=1e-5 * expected.max())
