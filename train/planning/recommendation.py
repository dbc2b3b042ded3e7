"""Which strategies a recipe fits under, with which batch, and which of them to use."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data_prep.common.errors import BadInput
from train.data.order import accumulation
from train.models.losses import RESPONSE_LOSSES
from train.planning.memory import NAMES, Memory, Strategy, bytes_sent, estimate_memory, read_strategy, usable_memory
from train.planning.step_cost import StepCost
from train.run.recipe import Recipe

SIMPLEST_FIRST = ("ddp", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
LARGEST_BATCH = 2**20  # stimuli; no larger batch is tried


@dataclass(frozen=True)
class StrategyEstimate:
    """A strategy with the largest batch that fits under it, or with the smallest if none does.

    Attributes:
        strategy: its name.
        fits: whether a batch fits.
        memory: of a process, with this batch.
        per_device: stimuli in a forward pass of a process.
        accumulation_steps: micro-batches per optimizer step; they follow from `per_device` and `batch.global_size`.
        largest_batch: the most stimuli that fit into one pass, whatever the recipe's global batch; 0 if none do.
        bytes_sent: by a GPU in an optimizer step.
    """

    strategy: str
    fits: bool
    memory: Memory
    per_device: int
    accumulation_steps: int
    largest_batch: int
    bytes_sent: float


def estimate_strategies(recipe: Recipe, cost: StepCost, gpus: int, gpu_bytes: float) -> list[StrategyEstimate]:
    """Every strategy that can run the recipe.

    Args:
        recipe: for its global batch and what it requires of a strategy; its `batch.per_device` is ignored.
        cost: of a step.
        gpus: over all machines.
        gpu_bytes: memory of each.

    Raises:
        BadInput: more GPUs than stimuli in a step.
    """
    if gpus > recipe.batch.global_size:
        raise BadInput(
            f"gpus: {gpus} processes cannot share a global batch of {recipe.batch.global_size} stimuli; raise "
            "batch.global_size or use fewer"
        )
    strategies = [read_strategy(name) for name in NAMES]
    limit = usable_memory(gpu_bytes)
    return [_estimate(strategy, recipe, cost, gpus, limit) for strategy in strategies if _can_run(recipe, strategy)]


def _can_run(recipe: Recipe, strategy: Strategy) -> bool:
    if recipe.precision == "fp16":
        return strategy.stage is None
    return not (recipe.compile and strategy.stage == 3)


def _estimate(strategy: Strategy, recipe: Recipe, cost: StepCost, gpus: int, limit: float) -> StrategyEstimate:
    def fits(batch: int, accumulation_steps: int = 1) -> bool:
        return estimate_memory(strategy, cost, gpus, batch, accumulation_steps).total <= limit

    divisions = list(_divisions(recipe, gpus))
    fitting = [division for division in divisions if fits(*division)]
    batch, accumulation_steps = fitting[0] if fitting else divisions[-1]
    return StrategyEstimate(
        strategy.name,
        fits=bool(fitting),
        memory=estimate_memory(strategy, cost, gpus, batch, accumulation_steps),
        per_device=batch,
        accumulation_steps=accumulation_steps,
        largest_batch=bisect_left(range(1, LARGEST_BATCH), True, key=lambda candidate: not fits(candidate)),
        bytes_sent=bytes_sent(strategy, cost, gpus, accumulation_steps),
    )


def _divisions(recipe: Recipe, gpus: int) -> Iterator[tuple[int, int]]:
    """How a process's share of a step can be divided: (stimuli, micro-batches), the largest batch first."""
    size = recipe.batch.global_size
    share = -(-size // gpus)
    undivided = recipe.task.predicts_responses and RESPONSE_LOSSES[recipe.loss.responses].needs_whole_batch
    most_micro_batches = 1 if undivided else share
    batches = {-(-share // micro_batches) for micro_batches in range(1, most_micro_batches + 1)}
    for batch in sorted(batches, reverse=True):
        yield batch, accumulation(size, gpus, batch)


def recommend(estimates: Sequence[StrategyEstimate]) -> StrategyEstimate | None:
    """The simplest strategy that fits; None if none does."""
    fitting = {estimate.strategy: estimate for estimate in estimates if estimate.fits}
    return next((fitting[name] for name in SIMPLEST_FIRST if name in fitting), None)
