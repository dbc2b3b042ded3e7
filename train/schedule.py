"""Optimizers and learning-rate schedules.

A schedule is a pure function of the optimizer step: the rate does not depend on the number of ranks, or on how often a
run was resumed.
"""

import math

import torch

from train import recipe

ONECYCLE_START, ONECYCLE_END = 1 / 25, 1 / 25e4  # of the peak, as in torch's OneCycleLR


def rate_factor(settings: recipe.Schedule, step: int, total: int) -> float:
    """The learning rate at a step, as a part of its peak.

    OneCycle (Smith and Topin 2018) in torch's form: a half cosine from 1/25 of the peak up to it over the first
    `warmup` of the steps, then a half cosine down to 1/250,000. Cosine: linear up, then a half cosine down to 0 just
    after the last step. Constant: linear up, then the peak.

    Args:
        settings: kind and warm-up.
        step: 0 for the first step.
        total: steps of the whole run.
    """
    if settings.kind == "onecycle":
        top = settings.warmup * total - 1
        if step <= top:
            return _half_cosine(ONECYCLE_START, 1.0, step / top if top > 0 else 1.0)
        return _half_cosine(1.0, ONECYCLE_END, (step - top) / max(total - 1 - top, 1e-9))
    warmup_steps = round(settings.warmup * total)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if settings.kind == "constant":
        return 1.0
    return _half_cosine(1.0, 0.0, (step - warmup_steps) / max(total - warmup_steps, 1))


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * min(progress, 1.0)))


def build_optimizer(settings: recipe.Optimizer, groups: list[dict], device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of the recipe over parameter groups; each group keeps its peak rate as `peak_lr`.

    Fused kernels are used where torch has them.
    """
    for group in groups:
        group.setdefault("peak_lr", settings.lr)
    betas = (settings.momentum, 0.999)
    fused = device.type in ("cuda", "cpu")
    match settings.name:
        case "sgd":
            return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, fused=fused)
        case "adam":
            return torch.optim.Adam(groups, lr=settings.lr, betas=betas, fused=fused)
        case "adamw":
            return torch.optim.AdamW(groups, lr=settings.lr, betas=betas, fused=fused)
        case "nadam":
            return torch.optim.NAdam(groups, lr=settings.lr, betas=betas, decoupled_weight_decay=True, foreach=True)
    raise ValueError(settings.name)
