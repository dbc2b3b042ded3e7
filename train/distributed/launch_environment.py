"""Which process this is and where it computes, from what its launcher says: known before the processes are joined."""

import contextlib
import io
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil

from data_prep.common.errors import BadInput
from data_prep.common.process_identity import Contradiction, ProcessIdentity, own_identity
from data_prep.common.worker_processes import usable_cores

# What tells of several processes where RANK and WORLD_SIZE do not, and who sets it.
PROCESS_COUNTS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
    "MV2_COMM_WORLD_SIZE": "mpirun",
}
# Accelerate also reads these, partly before RANK and WORLD_SIZE, which decide here.
MPI_VARIABLES = (
    *("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    *(
        f"{implementation}_COMM_WORLD_{number}"
        for implementation in ("OMPI", "MV2")
        for number in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    ),
)
TRUE, FALSE = ("1", "true", "yes", "y", "on", "t"), ("0", "false", "no", "n", "off", "f")  # as accelerate reads them


def announced_process() -> ProcessIdentity:
    """This process, as its launcher's variables describe it.

    Raises:
        BadInput: they contradict each other.
    """
    try:
        return own_identity()
    except Contradiction as error:
        raise BadInput(str(error)) from None


def this_process() -> ProcessIdentity:
    """This process, which is going to join the others of its run.

    Raises:
        BadInput: the launcher's variables contradict each other, or it was asked for several processes but started
            this one alone.
    """
    identity = announced_process()
    if "WORLD_SIZE" not in os.environ:
        _check_not_one_of_many(os.environ)
    return identity


def _check_not_one_of_many(environment: Mapping[str, str]) -> None:
    """Refuse to train alone where the launcher was asked for several processes, but set no rank.

    `accelerate launch --cpu --num_processes 2` starts one process and sets no variable; only its command line and its
    configuration show it.
    """
    script = " ".join(sys.argv[:1])
    for variable, launcher in PROCESS_COUNTS.items():
        if environment.get(variable, "1") != "1":
            count = environment[variable][:40]
            raise BadInput(
                f"{launcher} was asked for {count} processes ({variable}), but started this one without RANK and "
                f"WORLD_SIZE, which would train by itself; start with launch/local.sh [-n N] {script} ..., for one "
                "process too, or on several machines with launch/machines.sh"
            )
    requested = _accelerate_processes(_command_line_of_parent())
    if requested > 1:
        raise BadInput(
            f"accelerate launch was asked for {requested} processes, but started this one alone, which would train by "
            f"itself; use launch/local.sh -n {requested} {script} ..., or torchrun --nproc-per-node {requested}"
        )


def _command_line_of_parent() -> list[str]:
    try:
        parent = psutil.Process().parent()
        return [] if parent is None else parent.cmdline()
    except psutil.Error:
        return []


def _accelerate_processes(words: list[str]) -> int:
    """The number of processes that an `accelerate launch` command line, or its configuration, asks for; else 1."""
    start = next((k for k, word in enumerate(words[:3]) if Path(word).name.startswith("accelerate")), None)
    if start is None:
        return 1
    # By its own parser, and from the file that it reads: the user's default one if none is named.
    from accelerate.commands.config import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    options = words[start + 1 :]
    with contextlib.suppress(SystemExit, OSError, ValueError, TypeError), contextlib.redirect_stderr(io.StringIO()):
        launch = launch_command_parser().parse_args(options[1:] if options[:1] == ["launch"] else options)
        if launch.num_processes is not None:
            return launch.num_processes
        if launch.config_file is not None or (not launch.cpu and os.path.isfile(default_config_file)):
            return int(load_config_from_file(launch.config_file).num_processes)
    return 1


def uses_gpu() -> bool:
    """Whether this run computes on GPUs: if the machine has any, unless ACCELERATE_USE_CPU asks for the CPU."""
    import torch  # takes seconds; parsing must not wait for it

    return torch.cuda.is_available() and not cpu_requested()


def cpu_requested() -> bool:
    """Whether ACCELERATE_USE_CPU asks for the CPU, GPUs or not.

    Raises:
        BadInput: it is neither true nor false.
    """
    return _is_true("ACCELERATE_USE_CPU", os.environ)


def shares_gpus(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether SPIKETUNE_SHARE_GPUS lets several processes compute on one GPU; they talk over gloo, as nccl refuses it.

    Raises:
        BadInput: it is neither true nor false.
    """
    return _is_true("SPIKETUNE_SHARE_GPUS", environment)


def _is_true(variable: str, environment: Mapping[str, str]) -> bool:
    value = environment.get(variable, "false")
    if value.lower() not in (*TRUE, *FALSE):
        raise BadInput(f"{variable}={value[:40]}, but must be true or false")
    return value.lower() in TRUE


def gpu_index(identity: ProcessIdentity, gpus: int, environment: Mapping[str, str] = os.environ) -> int:
    """The number of a process's GPU among those that it sees.

    Args:
        identity: of the process.
        gpus: that it sees, at least one.
        environment: what Slurm or the user says about them.

    Raises:
        BadInput: it is unclear which GPU is its own.
    """
    if identity.ranks_on_machine <= gpus:
        return identity.local_rank
    if shares_gpus(environment):
        return identity.local_rank % gpus
    if gpus == 1 and (_bound_by_slurm(identity, environment) or _bound_by_user(identity, environment)):
        return 0
    raise BadInput(
        f"{identity.ranks_on_machine} processes were started on this machine, but this one sees {gpus} of its GPUs; "
        "start one process per GPU, or show each process its own (srun --gpus-per-task=1, or "
        "CUDA_VISIBLE_DEVICES=$LOCAL_RANK), or set ACCELERATE_USE_CPU=true (or SPIKETUNE_SHARE_GPUS=true, for tests)"
    )


def _bound_by_slurm(identity: ProcessIdentity, environment: Mapping[str, str]) -> bool:
    """Whether Slurm started each process as a task and gave each task one GPU, which it sees as the only one."""
    is_task = _is_slurm_task(identity, environment)
    per_task = environment.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2]  # "1" or "a100:1"
    bound = {"single:1", "per_task:1"} & set(environment.get("SLURM_GPU_BIND", "").split(","))
    return is_task and (per_task == "1" or environment.get("SLURM_NTASKS_PER_GPU") == "1" or bool(bound))


def _is_slurm_task(identity: ProcessIdentity, environment: Mapping[str, str]) -> bool:
    task = {
        "SLURM_PROCID": identity.rank,
        "SLURM_LOCALID": identity.local_rank,
        "SLURM_STEP_NUM_TASKS": identity.world_size,
    }
    return all(environment.get(name) == str(number) for name, number in task.items())


def cores_of_rank(identity: ProcessIdentity, environment: Mapping[str, str] = os.environ) -> int:
    """The cores of this process's share, at least one.

    The processes of a machine share the cores that this one may use, unless Slurm gave each its own.
    """
    cores = usable_cores()
    per_task = environment.get("SLURM_CPUS_PER_TASK", "")
    if per_task.isdigit() and _is_slurm_task(identity, environment):
        return max(min(cores, int(per_task)), 1)
    return max(cores // identity.ranks_on_machine, 1)


def _bound_by_user(identity: ProcessIdentity, environment: Mapping[str, str]) -> bool:
    """Whether CUDA_VISIBLE_DEVICES is this process's number, or one identifier; `check_members` compares those."""
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    return visible == str(identity.local_rank) or (visible.startswith(("GPU-", "MIG-")) and "," not in visible)
