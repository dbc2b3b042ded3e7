"""Training does not depend on the number of processes, on accumulation or on the strategy."""

import shutil

import pytest
import torch
from helpers import assert_refused, run_here, slow, succeed_here
from launching import (
    SMALL,
    kill_after_an_epoch,
    largest_difference,
    launch,
    losses,
    metrics,
    succeed,
    succeed_on,
    weights,
)

from data_prep.shards.folder import ShardFolder
from train.data.loader import TrainLoader
from train.data.recordings import Recordings
from train.data.stimuli import RecordingStimuli
from train.models.network import Network
from train.run.checkpoint import load_progress
from train.run.recipe import Recipe, load_recipe

# One step of plain SGD with rate 1: what changes in the weights is the gradient.
ONE_STEP = [
    *("--optimizer.name", "sgd", "--optimizer.lr", "1", "--optimizer.momentum", "0", "--optimizer.weight-decay", "0"),
    *("--schedule.kind", "constant", "--schedule.warmup", "0", "--epochs", "1", "--batch.global-size", "175"),
]


@pytest.fixture(scope="module")
def one_step(recording, tmp_path_factory):
    """A function from processes and micro-batch size to the weights after one step on the same 175 stimuli."""
    folder = tmp_path_factory.mktemp("one_step")

    def run(processes, per_device):
        out = folder / f"{processes}_{per_device}"
        micro_batch = ["--batch.per-device", per_device] if per_device else []
        if not out.exists():
            options = ["--data", recording, "--out", out, *SMALL, *ONE_STEP, *micro_batch]
            succeed_on(processes, "train/finetune.py", *options)
        return weights(out)

    return run


def gradient_by_hand(recording, run_recipe: Recipe) -> tuple[dict, dict]:
    """Initial weights, and the gradient of the mean squared error over all fitted stimuli, in plain torch."""
    shards = ShardFolder(recording)
    (division,) = Recordings([shards]).divide(run_recipe)
    stimuli = RecordingStimuli(division.train, 32, division.fit)
    options = {"seed": run_recipe.seed, "global_size": len(stimuli), "per_device": None, "workers": 0, "pin": False}
    (batch,) = next(TrainLoader(stimuli, rank=0, ranks=1, **options).epoch(0))
    torch.manual_seed(run_recipe.seed)
    network = Network(run_recipe, shards.manifest, 32).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    mean, std = (torch.tensor(getattr(shards.manifest.rates, name)) for name in ("mean", "std"))
    target = ((batch.rates - mean) / std).float()
    torch.nn.functional.mse_loss(network(batch.images)["rates"], target).backward()
    return before, {name: parameter.grad for name, parameter in network.named_parameters()}


def test_one_step_follows_the_gradient_of_the_global_batch(recording, one_step, tmp_path_factory):
    after = one_step(1, None)
    recipe = load_recipe(next(tmp_path_factory.getbasetemp().glob("one_step*")) / "1_None" / "recipe.yaml", Recipe)
    before, gradient = gradient_by_hand(recording, recipe)
    for name, value in gradient.items():
        torch.testing.assert_close(before[name] - after[name], value, rtol=1e-4, atol=1e-6)
    assert any(float(value.abs().max()) > 1e-3 for value in gradient.values())


@pytest.mark.parametrize(
    ("processes", "per_device"),
    [(1, 16), (2, None), (3, 16), *(pytest.param(*both, marks=slow) for both in ((3, None), (2, 30)))],
)
def test_gradients_are_those_of_one_process(one_step, processes, per_device):
    """175 stimuli divide neither by 2 nor by 3; tolerance: float32 sums in another order."""
    assert largest_difference(one_step(processes, per_device), one_step(1, None)) < 2e-6


def test_training_lowers_the_loss(trained):
    first, second = losses(trained)
    assert second < first - 0.01


def test_three_processes_train_the_same_network(recording, trained, tmp_path):
    out = tmp_path / "run"
    succeed(3, "train/finetune.py", "--data", recording, "--out", out, *SMALL)
    assert losses(out) == pytest.approx(losses(trained), rel=1e-4)
    assert largest_difference(weights(out), weights(trained)) < 1e-3  # Adam divides small sums by their own size


@pytest.fixture(scope="module")
def six_epochs(recording, tmp_path_factory):
    """An undisturbed run of six epochs on two processes, and its options."""
    options = ["--data", recording, *SMALL, "--epochs", "6"]
    out = tmp_path_factory.mktemp("six_epochs") / "run"
    succeed(2, "train/finetune.py", "--out", out, *options)
    return out, options


@slow  # test_faults.py kills one process, test_remote_shards.py all of them
def test_a_killed_run_resumes_bit_for_bit(six_epochs, recording, tmp_path):
    undisturbed, options = six_epochs
    kill_after_an_epoch(2, tmp_path / "run", *options, "--loader.workers", "1")  # which must end with their rank
    assert load_progress(tmp_path / "run" / "checkpoints" / "last").epoch < 6, "it was over before it could be killed"
    output = succeed(2, "train/finetune.py", "--data", recording, "--out", tmp_path / "run", "--resume")
    assert "resumed after epoch" in output
    assert losses(tmp_path / "run") == losses(undisturbed)
    assert largest_difference(weights(tmp_path / "run"), weights(undisturbed)) == 0


def test_a_run_without_a_checkpoint_starts_again(trained, recording, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run, symlinks=True)
    shutil.rmtree(run / "checkpoints")
    output = succeed_here("train/finetune.py", "--data", recording, "--out", run, "--resume").stdout
    assert "starting from the beginning" in output
    assert losses(run) == losses(trained)


def test_resuming_on_other_data_or_settings_is_refused(trained, recording, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(trained, run, symlinks=True)
    options = ["--stimuli", "240", "--sites", "12", "--repetitions", "6", "--image-size", "48", "--seed", "1"]
    succeed_here("data_prep/pack.py", "simulated", "--out", other, *options)
    for words, expected in (
        (["--data", other], "trained on other shards"),
        (["--data", recording, "--epochs", "3"], "epochs: 2 -> 3"),
    ):
        assert_refused(run_here("train/finetune.py", "--out", run, "--resume", *words), expected)


def test_a_damaged_image_is_named_whichever_process_reads_it(recording, tmp_path):
    """Only the process that reads it can report it."""
    broken = tmp_path / "broken"
    shutil.copytree(recording, broken)
    split = ShardFolder(broken).split("train")
    for position in range(len(split)):
        offset = split._index.offset[position, 0]
        with (broken / split.shards[split._index.shard[position]].file).open("r+b") as tar:
            tar.seek(int(offset) + 2)
            tar.write(bytes(200))
    for processes in (1, 2):
        done = launch(processes, "train/finetune.py", "--data", broken, "--out", tmp_path / f"run_{processes}", *SMALL)
        assert done.returncode == 2, done.stderr
        assert "not the bytes that were packed" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "vit_tiny_patch16_224"])
def test_networks_with_a_hidden_head_or_a_fixed_size_accept_any_image(recording, name):
    manifest = ShardFolder(recording).manifest
    recipe = Recipe.model_validate({"backbone": {"name": name, "weights": "random"}})
    outputs = Network(recipe, manifest, 64)(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    assert outputs["rates"].shape == (2, 12)
    assert outputs["rates"].dtype == torch.float32


def test_head_only_training_leaves_the_backbone_unchanged(recording, tmp_path):
    options = [*SMALL, "--backbone.name", "test_resnet", "--backbone.trainable", "head", "--epochs", "1"]
    succeed_here("train/finetune.py", "--data", recording, "--out", tmp_path / "run", *options)
    recipe = load_recipe(tmp_path / "run" / "recipe.yaml", Recipe)
    torch.manual_seed(recipe.seed)
    fresh = Network(recipe, ShardFolder(recording).manifest, 32).state_dict()
    trained = weights(tmp_path / "run")
    changed = {name for name in fresh if not torch.equal(fresh[name], trained[name])}
    assert changed == {"heads.rates.sites.weight", "heads.rates.sites.bias"}


def test_the_saved_network_is_the_scored_one(recording, tmp_path):
    """BatchNorm's running statistics differ between processes and are averaged before scoring and saving."""
    run = tmp_path / "run"
    options = [*SMALL, "--backbone.name", "test_resnet", "--epochs", "1", "--early-stopping.split", "val"]
    succeed(2, "train/finetune.py", "--data", recording, "--out", run, *options)
    succeed_here("train/evaluate.py", run)
    scores = metrics(run)
    assert scores["selected_on"] == ["val"]
    assert scores["regression"]["r2"]["mean"] == pytest.approx(
        load_progress(run / "checkpoints" / "best").best, rel=1e-5
    )


def test_bfloat16_trains_to_about_the_same_loss(recording, trained, tmp_path):
    out = tmp_path / "run"
    succeed_here("train/finetune.py", "--data", recording, "--out", out, *SMALL, "--precision", "bf16")
    assert losses(out) == pytest.approx(losses(trained), rel=0.02)
    assert losses(out) != losses(trained)


def test_a_diverged_run_ends_with_one_sentence(recording, tmp_path):
    options = ["--data", recording, *SMALL, "--optimizer.name", "sgd", "--optimizer.lr", "1000"]
    done = launch(2, "train/finetune.py", "--out", tmp_path / "run", *options)
    assert done.returncode == 1
    assert done.stderr.count("the training diverged: ") == 1
    assert "Traceback" not in done.stderr


def test_early_stopping_stops_all_processes(recording, tmp_path):
    """All stop in the same epoch, although their losses differ; otherwise one would wait for the others forever."""
    out = tmp_path / "run"
    options = [*SMALL, "--epochs", "30", "--early-stopping.patience", "2", "--optimizer.lr", "1e-9"]
    output = succeed(3, "train/finetune.py", "--data", recording, "--out", out, *options)
    assert output.count("stopped early") == 1
    progress = load_progress(out / "checkpoints" / "last")
    assert len(losses(out)) == progress.epoch == progress.best_epoch + 2 < 30
    assert progress.improved[-3:] == [True, False, False]
