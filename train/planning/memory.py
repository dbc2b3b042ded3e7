"""How strategies divide what a step needs among GPUs: memory, communication, and the batch that fits.

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

import json
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.common.errors import BadInput
from train.data.order import accumulation
from train.models.losses import RESPONSE_LOSSES
from train.planning.step_cost import Needs
from train.run.recipe import Recipe

GIB = 2**30
CONTEXT = 0.6 * GIB  # what CUDA and its libraries take of a GPU before the first tensor
HEADROOM = 0.1  # share of a GPU left for cuDNN's workspaces and what the allocator cannot reuse
ELEMENT = 4  # bytes of a float32
MOST = 2**20  # stimuli; no larger batch is looked for
NAMES = ("ddp", "zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
SIMPLEST_FIRST = ("ddp", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"


@dataclass(frozen=True)
class Strategy:
    """What of a strategy's configuration decides about memory.

    Attributes:
        name: `ddp`, or the name of a file in ds_configs.
        stage: of ZeRO, None for DDP.
        reduce: bytes of the buffers in which gradients are reduced.
        gathered: the most bytes of weights that ZeRO-3 holds whole.
        host_optimizer, host_weights: whether these are on the host.
    """

    name: str
    stage: int | None = None
    reduce: int = 0
    gathered: int = 0
    host_optimizer: bool = False
    host_weights: bool = False


def read_strategy(name: str) -> Strategy:
    """A strategy by its name, with the buffer sizes of its file.

    Raises:
        BadInput: the file is missing or is no DeepSpeed configuration.
    """
    if name == "ddp":
        return Strategy(name)
    path = CONFIGS / f"{name}.json"
    try:
        zero = json.loads(path.read_text(encoding="utf-8"))["zero_optimization"]
        stage = int(zero["stage"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is not readable as a DeepSpeed configuration ({error})") from None
    # ZeRO-2 reduces one buffer while it fills the other; ZeRO-3 flattens a bucket before it reduces it.
    buffers = 1 + bool(zero.get("overlap_comm") or stage == 3)
    kept_whole = min(zero.get("stage3_max_live_parameters", 10**9), zero.get("stage3_max_reuse_distance", 10**9))
    return Strategy(
        name,
        stage,
        reduce=ELEMENT * buffers * zero.get("reduce_bucket_size", 5 * 10**8) if stage else 0,
        gathered=ELEMENT * max(kept_whole, zero.get("stage3_prefetch_bucket_size", 5 * 10**7)) if stage == 3 else 0,
        host_optimizer=_on_host(zero, "offload_optimizer"),
        host_weights=_on_host(zero, "offload_param"),
    )


def _on_host(zero: dict, what: str) -> bool:
    return (zero.get(what) or {}).get("device") == "cpu"


@dataclass(frozen=True)
class Memory:
    """Bytes that a process takes: of its GPU, and of its machine's memory by offload.

    `weights` holds the running average too. `buffers` is what a strategy or the optimizer holds for a while.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float
    host: float

    @property
    def total(self) -> float:
        """Of the GPU."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers


def memory(strategy: Strategy, needs: Needs, gpus: int, batch: int, pieces: int) -> Memory:
    """What a process takes with `batch` stimuli in each of `pieces` micro-batches; the table above has the formulas."""
    stage, activations = strategy.stage or 0, needs.activations(batch)
    optimizer = (needs.trainable + needs.state) / gpus if stage else needs.state
    gradients = needs.trainable / (gpus if stage >= 2 else 1)
    weights = needs.weights / (gpus if stage == 3 else 1)
    average = needs.average + (needs.average / gpus if stage == 3 else 0)  # whole to score, and this process's part
    host = 0.0
    if strategy.host_optimizer:
        # With a page-locked copy of the stepped weights on their way back to the GPU.
        host, optimizer, gradients = optimizer + gradients + needs.trainable / gpus, 0.0, 0.0
    if strategy.host_weights:
        host, weights = host + weights, 0.0
    in_step = 0.0 if strategy.host_optimizer else _step_buffers(stage, strategy.stage is None, needs, gpus)
    return Memory(
        weights=weights + average,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        # The activations are gone when the optimizer steps.
        buffers=max(_backward_buffers(strategy, needs, gpus, pieces), in_step - activations),
        host=host,
    )


def _backward_buffers(strategy: Strategy, needs: Needs, gpus: int, pieces: int) -> float:
    """Bytes a strategy holds beside activations, while gradients are made."""
    if strategy.stage is None:
        # Gradients lie in the buckets, but while they accumulate without being reduced they are apart from them.
        return needs.trainable if gpus > 1 and pieces > 1 else 0
    staging = needs.largest if strategy.host_optimizer else 0
    return strategy.reduce + min(strategy.gathered, needs.weights) + staging


def _step_buffers(stage: int, ddp: bool, needs: Needs, gpus: int) -> float:
    """Bytes made and freed between backward and the end of the optimizer's step."""
    if stage:
        return (needs.trainable + needs.temporary) / gpus  # gradients are flattened first
    flat = 0 if ddp or gpus == 1 else needs.trainable  # ZeRO-0 reduces a flat copy of the gradients
    return max(flat, needs.temporary)


def sent(strategy: Strategy, needs: Needs, gpus: int, pieces: int) -> float:
    """Bytes that a GPU sends to others in an optimizer step of `pieces` micro-batches; the table above has them."""
    ring = (gpus - 1) / gpus
    match strategy.stage:
        case 1:
            return ring * needs.trainable * 3
        case 2:
            return ring * needs.trainable * (2 * pieces + 1)
        case 3:
            return ring * pieces * (2 * needs.weights + needs.trainable)
    return 2 * ring * needs.trainable


@dataclass(frozen=True)
class Choice:
    """A strategy with the batch that fits under it; with the smallest one where none does.

    Attributes:
        strategy: its name.
        fits: whether it does.
        memory: of a process, with this batch.
        per_device: stimuli in a forward pass of a process.
        pieces: micro-batches per optimizer step, which follow from it and the recipe's `batch.global_size`.
        largest: the most stimuli that fit into one pass, whatever the recipe's global batch; 0 where none do.
        sent: bytes that a GPU sends in an optimizer step.
    """

    strategy: str
    fits: bool
    memory: Memory
    per_device: int
    pieces: int
    largest: int
    sent: float


def usable(gpu_bytes: float) -> float:
    """What of a GPU's bytes a process can plan with."""
    return gpu_bytes * (1 - HEADROOM) - CONTEXT


def choices(recipe: Recipe, needs: Needs, gpus: int, gpu_bytes: float) -> list[Choice]:
    """Each strategy that can run the recipe, with the largest batch that fits.

    Args:
        recipe: for its global batch and what it asks of a strategy; its `batch.per_device` is what is looked for.
        needs: of a step.
        gpus: over all machines.
        gpu_bytes: memory of each.

    Raises:
        BadInput: more GPUs than stimuli in a step.
    """
    if gpus > recipe.batch.global_size:
        raise BadInput(
            f"gpus: {gpus} processes cannot share a global batch of {recipe.batch.global_size} stimuli; raise "
            "batch.global_size or take fewer"
        )
    strategies = [read_strategy(name) for name in NAMES]
    return [_choice(each, recipe, needs, gpus, usable(gpu_bytes)) for each in strategies if _can_run(recipe, each)]


def _can_run(recipe: Recipe, strategy: Strategy) -> bool:
    if recipe.precision == "fp16":
        return strategy.stage is None
    return not (recipe.compile and strategy.stage == 3)


def _choice(strategy: Strategy, recipe: Recipe, needs: Needs, gpus: int, limit: float) -> Choice:
    def fits(batch: int, pieces: int = 1) -> bool:
        return memory(strategy, needs, gpus, batch, pieces).total <= limit

    divisions = list(_divisions(recipe, gpus))
    fitting = [division for division in divisions if fits(*division)]
    batch, pieces = fitting[0] if fitting else divisions[-1]
    return Choice(
        strategy.name,
        fits=bool(fitting),
        memory=memory(strategy, needs, gpus, batch, pieces),
        per_device=batch,
        pieces=pieces,
        largest=bisect_left(range(1, MOST), True, key=lambda candidate: not fits(candidate)),
        sent=sent(strategy, needs, gpus, pieces),
    )


def _divisions(recipe: Recipe, gpus: int) -> Iterator[tuple[int, int]]:
    """(stimuli, micro-batches) into which a process's share of a step can be divided, the largest batch first."""
    size = recipe.batch.global_size
    share = -(-size // gpus)
    whole = recipe.task.predicts_responses and RESPONSE_LOSSES[recipe.loss.responses].needs_whole_batch
    batches = {-(-share // pieces) for pieces in range(1, 2 if whole else share + 1)}
    for batch in sorted(batches, reverse=True):
        yield batch, accumulation(size, gpus, batch)


def recommended(found: list[Choice]) -> Choice | None:
    """The simplest strategy that fits; None where none does."""
    by_name = {choice.strategy: choice for choice in found if choice.fits}
    return next((by_name[name] for name in SIMPLEST_FIRST if name in by_name), None)
