"""Several machines train as one, and a run survives the loss of a machine."""

import json
import os
import signal
from contextlib import suppress

import pytest
from helpers import finish, slow
from launching import SMALL, charts, forked, largest_difference, losses, succeed, wait_for_epochs, weights
from machines import machines, reason_against

pytestmark = pytest.mark.skipif(reason_against() is not None, reason=reason_against() or "")

EPOCHS = 10
OPTIONS = [*SMALL, "--epochs", EPOCHS, "--faults.timeout", "8"]


def start_on(hosts, how_many: str, restarts: int, processes: int, *command):
    """Start launch/machines.sh on each machine."""
    options = ["--host", hosts[0].address, "--machines", how_many, "--job", "together", "--join-seconds", "60"]
    options += ["-n", processes, "--max-restarts", restarts]
    return [host.start("bash", "launch/machines.sh", *options, *command, **forked()) for host in hosts]


@pytest.fixture(scope="module")
def on_one_machine(recording, tmp_path_factory):
    out = tmp_path_factory.mktemp("one_machine") / "run"
    succeed(2, "train/finetune.py", "--data", recording, "--out", out, *OPTIONS)
    return out


@pytest.mark.parametrize(("processes", "strategy"), [(1, "ddp"), pytest.param(2, "ds_configs/zero2.json", marks=slow)])
def test_two_machines_train_as_one(recording, on_one_machine, tmp_path, processes, strategy):
    run = tmp_path / "run"
    command = ["train/finetune.py", "--data", recording, "--out", run, *OPTIONS, "--strategy", strategy]
    with machines(2) as hosts:
        done = [finish(process) for process in start_on(hosts, "2", 0, processes, *command)]
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    assert f"{2 * processes} processes" in "".join(process.stdout for process in done)
    assert losses(run) == pytest.approx(losses(on_one_machine), rel=1e-4)
    assert largest_difference(weights(run), weights(on_one_machine)) < 1e-3


@slow
def test_a_slow_link_shows_as_communication(recording, on_one_machine, tmp_path):
    """The link is so slow that the gradients of a step take a quarter of a second."""
    run = tmp_path / "run"
    quick = charts(on_one_machine)
    gradients = sum(
        tensor.nbytes for name, tensor in weights(on_one_machine).items() if not name.startswith("objective")
    )
    with machines(2) as hosts:
        for host in hosts:
            host.limit(8 * gradients / 0.25 / 1e6)
        command = ["train/finetune.py", "--data", recording, "--out", run, *OPTIONS, "--epochs", 3]
        done = [finish(process) for process in start_on(hosts, "2", 0, 1, *command)]
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    slow = charts(run)
    assert 0.2 < slow["communication"] - quick["communication"] < 0.5
    for part in ("forward", "backward", "optimizer"):
        assert slow[part] < quick[part] + 0.05


@slow
@pytest.mark.parametrize("accident", ["killed", "cut off"])
def test_the_remaining_machine_continues_alone(recording, on_one_machine, tmp_path, accident):
    run = tmp_path / "run"
    command = ["train/finetune.py", "--data", recording, "--out", run, *OPTIONS]
    with machines(2) as hosts:
        first, second = start_on(hosts, "1:2", 2, 1, *command)
        wait_for_epochs(run, 1)
        if accident == "killed":
            for pid in hosts[1].pids():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        else:
            hosts[1].cut()
        done = finish(first)
        second.kill()
    assert done.returncode == 0, done.stderr
    assert "restarting all (1 of 2)" in done.stderr
    assert "resumed after epoch" in done.stdout
    assert losses(run) == pytest.approx(losses(on_one_machine), rel=1e-4)
    assert largest_difference(weights(run), weights(on_one_machine)) < 1e-3
    assert json.loads((run / "env.json").read_text())["job"] == "together"
