"""Tracing records the outputs of modules in order, ends a forward pass early, and leaves no hooks behind."""

import pytest
import torch
from torch import nn

from data_prep.common.errors import BadInput
from train.models.tracing import ForwardUntil, record_outputs, record_started


class Twice(nn.Module):
    """Runs `first` twice, then a module that returns a tuple, then `last`; never `unused`."""

    def __init__(self):
        super().__init__()
        self.last, self.first, self.pair, self.unused = Double(), Double(), Pair(), Double()

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.pair(self.first(self.first(x)))[0])


class Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


def has_hooks(net: nn.Module) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_outputs_are_recorded_in_the_order_in_which_modules_end():
    net = Twice()
    with record_outputs(net, ["last", "pair", "unused", "first"], transform=torch.neg) as outputs:
        net.forward_features(torch.ones(1))
    assert list(outputs) == ["first", "last"]  # a tuple is not recorded
    assert [float(output) for output in outputs.values()] == [-4, -8]  # the last output of `first`
    assert not has_hooks(net)


def test_modules_that_start_are_recorded():
    net = Twice()
    with record_started(net) as started:
        net.forward_features(torch.ones(1))
    assert started == {net.first, net.pair, net.last}
    assert not has_hooks(net)


def test_a_forward_pass_ends_as_soon_as_the_module_does():
    net = Twice()
    with record_started(net) as started:
        assert float(ForwardUntil(net, "first")(torch.ones(1))) == 2
    assert started == {net.first}
    assert not has_hooks(net)


@pytest.mark.parametrize("module", ["unused", "pair"])
def test_a_module_without_an_output_is_refused(module):
    net = Twice()
    with pytest.raises(BadInput, match=rf"backbone\.cut: {module} does not run in the forward pass of Twice"):
        ForwardUntil(net, module)(torch.ones(1))
    assert not has_hooks(net)
