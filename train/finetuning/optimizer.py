"""Optimizers by their name in a recipe."""

import torch
from timm.optim import Lion

from train.run import recipe


def set_momentum(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the momentum of sgd, or the first beta of the others."""
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = (value, *group["betas"][1:])
        else:
            group["momentum"] = value


def build_optimizer(settings: recipe.Optimizer, groups: list[dict], device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of the recipe over parameter groups, each of which has its `peak_lr`.

    Fused kernels are used where torch has them.
    """
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
        case "radam":
            return torch.optim.RAdam(groups, lr=settings.lr, betas=betas, decoupled_weight_decay=True, foreach=True)
        case "lion":
            return Lion(groups, lr=settings.lr, betas=(settings.momentum, 0.99), foreach=True)
    raise ValueError(settings.name)
