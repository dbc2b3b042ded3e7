"""What this machine reaches, measured on all processes at the same time: decoding, disk, products, decompositions.

Each takes a fraction of a second to a few seconds; on a GPU sizes are those that keep it busy.
"""

import io
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from gpu.probe import gram_of, made_up_features
from synthetic import finish

from train.data.decoding import decode_into
from train.distributed.runtime import Runtime
from train.evaluation.confidence_intervals import bootstrap_scores
from train.evaluation.similarity import cka, rsa
from train.planning.rates import Decoding, Decomposition, MachineRates
from train.regression.decomposition import eigh_on
from train.regression.feature_store import FeatureStore
from train.regression.precision import ProductPrecision

LEAST_SECONDS = 0.3  # that something is repeated for
JPEG_SIDE, JPEG_QUALITY = 256, 90
PRECISIONS: tuple[ProductPrecision, ...] = ("float32", "float64", "tf32", "bf16")
PRODUCT = {True: (4096, 16384), False: (1024, 4096)}  # stimuli and features, on a GPU and without
DECOMPOSED = {True: (1024, 4096), False: (512, 2048)}  # stimuli
WRITTEN = {True: 2**28, False: 2**26}  # bytes
COLUMNS = 1024  # that are read at a time
SITES, FEW, MANY = 64, 50, 400  # of the scores whose intervals are computed; stimuli
COMPARED = 400  # stimuli of RSA and CKA
MULTIPLIED = (2048, 1024, 128)  # stimuli, components and sites of a product in float64, as ridge computes it
PASSED = 2**22  # numbers of an array that is passed over


def seconds_of(work: Callable[[], object], device: torch.device | None = None) -> float:
    """Seconds of some work: the median of as many repetitions as fit into a short time, after one to warm up."""
    taken: list[float] = []
    work()
    began = time.perf_counter()
    while not taken or (time.perf_counter() - began < LEAST_SECONDS and len(taken) < 50):
        if device is not None:
            finish(device)
        started = time.perf_counter()
        work()
        if device is not None:
            finish(device)
        taken.append(time.perf_counter() - started)
    return sorted(taken)[len(taken) // 2]


def measure_machine(runtime: Runtime, folder: Path, decoding: Decoding, bandwidth: float | None) -> MachineRates:
    """Measure everything; every rank must take part, and all get what the slowest reaches.

    Args:
        runtime: this process.
        folder: on the disk to measure.
        decoding: as `decoding_of` measured it.
        bandwidth: of the network, see `MachineRates`.
    """
    size = PRODUCT[runtime.on_gpu]
    figure = figure_seconds()
    own = {
        "figure": figure,
        "decoding": decoding.seconds,
        **disk_seconds(folder, WRITTEN[runtime.on_gpu], runtime.rank),
        **{precision: product_seconds(precision, *size, runtime.device) for precision in PRECISIONS},
        **{f"decompose {n}": decomposition_seconds(n, runtime.device) for n in DECOMPOSED[runtime.on_gpu]},
        **host_seconds(),
    }
    slowest = {name: max(of_rank[name] for of_rank in runtime.gather_objects(own)) for name in own}
    bytes_ = WRITTEN[runtime.on_gpu]
    per_response = max(slowest["bootstrap of many"] - slowest["bootstrap of few"], 0) / (MANY - FEW) / SITES
    return MachineRates(
        decoding=decoding.model_copy(update={"seconds": slowest["decoding"]}),
        **{name: bytes_ / slowest[name] for name in ("disk_write", "page_write", "disk_read", "column_read")},
        bandwidth=bandwidth,
        products={precision: size[0] ** 2 * size[1] / slowest[precision] for precision in PRECISIONS},
        decompositions=[
            Decomposition(stimuli=n, seconds=slowest[f"decompose {n}"]) for n in DECOMPOSED[runtime.on_gpu]
        ],
        multiplication=2 * math.prod(MULTIPLIED) / slowest["multiplication"],
        passes=8 * PASSED / slowest["passes"],
        bootstrap_site=max(slowest["bootstrap of few"] / SITES - FEW * per_response, 0),
        bootstrap_response=per_response,
        similarity=slowest["similarity"] / COMPARED**2,
        figure=slowest["figure"],
    )


def decoding_of(images: list[tuple[bytes, str]], side: int) -> Decoding:
    """The time of decoding images in this process.

    Args:
        images: encoded, with their encodings.
        side: in pixels, to which they are brought.
    """
    pixels = np.empty((side, side, 3), np.uint8)

    def decode_all() -> None:
        for data, encoding in images:
            decode_into(pixels, data, encoding)

    size = sum(len(data) for data, _ in images) / len(images)
    return Decoding(seconds=seconds_of(decode_all) / len(images), bytes=size, side=side)


def made_up_jpeg() -> bytes:
    """A JPEG of a smooth image with some noise, about 20 kB."""
    draw = np.random.default_rng(0)
    knots = draw.integers(0, 256, (JPEG_SIDE // 8, JPEG_SIDE // 8, 3)).repeat(8, axis=0).repeat(8, axis=1)
    image = (knots + draw.normal(0, 3, knots.shape)).clip(0, 255).astype(np.uint8)
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=JPEG_QUALITY, colorsubsampling="420")


def disk_seconds(folder: Path, size: int, rank: int) -> dict[str, float]:
    """Seconds to write some bytes into the page cache and onto the disk, to read them from there, and as columns."""
    features = size // 4 // COLUMNS * 4
    rows = COLUMNS // 4
    store = FeatureStore(folder / f"disk_{rank}", {"layer": features})
    store.truncate(0)
    block = torch.rand(rows, features)
    started = time.perf_counter()
    store.append({"layer": block})
    written = time.perf_counter() - started
    (path,) = (folder / f"disk_{rank}").iterdir()
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        on_disk = time.perf_counter() - started
        out = np.empty((rows, COLUMNS), np.float32)
        started = time.perf_counter()
        for start in range(0, features, COLUMNS):
            store.read_columns("layer", start, out)
        columns = time.perf_counter() - started
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        while file.read(2**24):
            pass
        read = time.perf_counter() - started
    store.truncate(0)
    return {"disk_write": on_disk, "page_write": written, "disk_read": read, "column_read": columns}


def product_seconds(precision: ProductPrecision, stimuli: int, features: int, device: torch.device) -> float:
    """Seconds of the inner products of some stimuli's features, as a probe computes them."""
    made_up = made_up_features(stimuli, features, device)
    return seconds_of(lambda: gram_of(made_up, precision), device)


def decomposition_seconds(stimuli: int, device: torch.device) -> float:
    """Seconds of a decomposition in float64, as a probe computes it."""
    gram = gram_of(made_up_features(stimuli, 2 * stimuli, device), "float64").cpu().numpy()
    decompose = eigh_on(device)
    return seconds_of(lambda: decompose(gram), device)


def figure_seconds() -> float:
    """Seconds of the first figure of a process."""
    started = time.perf_counter()
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().plot(range(100))
    figure.savefig(io.BytesIO(), format="png", dpi=150)
    return time.perf_counter() - started


def host_seconds() -> dict[str, float]:
    """Seconds of numpy's work in float64: a product, a pass, intervals of scores, RSA and CKA."""
    draw = np.random.default_rng(0)
    stimuli, components, sites = MULTIPLIED
    vectors, weights = draw.normal(size=(stimuli, components)), draw.normal(size=(components, sites))
    numbers, reliability = draw.normal(size=PASSED), np.full(SITES, 0.5)
    scored = {count: draw.normal(size=(count, SITES)).astype(np.float32) for count in (FEW, MANY)}
    similar, other = vectors[:COMPARED] @ vectors[:COMPARED].T, vectors[:COMPARED, :COMPARED]

    def bootstrap(count: int) -> float:
        predicted, noise = scored[count], np.full((count, SITES), 0.5)
        return seconds_of(lambda: bootstrap_scores(predicted, predicted[::-1].copy(), reliability, noise))

    return {
        "multiplication": seconds_of(lambda: vectors @ weights),
        "passes": seconds_of(lambda: numbers - 1.0),
        "bootstrap of few": bootstrap(FEW),
        "bootstrap of many": bootstrap(MANY),
        "similarity": seconds_of(lambda: (rsa(similar, other), cka(similar, similar))),
    }
