"""Where a step's time goes: to computing, or to waiting for the network and the other processes."""

import time

import pytest
import torch
from helpers import slow
from launching import SMALL, charts, run_patched

from train.distributed.collectives import TimedBackend
from train.distributed.step_timing import StepClock

PAUSE = 0.02


@pytest.fixture
def clock() -> StepClock:
    return StepClock(torch.device("cpu"))


def test_a_part_loses_what_is_communication_in_it(clock):
    with clock.part("backward"):
        time.sleep(PAUSE)
        begin = clock.now()
        time.sleep(3 * PAUSE)
        clock.count_communication(begin)
    clock.finish_step()
    assert PAUSE <= clock.seconds["backward"] < 2 * PAUSE
    assert 3 * PAUSE <= clock.seconds["communication"] < 4 * PAUSE


def test_what_happens_between_two_steps_is_no_part_of_either(clock):
    clock.count_communication(clock.now())
    with clock.part("forward"):
        pass
    clock.finish_step()
    assert clock.seconds.keys() == {"forward"}


class Slow:
    """A communication backend, and its own work that is waited for."""

    answer = 42

    def all_reduce(self, async_op: bool = False):
        time.sleep(PAUSE)
        return self if async_op else None

    def wait(self):
        time.sleep(PAUSE)


def test_deepspeeds_operations_count_until_they_are_waited_for(clock):
    backend = TimedBackend(Slow(), clock)
    assert backend.answer == 42
    with clock.part("backward"):
        assert backend.all_reduce() is None
        work = backend.all_reduce(async_op=True)
        time.sleep(PAUSE)
        work.wait()
    clock.finish_step()
    assert 3 * PAUSE <= clock.seconds["communication"] < 4 * PAUSE
    assert PAUSE <= clock.seconds["backward"] < 2 * PAUSE


# The second of two processes takes its time before each micro-batch; the first one writes the charts.
SLOW_RANK = """
import time
own = module.Training._piece
def slow(self, *args):
    if self.runtime.rank == 1:
        time.sleep({pause})
    return own(self, *args)
module.Training._piece = slow
"""


@pytest.mark.parametrize(
    "strategy", ["ddp", pytest.param("ds_configs/zero2.json", marks=slow), "ds_configs/zero3.json"]
)
def test_waiting_for_a_slow_process_is_communication_and_not_computing(recording, tmp_path, strategy):
    pause = 0.3
    options = ["--data", recording, "--out", tmp_path / "run", *SMALL, "--epochs", "4", "--strategy", strategy]
    done = run_patched("finetuning.loop", SLOW_RANK.format(pause=pause), *options, processes=2)
    assert done.returncode == 0, done.stderr
    seconds = charts(tmp_path / "run")
    assert 0.8 * pause < seconds["communication"] < 2 * pause
    assert max(seconds[part] for part in ("forward", "backward", "optimizer")) < 0.5 * pause
