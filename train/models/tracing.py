"""Records what the modules of a network return in a forward pass, and ends the pass early.

These are hooks of our own because torchvision's feature extraction needs symbolic tracing, which many of timm's
networks defeat, and timm's own feature hooks cannot end a forward pass.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from data_prep.common.errors import BadInput
from train.models.timm_networks import TimmNetwork

ForwardPass = Callable[[torch.Tensor], torch.Tensor]
"""Normalised images (b, 3, h, w) -> the network's last output."""


@contextmanager
def record_outputs(
    net: nn.Module, names: Sequence[str], transform: Callable[[torch.Tensor], torch.Tensor] = lambda output: output
) -> Iterator[dict[str, torch.Tensor]]:
    """Record the outputs of modules while the block runs.

    Args:
        net: a network.
        names: of its modules.
        transform: applied to an output as soon as its module has ended.

    Yields:
        The outputs by name, in the order in which the modules end: the last one if a module runs several times, none
        if it never runs or returns no tensor.
    """
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str, _module: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(output, torch.Tensor):
            outputs[name] = transform(output)

    with _removed_after([net.get_submodule(name).register_forward_hook(partial(keep, name)) for name in names]):
        yield outputs


@contextmanager
def record_started(net: nn.Module) -> Iterator[set[nn.Module]]:
    """Record which modules of a network start while the block runs."""
    started: set[nn.Module] = set()

    def keep(module: nn.Module, _inputs: object) -> None:
        started.add(module)

    with _removed_after([module.register_forward_pre_hook(keep) for module in net.modules()]):
        yield started


@dataclass(frozen=True)
class ForwardUntil:
    """A network's forward pass that ends as soon as one of its modules does.

    Attributes:
        net: the network.
        module: name of the module whose output is returned.
    """

    net: TimmNetwork
    module: str

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images (b, 3, h, w) -> the output of the module.

        Raises:
            BadInput: the forward pass does not reach the module, or it returns no tensor.
        """
        with _removed_after([self.net.get_submodule(self.module).register_forward_hook(_end)]):
            try:
                self.net.forward_features(images)
            except _Ended as ended:
                if isinstance(ended.output, torch.Tensor):
                    return ended.output
        raise no_output(self.net, self.module)


def no_output(net: nn.Module, module: str) -> BadInput:
    """The error for a module whose output cannot be read."""
    return BadInput(
        f"backbone.cut: {module} does not run in the forward pass of {type(net).__name__}, or returns no tensor; "
        "cut at another module"
    )


class _Ended(Exception):
    def __init__(self, output: object):
        self.output = output


def _end(_module: nn.Module, _inputs: object, output: object) -> None:
    raise _Ended(output)


@contextmanager
def _removed_after(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
