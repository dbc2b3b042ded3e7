"""The parts of a probe that a GPU computes, stepped through without one."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_cuda import CUDA, Event, cuda_runtime, fake_copy, fake_gpu  # noqa: F401
from networks import backbone

from train.models.features import LayerFeatures, PixelFeatures
from train.models.population import POPULATION, SiteMaps
from train.models.windows import gaussian_windows
from train.regression import decomposition, sliced_ridge
from train.regression.decomposition import GpuDecomposition, eigh_on
from train.regression.feature_slices import exchange_features
from train.regression.gram import centred_gram
from train.regression.host_copies import Uploads, copied_to_host
from train.regression.precision import SymmetricSum
from train.regression.ridge import RidgeFit, ridge
from train.regression.sliced_ridge import as_linear_map, linear_outputs
from train.regression.symmetric_rows import SymmetricRows
from train.regression.windowed_inner_products import windowed_inner_products

PRECISIONS = ["float64", "float32", "tf32", "bf16"]


# ---- products ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_products_are_added_up_on_the_gpu(cuda_runtime, precision):  # noqa: F811
    with fake_gpu():
        products = SymmetricSum(600, precision, CUDA)
        for _ in range(2):
            products.add(torch.zeros(600, 40, device=CUDA))
        total = products.total()
    assert (total.device, total.dtype) == (CUDA, torch.float64)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_products_through_windows_are_mixed_on_the_gpu(cuda_runtime, precision):  # noqa: F811
    """A small map, whose positions are mixed, and one with more positions than windows."""

    def slices(module, unit=1, *, block_bytes):
        yield torch.zeros(20, 3 * unit, device=CUDA)

    activations = SimpleNamespace(
        runtime=cuda_runtime, stimuli=20, memory_bytes=2**20, precision=precision, slices=slices
    )
    sizes = {"small": (2, 2), "large": (10, 10)}
    with fake_gpu(may_wait=True):
        stripes = list(windowed_inner_products(gaussian_windows(), dict.fromkeys(sizes, 1.0), sizes, activations))
    assert {stripe.device for stripe in stripes} == {CUDA}


def test_bf16_products_round_their_factors_and_not_their_sum(monkeypatch, cuda_runtime):  # noqa: F811
    """On a GPU torch would take bf16 for tf32."""
    factors = []

    def mm(rows, columns, out_dtype):
        factors.extend((rows.dtype, columns.dtype))
        return torch.zeros(len(rows), columns.shape[1], dtype=out_dtype, device=CUDA)

    monkeypatch.setattr(torch, "mm", mm)
    with fake_gpu():
        SymmetricSum(10, "bf16", CUDA).add(torch.zeros(10, 4, device=CUDA))
    assert factors == [torch.bfloat16] * 2


def test_a_ridge_on_one_gpu_is_computed_there(cuda_runtime, monkeypatch):  # noqa: F811
    """The features arrive on the host, and one process exchanges them with nobody."""
    monkeypatch.setattr(cuda_runtime, "gather_rows", lambda rows: np.zeros(rows.shape, np.float32))
    fit = RidgeFit.empty(0, 30, 4)
    with fake_gpu(may_wait=True):
        features = exchange_features(torch.zeros(30, 50), cuda_runtime, [30])
        width = cuda_runtime.sum(torch.tensor(features.shape[1], device=features.device))
        products = sliced_ridge._inner_products(features, cuda_runtime)
        start = as_linear_map(features, fit, cuda_runtime)
        outputs = linear_outputs(features, start, cuda_runtime)
    assert {tensor.device for tensor in (width, products, start.weight, start.bias, outputs)} == {CUDA}


def test_a_matrix_on_disk_is_multiplied_on_the_gpu(cuda_runtime):  # noqa: F811
    """Columns that are one stretch, and columns that are not."""
    rows = np.zeros((20, 20), np.float32)
    for kept in (np.arange(3, 9), np.array([1, 4, 5, 11, 12, 19])):
        with fake_gpu(may_wait=True):
            matrix = SymmetricRows(rows, 0, kept, cuda_runtime, False, 2**10)
            product = matrix.multiply_whole(torch.zeros(6, 4, dtype=torch.float64, device=CUDA))
        assert (product.device, product.dtype, product.shape) == (CUDA, torch.float64, (6, 4))


# ---- activations ---------------------------------------------------------------------------------------------------


class Stream:
    """Stands for a stream of a GPU: what is put into its queue is done at once."""

    def __init__(self, *_: object):
        self.waits = 0

    def wait_stream(self, _: object) -> None:
        """Count the calls."""
        self.waits += 1


@pytest.fixture
def streams(monkeypatch):
    """Streams, events and page-locked memory without a GPU."""
    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(Stream()) or made[-1])
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", type("Copied", (Event,), {"synchronize": lambda self: None}))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **kw: empty(*size, **kw))
    return made


def test_a_batch_is_handed_out_when_the_next_is_under_way(streams):
    """In order and complete, also a shorter last batch, in two sets of buffers that take turns."""
    computed, memory = [], set()

    def batches():
        for number, count in enumerate((4, 4, 4, 2)):
            computed.append(number)
            yield {"layer": torch.full((count, 3), float(number)), "other": torch.full((count,), number)}

    for number, batch in enumerate(copied_to_host(batches(), CUDA)):
        assert len(computed) == min(number + 2, 4)
        assert torch.equal(batch["layer"], torch.full((2 if number == 3 else 4, 3), float(number)))
        assert (batch["other"] == number).all()
        memory.add(batch["layer"].data_ptr())
    assert number == 3
    assert len(memory) == 2
    assert [stream.waits for stream in streams] == [4]


def test_activations_leave_the_gpu_without_blocking_it(cuda_runtime, streams):  # noqa: F811
    net, names = backbone("test_resnet"), ["layer1", "layer4"]
    with torch.no_grad():
        features = LayerFeatures(net, names, 2)(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    weights = {name: torch.ones(3, features[name].shape[1] // 4) for name in names}
    site_maps = SiteMaps(weights, dict.fromkeys(names, (2, 2)), "")
    layers = LayerFeatures(fake_copy(net), names, 2)
    joined = LayerFeatures(fake_copy(net), [*names, POPULATION], 2, fake_copy(site_maps))
    with fake_gpu(may_wait=True), torch.no_grad():
        layers.to(CUDA)
        joined.to(CUDA)
        batch = torch.zeros(2, 3, 64, 64, dtype=torch.uint8, device=CUDA)
    for extractor in (PixelFeatures(), layers, joined):
        with fake_gpu(), torch.no_grad():
            (copied,) = copied_to_host([extractor(batch)], CUDA)
        assert {tensor.device.type for tensor in copied.values()} == {"cpu"}


def test_on_a_cpu_nothing_is_copied():
    batch = {"layer": torch.ones(2)}
    assert next(copied_to_host([batch], torch.device("cpu")))["layer"] is batch["layer"]


def test_blocks_of_features_go_up_while_the_next_is_filled(streams, monkeypatch):
    """Two page-locked buffers take turns, and a block is not overwritten before it is copied."""
    waits, sent = [], []
    event = type("Copied", (), {"record": lambda self: None, "synchronize": lambda self: waits.append(len(sent))})
    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, device, non_blocking: sent.append(non_blocking) or self.clone()
    )
    uploads, memory = Uploads(CUDA), []
    for number in range(4):
        block = uploads.buffer(3, 5 - number // 3)
        block[:] = number
        memory.append(block.ctypes.data)
        assert (uploads.upload() == number).all()
    assert sent == [True] * 4
    assert waits == [2, 3]
    assert memory[0] == memory[2] != memory[1] == memory[3]


def test_on_a_cpu_blocks_of_features_are_not_copied():
    uploads = Uploads(torch.device("cpu"))
    block = uploads.buffer(2, 3)
    block[:] = 7
    assert uploads.upload().data_ptr() == block.ctypes.data


# ---- decomposition -------------------------------------------------------------------------------------------------


@pytest.fixture
def problem() -> tuple[np.ndarray, np.ndarray]:
    """Inner products of 60 stimuli, two of them equal, and responses of 5 sites, some missing."""
    generator = np.random.default_rng(0)
    features = generator.normal(size=(60, 80))
    features[7] = features[3]
    rates = features[:, :5] + generator.normal(size=(60, 5))
    rates[4:9, 2] = np.nan
    return features @ features.T, rates


def fitted(problem, decompose):
    products, rates = problem
    stimuli = np.arange(50)
    return ridge(centred_gram(products, stimuli, np.arange(50, 60), decompose=decompose), rates[:50])


def test_a_ridge_does_not_depend_on_where_its_matrix_is_decomposed(problem):
    """`GpuDecomposition` on the CPU: torch's routine and its copies, in float64."""
    on_cpu, on_gpu = (
        fitted(problem, of) for of in (eigh_on(torch.device("cpu")), GpuDecomposition(torch.device("cpu")))
    )
    np.testing.assert_allclose(on_gpu.prediction, on_cpu.prediction, rtol=1e-5)
    np.testing.assert_allclose(on_gpu.dual, on_cpu.dual, atol=1e-10)
    np.testing.assert_allclose(on_gpu.inner_r2, on_cpu.inner_r2, rtol=1e-9)
    assert np.array_equal(on_gpu.penalty, on_cpu.penalty)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.linalg.LinAlgError, RuntimeError])
def test_a_matrix_that_the_gpu_cannot_take_is_decomposed_on_the_cpu(problem, monkeypatch, capsys, error):
    """The same numbers; said once, and not tried again."""
    tries = []

    def fail(matrix):
        tries.append(len(matrix))
        raise error("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`")

    monkeypatch.setattr(decomposition.torch.linalg, "eigh", fail)
    gpu = GpuDecomposition(torch.device("cpu"))
    assert np.array_equal(fitted(problem, gpu).prediction, fitted(problem, eigh_on(torch.device("cpu"))).prediction)
    assert capsys.readouterr().err.count("are decomposed on the CPU") == len(tries)
    fitted(problem, gpu)
    assert capsys.readouterr().err == ""


def test_errors_of_other_operations_on_the_gpu_are_not_hidden(problem, monkeypatch):
    def fail(matrix):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(decomposition.torch.linalg, "eigh", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        fitted(problem, GpuDecomposition(torch.device("cpu")))


def test_a_process_on_a_gpu_decomposes_there():
    assert isinstance(eigh_on(CUDA), GpuDecomposition)
    with fake_gpu():
        values, vectors = torch.linalg.eigh(torch.zeros(4, 4, dtype=torch.float64, device=CUDA))
    assert values.device == vectors.device == CUDA
