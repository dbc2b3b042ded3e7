"""Starts Accelerate and DeepSpeed, and checks that they join all the processes that the launcher started."""

import logging
import os
import socket
import sys
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
)
from packaging.version import Version

from data_prep.common.errors import BadInput, RunFailed
from data_prep.common.process_identity import ProcessIdentity
from train.distributed.launch_environment import MPI_VARIABLES, gpu_index, shares_gpus, this_process, uses_gpu
from train.distributed.strategy import DeepSpeedConfig

OLDEST_DEEPSPEED = "0.19.8"  # 0.18.0 and 0.19.0 were seen to give other losses than DDP under ZeRO-2


def check_launcher(precision: str) -> None:
    """Compare the launcher's settings with the recipe's precision and with the machine.

    Raises:
        BadInput: they contradict each other.
    """
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher not in ("no", precision):
        raise BadInput(
            f"the launcher has --mixed_precision {launcher}, but the recipe has precision: {precision}; leave it at no"
        )
    process = this_process()
    if uses_gpu():
        gpu_index(process, torch.cuda.device_count())


def start_accelerator(deepspeed: DeepSpeedConfig | None, timeout: float) -> Accelerator:
    """Join the processes that were started.

    Args:
        deepspeed: a complete configuration, or None.
        timeout: seconds that the processes wait for each other.

    Raises:
        BadInput: the launcher's variables contradict each other.
        RunFailed: other processes were joined than were started, or under another strategy.
    """
    process, cpu = this_process(), not uses_gpu()
    _prepare_environment(process, gpu=None if cpu else gpu_index(process, torch.cuda.device_count()))
    handlers: list[Any] = [
        # Buffers are averaged before evaluation and saving instead of sent along with every step.
        DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
    ]
    if process.world_size > 1 or deepspeed is not None:
        backend = "gloo" if cpu or shares_gpus() else "nccl"
        handlers.append(InitProcessGroupKwargs(backend=backend, timeout=timedelta(seconds=timeout)))
    if deepspeed is None:
        accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=handlers)
        expected_types = [DistributedType.MULTI_CPU, DistributedType.MULTI_GPU]
        if process.world_size == 1:
            expected_types.append(DistributedType.NO)  # or one of the above, if a launcher started this single process
    else:
        accelerator = _deepspeed_accelerator(deepspeed, cpu, handlers)
        expected_types = [DistributedType.DEEPSPEED]
    started = f"rank {process.rank} of {process.world_size}"
    joined = f"rank {accelerator.process_index} of {accelerator.num_processes}"
    if started != joined or accelerator.distributed_type not in expected_types:
        raise RunFailed(
            f"this process was started as {started}, but accelerate joined it as {joined} "
            f"({accelerator.distributed_type}); start with launch/local.sh or torchrun"
        )
    return accelerator


def _prepare_environment(process: ProcessIdentity, gpu: int | None) -> None:
    """Leave accelerate and DeepSpeed no other variables to read than those that describe this process.

    Args:
        process: this one; the variables of one of several are complete.
        gpu: the number of its GPU among those that it sees. To both of them LOCAL_RANK is that number.
    """
    for name in MPI_VARIABLES:
        os.environ.pop(name, None)
    if gpu is not None and process.world_size > 1:
        os.environ["LOCAL_RANK"] = str(gpu)
    if process.world_size == 1 and ("MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ):
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # of another run: no such store is there


def check_deepspeed() -> None:
    """Refuse a DeepSpeed that trains another model than DDP does.

    Raises:
        BadInput: it is too old, or there is none.
    """
    try:
        installed = version("deepspeed")
    except PackageNotFoundError:
        raise BadInput(f"this strategy needs DeepSpeed {OLDEST_DEEPSPEED} or newer, which is not installed") from None
    if Version(installed) < Version(OLDEST_DEEPSPEED):
        raise BadInput(
            f"DeepSpeed {installed} is installed, and versions before {OLDEST_DEEPSPEED} may train a wrong model under "
            "ZeRO-2 without a word; update it, or use no --strategy"
        )


def _deepspeed_accelerator(config: DeepSpeedConfig, cpu: bool, handlers: list[Any]) -> Accelerator:
    check_deepspeed()
    # DeepSpeed looks for ninja on PATH, which lacks the virtual environment unless that is activated.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        os.environ.setdefault(name, value)  # a single process without a launcher
    if cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)  # it warns about NAdam and SGD at every start
    # Only inference needs it, and compiling it takes a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # With it set, accelerate silently drops DeepSpeed for DDP.
    os.environ.pop("ACCELERATE_USE_CPU", None)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    return Accelerator(
        mixed_precision="no",
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
        gradient_accumulation_steps=config["gradient_accumulation_steps"],
        kwargs_handlers=handlers,
    )


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
