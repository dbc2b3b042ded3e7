"""Ending a network early: what comes after a module is dropped, whatever the network."""

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from data_prep.common.errors import BadInput

Run = Callable[[torch.Tensor], torch.Tensor]


def truncate(net: nn.Module, cut: str | None, example: torch.Tensor, keep_head: bool) -> Run:
    """Drop what a network does not need to get from images to the output of module `cut`.

    Modules that start only after `cut` has ended pass their input on instead (and their weights are gone), so that the
    network's own `forward_features` ends in the output of `cut`. Where it does not, as within a residual block, whose
    sum would still be formed, the forward pass is broken off at `cut`. Parameters that were not reached are frozen.

    Args:
        net: a timm network in evaluation mode; changed in place.
        cut: name of a module; None for the end of `forward_features`.
        example: images (b, 3, h, w) of the size that is going to be used.
        keep_head: whether `forward_head` is needed as well.

    Returns:
        The forward pass to use from now on.

    Raises:
        BadInput: no such module (with the nearest names), or one that the forward pass does not come by.
    """
    if cut is None and keep_head:
        return net.forward_features
    if cut is not None:
        check_module(net, cut)
    with _stirred(net):
        needed, later, output = _trace(net, cut, example)
        dropped = list(_drop(net, needed, later))
        if cut is None or _ends_in(net.forward_features, example, output):
            return net.forward_features
    for parent, name, module in dropped:
        if next(module.parameters(), None) is None:  # it may be what its parent's own code reads
            parent.register_module(name, module)
    return _BrokenOff(net, cut)


def check_module(net: nn.Module, name: str) -> None:
    """Refuse a module that a network does not have, with the nearest names.

    Raises:
        BadInput: no such module.
    """
    names = [found for found, _ in net.named_modules() if found]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3) or [found for found in names if "." not in found]
        raise BadInput(f"backbone.cut: the network has no module {name!r}; nearest are {', '.join(near)}")


@contextmanager
def _stirred(net: nn.Module) -> Iterator[None]:
    """Other weights for the time being, without the zeros and ones of fresh networks.

    Residual branches that begin at zero would let a sum look like one of its parts.
    """
    generator = torch.Generator().manual_seed(0)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.is_floating_point() and tensor.ndim <= 1:
                tensor += 0.1 + 0.4 * torch.rand(tensor.shape, generator=generator)
            elif tensor.is_floating_point() and not tensor.any():
                tensor += 0.02 * torch.randn(tensor.shape, generator=generator)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in before.items():
                parent, _, own = name.rpartition(".")
                module = _module_at(net, parent)
                if module is not None and isinstance(held := getattr(module, own, None), torch.Tensor):
                    held.copy_(tensor)


def _module_at(net: nn.Module, name: str) -> nn.Module | None:
    """A module, or None where it has been dropped."""
    try:
        return net.get_submodule(name)
    except AttributeError:
        return None


class _PassOn(nn.Module):
    """Gives back its first input, whatever else a network hands to its blocks."""

    def forward(self, x: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        """x."""
        return x


def is_dropped(module: nn.Module) -> bool:
    """Whether a module only stands where a dropped one stood."""
    return isinstance(module, _PassOn) or (isinstance(module, nn.Sequential) and not len(module))


class _Reached(Exception):
    def __init__(self, output: torch.Tensor):
        self.output = output


@contextmanager
def _breaking_off(module: nn.Module) -> Iterator[None]:
    def stop(_module, _inputs, output):
        raise _Reached(output)

    handle = module.register_forward_hook(stop)
    try:
        yield
    finally:
        handle.remove()


@dataclass
class _BrokenOff:
    """The forward pass of a network up to a module."""

    net: nn.Module
    cut: str

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        with _breaking_off(self.net.get_submodule(self.cut)):
            try:
                self.net.forward_features(images)
            except _Reached as reached:
                return reached.output
        raise BadInput(f"backbone.cut: the forward pass of {type(self.net).__name__} does not come by {self.cut}")


Trace = tuple[set[nn.Module], set[nn.Module], torch.Tensor]


def _trace(net: nn.Module, cut: str | None, example: torch.Tensor) -> Trace:
    """What a network needs to get to the end of `cut`, and what it ends in there.

    Freezes the parameters that are not used until then.

    Returns:
        The modules that start before `cut` ends or whose weights are used until then; those that start only later; the
        output of `cut`.
    """
    run = net.forward_features if cut is None else _BrokenOff(net, cut)
    with torch.no_grad():
        ever, _ = _run_watched(net, net.forward_features, example)
        needed, expected = _run_watched(net, run, example)
    output = run(example)  # again, as kernels may round otherwise where gradients are wanted
    if not isinstance(output, torch.Tensor):
        raise BadInput(f"backbone.cut: {cut} gives a {type(output).__name__}, not one tensor; cut at another module")
    parameters = list(net.parameters())
    used = torch.autograd.grad(output.float().sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, used, strict=True):
        parameter.requires_grad_(gradient is not None)
    needed.update(m for m in net.modules() if any(p.requires_grad for p in m.parameters(recurse=False)))
    return needed, ever - needed, expected


def _run_watched(net: nn.Module, run: Run, example: torch.Tensor) -> tuple[set[nn.Module], torch.Tensor]:
    """The modules that start in a forward pass, and its output."""
    started: set[nn.Module] = set()
    handles = [module.register_forward_pre_hook(lambda module, _: started.add(module)) for module in net.modules()]
    try:
        return started, run(example)
    finally:
        for handle in handles:
            handle.remove()


def _drop(
    module: nn.Module, needed: set[nn.Module], later: set[nn.Module]
) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Replace the modules that are not needed, the outermost ones, by ones that pass their input on.

    One that never starts and has no weights stays: its parent may read its settings.

    Yields:
        What was replaced: parent, name in it, module.
    """
    for name, child in list(module.named_children()):
        if any(inner in needed for inner in child.modules()):
            yield from _drop(child, needed, later)
        elif any(inner in later for inner in child.modules()) or next(child.parameters(), None) is not None:
            # An empty sequence stays iterable, which gradient checkpointing asks of stages.
            module.register_module(name, nn.Sequential() if isinstance(child, nn.Sequential) else _PassOn())
            yield module, name, child


@torch.no_grad()
def _ends_in(run: Run, example: torch.Tensor, expected: torch.Tensor) -> bool:
    try:
        found = run(example)
    except Exception:  # what a network raises that misses a module
        return False
    return isinstance(found, torch.Tensor) and found.shape == expected.shape and torch.equal(found, expected)
