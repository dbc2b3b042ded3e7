"""The private APIs that docs/private_apis.md lists exist as expected, and no others are used.

Nothing here starts a process: attributes, signatures, and a word in the source where an object only has an attribute.
"""

import ast
import inspect
import re
from collections.abc import Callable

import deepspeed
import pytest
import torch
import torch.distributed.launcher.api
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import partition_parameters
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from helpers import ROOT
from torch import nn
from torch.distributed import distributed_c10d
from torch.distributed.elastic.agent.server.api import SimpleElasticAgent
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import PContext, SubprocessContext
from torch.distributed.elastic.rendezvous import dynamic_rendezvous

TABLE = ROOT / "docs" / "private_apis.md"
LIBRARIES = ("torch", "accelerate", "deepspeed")
PRIVATE = re.compile(r"_(?!_)\w*")


def parameters(function: Callable) -> list[str]:
    return list(inspect.signature(function).parameters)


def mentions(code: object, *words: str) -> bool:
    source = inspect.getsource(code)
    return all(re.search(rf"\b{word}\b", source) for word in words)


def finds_infinity() -> bool:
    infinity = torch.zeros(())
    torch._amp_foreach_non_finite_check_and_unscale_([torch.tensor([1.0, torch.inf])], infinity, torch.ones(()))
    return bool(infinity)


def halves_a_scale() -> bool:
    scale = torch.tensor(4.0)
    torch._amp_update_scale_(scale, torch.zeros((), dtype=torch.int32), torch.ones(()), 2.0, 0.5, 2000)
    return bool(scale == 2)


def multiplies_a_list() -> bool:
    numbers = torch.tensor([2, 3], dtype=torch.int32)
    torch._foreach_mul_([numbers], torch.zeros((), dtype=torch.int32))
    return not numbers.any()


def fused_optimizer_skips() -> bool:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], fused=True)
    weight.grad = torch.ones(2)
    optimizer.grad_scale, optimizer.found_inf = None, torch.ones(())
    optimizer.step()
    return bool((weight == 1).all())


def shared_storage() -> bool:
    return torch.UntypedStorage._new_shared(8).is_shared()


def counts_a_tensor() -> bool:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))

    with FakeTensorMode(), Count() as counted:
        torch.ones(2) + 1
    return counted.calls > 0


def copies_without_data() -> bool:
    from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

    return parameters(FakeCopyMode)[0] == "fake_mode" and issubclass(FakeTensorMode, object)


def event_types() -> bool:
    from torch._C._profiler import _EventType

    return hasattr(_EventType, "Allocation")


def stage_3_positions() -> bool:
    """`grad_position[id]` is (group, offset, length)."""
    return mentions(DeepSpeedZeroOptimizer_Stage3, r"int\(i\), int\(current_offset\), int\(num_elements")


CHECKS: dict[str, Callable[[], bool]] = {
    "torch.autograd.Variable._execution_engine.queue_callback": lambda: callable(
        torch.autograd.Variable._execution_engine.queue_callback
    ),
    "torch._amp_foreach_non_finite_check_and_unscale_": finds_infinity,
    "torch._amp_update_scale_": halves_a_scale,
    "torch._foreach_mul_": multiplies_a_list,
    "Optimizer.grad_scale": fused_optimizer_skips,
    "Optimizer.found_inf": fused_optimizer_skips,
    "torch.distributed.distributed_c10d._world": lambda: isinstance(distributed_c10d._world.pg_map, dict),
    "torch.distributed.distributed_c10d._set_pg_timeout": lambda: (
        hasattr(torch.distributed, "set_timeout")
        or parameters(distributed_c10d._set_pg_timeout) == ["timeout", "group"]
    ),
    "torch.distributed.distributed_c10d._get_default_store": lambda: (
        parameters(distributed_c10d._get_default_store) == []
    ),
    "torch.distributed.distributed_c10d._abort_process_group": lambda: (
        parameters(distributed_c10d._abort_process_group) == ["group"]
    ),
    "torch.UntypedStorage._new_shared": shared_storage,
    "torch.cuda.default_generators": lambda: isinstance(torch.cuda.default_generators, tuple),
    "torch._subclasses.fake_tensor.FakeTensorMode": counts_a_tensor,
    "torch._subclasses.fake_tensor.FakeCopyMode": copies_without_data,
    "torch.utils._python_dispatch.TorchDispatchMode": counts_a_tensor,
    "torch._C._profiler._EventType": event_types,
    "LocalElasticAgent._start_workers": lambda: (
        parameters(LocalElasticAgent._start_workers) == ["self", "worker_group"]
    ),
    "PContext.close": lambda: parameters(PContext.close) == ["self", "death_sig", "timeout"],
    "LocalElasticAgent._monitor_workers": lambda: (
        parameters(LocalElasticAgent._monitor_workers) == ["self", "worker_group"]
    ),
    "SimpleElasticAgent._remaining_restarts": lambda: mentions(SimpleElasticAgent, "self._remaining_restarts"),
    "SimpleElasticAgent._worker_group": lambda: mentions(SimpleElasticAgent.__init__, "self._worker_group"),
    "LocalElasticAgent._stop_workers": lambda: (
        parameters(LocalElasticAgent._stop_workers) == ["self", "worker_group"]
        and mentions(LocalElasticAgent._stop_workers, "self._shutdown")
    ),
    "LocalElasticAgent._shutdown": lambda: (
        parameters(LocalElasticAgent._shutdown)[:2] == ["self", "death_sig"]
        and mentions(LocalElasticAgent._shutdown, r"self._pcontext.close\(death_sig")
    ),
    "LocalElasticAgent._pcontext": lambda: (
        mentions(LocalElasticAgent, "self._pcontext") and mentions(SubprocessContext, "self.subprocess_handlers")
    ),
    "torch.distributed.launcher.api.LocalElasticAgent": lambda: (
        mentions(torch.distributed.launcher.api.launch_agent, "LocalElasticAgent")
        and torch.distributed.launcher.api.LocalElasticAgent is LocalElasticAgent
    ),
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": lambda: mentions(dynamic_rendezvous, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"),
    "DeepSpeedEngine.micro_steps": lambda: mentions(DeepSpeedEngine, r"self\.micro_steps \+= 1"),
    "DeepSpeedZeroOptimizer.overflow": lambda: mentions(DeepSpeedZeroOptimizer.__init__, "self.overflow"),
    "DeepSpeedZeroOptimizer_Stage3.overflow": lambda: mentions(DeepSpeedZeroOptimizer_Stage3.__init__, "self.overflow"),
    "DeepSpeedZeroOptimizer.single_partition_of_fp32_groups": lambda: mentions(
        DeepSpeedZeroOptimizer.__init__, "self.single_partition_of_fp32_groups"
    ),
    "DeepSpeedZeroOptimizer.round_robin_bit16_groups": lambda: mentions(
        DeepSpeedZeroOptimizer.__init__, "self.round_robin_bit16_groups"
    ),
    "DeepSpeedZeroOptimizer_Stage3.fp32_partitioned_groups_flat": lambda: mentions(
        DeepSpeedZeroOptimizer_Stage3.__init__, "self.fp32_partitioned_groups_flat"
    ),
    "DeepSpeedZeroOptimizer_Stage3.fp16_groups": lambda: mentions(
        DeepSpeedZeroOptimizer_Stage3.__init__, "self.fp16_groups"
    ),
    "DeepSpeedZeroOptimizer_Stage3.grad_position": stage_3_positions,
    "DeepSpeedZeroOptimizer_Stage3.get_param_id": lambda: (
        parameters(DeepSpeedZeroOptimizer_Stage3.get_param_id) == ["self", "param"]
    ),
    **{
        f"param.{name}": lambda name=name: mentions(partition_parameters, rf"param\.{name} = \w+")
        for name in ("ds_tensor", "ds_numel", "ds_shape", "ds_persist", "all_gather")
    },
    "deepspeed.ops.__compatible_ops__": lambda: "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__,
}


def listed() -> set[str]:
    """The APIs in the first columns of the tables."""
    rows = [line.split("|")[1] for line in TABLE.read_text().splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


@pytest.mark.parametrize("name", CHECKS)
def test_the_private_api_is_as_the_code_expects(name):
    assert CHECKS[name](), f"{name} has changed; docs/private_apis.md says who uses it and what could replace it"


def test_the_table_and_the_checks_have_the_same_rows():
    assert listed() == CHECKS.keys()


def used() -> dict[str, str]:
    """The private names of the libraries that the code uses, with a file of each."""
    accesses = {}
    for folder in ("data_prep", "train", "launch", "spiketune", "benchmarks", "tests"):
        for path in ROOT.glob(f"{folder}/**/*.py"):
            if path.name != "test_private_apis.py":
                accesses |= dict.fromkeys(private_names(ast.parse(path.read_text())), str(path.relative_to(ROOT)))
    return accesses


def private_names(tree: ast.Module) -> set[str]:
    """Dotted names with a private part, whose first part is imported from one of the libraries."""
    names, roots = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    roots = {name: module for name, module in roots.items() if module.split(".")[0] in LIBRARIES}
    names |= set(roots.values())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            if first in roots and re.fullmatch(r"[\w.]+", rest):
                names.add(f"{roots[first]}.{rest}")
    return {name for name in names if any(PRIVATE.fullmatch(part) for part in name.split("."))}


def test_no_other_private_api_is_used():
    known = listed()
    others = {
        name: file
        for name, file in used().items()
        if not any(f"{name}.".startswith(f"{api}.") or api.startswith(name) for api in known)
    }
    assert not others, "list these in docs/private_apis.md, or use a public API"
