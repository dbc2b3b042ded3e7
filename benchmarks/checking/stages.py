"""The stages: each runs in a process of its own on every rank, joins the others, and returns its verdicts.

All ranks return the same verdicts; the first one reports them.
"""

import json
import math
import platform
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from gpu.deepspeed_ops import deepspeed_for
from gpu.gpu_memory import peak_of, start_peak
from gpu.results import Skipped
from harness import number, version_of
from synthetic import GIB, finish, pack_jpegs, pack_simulated, recipe_of, setting_of, training
from training_speed import endless

from checking.rate_stages import TRAINING, machine_rates, recipe_rates
from checking.run_rates import measure_training
from checking.verdicts import ENDED, FAILED, OK, SKIPPED, SLOW, Verdict
from data_prep.common.process_identity import own_identity
from data_prep.common.worker_processes import usable_cores
from train.data.loader import workers_per_rank
from train.distributed.launch_environment import cores_of_rank, uses_gpu
from train.distributed.runtime import Runtime, start_runtime
from train.planning.rates import CPU

SMALL_NETWORK = "test_convnext"  # without batch statistics, which each rank has of its own share
SMALL_SIDE, SMALL_BATCH, STEPS = 64, 32, 8
TOLERANCE = {True: 1e-3, False: 1e-5}  # relative, of a loss in float32 on a GPU and on a CPU, summed in another order
PACKAGES = ("torch", "torchvision", "timm", "accelerate", "deepspeed", "numpy", "webdataset")
MESSAGES = {True: 2**28, False: 2**24}  # bytes of the large exchange, on GPUs and on CPUs
REPEATS = 5
LEAST_FED = 0.95  # of the images a second with a batch that stays on the GPU
REPORT = "do not trust results from this setup; report it with this output"
STRATEGIES = ("ddp", "zero2")
MOST_EXCHANGE = 0.3  # of a step that the exchange of its gradients may take


@dataclass(frozen=True)
class BigStep:
    """The network whose speed is measured.

    Attributes:
        network: timm's name.
        side: of its images, in pixels.
        batch: stimuli per process and step.
        seconds: that each speed is measured for.
    """

    network: str
    side: int
    batch: int
    seconds: float

    @classmethod
    def here(cls) -> "BigStep":
        """EfficientNet-B6 on GPUs, a tiny network on CPUs."""
        if uses_gpu():
            return cls("tf_efficientnet_b6", 528, 16, 6.0)
        return cls("test_resnet", 64, 8, 1.0)

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.network}, {self.side} px, {self.batch} images a process"


def pack(folder: Path) -> list[Verdict]:
    """The recordings that the other stages train on."""
    on_gpu = uses_gpu()
    pack_simulated(folder / "recording", SMALL_SIDE, 120)
    pack_jpegs(folder / "jpegs", 64 if on_gpu else 16, 2048 if on_gpu else 160, 256 if on_gpu else 64)
    return []


# ------------------------------------------------------------------------------------------------- machines and network


def machines(folder: Path) -> list[Verdict]:
    """Versions and devices of all processes, and the speed of their exchange."""
    with start_runtime(None, "fp32", False) as runtime:
        processes = runtime.gather_objects(facts_of(runtime))
        verdicts = [same_versions(processes), own_devices(processes)]
        if runtime.ranks > 1:
            verdicts.append(exchange(runtime))
    return verdicts


def facts_of(runtime: Runtime) -> dict[str, Any]:
    """What this process runs on and with."""
    versions = {name: version_of(name) for name in PACKAGES} | {"python": platform.python_version()}
    facts: dict[str, Any] = {"host": socket.gethostname(), "versions": versions, "cores": usable_cores()}
    if runtime.on_gpu:
        properties = torch.cuda.get_device_properties(runtime.device)
        facts |= {"device": properties.name, "id": str(properties.uuid), "GiB": properties.total_memory / GIB}
    return facts


def same_versions(processes: Sequence[dict[str, Any]]) -> Verdict:
    """Whether all processes have the same versions."""
    first = processes[0]["versions"]
    for rank, process in enumerate(processes):
        for name, version in process["versions"].items():
            if version != first[name]:
                finding = f"{name} is {first[name]} on rank 0 and {version} on rank {rank} ({process['host']})"
                return Verdict("versions", FAILED, finding, "install the same versions on every machine")
    return Verdict("versions", OK, ", ".join(f"{name} {version}" for name, version in first.items()), values=first)


def own_devices(processes: Sequence[dict[str, Any]]) -> Verdict:
    """Whether each process has a GPU of its own, or how many cores it shares."""
    hosts = {process["host"] for process in processes}
    where = f"{len(processes)} {'process' if len(processes) == 1 else 'processes'} on {', '.join(sorted(hosts))}"
    values = {
        "processes": len(processes),
        "machines": len(hosts),
        "hosts": sorted(hosts),
        "cores": [process["cores"] for process in processes],
        "device": processes[0].get("device", CPU),
        "device bytes": min(p["GiB"] for p in processes) * GIB if "GiB" in processes[0] else None,
    }
    if "id" not in processes[0]:
        return Verdict("devices", OK, f"{where}, on the CPU, {processes[0]['cores']} cores", values=values)
    ids = [process["id"] for process in processes]
    if len(set(ids)) < len(ids):
        twice = next(rank for rank, device in enumerate(ids) if ids.index(device) < rank)
        finding = f"ranks {ids.index(ids[twice])} and {twice} use the same GPU ({processes[twice]['host']})"
        return Verdict("devices", FAILED, finding, "start one process per GPU; see CUDA_VISIBLE_DEVICES")
    kinds = sorted({f"{process['device']}, {process['GiB']:.0f} GiB" for process in processes})
    return Verdict("devices", OK, f"{where}, each with its own GPU ({'; '.join(kinds)})", values=values)


def exchange(runtime: Runtime) -> Verdict:
    """The speed of an all-reduce, large and small."""
    size = MESSAGES[runtime.on_gpu]
    seconds = all_reduce_seconds(runtime, size)
    # What each link carries: the bus bandwidth of NVIDIA's nccl-tests.
    bandwidth = 2 * (runtime.ranks - 1) / runtime.ranks * size / seconds
    latency = all_reduce_seconds(runtime, 4)
    finding = (
        f"{dist.get_backend()}: all-reduce of {size / 2**20:.0f} MiB at {number(bandwidth / 1e9)} GB/s per link, "
        f"of 4 bytes in {number(1e6 * latency)} µs"
    )
    values = {"bus bandwidth GB/s": bandwidth / 1e9, "latency s": latency}
    return Verdict("network", OK, finding, values=values)


def all_reduce_seconds(runtime: Runtime, size: int) -> float:
    """The median time of an all-reduce of some bytes; the slowest rank's."""
    tensor, taken = torch.ones(size // 4, device=runtime.device), []
    for _ in range(REPEATS + 2):  # connections open with the first
        dist.barrier()
        finish(runtime.device)
        started = time.perf_counter()
        dist.all_reduce(tensor)
        finish(runtime.device)
        taken.append(time.perf_counter() - started)
        tensor.fill_(1)
    slowest = runtime.all_gather(torch.tensor(taken[2:], device=runtime.device)).max(0).values
    return float(slowest.median())


# --------------------------------------------------------------------------------------------------------------- losses


def train_small(folder: Path, name: str, strategy: str) -> list[float]:
    """The losses of the first steps of a small network over global batches of the same stimuli."""
    sections: dict[str, Any] = {
        "strategy": setting_of(strategy),
        "precision": "fp32",
        "optimizer": {"name": "adamw", "clip_norm": 0.5},
        "loader": {"workers": 0},
    }
    recipe = recipe_of(SMALL_NETWORK, SMALL_SIDE, SMALL_BATCH, **sections)
    with training(recipe, folder / "recording", folder / f"run_{name}") as run:
        parts = [run.step(micros, 0)["loss"] for micros in islice(endless(run.loader), STEPS)]
        return run.runtime.sum(torch.stack(parts)).tolist()


def alone(folder: Path) -> list[Verdict]:
    """The losses on one process, which the others are compared with."""
    (folder / "alone.json").write_text(json.dumps(train_small(folder, "alone", "ddp")))
    return []


def losses_of(strategy: str, folder: Path) -> list[Verdict]:
    """Whether all processes together have the losses of one."""
    losses = train_small(folder, f"losses_{strategy}", strategy)
    if not (folder / "alone.json").exists():  # on other machines than the first, which reports
        return []
    expected = json.loads((folder / "alone.json").read_text())
    difference = float(np.max(np.abs(np.divide(losses, expected) - 1)))  # NaN if a loss is
    subject, most = f"losses, {title(strategy)}", TOLERANCE[uses_gpu()]
    finding = f"{STEPS} steps differ from those on one process by at most {difference:.1e}"
    values = {"losses": losses, "largest difference": difference}
    if difference <= most:
        return [Verdict(subject, OK, finding, values=values)]
    return [Verdict(subject, FAILED, finding, f"must be at most {most:g}: {REPORT}", values)]


def title(strategy: str) -> str:
    """A strategy in words."""
    return {"ddp": "DDP", "zero2": "ZeRO-2"}[strategy]


# ---------------------------------------------------------------------------------------------------------------- speed


def step_of(strategy: str, folder: Path) -> list[Verdict]:
    """Speed and memory of a hybrid network's step in bf16, on one batch and fed by the loader."""
    big, identity = BigStep.here(), own_identity()
    workers = workers_per_rank(None if uses_gpu() else 0, cores_of_rank(identity))
    sections: dict[str, Any] = {
        "strategy": setting_of(strategy),
        "precision": "bf16",
        "task": {"kind": "hybrid"},
        "loader": {"workers": workers},
    }
    recipe = recipe_of(big.network, big.side, big.batch * identity.world_size, **sections)
    with training(recipe, folder / "jpegs", folder / f"run_step_{strategy}") as run:
        start_peak(run.runtime.device)
        rates = measure_training(run, strategy, None, big.seconds)
        rate, fed = big.batch / rates.step_seconds, big.batch / rates.decoded_seconds
        loss = float(run.runtime.sum(run.step(next(iter(run.loader.epoch(0))), 0)["loss"]))
        memory = peak_of(run.runtime.device).allocated / GIB
    values = {
        "network": big.network,
        "side": big.side,
        "batch": big.batch,
        "processes": identity.world_size,
        "images/s per process": rate,
        "fed images/s per process": fed,
        "workers": workers,
        "memory GiB": memory,
        "gradient bytes": rates.trainable,
        TRAINING: rates.model_dump(),
    }
    subject = f"step, {title(strategy)}"
    if not math.isfinite(loss):
        return [Verdict(subject, FAILED, f"{big.name}: the loss is {loss}", REPORT, values)]
    finding = f"{big.name}: {number(rate)} images/s each, {1000 * big.batch / rate:.0f} ms, {memory:.1f} GiB"
    return [Verdict(subject, OK, finding, values=values), feeding(strategy, rate, fed, workers)]


def feeding(strategy: str, rate: float, fed: float, workers: int) -> Verdict:
    """Whether the loader keeps up with the step. On a CPU both share the cores."""
    part, subject = fed / rate, f"loader, {title(strategy)}"
    finding = f"{number(fed)} images/s each when fed, {part:.2f} of a batch that stays on the device; {workers} workers"
    values = {"part": part, "workers": workers}
    if part >= LEAST_FED or not uses_gpu():
        return Verdict(subject, OK, finding, values=values)
    advice = "decoding limits: ask for more CPU cores per GPU, or keep decoded images (loader.cache); docs/loading.md"
    return Verdict(subject, SLOW, finding, advice, values)


def gradients_against_network(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Whether exchanging a step's gradients takes little of the step, from what the stages measured."""
    by_subject = {verdict.subject: verdict.values for verdict in verdicts}
    network, step = by_subject.get("network"), by_subject.get("step, DDP")
    if not network or not step:
        return []
    ranks = step["processes"]
    exchange_seconds = 2 * (ranks - 1) / ranks * step["gradient bytes"] / (1e9 * network["bus bandwidth GB/s"])
    share = exchange_seconds / (step["batch"] / step["images/s per process"])
    finding = f"exchanging the gradients alone takes {1000 * exchange_seconds:.1f} ms, {share:.2f} of the DDP step"
    if share <= MOST_EXCHANGE or not uses_gpu():
        return [Verdict("gradients", OK, finding, values={"share": share})]
    advice = "check that NCCL uses the fast network (NCCL_DEBUG=INFO, NCCL_SOCKET_IFNAME), or accumulate micro-batches"
    return [Verdict("gradients", SLOW, finding, advice, {"share": share})]


# --------------------------------------------------------------------------------------------------------------- stages


@dataclass(frozen=True)
class Stage:
    """A part of the check.

    Attributes:
        name: on the command line and in messages.
        seconds: after which it is given up.
        work: takes the folder of the check.
    """

    name: str
    seconds: float
    work: Callable[[Path], list[Verdict]]


PREPARATIONS = (Stage("recordings", 180, pack), Stage("one process", 120, alone))
STAGES = (
    Stage("machines and network", 180, machines),  # also waits for machines that are still packing
    *(Stage(f"losses, {title(strategy)}", 120, partial(losses_of, strategy)) for strategy in STRATEGIES),
    *(Stage(f"step, {title(strategy)}", 150, partial(step_of, strategy)) for strategy in STRATEGIES),
    Stage("rates", 150, machine_rates),
)
RECIPE = Stage("recipe", 600, recipe_rates)  # only if one is asked for
OF_RATES = ("recordings", "machines and network", "rates", "recipe")  # with --rates-only


def run_stage(name: str, folder: Path) -> None:
    """Run a stage in this process; the first rank adds its verdicts to the folder's."""
    stage = next(stage for stage in (*PREPARATIONS, *STAGES, RECIPE) if stage.name == name)
    strategy = "zero2" if name.endswith(title("zero2")) else "ddp"
    try:
        with deepspeed_for(strategy):
            verdicts = stage.work(folder)
    except Skipped as reason:
        verdicts = [Verdict(name, SKIPPED, str(reason))]
    if own_identity().rank == 0:
        for verdict in verdicts:
            verdict.append_to(folder)
        (folder / ENDED).write_text(str(time.time()))
