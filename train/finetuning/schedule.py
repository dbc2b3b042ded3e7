"""Learning-rate schedules.

A schedule is a pure function of the optimizer step (and, for plateaus, of the scores so far): the rate does not depend
on the number of ranks, or on how often a run was resumed.
"""

import math
from collections.abc import Sequence

from train.distributed.engine import Engine
from train.finetuning.optimizer import set_momentum
from train.run import recipe

ONECYCLE_START, ONECYCLE_END = 1 / 25, 1 / 25e4  # of the peak, as in torch's OneCycleLR
HIGH_MOMENTUM, LOW_MOMENTUM = 0.95, 0.85  # likewise


def set_rates(engine: Engine, settings: recipe.Schedule, step: int, total: int, drops: int) -> None:
    """Set learning rate and momentum for a step; arguments as of `rate_factor`."""
    engine.set_learning_rate(rate_factor(settings, step, total, drops))
    value = momentum(settings, step, total)
    if value is not None:
        set_momentum(engine.optimizer, value)


def rate_factor(settings: recipe.Schedule, step: int, total: int, drops: int = 0) -> float:
    """The learning rate at a step, relative to its peak.

    OneCycle (Smith and Topin 2018) in torch's form: a half cosine from 1/25 of the peak up to it over the first
    `warmup` of the steps, then a half cosine down to 1/250,000. Cosine: linear up, then a half cosine down to 0 just
    after the last step. Plateau: linear up, then `plateau_factor` to the power of `drops`. Constant: linear up, then
    the peak.

    Args:
        settings: kind and warm-up.
        step: 0 for the first step.
        total: steps of the whole run.
        drops: plateaus reached so far, see `plateaus`.
    """
    if settings.kind == "onecycle":
        return _one_cycle(settings.warmup, step, total, ONECYCLE_START, 1.0, ONECYCLE_END)
    warmup_steps = round(settings.warmup * total)
    warm = (step + 1) / warmup_steps if step < warmup_steps else 1.0
    if settings.kind == "plateau":
        return warm * settings.plateau_factor**drops
    if settings.kind == "constant" or step < warmup_steps:
        return warm
    return _half_cosine(1.0, 0.0, (step - warmup_steps) / max(total - warmup_steps, 1))


def momentum(settings: recipe.Schedule, step: int, total: int) -> float | None:
    """The momentum (first beta) at a step where the schedule cycles it, in torch's OneCycleLR's form; else None."""
    if not settings.cycle_momentum:
        return None
    return _one_cycle(settings.warmup, step, total, HIGH_MOMENTUM, LOW_MOMENTUM, HIGH_MOMENTUM)


def plateaus(settings: recipe.Schedule, improved: Sequence[bool]) -> int:
    """How often the selection metric has failed to improve for `plateau_patience` epochs in a row.

    Args:
        settings: with the patience.
        improved: for each epoch so far, whether it was the best until then.
    """
    drops = waited = 0
    for better in improved:
        waited = 0 if better else waited + 1
        if waited == settings.plateau_patience:
            drops, waited = drops + 1, 0
    return drops


def _one_cycle(warmup: float, step: int, total: int, start: float, middle: float, end: float) -> float:
    top = warmup * total - 1
    if step <= top:
        return _half_cosine(start, middle, step / top if top > 0 else 1.0)
    return _half_cosine(middle, end, (step - top) / max(total - 1 - top, 1e-9))


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * min(progress, 1.0)))
