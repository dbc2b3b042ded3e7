"""Processes, devices, precision and DeepSpeed: the only file that starts Accelerate and DeepSpeed.

`start_runtime(...)` finds out how many processes there are, joins them and gives a `Runtime`; `engine.py` steps.
"""

import logging
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

from data_prep.common.errors import BadInput, RunFailed
from train.distributed.heartbeat import Heartbeat
from train.distributed.launch_environment import cpu_requested, ranks_on_machine, uses_gpu, world_size
from train.distributed.strategy import strategy_name

TIMEOUTS = (1800.0, 300.0)  # seconds, until the first step is done and from then on

SIGNS_OF_ABSENCE = ("closed by peer", "reset by peer", "imed out", "timeout", "Broken pipe")  # in what gloo raises
ROLL_CALL_SECONDS = 3.0


class Runtime:
    """This process among the others.

    Attributes:
        deepspeed: whether DeepSpeed is the strategy.
        rank, ranks: which process this is, and of how many.
        device: where it computes.
        hosts: the machine of each rank.
        pulse: what the ranks tell each other with every step.

    Args:
        accelerator: joined.
        deepspeed: a filled configuration, or None.
        timeouts: seconds, see `beat`.
    """

    def __init__(self, accelerator: Accelerator, deepspeed: dict[str, Any] | None, timeouts: tuple[float, float]):
        self._accelerator = accelerator
        self.deepspeed = deepspeed is not None
        self._strategy = strategy_name(deepspeed, accelerator.num_processes)
        self.rank: int = accelerator.process_index
        self.ranks: int = accelerator.num_processes
        self.device: torch.device = accelerator.device
        self.hosts: list[str] = self.gather_objects(socket.gethostname())
        self.heartbeat = Heartbeat(self.ranks, timedelta(seconds=timeouts[0]))
        self._timeout, self._beats = timedelta(seconds=timeouts[1]), 0

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and speaks for all."""
        return self.rank == 0

    @property
    def on_gpu(self) -> bool:
        """Whether batches are copied to a GPU."""
        return self.device.type == "cuda"

    def describe(self) -> str:
        """Processes, device and strategy, for the log."""
        name = torch.cuda.get_device_name(self.device) if self.on_gpu else f"CPU, {torch.get_num_threads()} threads"
        return f"{self.ranks} process{'es' * (self.ranks > 1)} ({name} each), {self._strategy}"

    def beat(self, busy: float | None = None) -> None:
        """Exchange a message with the other ranks, once a step; see `train/distributed/heartbeat.py`.

        From the second time on, when a whole step is behind all of them, the second time-out
        holds for all that they wait for each other.

        Raises:
            Stopped: a rank was told to stop; all ranks raise it at the same beat.
        """
        self.heartbeat.beat(busy)
        self._beats += 1
        if self._beats == 2 and self.ranks > 1:
            for group in dist.distributed_c10d._world.pg_map:  # DeepSpeed's and the pulse's as well
                dist.set_timeout(self._timeout, group)

    def absent(self) -> list[int]:
        """The ranks that do not say within three seconds that they have noticed a failure too.

        Raises:
            RuntimeError: nor can the machine be reached where that is said.
        """
        store = dist.distributed_c10d._get_default_store()
        store.set_timeout(timedelta(seconds=ROLL_CALL_SECONDS))
        store.set(f"roll call/{self.rank}", "here")
        deadline, missing = time.monotonic() + ROLL_CALL_SECONDS, list(range(self.ranks))
        while missing and time.monotonic() < deadline:
            missing = [rank for rank in missing if not store.check([f"roll call/{rank}"])]
            time.sleep(0.1)
        return missing

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

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean over ranks, in float64."""
        return self.all_gather(tensor).double().mean(0)

    def reduce_to(self, tensor: torch.Tensor, rank: int) -> torch.Tensor | None:
        """The sum over ranks, on one rank; None on the others."""
        if self.ranks > 1:
            dist.reduce(tensor, dst=rank)
        return tensor if self.rank == rank else None

    def run_on_main(self, work: Callable[[], None]) -> None:
        """Let the leading rank alone do something; what it finds wrong, all ranks raise.

        Raises:
            BadInput: `work` does.
        """
        fault = None
        if self.is_main:
            try:
                work()
            except BadInput as error:
                fault = str(error)
        if (found := self.gather_objects(fault)[0]) is not None:
            raise BadInput(found)

    def gather_objects(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order, on every rank; for what is no tensor."""
        if self.ranks == 1:
            return [value]
        values = [None] * self.ranks
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def cudnn_autotuning(self, deterministic: bool) -> Iterator[None]:
        """Let cuDNN try its kernels and take the fastest; in training only, as it may choose others in another run."""
        torch.backends.cudnn.benchmark = not deterministic
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = False

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._accelerator.wait_for_everyone()

    def wrap(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """The network as the strategy wraps it, which joins it with those of the other ranks.

        Raises:
            RuntimeError: the strategy that was asked for is not the one that came out.
        """
        if self.deepspeed:
            wrapped, _ = self._accelerator.prepare(network, optimizer)
            if type(wrapped).__name__ != "DeepSpeedEngine":
                raise RuntimeError(f"asked for DeepSpeed, but accelerate prepared a {type(wrapped).__name__}")
            return wrapped
        if self.ranks == 1:
            return network
        with warnings.catch_warnings():  # accelerate still passes `broadcast_buffers`, which torch is renaming
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            wrapped = self._accelerator.prepare(network)
        if not isinstance(wrapped, nn.parallel.DistributedDataParallel):
            raise RuntimeError(f"asked for DDP over {self.ranks} processes, but got a {type(wrapped).__name__}")
        return wrapped


@contextmanager
def start_runtime(
    deepspeed: dict[str, Any] | None,
    precision: str,
    deterministic: bool = False,
    *,
    timeouts: tuple[float, float] = TIMEOUTS,
) -> Iterator[Runtime]:
    """Join the processes of this run; they part again on every way out.

    Args:
        deepspeed: a filled configuration, or None.
        precision: of the recipe, compared with what the launcher was told.
        deterministic: use only kernels that repeat bitwise.
        timeouts: seconds that the processes wait for each other, until their first step is done and from then on.

    Raises:
        BadInput: the launcher's settings contradict the recipe or the machine.
        RunFailed: another process has ended or does not answer.
        RuntimeError: not as many processes were joined as were started.
    """
    _check_launcher(precision)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32; matrix products have it off by default
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses to be deterministic
    runtime = None
    try:
        runtime = Runtime(_accelerator(deepspeed, timeouts[0]), deepspeed, timeouts)
        with runtime.heartbeat.listening():
            yield runtime
    except RuntimeError as error:
        if "deterministic implementation" in str(error):
            raise RunFailed(f"deterministic: {' '.join(str(error).split('.')[0].split())}; set it to false") from None
        if any(sign in str(error) for sign in SIGNS_OF_ABSENCE):
            raise RunFailed(_who_is_absent(runtime)) from None
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _who_is_absent(runtime: Runtime | None) -> str:
    """A sentence about the processes that have ended or hang, for those that have noticed."""
    if runtime is None:
        return "the processes could not be joined: one has ended, or cannot be reached; its message says why"
    try:
        absent = runtime.absent()
    except RuntimeError:
        return "this process has lost the others: the machine that keeps their addresses cannot be reached"
    if not absent:
        return "the processes have lost each other, though all of them run: look at the network between them"
    named = ", ".join(f"rank {rank} on {runtime.hosts[rank]}" for rank in absent)
    return f"{named} has ended or hangs; where it ended, its message says why"


def _check_launcher(precision: str) -> None:
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher not in ("no", precision):
        raise BadInput(f"the launcher was told --mixed_precision {launcher}, the recipe says precision: {precision}")
    gpus = torch.cuda.device_count()
    if 0 < gpus < ranks_on_machine() and not cpu_requested():
        raise BadInput(
            f"{ranks_on_machine()} processes were started on a machine with {gpus} GPUs; start one per GPU, "
            "or set ACCELERATE_USE_CPU=true"
        )


def _accelerator(deepspeed: dict[str, Any] | None, timeout: float) -> Accelerator:
    expected = world_size()
    cpu = not uses_gpu()
    handlers: list[Any] = [
        # Averaged before evaluation and saving instead of sent along with every step.
        DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
    ]
    if expected > 1 or deepspeed is not None:
        handlers.append(InitProcessGroupKwargs(backend="gloo" if cpu else "nccl", timeout=timedelta(seconds=timeout)))
    if deepspeed is None:
        accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=handlers)
        wanted = [DistributedType.MULTI_CPU, DistributedType.MULTI_GPU]
        if expected == 1:
            wanted.append(DistributedType.NO)  # or one of the above, if a launcher started the one process
    else:
        accelerator = _deepspeed_accelerator(deepspeed, cpu, handlers)
        wanted = [DistributedType.DEEPSPEED]
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
    return Accelerator(
        mixed_precision="no",
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
        gradient_accumulation_steps=config["gradient_accumulation_steps"],
        kwargs_handlers=handlers,
    )
