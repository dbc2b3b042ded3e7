"""The BatchNorm layers of a network, and their running statistics."""

from collections.abc import Iterator

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
