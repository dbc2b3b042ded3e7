"""The time of a step is divided into computing and waiting for other processes."""

import time

import pytest
import torch
from launching import SMALL, charts, run_patched

from train.distributed.step_timing import StepClock

PAUSE = 0.02


@pytest.fixture
def clock() -> StepClock:
    return StepClock(torch.device("cpu"))


def test_communication_is_subtracted_from_the_other_times(clock):
    with clock.part("backward"):
        time.sleep(PAUSE)
        begin = clock.now()
        time.sleep(3 * PAUSE)
        clock.count("communication", begin)
    clock.finish_step()
    assert PAUSE <= clock.seconds["backward"] < 2 * PAUSE
    assert 3 * PAUSE <= clock.seconds["communication"] < 4 * PAUSE


# The second of two processes takes its time before each micro-batch; the first one writes the charts.
SLOW_RANK = """
import time
own = module.Training._forward_and_backward
def slow(self, *args):
    if self.runtime.rank == 1:
        time.sleep({pause})
    return own(self, *args)
module.Training._forward_and_backward = slow
"""


def test_waiting_for_a_slow_process_is_communication_and_not_computing(recording, tmp_path):
    pause = 0.3
    options = ["--data", recording, "--out", tmp_path / "run", *SMALL, "--epochs", "4"]
    done = run_patched("finetuning.loop", SLOW_RANK.format(pause=pause), *options, processes=2)
    assert done.returncode == 0, done.stderr
    seconds = charts(tmp_path / "run")
    assert 0.8 * pause < seconds["communication"] < 2 * pause
    assert max(seconds[part] for part in ("forward", "backward", "optimizer")) < 0.5 * pause
