"""How strategies divide the cost of a step among GPUs: memory and communication.

N GPUs, W bytes of weights of which P are trained, S bytes of optimizer state, k micro-batches per optimizer step.
Weights and gradients are float32 in every precision, and ZeRO-1, -2 and -3 step a second copy of the trained weights.

| bytes per GPU    | weights | gradients | optimizer     | sent in an optimizer step    |
| ---------------- | ------- | --------- | ------------- | ---------------------------- |
| ddp, zero0       | W       | P         | S             | 2 (N-1)/N P                  |
| zero1            | W       | P         | (P + S) / N   | 3 (N-1)/N P                  |
| zero2            | W       | P / N     | (P + S) / N   | (2 k + 1) (N-1)/N P          |
| zero3            | W / N   | P / N     | (P + S) / N   | k (N-1)/N (2 W + P)          |

An all-reduce in a ring is a reduce-scatter and an all-gather, in each of which a GPU sends (N-1)/N of the bytes. DDP,
ZeRO-0 and -1 reduce gradients with the last micro-batch, ZeRO-2 and -3 with every one; ZeRO-1 and -2 gather weights
once a step, ZeRO-3 in every forward and backward pass (Rajbhandari et al. 2020, "ZeRO: Memory optimizations toward
training trillion parameter models", sections 5 and 7). The paper's ZeRO-1 and -2 scatter gradients as they reduce them;
DeepSpeed reduces whole buckets for all (`use_multi_rank_bucket_allreduce`), as benchmarks/scaling.py counted. Offload
keeps optimizer state, the copy of the weights and gradients (`zero3_offload`: the weights too) on the host.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_prep.common.errors import BadInput
from data_prep.common.safe_reading import parse_json, read_regular_file
from train.planning.step_cost import StepCost

GIB = 2**30
CUDA_CONTEXT = 0.6 * GIB  # what CUDA and its libraries take of a GPU before the first tensor
HEADROOM = 0.1  # share of a GPU left for cuDNN's workspaces and what the allocator cannot reuse
ELEMENT = 4  # bytes of a float32
NAMES = ("ddp", "zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"


@dataclass(frozen=True)
class Strategy:
    """The part of a strategy's configuration that determines memory.

    Attributes:
        name: `ddp`, or the name of a file in ds_configs.
        stage: of ZeRO, None for DDP.
        reduce_bytes: of the buffers in which gradients are reduced.
        gathered_bytes: the most of the weights that ZeRO-3 holds whole.
        host_optimizer, host_weights: whether these are on the host.
    """

    name: str
    stage: int | None = None
    reduce_bytes: int = 0
    gathered_bytes: int = 0
    host_optimizer: bool = False
    host_weights: bool = False


def read_strategy(name: str) -> Strategy:
    """A strategy by its name, with the buffer sizes of its file.

    Raises:
        BadInput: the file is missing or is not a DeepSpeed configuration.
    """
    if name == "ddp":
        return Strategy(name)
    path = CONFIGS / f"{name}.json"
    try:
        zero = parse_json(read_regular_file(path))["zero_optimization"]
        stage = int(zero["stage"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is not readable as a DeepSpeed configuration ({error})") from None
    # ZeRO-2 reduces one buffer while it fills the other; ZeRO-3 flattens a bucket before it reduces it.
    buffers = 2 if zero.get("overlap_comm") or stage == 3 else 1
    kept_whole = min(zero.get("stage3_max_live_parameters", 10**9), zero.get("stage3_max_reuse_distance", 10**9))
    return Strategy(
        name,
        stage,
        reduce_bytes=ELEMENT * buffers * zero.get("reduce_bucket_size", 5 * 10**8) if stage else 0,
        gathered_bytes=ELEMENT * max(kept_whole, zero.get("stage3_prefetch_bucket_size", 5 * 10**7))
        if stage == 3
        else 0,
        host_optimizer=_on_host(zero, "offload_optimizer"),
        host_weights=_on_host(zero, "offload_param"),
    )


def _on_host(zero: dict[str, Any], section: str) -> bool:
    return (zero.get(section) or {}).get("device") == "cpu"


@dataclass(frozen=True)
class Memory:
    """Bytes that a process takes of its GPU, and by offload of its machine's memory (`host`).

    `weights` includes the running average. `buffers` are held for a part of a step by the strategy or the optimizer.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float
    host: float

    @property
    def total(self) -> float:
        """Bytes of the GPU."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers


def estimate_memory(strategy: Strategy, cost: StepCost, gpus: int, batch: int, accumulation_steps: int) -> Memory:
    """The memory of a process with `batch` stimuli in each micro-batch; the table above has the formulas."""
    stage, activations = strategy.stage or 0, cost.activations(batch)
    optimizer = (cost.trainable + cost.optimizer_state) / gpus if stage else cost.optimizer_state
    gradients = cost.trainable / (gpus if stage >= 2 else 1)
    weights = cost.weights / (gpus if stage == 3 else 1)
    average: float = cost.running_average
    if stage == 3:
        average += cost.running_average / gpus  # the whole average to score with, and this process's part of it
    host = 0.0
    if strategy.host_optimizer:
        # With a page-locked copy of the stepped weights on their way back to the GPU.
        host, optimizer, gradients = optimizer + gradients + cost.trainable / gpus, 0.0, 0.0
    if strategy.host_weights:
        host, weights = host + weights, 0.0
    in_step = 0.0 if strategy.host_optimizer else _step_buffers(strategy, cost, gpus)
    return Memory(
        weights=weights + average,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        # The activations are gone when the optimizer steps.
        buffers=max(_backward_buffers(strategy, cost, gpus, accumulation_steps), in_step - activations),
        host=host,
    )


def _backward_buffers(strategy: Strategy, cost: StepCost, gpus: int, accumulation_steps: int) -> float:
    """Bytes that a strategy holds beside activations, while gradients are computed."""
    if strategy.stage is None:
        # Gradients are views of the buckets, except while they accumulate without being reduced.
        return cost.trainable if gpus > 1 and accumulation_steps > 1 else 0
    staging = cost.largest_tensor if strategy.host_optimizer else 0
    return strategy.reduce_bytes + min(strategy.gathered_bytes, cost.weights) + staging


def _step_buffers(strategy: Strategy, cost: StepCost, gpus: int) -> float:
    """Bytes allocated and freed between the backward pass and the end of the optimizer's step."""
    if strategy.stage:
        return (cost.trainable + cost.optimizer_temporary) / gpus  # gradients are flattened first
    flat = 0 if strategy.stage is None or gpus == 1 else cost.trainable  # ZeRO-0 reduces a flat copy of the gradients
    return max(flat, cost.optimizer_temporary)


class Weights(Protocol):
    """Bytes of a network's weights: of all, and of those that are trained."""

    @property
    def weights(self) -> float: ...

    @property
    def trainable(self) -> float: ...


def bytes_sent(strategy: Strategy, cost: Weights, gpus: int, accumulation_steps: int) -> float:
    """Bytes that a GPU sends to others in an optimizer step; the table above has the formulas."""
    ring = (gpus - 1) / gpus
    match strategy.stage:
        case 1:
            return ring * cost.trainable * 3
        case 2:
            return ring * cost.trainable * (2 * accumulation_steps + 1)
        case 3:
            return ring * accumulation_steps * (2 * cost.weights + cost.trainable)
    return 2 * ring * cost.trainable


def usable_memory(gpu_bytes: float) -> float:
    """How many of a GPU's bytes a plan may use."""
    return gpu_bytes * (1 - HEADROOM) - CUDA_CONTEXT
