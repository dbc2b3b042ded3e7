"""Part `device`: what the machine is, and the rates that everything else is measured against."""

import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from harness import version_of
from synthetic import GIB, finish

from data_prep.common.worker_processes import usable_cores
from gpu.entries import Entry, Part, Place
from gpu.forms import Form
from gpu.results import Finding
from gpu.step_plan import TERA

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "accelerate",
    "deepspeed",
    "numpy",
    "triton",
    "simplejpeg",
    "nvidia-nccl-cu13",
)
REPEATS = 7
WARM_UP_SECONDS = 0.3
COPIED = {True: GIB, False: 2**25}  # bytes of a copy, on a GPU and without
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
RATES = "rates"  # what `rates` leaves: measured floating-point operations a second, by precision


def part(form: Form) -> Part:
    """The entries of this part."""
    return Part("device", [[Entry("facts", 60, facts, needed=True)], [Entry("rates", 60, rates, needed=True)]])


def facts(place: Place) -> Finding:
    """Versions, device, cores, and whether DeepSpeed's operations could be built."""
    values: dict[str, object] = {
        "device": device_name(place.form),
        "cores": usable_cores(),
        "memory GiB": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB, 1),
        "python": platform.python_version(),
        "system": platform.release(),
        "nvcc": shutil.which("nvcc") or "none",
        "C compiler": shutil.which("cc") or shutil.which("gcc") or "none",
    }
    values |= {name: version_of(name) for name in PACKAGES}
    if place.form.on_gpu:
        properties = torch.cuda.get_device_properties(0)
        values |= {
            "GPUs": torch.cuda.device_count(),
            "GPU memory GiB": round(properties.total_memory / GIB, 2),
            "multiprocessors": properties.multi_processor_count,
            "compute capability": f"{properties.major}.{properties.minor}",
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
            "taken before the first tensor GiB": round(context_bytes() / GIB, 2),
        }
    return Finding(values)


def device_name(form: Form) -> str:
    """Of the GPU, or that there is none."""
    return torch.cuda.get_device_name(0) if form.on_gpu else f"CPU ({platform.machine()})"


def context_bytes() -> int:
    """What CUDA takes of the GPU for this process before its first tensor, if no other process uses it."""
    torch.cuda.init()
    free, total = torch.cuda.mem_get_info(0)
    return total - free


def median_seconds(work: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """The median duration of some work on a device, after a warm-up; on a GPU measured by CUDA's events."""
    warm_from = time.perf_counter()
    while True:  # an idle GPU takes a moment to raise its clock
        work()
        finish(device)
        if device.type != "cuda" or time.perf_counter() - warm_from > WARM_UP_SECONDS:
            break
    took = []
    for _ in range(repeats):
        if device.type == "cuda":
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            work()
            ended.record()
            ended.synchronize()
            took.append(began.elapsed_time(ended) / 1000)
        else:
            started = time.perf_counter()
            work()
            took.append(time.perf_counter() - started)
    return statistics.median(took)


def rates(place: Place) -> Finding:
    """Copies within the device, from the host and back; products of matrices in every precision."""
    device, form = torch.device(place.form.device), place.form
    values = copy_rates(device, COPIED[form.on_gpu])
    products = {precision: product_rate(form.matrix, precision, device) for precision in DTYPES}
    products["float64"] = product_rate(form.matrix // 2, "float64", device)
    place.leave(RATES, products)
    values |= {f"product {precision} TFLOP/s": rate / TERA for precision, rate in products.items()}
    return Finding(values)


def copy_rates(device: torch.device, size: int) -> dict[str, float]:
    """GB/s of copies; within the device reading and writing both count."""
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    values = {"device to device GB/s": 2 * size / median_seconds(lambda: target.copy_(source), device) / 1e9}
    if device.type != "cuda":
        return values
    host = torch.from_numpy(np.random.default_rng(0).integers(0, 256, size // 4, np.uint8))
    pinned, part = host.pin_memory(), target[: size // 4]
    sides = {
        "pinned host to device": lambda: part.copy_(pinned, non_blocking=True),
        "device to pinned host": lambda: pinned.copy_(part, non_blocking=True),
        "host to device": lambda: part.copy_(host),
        "device to host": lambda: host.copy_(part),
    }
    return values | {f"{name} GB/s": len(host) / median_seconds(side, device) / 1e9 for name, side in sides.items()}


def product_rate(side: int, precision: str, device: torch.device) -> float:
    """Floating-point operations a second of a product of two square matrices of random numbers."""
    dtype = DTYPES.get(precision, torch.float64)
    if device.type == "cpu" and precision == "fp16":
        side = min(side, 128)  # slow where the CPU lacks it
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        return 2 * side**3 / median_seconds(lambda: left @ right, device)
    finally:
        torch.set_float32_matmul_precision(before)
