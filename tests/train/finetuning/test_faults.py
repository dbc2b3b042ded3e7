"""Whatever ends a process, the run resumes and ends as if nothing had happened."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from helpers import assert_refused, finish, run_here, slow, succeed_here
from launching import (
    SMALL,
    STOP_WHILE_SCORING,
    checkpoint_tensors,
    largest_difference,
    launch,
    losses,
    run_patched,
    start,
    succeed,
    wait_for_epochs,
    weights,
)

from data_prep.common.errors import STOPPED, RunFailed
from train.distributed import loss_scale
from train.distributed.engine import StepOutcome
from train.finetuning.bottlenecks import Bottlenecks
from train.finetuning.epoch_log import TrainedEpoch
from train.finetuning.non_finite_steps import NonFiniteSteps
from train.finetuning.setup import preparation
from train.models.losses import SquaredError
from train.run.checkpoint import load_progress
from train.run.progress import Progress

EPOCHS = 12
OPTIONS = [*SMALL, "--epochs", EPOCHS]


@pytest.fixture(scope="module")
def undisturbed(recording, tmp_path_factory):
    """An undisturbed run on two processes."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    succeed(2, "train/finetune.py", "--data", recording, "--out", out, *OPTIONS)
    return out


def ranks_of(run: Path) -> dict[int, psutil.Process]:
    """The processes of a run, by rank."""
    by_rank = {}
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if str(run) in words and "processes.py" not in " ".join(words):
            by_rank[int(process.environ()["RANK"])] = process
    return by_rank


def assert_same(run: Path, other: Path) -> None:
    """Two runs ended with the same losses and weights, bit for bit."""
    assert losses(run) == losses(other)
    assert len(losses(run)) == EPOCHS
    assert largest_difference(weights(run), weights(other)) == 0


def preempted(run: Path, command: list, preempt: Callable[[subprocess.Popen], object]) -> Progress:
    """Start a job and preempt it after an epoch; returns how far it was when it stopped."""
    started = start(2, *command, SPIKETUNE_JOB="mine")
    wait_for_epochs(run)
    preempt(started)
    done = finish(started)
    assert done.returncode == STOPPED, done.stderr
    assert done.stderr.count("stopped by SIG") == 1
    assert "Traceback" not in done.stderr
    stopped = load_progress(run / "checkpoints" / "last")
    assert stopped.epoch < EPOCHS
    return stopped


@pytest.mark.parametrize("rank", [pytest.param(0, marks=slow), 1])
def test_a_preempted_job_saves_and_resumes_when_restarted(recording, undisturbed, tmp_path, rank):
    run, command = tmp_path / "run", ["train/finetune.py", "--data", recording, "--out", tmp_path / "run", *OPTIONS]
    stopped = preempted(run, command, lambda _: ranks_of(run)[rank].send_signal(signal.SIGTERM))
    output = succeed(2, *command, SPIKETUNE_JOB="mine")
    assert f"(step {stopped.step})" in output
    assert_same(run, undisturbed)


def test_a_signal_to_the_launcher_stops_the_job_too(recording, tmp_path):
    run = tmp_path / "run"
    command = ["train/finetune.py", "--data", recording, "--out", run, *OPTIONS]
    preempted(run, command, lambda launcher: launcher.send_signal(signal.SIGUSR1))


def test_another_job_does_not_resume_the_run(recording, undisturbed, monkeypatch):
    monkeypatch.setenv("SPIKETUNE_JOB", "other")
    done = run_here("train/finetune.py", "--data", recording, "--out", undisturbed, *OPTIONS)
    assert_refused(done, "already holds a run")


@pytest.mark.parametrize("fault", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=slow)])
def test_a_lost_process_is_named_and_all_processes_restart(recording, undisturbed, tmp_path, fault):
    """A process that hangs is given up after the time-out."""
    run = tmp_path / "run"
    command = ["train/finetune.py", "--data", recording, "--out", run, *OPTIONS, "--faults.timeout", "3"]
    started = start(2, "--max-restarts", "1", *command)
    wait_for_epochs(run)
    ranks_of(run)[1].send_signal(fault)
    began = time.monotonic()
    done = finish(started)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 90
    assert "restarting all (1 of 1)" in done.stderr
    assert "resumed after epoch" in done.stdout
    if fault == signal.SIGSTOP:
        assert "rank 1 on" in done.stderr
        assert "has ended or hangs" in (run / "failures" / "rank_0.txt").read_text() + done.stderr
    assert_same(run, undisturbed)


def test_bad_input_is_not_retried(recording, trained):
    command = ["train/finetune.py", "--data", recording, "--out", trained, *OPTIONS]
    done = launch(2, "--max-restarts", "3", *command)
    assert done.returncode == 2
    assert done.stderr.count("already holds a run") == 1
    assert "restarting" not in done.stderr


def test_a_run_stopped_while_scoring_scores_again(recording, trained, tmp_path):
    options = ["--data", recording, "--out", tmp_path / "run", *SMALL]
    done = run_patched("finetuning.selection_scoring", STOP_WHILE_SCORING, *options)
    assert done.returncode == STOPPED, done.stderr
    assert len(losses(tmp_path / "run")) == 1
    succeed_here("train/finetune.py", "--data", recording, "--out", tmp_path / "run", "--resume")
    assert losses(tmp_path / "run") == losses(trained)
    assert largest_difference(weights(tmp_path / "run"), weights(trained)) == 0


# The fourth step's loss is NaN on the last rank.
NAN_ONCE = """
contribution = module.SquaredError.contribution
def broken(self, outputs, batch, sum_over_ranks):
    if self.training:
        broken.calls += 1
    value = contribution(self, outputs, batch, sum_over_ranks)
    last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
    return value * float("nan") if broken.calls in {calls} and last and self.training else value
broken.calls = 0
module.SquaredError.contribution = broken
"""


@pytest.fixture(scope="module")
def left_out(recording, tmp_path_factory):
    """A run of one process whose fourth step was skipped, and its output."""
    run = tmp_path_factory.mktemp("nan") / "run"
    options = ["--data", recording, "--out", run, *SMALL, "--backbone.name", "test_convnext"]
    done = run_patched("models.losses", NAN_ONCE.format(calls={4}), *options)
    assert done.returncode == 0, done.stderr
    return run, done.stdout


def test_a_non_finite_step_is_skipped_and_named(left_out, trained):
    run, output = left_out
    assert "warning: step 4 is left out: the loss was not finite on rank 0, which saw " in output
    assert output.count("warning:") == 1
    assert all(abs(loss) < 10 for loss in losses(run))
    assert losses(run) != losses(trained)
    assert load_progress(run / "checkpoints" / "last").step == load_progress(trained / "checkpoints" / "last").step


@pytest.mark.parametrize(
    "strategy", ["ddp", *(pytest.param(strategy, marks=slow) for strategy in ("zero0", "zero1", "zero3"))]
)
def test_every_strategy_skips_the_step(recording, left_out, tmp_path, strategy):
    run = tmp_path / "run"
    chosen = strategy if strategy == "ddp" else f"ds_configs/{strategy}.json"
    options = ["--data", recording, "--out", run, *SMALL, "--strategy", chosen]
    done = run_patched("models.losses", NAN_ONCE.format(calls={4}), *options, processes=2)
    assert done.returncode == 0, done.stderr
    assert "step 4 is left out: the loss was not finite on rank 1, which saw" in done.stdout
    assert losses(run) == pytest.approx(losses(left_out[0]), rel=1e-4)
    assert largest_difference(weights(run), weights(left_out[0])) < 1e-3


def test_too_many_non_finite_steps_in_a_row_end_the_run(recording, tmp_path):
    run = tmp_path / "run"
    options = ["--data", recording, "--out", run, *SMALL, "--faults.bad-steps", "3"]
    done = run_patched("models.losses", NAN_ONCE.format(calls=set(range(7, 11))), *options)
    assert done.returncode == 1
    assert "steps in a row had a loss or a gradient that is not finite" in done.stderr
    assert "Traceback" not in done.stderr
    assert load_progress(run / "checkpoints" / "last").epoch == 1


@pytest.fixture
def fp16_on_a_cpu(monkeypatch):
    """Let a run scale its loss for float16 without a GPU."""
    monkeypatch.setattr(preparation, "check_hardware", lambda *_: None)


def test_a_diverged_fp16_run_ends_though_its_scale_keeps_adapting(recording, tmp_path, monkeypatch, fp16_on_a_cpu):
    """NaN losses from the second epoch on: the run ends as in other precisions, and names the stimuli."""
    contribution, calls = SquaredError.contribution, iter(range(1, 1000))

    def diverging(self, *args):
        value = contribution(self, *args)
        return value * float("nan") if self.training and next(calls) > 5 else value

    monkeypatch.setattr(SquaredError, "contribution", diverging)
    run = tmp_path / "run"
    options = [*SMALL, "--precision", "fp16", "--faults.bad-steps", "4"]
    done = run_here("train/finetune.py", "--data", recording, "--out", run, *options)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "4 steps in a row had a loss or a gradient that is not finite" in done.stderr
    assert "step 6 is left out: the loss was not finite on rank 0, which saw" in done.stdout
    assert load_progress(run / "checkpoints" / "last").epoch == 1


def test_an_overflow_of_the_loss_scale_is_no_fault(recording, tmp_path, monkeypatch, fp16_on_a_cpu):
    """A scale that is far too large at the start is halved until gradients fit; nobody is warned."""
    monkeypatch.setattr(loss_scale, "INITIAL", 2.0**30)
    run = tmp_path / "run"
    options = [*SMALL, "--precision", "fp16", "--faults.bad-steps", "1", "--epochs", "6"]
    done = run_here("train/finetune.py", "--data", recording, "--out", run, *options)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stdout
    scale = checkpoint_tensors(run)["optimizer: loss_scale|scale"]
    assert 1 < scale < 2.0**30
    assert losses(run)[-1] < losses(run)[0]


def test_a_gradient_that_no_scale_makes_finite_ends_the_run():
    """The loss is finite, and the scale has come down to 1."""
    warnings: list[str] = []
    network, stimuli = SimpleNamespace(named_modules=list), SimpleNamespace(stimulus_ids=["a", "b"])
    steps = NonFiniteSteps(network, stimuli, SimpleNamespace(gather_objects=lambda value: [value]), 3, warnings.append)
    batch = SimpleNamespace(positions=torch.tensor([0, 1]), weight=torch.ones(2))
    for number, scale_may_be_why in enumerate([True, True, False, False], start=1):
        outcome = StepOutcome(torch.tensor(True), torch.tensor(scale_may_be_why))
        steps.record(number, [batch], torch.tensor(0.5), outcome)
    assert steps.read() == [0.5, 0.5, None, None]
    assert [text.split(" is ")[0] for text in warnings] == ["warning: step 3", "warning: step 4"]
    steps.record(5, [batch], torch.tensor(0.5), StepOutcome(torch.tensor(True), torch.tensor(True)))
    assert steps.read() == [0.5]
    steps.record(6, [batch], torch.tensor(0.5), StepOutcome(torch.tensor(True), torch.tensor(False)))
    with pytest.raises(RunFailed, match="3 steps in a row"):
        steps.read()


def test_running_statistics_survive_a_non_finite_step(recording, tmp_path):
    """NaN images corrupt BatchNorm's statistics before the loss is known."""
    patch = """
forward = module.Network.forward
def broken(self, images):
    broken.calls += self.training
    return forward(self, images * float("nan") if broken.calls == 4 and self.training else images)
broken.calls = 0
module.Network.forward = broken
"""
    run = tmp_path / "run"
    options = ["--data", recording, "--out", run, *SMALL, "--backbone.name", "test_resnet"]
    done = run_patched("models.network", patch, *options)
    assert done.returncode == 0, done.stderr
    assert "step 4 is left out" in done.stdout
    assert all(bool(tensor.isfinite().all()) for tensor in weights(run).values() if tensor.is_floating_point())


def test_a_full_disk_stops_logging_but_not_training(recording, tmp_path):
    """The run reports that charts and the log can no longer be written, and continues."""
    patch = """
import errno, logging
def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")
module.SummaryWriter.add_scalar = full
logging.FileHandler.flush = full
"""
    done = run_patched("run.tensorboard", patch, "--data", recording, "--out", tmp_path / "run", *SMALL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cannot be written (No space left on device); continuing without charts") == 1
    assert done.stderr.count("log.txt cannot be written") == 1
    assert len(losses(tmp_path / "run")) == 2


def epoch_that_waited(seconds: float, steps: int = 10, first: float = 0.0) -> TrainedEpoch:
    return TrainedEpoch(
        loss=1.0,
        train_scores={},
        steps=steps,
        images_per_second=1.0,
        seconds=10.0,
        data_wait_seconds=seconds,
        first_wait_seconds=first,
    )


def test_each_bottleneck_is_reported_once():
    bottlenecks, hosts = Bottlenecks(), ["one", "two", "three"]
    assert bottlenecks.notes(epoch_that_waited(0.5), [0.3, 0.32, 0.31], hosts) == []
    (slow_rank,) = bottlenecks.notes(epoch_that_waited(0.5), [0.3, 0.9, 0.3], hosts)
    assert "rank 1 on two takes 3.0 times as long" in slow_rank
    (loader,) = bottlenecks.notes(epoch_that_waited(4.0), [0.3, 0.9, 0.3], hosts)
    assert "40% of the time is spent waiting for images" in loader
    assert bottlenecks.notes(epoch_that_waited(4.0), [0.3, 0.9, 0.3], hosts) == []


def test_the_loader_is_judged_once_it_has_started_and_there_were_enough_steps():
    bottlenecks = Bottlenecks()
    assert bottlenecks.notes(epoch_that_waited(9.8, steps=2, first=9.7), [1.0], ["one"]) == []
    assert bottlenecks.notes(epoch_that_waited(0.1, steps=8, first=0.1), [1.0], ["one"]) == []
    assert (
        Bottlenecks().notes(epoch_that_waited(9.8, first=9.7), [1.0], ["one"]) != []
    )  # 0.1 of the 0.3 s that are left
    few = Bottlenecks()
    notes = [few.notes(epoch_that_waited(5.0, steps=4), [1.0], ["one"]) for _ in range(3)]
    assert notes[:2] == [[], []]
    assert "50% of the time" in notes[2][0]


def test_charts_show_where_the_time_of_a_step_goes(undisturbed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(undisturbed))
    events.Reload()
    parts = ("data_wait", "forward", "backward", "optimizer", "communication")
    names = {"speed/images_per_second", *(f"speed/{part}_seconds" for part in parts)}
    assert names <= set(events.Tags()["scalars"])
    times = [json.loads(line)["train_seconds"] for line in (undisturbed / "history.jsonl").read_text().splitlines()]
    assert all(event.value < sum(times) for event in events.Scalars("speed/forward_seconds"))
