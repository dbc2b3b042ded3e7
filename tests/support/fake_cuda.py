"""A GPU that is not there: tensors with a device and a shape but no content, on a machine without CUDA.

torch's fake tensors raise when an operation mixes devices and when the host reads a value. `FakeGpu` also finds what
they let pass: copies between host and GPU that the host would wait for, and lists of tensors on different devices.
Backward passes and kernels that only CUDA has (they need a driver) cannot run.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

from train.distributed.heartbeat import Heartbeat
from train.distributed.runtime import Runtime

CUDA = torch.device("cuda", 0)
FIRST_WITHOUT_DRIVER = Version("2.11")
# Operations whose result, or its shape, the host must know.
READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive")
INDEXES = ("index", "index_put", "index_put_")
NO_HOST_NUMBERS = ("foreach", "_amp_")  # operations that take no number from the host as a tensor
COPIES = ("aten._to_copy.default", "aten.copy_.default", "aten._pin_memory.default")


class HostWaits(AssertionError):
    """The host would wait for the GPU."""


class MixedDevices(AssertionError):
    """An operation gets tensors from the host and from the GPU."""


class FakeGpu(TorchDispatchMode):
    """Raises where the host would wait for the GPU, and where an operation mixes devices.

    Args:
        may_wait: whether blocking copies are allowed, as they are outside of a training step.
    """

    def __init__(self, may_wait: bool = False):
        super().__init__()
        self.may_wait = may_wait

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = list(_tensors([*args, *kwargs.values()]))
        devices = {tensor.device.type for tensor in given}
        if "cuda" in devices and not self.may_wait and _is_read(func, given):
            raise HostWaits(f"{func} on {sorted(devices)}")
        if str(func) in COPIES:
            self._check_copy(func, given, args, kwargs)
        elif len(devices) > 1 and not _takes_numbers_from_the_host(func, given):
            raise MixedDevices(f"{func} on {sorted(devices)}")
        if func.overloadpacket.__name__ == "_fused_sgd_":
            return None  # torch has no fake form of it
        return func(*args, **kwargs)

    def _check_copy(self, func, given: list[torch.Tensor], args: tuple, kwargs: dict) -> None:
        target = given[0].device if func is torch.ops.aten.copy_.default else kwargs.get("device") or given[0].device
        source = given[-1].device
        non_blocking = kwargs.get("non_blocking", len(args) > 2 and args[2])
        if torch.device(target).type != source.type and not non_blocking and not self.may_wait:
            raise HostWaits(f"{func} from {source} to {target} blocks")


def _tensors(values: list | tuple) -> Iterator[torch.Tensor]:
    """The tensors among the arguments of an operation, also those in lists."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _is_read(func, given: list[torch.Tensor]) -> bool:
    """Whether the host must know a value or a shape that only the GPU knows; to index by a mask is to find its ones."""
    by_mask = func.overloadpacket.__name__ in INDEXES and any(tensor.dtype == torch.bool for tensor in given[1:])
    return by_mask or func.overloadpacket.__name__ in READS


def _takes_numbers_from_the_host(func, given: list[torch.Tensor]) -> bool:
    """Whether what comes from the host are numbers, and the operation passes them on to the GPU by value."""
    only_numbers = all(tensor.device.type == "cuda" or not tensor.ndim for tensor in given)
    return only_numbers and not any(word in str(func) for word in NO_HOST_NUMBERS)


@cache
def _fake_tensors() -> FakeTensorMode:
    """One for all tests: timm keeps tensors of a network it has made, and those of different modes do not mix."""
    return FakeTensorMode(shape_env=ShapeEnv())


@contextmanager
def fake_gpu(may_wait: bool = False) -> Iterator[FakeGpu]:
    """Everything within is fake, also the GPU; the test is skipped under a torch whose fake tensors need a driver."""
    if Version(torch.__version__) < FIRST_WITHOUT_DRIVER:
        pytest.skip(f"fake tensors of torch before {FIRST_WITHOUT_DRIVER} need the driver of a GPU")
    with _fake_tensors(), FakeGpu(may_wait) as gpu:
        yield gpu


def fake_copy(module: nn.Module) -> nn.Module:
    """A copy of a real or fake module whose tensors have no content."""
    with FakeCopyMode(_fake_tensors()):
        return copy.deepcopy(module)


def module_to(
    module: nn.Module, device: torch.device | None = None, *, memory_format: torch.memory_format | None = None
) -> nn.Module:
    """`Module.to`, which cannot replace the data of fake tensors, with new tensors instead."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                layout = {"memory_format": memory_format} if memory_format is not None and tensor.ndim == 4 else {}
                with torch.no_grad():
                    there = tensor.to(device=device, **layout)
                is_parameter = isinstance(tensor, nn.Parameter)
                tensors[name] = nn.Parameter(there, tensor.requires_grad) if is_parameter else there
    return module


class CudaRuntime(Runtime):
    """One process on the fake GPU."""

    def __init__(self):
        self.rank, self.ranks, self.device, self.deepspeed, self.members = 0, 1, CUDA, False, []
        self.heartbeat = None


class Event:
    """Stands for an event in a GPU's queue."""

    def __init__(self, **_: bool):
        pass

    def record(self, *_: object) -> None:
        """Nothing has a time."""

    def query(self) -> bool:
        """Nothing is ever over."""
        return False


@pytest.fixture
def cuda_runtime(monkeypatch) -> CudaRuntime:
    """A runtime on the fake GPU, with the parts of torch.cuda that need a driver replaced."""
    monkeypatch.setattr(nn.Module, "to", module_to)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=50 * 2**20))
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "default_generators", (torch.Generator(),))
    runtime = CudaRuntime()
    runtime.heartbeat = Heartbeat(1, None)
    return runtime
