"""This process among the others of its run: `start_runtime(...)` joins them and yields a `Runtime`."""

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from data_prep.common.errors import BadInput, RunFailed
from train.distributed.accelerator import check_launcher, start_accelerator
from train.distributed.heartbeat import Heartbeat
from train.distributed.launch_environment import shares_gpus
from train.distributed.lost_ranks import LostRankWatch, leaving_group
from train.distributed.roll_call import call_roll, check_agreement, check_members, own_entry
from train.distributed.strategy import DeepSpeedConfig, strategy_name

# In the messages of gloo, and of nccl.
CONNECTION_ERRORS = ("closed by peer", "reset by peer", "imed out", "timeout", "Broken pipe", "ncclRemoteError")
ROLL_CALL_SECONDS = 3.0
NAMING_SECONDS = 60.0  # by which nccl waits longer than the heartbeat, which names a lost rank; nccl kills the process


class Runtime:
    """This process among the others.

    Attributes:
        deepspeed: whether DeepSpeed is the strategy.
        rank: of this process.
        ranks: number of processes.
        device: where this process computes.
        members: all ranks.
        heartbeat: what the ranks exchange with every step.

    Args:
        accelerator: joined.
        deepspeed: a complete configuration, or None.
        start_timeout, timeout: seconds, see `start_runtime`.

    Raises:
        BadInput: the processes cannot work together.
    """

    def __init__(
        self, accelerator: Accelerator, deepspeed: DeepSpeedConfig | None, start_timeout: float, timeout: float
    ):
        self._accelerator = accelerator
        self.deepspeed = deepspeed is not None
        self._strategy = strategy_name(deepspeed, accelerator.num_processes)
        self.rank: int = accelerator.process_index
        self.ranks: int = accelerator.num_processes
        self.device: torch.device = accelerator.device
        self.members = [own_entry(self.rank, self.ranks, self.device)]
        if self.ranks > 1:
            self.members = call_roll(self.members[0], dist.distributed_c10d._get_default_store())
        check_members(self.members, share_gpus=shares_gpus())
        self.heartbeat = Heartbeat(self.ranks, timedelta(seconds=start_timeout))
        self._step_timeout, self._beats = timedelta(seconds=timeout), 0

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and messages for all."""
        return self.rank == 0

    @property
    def hosts(self) -> list[str]:
        """The machine of each rank."""
        return [member.host for member in self.members]

    @property
    def on_gpu(self) -> bool:
        """Whether this process computes on a GPU."""
        return self.device.type == "cuda"

    def check_agreement(self, plan: Mapping[str, str]) -> None:
        """Compare what this rank is about to do with the plans of the others; every rank must take part.

        Raises:
            BadInput: they differ; all ranks raise it.
        """
        check_agreement(self.gather_objects(dict(plan)), [str(member) for member in self.members])

    def facts(self) -> dict[str, Any]:
        """The entries of env.json about processes."""
        return {"world_size": self.ranks, "processes": self.describe()}

    def describe(self) -> str:
        """Processes, device and strategy, for the log."""
        device = torch.cuda.get_device_name(self.device) if self.on_gpu else f"CPU, {torch.get_num_threads()} threads"
        processes = "1 process" if self.ranks == 1 else f"{self.ranks} processes"
        return f"{processes} ({device} each), {self._strategy}"

    def beat(self, work_seconds: float | None = None) -> None:
        """Exchange a message with the other ranks, once a step; see `train/distributed/heartbeat.py`.

        From the second beat on, when all ranks have done a whole step, `timeout` replaces `start_timeout`.

        Raises:
            Stopped: a rank has received a signal; all ranks raise it at the same beat.
        """
        self.heartbeat.beat(work_seconds)
        self._beats += 1
        if self._beats == 2 and self.ranks > 1:
            for group in dist.distributed_c10d._world.pg_map:  # including DeepSpeed's and the heartbeat's
                named_first = timedelta(seconds=NAMING_SECONDS if dist.get_backend(group) == "nccl" else 0)
                _set_timeout(self._step_timeout + named_first, group)

    def report_to_others(self) -> None:
        """Tell the other ranks that this one runs and has noticed a failure.

        Raises:
            RuntimeError: the machine that collects the reports cannot be reached.
        """
        store = dist.distributed_c10d._get_default_store()
        store.set_timeout(timedelta(seconds=ROLL_CALL_SECONDS))
        store.set(f"roll call/{self.rank}", "here")

    def unresponsive_ranks(self) -> list[int]:
        """The ranks that do not report within three seconds that they have noticed a failure too.

        Raises:
            RuntimeError: the machine that collects the reports cannot be reached either.
        """
        self.report_to_others()
        store = dist.distributed_c10d._get_default_store()
        deadline, missing = time.monotonic() + ROLL_CALL_SECONDS, list(range(self.ranks))
        while missing and time.monotonic() < deadline:
            missing = [rank for rank in missing if not store.check([f"roll call/{rank}"])]
            time.sleep(0.1)
        return missing

    # --- collectives: the same calls with one process and with many, and the only place that makes them

    def _own(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor for a collective operation.

        Raises:
            RuntimeError: it is not on this process's device; nccl would refuse a host's, gloo a GPU's not always.
        """
        if tensor.device.type != self.device.type:
            raise RuntimeError(
                f"a tensor on {tensor.device} cannot be exchanged: the processes compute on {self.device}"
            )
        return tensor.contiguous()

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all ranks, which have the same shape, stacked along a new first dimension."""
        tensor = self._own(tensor)
        if self.ranks == 1:
            return tensor[None]
        tensors = [torch.empty_like(tensor) for _ in range(self.ranks)]
        dist.all_gather(tensors, tensor)
        return torch.stack(tensors)

    def all_to_all(self, parts: Sequence[torch.Tensor], sizes: Sequence[int]) -> torch.Tensor:
        """Send each rank a part, flat; returns the parts that the ranks sent to this one, end to end.

        Args:
            parts: for each rank (any number,), of one type.
            sizes: numbers of elements that each rank sends to this one.
        """
        sent = self._own(torch.cat(list(parts)))
        received = sent.new_empty(sum(sizes))
        dist.all_to_all_single(received, sent, list(sizes), [len(part) for part in parts])
        return received

    def gather_rows(self, rows: torch.Tensor) -> np.ndarray:
        """The rows of all ranks, in the order of the ranks; their numbers may differ."""
        if self.ranks == 1:
            return rows.cpu().numpy()
        counts = self.all_gather(torch.tensor(len(rows), device=self.device)).tolist()
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = self.all_gather(padded).cpu().numpy()
        return np.concatenate([padded_rows[:count] for padded_rows, count in zip(gathered, counts, strict=True)])

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in the order of the ranks."""
        return self.all_gather(tensor).sum(0)

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean over ranks, in float64."""
        return self.all_gather(tensor).double().mean(0)

    def reduce_to(self, tensor: torch.Tensor, rank: int) -> torch.Tensor | None:
        """The sum over ranks, on one rank; None on the others."""
        tensor = self._own(tensor)
        if self.ranks > 1:
            dist.reduce(tensor, dst=rank)
        return tensor if self.rank == rank else None

    def broadcast(self, tensor: torch.Tensor, rank: int = 0) -> torch.Tensor:
        """The tensor of one rank, on every rank; those of the others have its shape and are overwritten."""
        tensor = self._own(tensor)
        if self.ranks > 1:
            dist.broadcast(tensor, src=rank)
        return tensor

    def run_on_main(self, work: Callable[[], None]) -> None:
        """Call `work` on the main rank alone; all ranks wait for it.

        Raises:
            BadInput: `work` raises it; all ranks do.
        """
        fault = None
        if self.is_main:
            try:
                work()
            except BadInput as error:
                fault = str(error)
        if (fault := self.gather_objects(fault)[0]) is not None:
            raise BadInput(fault)

    def gather_objects(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order, on every rank; for anything that is not a tensor."""
        if self.ranks == 1:
            return [value]
        values = [None] * self.ranks
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def cudnn_autotuning(self, deterministic: bool) -> Iterator[None]:
        """Let cuDNN choose its fastest kernels; for training only, as the choice may vary between runs."""
        torch.backends.cudnn.benchmark = not deterministic
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = False

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._accelerator.wait_for_everyone()

    def wrap(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """The network as the strategy wraps it, joined with those of the other ranks.

        Raises:
            RuntimeError: accelerate prepared another strategy than the one asked for.
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
    deepspeed: DeepSpeedConfig | None,
    precision: str,
    deterministic: bool = False,
    *,
    start_timeout: float = 1800.0,
    timeout: float = 300.0,
) -> Iterator[Runtime]:
    """Join the processes of this run, and leave the process group on every way out.

    Args:
        deepspeed: a complete configuration, or None.
        precision: of the recipe, compared with the launcher's.
        deterministic: use only kernels that are reproducible bit for bit.
        start_timeout: seconds that the processes wait for each other until their first step is done.
        timeout: the same from then on.

    Raises:
        BadInput: the launcher's settings contradict the recipe or the machine.
        RunFailed: another process has ended or does not answer, or other processes were joined than were started.
    """
    check_launcher(precision)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32; matrix products have it off by default
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses to be deterministic
    runtime = None
    with leaving_group():
        try:
            accelerator = start_accelerator(deepspeed, start_timeout)
            runtime = Runtime(accelerator, deepspeed, start_timeout, timeout)
            with runtime.heartbeat.stop_on_signals(), _watched(runtime):
                yield runtime
        except RuntimeError as error:
            if "deterministic implementation" in str(error):
                sentence = " ".join(str(error).split(".")[0].split())
                raise RunFailed(f"deterministic: {sentence}; set it to false") from None
            if any(sign in str(error) for sign in CONNECTION_ERRORS):
                raise RunFailed(_explain_lost_connection(runtime)) from None
            raise


@contextmanager
def _watched(runtime: Runtime) -> Iterator[None]:
    """End this process if ranks are lost while it waits for its GPU, which then never answers."""
    if not runtime.on_gpu or runtime.ranks == 1:
        yield
        return
    watch = LostRankWatch(runtime.report_to_others, lambda: _explain_lost_connection(runtime))
    runtime.heartbeat.watch = watch
    try:
        yield
    finally:
        watch.end()


def _set_timeout(timeout: timedelta, group: dist.ProcessGroup) -> None:
    # torch has made this function public after 2.11, and warns where the old name is used since.
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    set_timeout(timeout, group)


def _explain_lost_connection(runtime: Runtime | None) -> str:
    """A sentence about the processes that have ended or hang, for one that has noticed."""
    if runtime is None:
        return "the processes could not be joined: one has ended or cannot be reached; see its message"
    try:
        unresponsive = runtime.unresponsive_ranks()
    except RuntimeError:
        return "this process has lost the others: the machine that keeps their addresses cannot be reached"
    if not unresponsive:
        return "the processes have lost each other, though all of them run: check the network between them"
    named = ", ".join(f"rank {rank} on {runtime.hosts[rank]}" for rank in unresponsive)
    return f"{named} has ended or hangs; if it has ended, see its message"
