"""Ends a network early: modules after the cut are dropped."""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from data_prep.common.errors import BadInput
from train.models.timm_networks import TimmNetwork
from train.models.tracing import ForwardPass, ForwardUntil, record_started


def truncate(net: TimmNetwork, cut: str | None, example: torch.Tensor, keep_head: bool) -> ForwardPass:
    """Drop the modules that a network does not need to get from images to the output of module `cut`.

    Modules that start only after `cut` has ended pass their input on instead (and their weights are gone), so that the
    network's own `forward_features` ends in the output of `cut`. Where it does not, as within a residual block, whose
    sum would still be formed, the forward pass is ended at `cut`. Parameters that are not reached are frozen.

    Args:
        net: a timm network in evaluation mode; changed in place.
        cut: name of a module; None for the end of `forward_features`.
        example: images (b, 3, h, w) of the size that will be used.
        keep_head: whether `forward_head` is needed as well.

    Returns:
        The forward pass to use from now on.

    Raises:
        BadInput: no such module (names the nearest ones), or one whose output the forward pass does not give.
    """
    if cut is None and keep_head:
        return net.forward_features
    if cut is not None:
        check_module(net, cut)
    with _perturbed_weights(net):
        reach = _reach(net, cut, example)
        dropped = _drop(net, reach)
        if cut is None or _ends_in(net.forward_features, example, reach.output):
            return net.forward_features
    for child in dropped:
        if next(child.module.parameters(), None) is None:  # its parent's own code may read it
            child.parent.register_module(child.name, child.module)
    return ForwardUntil(net, cut)


def check_module(net: nn.Module, name: str) -> None:
    """Refuse a module that a network does not have.

    Raises:
        BadInput: no such module; names the nearest ones.
    """
    names = [module_name for module_name, _ in net.named_modules() if module_name]
    if name not in names:
        top_level = [module_name for module_name in names if "." not in module_name]
        near = difflib.get_close_matches(name, names, n=3) or top_level
        raise BadInput(f"backbone.cut: the network has no module {name!r}; nearest are {', '.join(near)}")


@contextmanager
def _perturbed_weights(net: nn.Module) -> Iterator[None]:
    """Perturb the weights while the block runs, so that none are the zeros and ones of fresh networks.

    Residual branches that begin at zero would let a sum look like one of its terms.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = list(net.state_dict().values())
    before = [tensor.clone() for tensor in tensors]
    with torch.no_grad():
        for tensor in tensors:
            if tensor.is_floating_point() and tensor.ndim <= 1:
                tensor += 0.1 + 0.4 * torch.rand(tensor.shape, generator=generator)
            elif tensor.is_floating_point() and not tensor.any():
                tensor += 0.02 * torch.randn(tensor.shape, generator=generator)
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, values in zip(tensors, before, strict=True):
                tensor.copy_(values)


class _PassOn(nn.Module):
    """Returns its first input and ignores the others."""

    def forward(self, x: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        """x."""
        return x


def is_dropped(module: nn.Module) -> bool:
    """Whether a module only stands in for one that was dropped."""
    return isinstance(module, _PassOn) or (isinstance(module, nn.Sequential) and not len(module))


@dataclass(frozen=True)
class _Reach:
    """The modules that a forward pass to the end of a module reaches.

    Attributes:
        needed: modules that start before the module ends, or whose weights are used until then.
        later: modules that start only afterwards.
        output: of the module.
    """

    needed: set[nn.Module]
    later: set[nn.Module]
    output: torch.Tensor


def _reach(net: TimmNetwork, cut: str | None, example: torch.Tensor) -> _Reach:
    """Try the forward pass to the end of `cut`, and freeze the parameters that are not used until then."""
    forward_pass: ForwardPass = net.forward_features if cut is None else ForwardUntil(net, cut)
    with torch.no_grad():
        with record_started(net) as started:
            net.forward_features(example)
        with record_started(net) as needed:
            expected = forward_pass(example)
    output = forward_pass(example)  # again, as kernels may round otherwise where gradients are wanted
    parameters = list(net.parameters())
    gradients = torch.autograd.grad(output.float().sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)
    for module in net.modules():
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            needed.add(module)
    return _Reach(needed, started - needed, expected)


@dataclass(frozen=True)
class _Dropped:
    """A module that was replaced, with its parent and its name in it."""

    parent: nn.Module
    name: str
    module: nn.Module


def _drop(parent: nn.Module, reach: _Reach) -> list[_Dropped]:
    """Replace the outermost modules that are not needed by ones that pass their input on.

    A module that never starts and has no weights stays: its parent may read its settings.
    """
    dropped: list[_Dropped] = []
    for name, child in list(parent.named_children()):
        modules = set(child.modules())
        if modules & reach.needed:
            dropped += _drop(child, reach)
        elif modules & reach.later or next(child.parameters(), None) is not None:
            # An empty sequence stays iterable, which gradient checkpointing asks of stages.
            parent.register_module(name, nn.Sequential() if isinstance(child, nn.Sequential) else _PassOn())
            dropped.append(_Dropped(parent, name, child))
    return dropped


@torch.no_grad()
def _ends_in(forward_pass: ForwardPass, example: torch.Tensor, expected: torch.Tensor) -> bool:
    try:
        output = forward_pass(example)
    except Exception:  # networks that lack a module raise many kinds
        return False
    return isinstance(output, torch.Tensor) and output.shape == expected.shape and torch.equal(output, expected)
