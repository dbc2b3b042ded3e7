"""The time of a step is divided into computing and waiting for other processes."""

from types import SimpleNamespace

import torch
from launching import SMALL, charts, run_patched

from train.distributed import step_timing
from train.distributed.step_timing import StepClock


def test_communication_is_subtracted_from_the_other_times(monkeypatch):
    readings = iter([10.0, 11.0, 14.0, 15.0, 15.0, 17.0])
    monkeypatch.setattr(step_timing, "time", SimpleNamespace(perf_counter=lambda: next(readings)))
    clock = StepClock(torch.device("cpu"))
    with clock.part("backward"):
        begin = clock.now()
        clock.count("communication", begin)
    with clock.part("optimizer"):
        pass
    clock.finish_step()
    assert clock.seconds == {"communication": 3.0, "backward": 2.0, "optimizer": 2.0}


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
