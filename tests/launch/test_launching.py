"""Every launcher yields the right number of processes, and bad input ends in one error message."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from forked_python import forked_python
from helpers import ROOT, run_here, slow
from launching import SMALL, forked, launch, losses

BIN = Path(sys.executable).parent


def run(*command, **environment) -> subprocess.CompletedProcess:
    """A launcher, as a user types it."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **forked(), **environment}
    return subprocess.run([*map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@slow
@pytest.mark.parametrize("way", ["flag", "file"])
def test_accelerate_on_cpu_that_starts_one_process_of_two_is_noticed(recording, tmp_path, way):
    """By the command line of the parent process, which is not that of a fork."""
    config = tmp_path / "cpu.yaml"
    config.write_text("distributed_type: MULTI_CPU\nnum_processes: 2\nnum_machines: 1\nuse_cpu: true\n")
    options = ["--cpu", "--num_processes", "2"] if way == "flag" else ["--config_file", config]
    command = ["train/finetune.py", "--data", recording, "--out", tmp_path / "run"]
    done = run(BIN / "accelerate", "launch", *options, *command)
    assert done.returncode != 0
    assert "was asked for 2 processes, but started this one alone" in done.stderr
    assert not (tmp_path / "run").exists()


def test_srun_without_a_launcher_is_noticed(recording, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    done = run_here("train/finetune.py", "--data", recording, "--out", tmp_path / "run")
    assert done.returncode == 2
    assert "srun was asked for 4 processes" in done.stderr


@pytest.mark.parametrize("launcher", ["accelerate", pytest.param("torchrun", marks=slow)])
def test_launchers_that_work_train_together(recording, trained, tmp_path, launcher):
    free_port = ["--main_process_port", "0"]
    accelerate = [forked_python(), "-m", "accelerate.commands.launch"]  # what the command `accelerate launch` runs
    ways = {
        "accelerate": [*accelerate, "--multi_gpu", "--num_processes", "2", "--num_machines", "1", *free_port],
        "torchrun": [BIN / "torchrun", "--standalone", "--nproc-per-node", "2"],
    }
    environment = {"ACCELERATE_USE_CPU": "true"} if launcher == "accelerate" else {}
    options = ["train/finetune.py", "--data", recording, "--out", tmp_path / "run", *SMALL]
    done = run(*ways[launcher], *options, **environment)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout
    assert losses(tmp_path / "run") == pytest.approx(losses(trained), rel=1e-4)


BAD = {
    "unknown setting": (["--optimizer.rl", "1e-3"], "--optimizer.lr"),
    "bad value": (["--optimizer.lr", "-1"], "greater than 0"),
    "unknown network": (["--backbone.name", "resnet51"], "resnet50"),
    "no such weights": (["--backbone.weights", "nowhere.safetensors"], "nowhere.safetensors is not a file"),
    "no such data": (["--data", "nowhere"], "nowhere is not a folder"),
    "batch smaller than its part": (["--batch.global-size", "4", "--batch.per-device", "8"], "batch.per_device"),
    "metric of another task": (["--early-stopping.metric", "top1"], "top1 needs task.kind"),
    "no such strategy": (["--strategy", "ds_configs/zero9.json"], "zero9.json does not exist"),
    "nothing to resume": (["--resume"], "no recipe.yaml"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_a_sentence_and_leaves_nothing(recording, tmp_path, case):
    options, expected = BAD[case]
    done = run_here("train/finetune.py", "--data", recording, "--out", tmp_path / "run", *SMALL, *options)
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_bad_input_under_the_launcher_is_reported_once(trained, recording):
    done = launch(3, "train/finetune.py", "--data", recording, "--out", trained, *SMALL)
    assert done.returncode == 2
    assert done.stderr.count("already holds a run") == 1
    assert "Traceback" not in done.stderr


# The process that reports is the last to notice.
LAGS = """
import os, time
from data_prep.common.errors import BadInput, run_command

def main():
    time.sleep(2 * (os.environ["RANK"] == "0"))
    raise BadInput("no such thing")

run_command(main, on_ranks=True)
"""


def test_the_report_is_not_lost_when_the_process_that_reports_lags(tmp_path):
    script = tmp_path / "lags.py"
    script.write_text(LAGS)
    done = launch(2, script, PYTHONPATH=str(ROOT))
    assert done.returncode == 2
    assert done.stderr == "error: no such thing\n"


def test_more_processes_than_stimuli_in_a_batch_are_refused(recording, tmp_path):
    options = ["--data", recording, "--out", tmp_path / "run", *SMALL, "--batch.global-size", "2"]
    done = launch(3, "train/finetune.py", *options)
    assert done.returncode == 2
    assert "3 processes cannot share a global batch of 2" in done.stderr


def test_a_deepspeed_file_that_contradicts_the_recipe_is_refused(recording, tmp_path):
    config = tmp_path / "zero.json"
    config.write_text('{"zero_optimization": {"stage": 2}, "gradient_clipping": 3.0}')
    options = ["--data", recording, "--out", tmp_path / "run", *SMALL, "--strategy", config]
    done = run_here("train/finetune.py", *options)
    assert done.returncode == 2
    assert "gradient_clipping is 3.0 in the file, but 0.0 in the recipe" in done.stderr


# The first process is done at once; the second one hangs, the first time it is started.
HANGS_AT_ITS_END = """
import os, pathlib, signal
mark = pathlib.Path(__file__).with_suffix(".mark")
if os.environ["RANK"] == "1" and not mark.exists():
    mark.touch()
    os.kill(os.getpid(), signal.SIGSTOP)
"""

IMPATIENT = "import sys; from launch import processes; processes.HANG_SECONDS = 2; sys.exit(processes.main())"


def test_a_process_that_hangs_when_the_others_are_done_is_ended(tmp_path):
    script = tmp_path / "hangs.py"
    script.write_text(HANGS_AT_ITS_END)
    done = run(sys.executable, "-c", IMPATIENT, "local", "-n", "2", "--max-restarts", "1", script)
    assert done.returncode == 0, done.stderr
    assert "hangs after others have ended; killing it" in done.stderr
    assert "restarting all (1 of 1)" in done.stderr
