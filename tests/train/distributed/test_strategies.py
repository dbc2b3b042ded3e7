"""Every strategy trains the same model, and any strategy resumes the checkpoints of any other, at any step."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import ROOT, assert_refused, run_here, slow, succeed_here
from launching import SMALL, assert_identical, checkpoint_tensors, forked, losses, succeed
from safetensors.torch import load_file

from data_prep.common.errors import BadInput
from train.distributed import accelerator
from train.finetuning.setup.recipe_checks import check_hardware
from train.run.checkpoint import load_progress
from train.run.recipe import Recipe

# By default, zero1 and those that offload are covered by runs that are resumed under them.
STRATEGIES = [
    *(pytest.param(strategy, marks=slow) for strategy in ("zero0", "zero1", "zero2_offload", "zero3_offload")),
    *("zero2", "zero3"),
]
# Accumulation, clipping, weights that the losses learn, an average of the weights; a checkpoint at every other step of
# two epochs of five, all of them kept.
OPTIONS = [
    *(*SMALL, "--task.kind", "hybrid", "--task.weighting", "uncertainty", "--ema", "0.9"),
    *("--batch.per-device", "10", "--optimizer.clip-norm", "0.5"),
    *("--checkpoint.every-steps", "2", "--checkpoint.keep", "100"),
]
# Tolerance for float32 sums in another order: relative for a loss, absolute for a tensor.
LOSS, TENSOR = 1e-6, 1e-5


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """The tensors of the last checkpoint of a run that every strategy has."""
    return {name: x for name, x in checkpoint_tensors(run).items() if "loss_scale" not in name}


def assert_close(run: Path, other: Path) -> None:
    assert losses(run) == pytest.approx(losses(other), rel=LOSS)
    ours, theirs = tensors(run), tensors(other)
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        torch.testing.assert_close(x, theirs[name], rtol=TENSOR, atol=TENSOR, msg=lambda text, name=name: name + text)


def stopped_after(run: Path, step: int, out: Path) -> Path:
    """A copy of a run as if it had been killed after `step`."""
    shutil.copytree(run, out, symlinks=True)
    for checkpoint in (out / "checkpoints").glob("step_*"):
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)
    (out / "checkpoints" / "last").unlink()
    (out / "checkpoints" / "last").symlink_to(f"step_{step}")
    return out


@pytest.fixture(scope="module")
def by_strategy(recording, tmp_path_factory):
    """A function from a strategy to its run on two processes."""
    folder = tmp_path_factory.mktemp("strategies")

    def run(strategy: str) -> Path:
        out = folder / strategy
        if not out.exists():
            setting = strategy if strategy == "ddp" else f"ds_configs/{strategy}.json"
            command = ["train/finetune.py", "--data", recording, "--out", out, *OPTIONS, "--strategy", setting]
            output = succeed(2, *command)
            assert {"ddp": "DDP", "zero0": "ZeRO-0", "zero3_offload": "ZeRO-3 with optimizer and weights"}.get(
                strategy, "ZeRO-"
            ) in output
        return out

    return run


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_trains_the_model_that_ddp_trains(by_strategy, strategy):
    assert_close(by_strategy(strategy), by_strategy("ddp"))


@slow
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_sharding_the_weights_does_not_change_other_optimizers(recording, tmp_path, optimizer):
    options = ["--data", recording, *SMALL, "--optimizer.name", optimizer, "--optimizer.clip-norm", "0.5"]
    succeed(2, "train/finetune.py", "--out", tmp_path / "zero3", *options, "--strategy", "ds_configs/zero3.json")
    succeed_here("train/finetune.py", "--out", tmp_path / "one", *options)
    assert losses(tmp_path / "zero3") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.parametrize(
    ("before", "processes", "after"),
    [
        ("zero3", 1, "zero1"),
        ("ddp", 3, "zero3_offload"),
        ("zero2", 2, "zero2_offload"),
        pytest.param("zero0", 1, "ddp", marks=slow),
    ],
    ids=[
        "ZeRO-3 to ZeRO-1 on 1",
        "DDP to offloaded ZeRO-3 on 3",
        "ZeRO-2 to offloaded ZeRO-2 on 2",
        "ZeRO-0 to one process",
    ],
)
def test_a_run_resumes_mid_epoch_under_another_strategy_and_process_count(
    by_strategy, recording, tmp_path, before, processes, after
):
    """Step 8 of 10 is the third of the second epoch."""
    run = stopped_after(by_strategy(before), 8, tmp_path / "run")
    setting = after if after == "ddp" else f"ds_configs/{after}.json"
    command = ["train/finetune.py", "--data", recording, "--out", run, "--resume", "--strategy", setting]
    output = succeed(processes, *command)
    assert "resumed after epoch 1, step 3 of the next (step 8)" in output
    assert_close(run, by_strategy("ddp"))


# ---- the same to the last bit --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def live(recording, tmp_path_factory):
    """Two runs with BatchNorm on two processes, with and without checkpoints within an epoch."""
    folder = tmp_path_factory.mktemp("live")
    options = ["--data", recording, *SMALL, "--backbone.name", "test_resnet", "--ema", "0.9", "--deterministic"]
    midway = ["--checkpoint.every-steps", "1", "--checkpoint.keep", "100"]
    succeed(2, "train/finetune.py", "--out", folder / "midway", *options, *midway)
    succeed(2, "train/finetune.py", "--out", folder / "plain", *options)
    return folder / "midway", folder / "plain"


def test_saving_midway_changes_nothing(live):
    assert_identical(*live)


@pytest.mark.parametrize("step", [pytest.param(3, marks=slow), 7])
def test_a_run_stopped_at_any_step_resumes_bit_for_bit(live, recording, tmp_path, step):
    run = stopped_after(live[0], step, tmp_path / "run")
    assert (run / "checkpoints" / "last" / "statistics.safetensors").exists()
    succeed(2, "train/finetune.py", "--data", recording, "--out", run, "--resume")
    assert_identical(run, live[1])


def test_a_mid_epoch_checkpoint_averages_the_statistics_of_all_ranks(live):
    checkpoint = live[0] / "checkpoints" / "step_3"
    network = load_file(checkpoint / "network.safetensors")
    for name, statistics in load_file(checkpoint / "statistics.safetensors").items():
        file, name = name.split("|")
        assert len(statistics) == 2
        assert not torch.equal(*statistics)
        if file == "network":
            torch.testing.assert_close(network[name], statistics.mean(0))


# ---- damage --------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("file", "damage"),
    [("optimizer.safetensors", flip), ("network.safetensors", cut_off), ("sha256.json", Path.unlink)],
    ids=["a bit", "the end", "the sums"],
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(trained, recording, tmp_path, file, damage):
    run = tmp_path / "run"
    shutil.copytree(trained, run, symlinks=True)
    damage(run / "checkpoints" / "last" / file)
    done = succeed_here("train/finetune.py", "--data", recording, "--out", run, "--resume")
    assert "warning: " in done.stdout
    assert file in done.stdout
    assert "resumed after epoch 1" in done.stdout
    assert_close(run, trained)  # in one thread


def test_a_run_without_an_intact_checkpoint_is_refused(trained, recording, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run, symlinks=True)
    for file in (run / "checkpoints").glob("step_*/network.safetensors"):
        flip(file)
    done = run_here("train/finetune.py", "--data", recording, "--out", run, "--resume")
    assert_refused(done, "no intact checkpoint", "network.safetensors")
    assert_refused(run_here("train/evaluate.py", run), "network.safetensors", "damaged")


def test_the_best_checkpoint_of_each_kept_one_is_kept_too(trained, recording, tmp_path):
    """Even if it is no longer the best, because the last checkpoint may turn out to be damaged."""
    run = tmp_path / "run"
    options = ["--data", recording, *SMALL, "--epochs", "6", "--checkpoint.keep", "3", "--optimizer.lr", "1e-2"]
    succeed_here("train/finetune.py", "--out", run, *options)
    kept = {path.name for path in (run / "checkpoints").glob("step_*")}
    last = [f"step_{step}" for step in (20, 25, 30)]
    assert kept == {
        *last,
        *(f"step_{load_progress(run / 'checkpoints' / name).best_step}" for name in last),
    }


def test_a_full_disk_stops_every_process(recording, tmp_path):
    """A limit on the file size stands in for the full disk; no partial checkpoint is left."""
    run = tmp_path / "run"
    words = ["bash", "launch/local.sh", "-n", "2", "train/finetune.py", "--data", recording, "--out", run, *SMALL]
    limited = f"ulimit -f 400; exec {' '.join(map(str, words))}"
    done = subprocess.run(
        ["bash", "-c", limited], cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, **forked()}
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("cannot be saved") == 1
    assert "Traceback" not in done.stderr
    assert not list((run / "checkpoints").iterdir())


# ---- what does not go together -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zero", "words"),
    [
        ({"stage": 4}, ["zero_optimization.stage", "0, 1, 2 or 3", "4"]),
        ({"stage": 2, "offload_optimizer": {"device": "nvme"}}, ["offload_optimizer.device", "cpu", "nvme"]),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, ["offload_param", "stage 3"]),
        ({"stage": 0, "offload_optimizer": {"device": "cpu"}}, ["offload_optimizer", "stage 1"]),
        ("three", ["zero_optimization.stage"]),
    ],
)
def test_impossible_strategies_are_refused(recording, tmp_path, zero, words):
    path = tmp_path / "strategy.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    command = ["train/finetune.py", "--data", recording, "--out", tmp_path / "run", *SMALL, "--strategy", path]
    assert_refused(run_here(*command), path, *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--precision", "fp16"], ["precision", "fp16", "GPU", "bf16"]),
        (["--precision", "fp16", "--strategy", "ds_configs/zero2.json"], ["precision", "fp16", "ddp"]),
        (["--compile", "--strategy", "ds_configs/zero3.json"], ["compile", "ZeRO-3"]),
        (["--backbone.batch-norm", "synced"], ["backbone.batch_norm", "test_convnext", "no BatchNorm"]),
    ],
)
def test_settings_that_conflict_with_the_strategy_are_refused(recording, tmp_path, options, words):
    precision = [] if "--precision" in options else ["--precision", "fp32"]
    options = [*SMALL[:4], *SMALL[6:], *precision, *options]
    done = run_here("train/finetune.py", "--data", recording, "--out", tmp_path / "run", *options)
    assert_refused(done, *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_synced_batch_norm_over_processes_needs_gpus():
    recipe = Recipe.model_validate({"backbone": {"batch_norm": "synced"}})
    check_hardware(recipe, None, 1)
    with pytest.raises(BadInput, match="synced works only on GPUs"):
        check_hardware(recipe, None, 2)


@pytest.mark.parametrize(
    ("installed", "message"),
    [("0.18.9", "DeepSpeed 0.18.9 is installed, and versions before"), (None, "which is not installed")],
)
def test_a_deepspeed_that_may_train_a_wrong_model_is_refused(monkeypatch, installed, message):
    def version(name: str) -> str:
        if installed is None:
            raise accelerator.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(accelerator, "version", version)
    with pytest.raises(BadInput, match=message):
        accelerator.check_deepspeed()
