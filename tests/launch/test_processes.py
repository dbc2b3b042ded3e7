"""How many processes launch/local.sh starts, and what it tells them."""

import os
import signal
import sys

import processes
import pytest
from helpers import ROOT, finish, wait_for
from launching import start


@pytest.fixture
def machine(monkeypatch):
    """A function that sets what a machine has: GPUs that nvidia-smi lists, device files, CUDA_VISIBLE_DEVICES."""

    def has(listed: int, driver: bool, visible: str | None) -> None:
        monkeypatch.setattr(processes, "listed_gpus", lambda: listed)
        monkeypatch.setattr(processes, "has_gpu_driver", lambda: driver)
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return has


@pytest.mark.parametrize(
    ("listed", "driver", "visible", "expected"),
    [
        (4, True, None, 4),
        (0, False, None, 0),
        (4, True, "1,3", 2),
        (4, True, "-1", 0),
        (4, True, "", 0),
        (0, True, "0,1", 2),  # a container without nvidia-smi
        (2, False, "0", 1),
        (0, False, "0", 0),  # left over, or set on every node
        (0, False, "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", 0),
        (2, True, "MIG-1,MIG-2", 1),
    ],
)
def test_gpus_are_those_that_are_visible_and_there(machine, listed, driver, visible, expected):
    machine(listed, driver, visible)
    assert processes.gpu_count() == expected


def test_a_process_alone_gets_no_variables_of_another_job(machine, monkeypatch):
    """As an interactive shell on a cluster has them."""
    machine(0, False, "0")
    left_over = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "node7", "MASTER_PORT": "29500", "PMI_SIZE": "8"}
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    started = []
    monkeypatch.setattr(os, "execv", lambda program, words: started.append((words, dict(os.environ))))
    monkeypatch.setattr(processes, "launch", lambda *_: 0)
    monkeypatch.setattr(sys, "argv", ["processes.py", "local", "-n", "1", processes.__file__, "--epochs", "2"])
    processes.main()
    ((words, environment),) = started
    assert words == [sys.executable, processes.__file__, "--epochs", "2"]
    assert not left_over.keys() & environment.keys()
    assert environment["ACCELERATE_USE_CPU"] == "true"


WAITS = """
import os, time
from pathlib import Path
from data_prep.common.errors import run_command

def main():
    Path(f"{__file__}.{os.environ['RANK']}").touch()
    time.sleep(60)

run_command(main, on_ranks=True)
"""


def test_ctrl_c_is_answered_in_a_word(tmp_path):
    """torchrun would report it several times, with tracebacks."""
    script = tmp_path / "waits.py"
    script.write_text(WAITS)
    launcher = start(2, script, PYTHONPATH=str(ROOT))
    wait_for(lambda: len([*tmp_path.glob("waits.py.*")]) == 2, process=launcher, seconds=120)
    os.killpg(launcher.pid, signal.SIGINT)
    done = finish(launcher, timeout=60)
    assert done.returncode == 130
    assert done.stderr.splitlines() == ["interrupted", "interrupted"]  # a rank, and the launcher
