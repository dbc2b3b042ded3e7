"""Processes, devices, precision and DeepSpeed: the only file that knows Accelerate and DeepSpeed.

`started(...)` finds out how many processes there are, joins them and gives a `Runtime`; `Runtime.prepare` turns network
and optimizer into an `Engine` that steps in the same way under every strategy.
"""

import logging
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
)
from torch import nn

from data_prep.errors import BadInput, RunFailed
from train.processes import cpu_wanted, ranks_on_machine, uses_gpu, world_size

STARTING_TIMEOUT = timedelta(minutes=30)
SHARED_STATE = ("step", "mu_product")  # of an optimizer: numbers, not one per weight


class Runtime:
    """This process among the others.

    Attributes:
        rank, ranks: which process this is, and of how many.
        device: where it computes.
    """

    def __init__(self, accelerator: Accelerator, deepspeed: bool):
        self._accelerator = accelerator
        self.deepspeed = deepspeed
        self.rank: int = accelerator.process_index
        self.ranks: int = accelerator.num_processes
        self.device: torch.device = accelerator.device

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and speaks for all."""
        return self.rank == 0

    @property
    def on_gpu(self) -> bool:
        """Whether batches are copied to a GPU."""
        return self.device.type == "cuda"

    def describe(self) -> str:
        """Processes, device and strategy, for the log."""
        strategy = "DeepSpeed" if self.deepspeed else "DDP" if self.ranks > 1 else "one process"
        name = torch.cuda.get_device_name(self.device) if self.on_gpu else f"CPU, {torch.get_num_threads()} threads"
        return f"{self.ranks} process{'es' * (self.ranks > 1)} ({name} each), {strategy}"

    # --- collectives: the same calls with one process and with many

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all ranks, of one shape, stacked along a new first dimension."""
        if self.ranks == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.ranks)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    def gather_rows(self, rows: torch.Tensor) -> np.ndarray:
        """The rows of all ranks, one rank's behind the other's; ranks may have different numbers of rows."""
        if self.ranks == 1:
            return rows.cpu().numpy()
        counts = self.all_gather(torch.tensor(len(rows), device=self.device)).tolist()
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = self.all_gather(padded).cpu().numpy()
        return np.concatenate([part[:count] for part, count in zip(parts, counts, strict=True)])

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in the order of the ranks."""
        return self.all_gather(tensor).sum(0)

    def sum_to(self, tensor: torch.Tensor, rank: int) -> torch.Tensor | None:
        """The sum over ranks, on one rank; None on the others."""
        if self.ranks > 1:
            dist.reduce(tensor, dst=rank)
        return tensor if self.rank == rank else None

    def gather_objects(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order, on every rank; for what is no tensor."""
        if self.ranks == 1:
            return [value]
        values = [None] * self.ranks
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def fastest_kernels(self, deterministic: bool) -> Iterator[None]:
        """Let cuDNN try its kernels and take the fastest; in training only, as it may choose others in another run."""
        torch.backends.cudnn.benchmark = not deterministic
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = False

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._accelerator.wait_for_everyone()

    def average_batch_statistics(self, network: nn.Module) -> None:
        """Average BatchNorm's running statistics over ranks; they differ, as each rank normalises its own batches."""
        if self.ranks == 1:
            return
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                for statistic in (module.running_mean, module.running_var):
                    statistic.copy_(self.all_gather(statistic).double().mean(0))

    def prepare(self, network: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> "Engine":
        """Network and optimizer, ready to be stepped; `options` go to `Engine`.

        Raises:
            RuntimeError: the strategy that was asked for is not the one that came out.
        """
        if self.deepspeed:
            wrapped, _ = self._accelerator.prepare(network, optimizer)
            if type(wrapped).__name__ != "DeepSpeedEngine":
                raise RuntimeError(f"asked for DeepSpeed, but accelerate prepared a {type(wrapped).__name__}")
        else:
            with warnings.catch_warnings():  # accelerate still passes `broadcast_buffers`, which torch is renaming
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
                wrapped = self._accelerator.prepare(network) if self.ranks > 1 else network
            if self.ranks > 1 and not isinstance(wrapped, nn.parallel.DistributedDataParallel):
                raise RuntimeError(f"asked for DDP over {self.ranks} processes, but got a {type(wrapped).__name__}")
        return Engine(self, wrapped, network, optimizer, **options)


class Engine:
    """Network and optimizer under any strategy.

    Args:
        runtime: this process.
        wrapped: the network as the strategy wrapped it.
        network: the network itself.
        optimizer: the torch optimizer; its parameter groups hold the learning rates under every strategy.
        pieces: micro-batches per optimizer step.
        clip_norm: largest norm of the gradient, or None.
    """

    def __init__(
        self,
        runtime: Runtime,
        wrapped: nn.Module,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        pieces: int,
        clip_norm: float | None,
    ):
        self.runtime, self.network, self.optimizer = runtime, network, optimizer
        self._wrapped, self._pieces, self._clip_norm = wrapped, pieces, clip_norm
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """The network's outputs for a micro-batch, in training."""
        return self._wrapped(images)

    def micro_batch(self, piece: int):
        """Around forward and backward of a micro-batch: gradients travel between ranks with the last one only."""
        ddp = isinstance(self._wrapped, nn.parallel.DistributedDataParallel)
        return self._wrapped.no_sync() if ddp and piece < self._pieces - 1 else nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's gradients. `loss` is its part of the global batch's loss (see `train/objectives.py`).

        DDP and DeepSpeed average over ranks, and DeepSpeed over micro-batches too; both are undone here, so that what
        arrives is the sum of the parts.
        """
        if self.runtime.deepspeed:
            self._wrapped.backward(loss * (self.runtime.ranks * self._pieces))
            if not self._wrapped.is_gradient_accumulation_boundary():
                self._wrapped.step()  # counts the micro-batch
        else:
            (loss * self.runtime.ranks).backward()

    def step(self) -> None:
        """One optimizer step with the gradients of a whole global batch; clears them."""
        if self.runtime.deepspeed:
            self._wrapped.step()
            return
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def optimizer_tensors(self) -> dict[str, torch.Tensor]:
        """The optimizer's state as `<parameter>|<key>`, whole whatever the strategy; every rank must take part."""
        if self.runtime.deepspeed:
            return self._partitioned_optimizer_tensors()
        state = self.optimizer.state
        return {
            f"{name}|{key}": value
            for name, parameter in self.network.named_parameters()
            for key, value in state.get(parameter, {}).items()
        }

    def _partitioned_optimizer_tensors(self) -> dict[str, torch.Tensor]:
        tensors = {}
        for state, names, parameters in self._partitions():
            for key, value in state.items():
                if key in SHARED_STATE:
                    tensors |= {f"{name}|{key}": value.clone() for name in names}
                    continue
                whole = self.runtime.all_gather(value).flatten()  # ends in padding
                parts = whole[: sum(p.numel() for p in parameters)].split([p.numel() for p in parameters])
                tensors |= {
                    f"{name}|{key}": part.view(parameter.shape).clone()
                    for name, parameter, part in zip(names, parameters, parts, strict=True)
                }
        return tensors

    def _partitions(self) -> Iterator[tuple[dict[str, torch.Tensor], list[str], list[nn.Parameter]]]:
        """Per parameter group: the state of this rank's partition, and the parameters that lie flat in all partitions.

        ZeRO-1 and -2 flatten a group's parameters in `round_robin_bit16_groups`' order and cut the result into equal
        parts, one per rank.
        """
        names = {id(parameter): name for name, parameter in self.network.named_parameters()}
        zero = self._wrapped.optimizer
        for partition, parameters in zip(
            zero.single_partition_of_fp32_groups, zero.round_robin_bit16_groups, strict=True
        ):
            yield self.optimizer.state[partition], [names[id(p)] for p in parameters], parameters

    def load(self, network: dict[str, torch.Tensor], optimizer: dict[str, torch.Tensor]) -> None:
        """Go on from a checkpoint: the network's tensors, and the optimizer's as `optimizer_tensors` gave them."""
        self.network.load_state_dict(network)
        if self.runtime.deepspeed:
            self._load_partitioned(optimizer)
        else:
            self._load_whole(optimizer)

    def _load_whole(self, tensors: dict[str, torch.Tensor]) -> None:
        names = {id(parameter): name for name, parameter in self.network.named_parameters()}
        content = self.optimizer.state_dict()
        for index, parameter in enumerate(self._parameters):
            prefix = f"{names[id(parameter)]}|"
            content["state"][index] = {
                name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)
            }
        self.optimizer.load_state_dict(content)
        for state in self.optimizer.state.values():
            if "mu_product" in state:  # NAdam reads it on the host in every step; torch has moved it to the device
                state["mu_product"] = state["mu_product"].cpu()

    def _load_partitioned(self, tensors: dict[str, torch.Tensor]) -> None:
        zero = self._wrapped.optimizer
        zero.refresh_fp32_params()  # ZeRO steps copies of the weights, which have just been loaded
        keys = {name.rpartition("|")[2] for name in tensors}
        groups = zip(self.optimizer.param_groups, zero.single_partition_of_fp32_groups, self._partitions(), strict=True)
        for group, partition, (state, names, _) in groups:
            for key in keys:
                parts = [tensors[f"{name}|{key}"] for name in names]
                if key in SHARED_STATE:
                    on_device = key == "step" and group.get("fused")
                    state[key] = parts[0].to(partition.device if on_device else "cpu", copy=True)
                    continue
                whole = partition.new_zeros(partition.numel() * self.runtime.ranks)
                flat = torch.cat([part.flatten() for part in parts])
                whole[: flat.numel()] = flat.to(whole)
                state[key] = whole.view(self.runtime.ranks, -1)[self.runtime.rank].clone()

    def set_rate(self, factor: float) -> None:
        """Set every group's learning rate to `factor` times its peak."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


@contextmanager
def started(deepspeed: dict[str, Any] | None, precision: str, deterministic: bool = False) -> Iterator[Runtime]:
    """Join the processes of this run; they part again on every way out.

    Args:
        deepspeed: a filled configuration, or None.
        precision: of the recipe, compared with what the launcher was told.
        deterministic: use only kernels that repeat bitwise.

    Raises:
        BadInput: the launcher's settings contradict the recipe or the machine.
        RuntimeError: not as many processes were joined as were started.
    """
    _check_launcher(precision)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32; matrix products have it off by default
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses to be deterministic
    try:
        yield Runtime(_accelerator(deepspeed), deepspeed is not None)
    except RuntimeError as error:
        if "deterministic implementation" in str(error):
            raise RunFailed(f"deterministic: {' '.join(str(error).split('.')[0].split())}; set it to false") from None
        if "closed by peer" in str(error) or "reset by peer" in str(error):
            raise RunFailed("another process of this run has ended; its message says why") from None
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _check_launcher(precision: str) -> None:
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher not in ("no", precision):
        raise BadInput(f"the launcher was told --mixed_precision {launcher}, the recipe says precision: {precision}")
    gpus = torch.cuda.device_count()
    if 0 < gpus < ranks_on_machine() and not cpu_wanted():
        raise BadInput(
            f"{ranks_on_machine()} processes were started on a machine with {gpus} GPUs; start one per GPU, "
            "or set ACCELERATE_USE_CPU=true"
        )


def _accelerator(deepspeed: dict[str, Any] | None) -> Accelerator:
    expected = world_size()
    cpu = not uses_gpu()
    handlers: list[Any] = [
        # Averaged before evaluation and saving instead of sent along with every step.
        DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
    ]
    if expected > 1 or deepspeed is not None:
        handlers.append(InitProcessGroupKwargs(backend="gloo" if cpu else "nccl", timeout=STARTING_TIMEOUT))
    if deepspeed is None:
        accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=handlers)
        wanted = (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU) if expected > 1 else (DistributedType.NO,)
    else:
        accelerator = _deepspeed_accelerator(deepspeed, cpu, handlers)
        wanted = (DistributedType.DEEPSPEED,)
    if accelerator.num_processes != expected or accelerator.distributed_type not in wanted:
        raise RuntimeError(
            f"{expected} processes were started, but accelerate joined {accelerator.num_processes} "
            f"as {accelerator.distributed_type}; start with launch/local.sh or torchrun"
        )
    return accelerator


def _deepspeed_accelerator(config: dict[str, Any], cpu: bool, handlers: list[Any]) -> Accelerator:
    # DeepSpeed looks for ninja on PATH, where an environment that was not activated is not.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:  # one process alone
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    if cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)  # it warns of NAdam and SGD at every start
    # Used for inference only, and about a minute of compilation.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # With it set, accelerate drops DeepSpeed for DDP and says nothing.
    os.environ.pop("ACCELERATE_USE_CPU", None)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    plugin = DeepSpeedPlugin(hf_ds_config=config)
    return Accelerator(mixed_precision="no", deepspeed_plugin=plugin, kwargs_handlers=handlers)
