"""Collective operations are called in one place, which refuses tensors of another device."""

import ast

import pytest
import torch
from fake_cuda import CUDA, CudaRuntime, fake_gpu
from helpers import ROOT

COLLECTIVES = {
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "send",
    "recv",
}
PLACES = {"train/distributed/runtime.py", "train/distributed/heartbeat.py"}

CALLS = {
    "all_gather": lambda runtime, tensor: runtime.all_gather(tensor),
    "all_to_all": lambda runtime, tensor: runtime.all_to_all([tensor], [len(tensor)]),
    "gather_rows": lambda runtime, tensor: runtime.all_gather(tensor),
    "mean": lambda runtime, tensor: runtime.mean(tensor),
    "reduce_to": lambda runtime, tensor: runtime.reduce_to(tensor, 0),
    "sum": lambda runtime, tensor: runtime.sum(tensor),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_tensor_on_the_host_is_refused_where_processes_compute_on_gpus(name, ranks):
    """As nccl would, and already on one process."""
    runtime = CudaRuntime()
    runtime.ranks = ranks
    with pytest.raises(RuntimeError, match="cpu cannot be exchanged: the processes compute on cuda:0"):
        CALLS[name](runtime, torch.zeros(3))


@pytest.mark.parametrize("name", sorted(CALLS.keys() - {"all_to_all"}))
def test_a_tensor_on_the_gpu_is_exchanged(name):
    with fake_gpu():
        assert CALLS[name](CudaRuntime(), torch.zeros(3, device=CUDA)).device == CUDA


def test_collective_operations_are_called_nowhere_else():
    others = []
    for path in ROOT.glob("train/**/*.py"):
        name = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in COLLECTIVES:
                owner = ast.unparse(node.func.value)
                if owner in ("dist", "torch.distributed") and name not in PLACES:
                    others.append(f"{name}:{node.lineno}")
    assert not others
