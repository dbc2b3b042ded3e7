"""A process that would train alone, or on another's GPU, is refused."""

import accelerate.commands.config as accelerate_config
import accelerate.commands.config.config_args as accelerate_files
import pytest
from helpers import run_here, started_as

from data_prep.common.errors import BadInput
from data_prep.common.process_identity import ProcessIdentity, identify
from train.distributed import accelerator, launch_environment
from train.distributed.launch_environment import MPI_VARIABLES, cores_of_rank, cpu_requested, gpu_index, this_process

CPU_CONFIG = "distributed_type: MULTI_CPU\nnum_processes: 2\nnum_machines: 1\nuse_cpu: true\n"


@pytest.mark.parametrize(
    ("variable", "count", "launcher"),
    [
        ("SLURM_STEP_NUM_TASKS", "4", "srun was asked for 4"),
        ("PMI_SIZE", "2", "mpirun was asked for 2"),
        ("OMPI_COMM_WORLD_SIZE", "3", "mpirun was asked for 3"),
        ("MV2_COMM_WORLD_SIZE", "two", "mpirun was asked for two"),
    ],
)
def test_one_of_several_without_a_rank_is_refused(monkeypatch, variable, count, launcher):
    monkeypatch.setenv(variable, count)
    with pytest.raises(BadInput, match=f"{launcher} processes \\({variable}\\), but started this one without RANK"):
        this_process()
    for name, value in started_as(rank=1, ranks=2).items():  # torchrun in that step: its variables decide
        monkeypatch.setenv(name, value)
    launch_environment.own_identity.cache_clear()
    assert this_process() == ProcessIdentity(1, 2, 1, 2)


def test_the_interactive_shell_of_one_task_trains_alone(monkeypatch):
    """`srun --pty bash`, or a shell within an allocation of several tasks."""
    for name, value in {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "PMI_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert this_process() == ProcessIdentity()


@pytest.mark.parametrize(
    ("words", "processes"),
    [
        ("bash", 1),
        ("python run.py --num_processes 2", 1),
        ("python /bin/accelerate launch train/finetune.py", 2),  # by the user's default configuration
        ("python /bin/accelerate launch --cpu train/finetune.py", 1),  # which is not read then
        ("python /bin/accelerate launch --num_processes 1 train/finetune.py --num_processes 4", 1),
        ("python /bin/accelerate launch --cpu --num-processes=3 train/finetune.py", 3),
        ("python -m accelerate.commands.launch --num_processes 3 train/finetune.py", 3),
        ("accelerate-launch train/finetune.py", 2),
    ],
)
def test_what_accelerate_was_asked_for_is_read_as_accelerate_reads_it(monkeypatch, tmp_path, words, processes):
    default = tmp_path / "default_config.yaml"
    default.write_text(CPU_CONFIG)
    for module in (accelerate_config, accelerate_files):
        monkeypatch.setattr(module, "default_config_file", str(default))
    monkeypatch.setattr(launch_environment, "_command_line_of_parent", words.split)
    if processes == 1:
        assert this_process() == ProcessIdentity()
        return
    with pytest.raises(BadInput, match=f"accelerate launch was asked for {processes} processes, but started this one"):
        this_process()


def test_a_training_with_a_left_over_rank_is_refused_before_anything_is_written(recording, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    done = run_here("train/finetune.py", "--data", recording, "--out", tmp_path / "run")
    assert done.returncode == 2
    assert "error: RANK=3 is set but WORLD_SIZE is not; unset RANK" in done.stderr
    assert not (tmp_path / "run").exists()
    assert run_here("train/finetune.py", "--help").returncode == 0


# --------------------------------------------------------------------------------------------------------- devices

EIGHT = ProcessIdentity(rank=11, world_size=16, local_rank=3, ranks_on_machine=8)
TASK = {"SLURM_PROCID": "11", "SLURM_LOCALID": "3", "SLURM_STEP_NUM_TASKS": "16"}


@pytest.mark.parametrize(
    "binding",
    [
        TASK | {"SLURM_GPUS_PER_TASK": "1"},
        TASK | {"SLURM_GPUS_PER_TASK": "a100:1"},
        TASK | {"SLURM_NTASKS_PER_GPU": "1"},
        TASK | {"SLURM_GPU_BIND": "single:1"},
        TASK | {"SLURM_GPU_BIND": "verbose,per_task:1"},
        {"CUDA_VISIBLE_DEVICES": "3"},
        {"CUDA_VISIBLE_DEVICES": "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"},
        {"CUDA_VISIBLE_DEVICES": "MIG-8932f937-d72c-4106-c12f-20bd9faed9f6"},
    ],
    ids=str,
)
def test_a_process_that_is_bound_to_one_gpu_uses_it(binding):
    assert gpu_index(EIGHT, 1, binding) == 0
    assert gpu_index(EIGHT, 8, binding) == 3
    with pytest.raises(BadInput, match="8 processes were started on this machine, but this one sees 2 of its GPUs"):
        gpu_index(EIGHT, 2, binding)


@pytest.mark.parametrize(
    "binding",
    [
        {},
        TASK,
        {"SLURM_GPUS_PER_TASK": "1"},
        TASK | {"SLURM_GPUS_PER_TASK": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"},  # torchrun in one task
        TASK | {"SLURM_GPUS_PER_TASK": "2"},
        TASK | {"SLURM_GPU_BIND": "single:10"},  # tasks that share a GPU
        {"CUDA_VISIBLE_DEVICES": "0"},
    ],
    ids=str,
)
def test_processes_that_may_share_a_gpu_are_refused(binding):
    with pytest.raises(BadInput, match="this one sees 1 of its GPUs; start one process per GPU, or show each"):
        gpu_index(EIGHT, 1, binding)


def test_processes_share_gpus_where_they_are_allowed_to():
    assert [gpu_index(EIGHT, gpus, {"SPIKETUNE_SHARE_GPUS": "true"}) for gpus in (1, 2, 3, 8)] == [0, 1, 0, 3]
    with pytest.raises(BadInput, match="SPIKETUNE_SHARE_GPUS=maybe, but must be true or false"):
        gpu_index(EIGHT, 1, {"SPIKETUNE_SHARE_GPUS": "maybe"})


def test_accelerate_and_deepspeed_see_one_process_and_its_gpu(monkeypatch):
    environment = started_as(rank=3, ranks=4) | {"PMI_RANK": "0", "OMPI_COMM_WORLD_SIZE": "9"}
    monkeypatch.setattr(accelerator.os, "environ", dict(environment))
    accelerator._prepare_environment(identify(environment), gpu=0)
    assert accelerator.os.environ == started_as(rank=3, ranks=4) | {"LOCAL_RANK": "0"}
    left_over = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "elsewhere", "PMI_SIZE": "1"}
    monkeypatch.setattr(accelerator.os, "environ", dict(left_over))
    accelerator._prepare_environment(ProcessIdentity(), gpu=None)
    assert accelerator.os.environ.keys() == {"MASTER_ADDR", "MASTER_PORT"}
    assert accelerator.os.environ["MASTER_ADDR"] == "127.0.0.1"


def test_accelerate_reads_no_other_variables_than_are_removed(monkeypatch):
    from accelerate.utils.environment import get_cpu_distributed_information

    for number, name in enumerate(MPI_VARIABLES):
        monkeypatch.setenv(name, str(7 + number))
    for name in MPI_VARIABLES:
        monkeypatch.delenv(name)
    found = get_cpu_distributed_information()
    assert (found.rank, found.world_size, found.local_rank, found.local_world_size) == (0, 1, 0, 1)


@pytest.mark.parametrize("value", ["true", "True", "1", "yes", "on"])
def test_the_cpu_is_asked_for_as_accelerate_understands_it(monkeypatch, value):
    monkeypatch.setenv("ACCELERATE_USE_CPU", value)
    assert cpu_requested()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "maybe")
    with pytest.raises(BadInput, match="ACCELERATE_USE_CPU=maybe, but must be true or false"):
        cpu_requested()


def test_a_rank_has_its_share_of_the_cores_or_those_that_slurm_gave_it(monkeypatch):
    monkeypatch.setattr(launch_environment, "usable_cores", lambda: 32)
    third = ProcessIdentity(rank=2, world_size=4, local_rank=2, ranks_on_machine=4)
    assert cores_of_rank(third, {}) == 8
    assert cores_of_rank(third, {"SLURM_CPUS_PER_TASK": "32"}) == 8  # one task, whose launcher started four processes
    task = {"SLURM_PROCID": "2", "SLURM_LOCALID": "2", "SLURM_STEP_NUM_TASKS": "4"}
    assert cores_of_rank(third, task | {"SLURM_CPUS_PER_TASK": "12"}) == 12
    assert cores_of_rank(third, task) == 8
    monkeypatch.setattr(launch_environment, "usable_cores", lambda: 2)
    assert cores_of_rank(third, {}) == 1
