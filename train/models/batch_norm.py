"""The BatchNorm layers of a network, and their running statistics."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def batch_norm_statistics(network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The running statistics by name; they differ between ranks, as each normalises its own micro-batches."""
    for name, module in network.named_modules():
        if isinstance(module, BATCH_NORMS) and module.track_running_stats:
            assert module.running_mean is not None
            assert module.running_var is not None
            yield f"{name}.running_mean", module.running_mean
            yield f"{name}.running_var", module.running_var


@torch.no_grad()
def single_value_norms(network: nn.Module, images: torch.Tensor) -> list[str]:
    """The BatchNorm layers that would have one value per channel to normalise by, in training; torch refuses that.

    Args:
        network: from images to anything.
        images: (1, 3, size, size), on the network's device.

    Returns:
        Names of modules, in the order in which they run. Layers whose statistics are frozen, or are those of all
        processes together (SyncBatchNorm), are not among them.
    """
    found: list[str] = []

    def look(name: str, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].numel() == inputs[0].shape[1]:
            found.append(name)

    was_training = network.training
    network.train()
    trained = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, BATCH_NORMS) and not isinstance(module, nn.SyncBatchNorm) and module.training
    }
    network.eval()  # which normalises by the running statistics, and leaves them alone
    hooks = [module.register_forward_pre_hook(partial(look, name)) for name, module in trained.items()]
    try:
        network(images)
    finally:
        for hook in hooks:
            hook.remove()
        network.train(was_training)
    return found
