"""Controls and protocol: shuffled responses, seeds, running averages, and data that a loss refuses."""

from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from helpers import assert_refused, run_here, succeed_here
from launching import assert_identical, losses, predictions, weights
from make_sources import make_folder
from safetensors.torch import load_file
from timm.models import register_model

from data_prep.shards.folder import ShardFolder
from data_prep.shards.packing import pack
from data_prep.sources.folder import Folder
from train.data.recordings import Recordings
from train.data.stimuli import RecordingStimuli
from train.distributed.engine import Engine
from train.finetuning import checkpointing
from train.finetuning.ema import RunningAverage
from train.finetuning.setup.preparation import training_stimuli
from train.run.recipe import Recipe

SITES = 6
OPTIONS = [
    *("--backbone.name", "test_convnext", "--backbone.weights", "random", "--images.size", "32"),
    *("--precision", "fp32", "--loader.workers", "0", "--batch.global-size", "16", "--optimizer.lr", "3e-3"),
]


@register_model
def dropping_convnext(pretrained=False, **options):
    """A network that drops a third of its residual branches in training."""
    return timm.create_model("test_convnext", drop_path_rate=0.3, **options)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """100 stimuli, 60 of them for training, whose responses are easy to predict."""
    path = tmp_path_factory.mktemp("protocol")
    make_folder(path / "src", n=100, splits=True, sites=SITES, noise=0.5)
    return pack(Folder(source=path / "src").open(), path / "shards", stimuli_per_shard=50, workers=1).folder


def finetune(run, data, *words):
    return run_here("train/finetune.py", "--data", data, "--out", run, *OPTIONS, *words)


def trained(run, data, *words):
    done = finetune(run, data, *words)
    assert done.returncode == 0, done.stderr
    return run


def evaluated(run, split="val"):
    succeed_here("train/evaluate.py", run, "--split", split)
    return predictions(run, split)


# ---- shuffled responses --------------------------------------------------------------------------------------------


def as_set(rows: np.ndarray) -> set[bytes]:
    return {row.tobytes() for row in rows}


def test_shuffling_moves_whole_rows_and_leaves_the_stimuli(data):
    split = ShardFolder(data).split("train")
    before, after, again, other = (RecordingStimuli(split, 32, classes=True) for _ in range(4))
    for stimuli, seed in ((after, 3), (again, 3), (other, 4)):
        stimuli.shuffle_responses(seed)
    assert as_set(after.rates) == as_set(before.rates)
    moved = (after.rates != before.rates).any(1)
    assert moved.mean() > 0.9
    assert np.array_equal(after.rates, again.rates)
    assert not np.array_equal(after.rates, other.rates)
    assert np.array_equal(after.labels, before.labels)
    assert after.stimulus_ids == before.stimulus_ids


def test_the_response_counts_are_shuffled_with_the_rows(holey):
    """The loss is normalised by these counts."""
    stimuli = RecordingStimuli(ShardFolder(holey).split("train"), 32)
    before = stimuli.observed
    stimuli.shuffle_responses(0)
    assert np.array_equal(stimuli.observed, (~np.isnan(stimuli.rates)).sum(1))
    assert not np.array_equal(stimuli.observed, before)


@pytest.mark.parametrize("split", ["inner", "val"])
def test_shuffling_keeps_fitted_and_selecting_responses_apart(data, split):
    settings = {"early_stopping": {"split": split}}
    shards = ShardFolder(data)
    recordings, recipe = Recordings([shards]), Recipe.model_validate(settings)
    plain, shuffled = (training_stimuli(recordings, recordings.divide(recipe), recipe) for _ in range(2))
    for before, after in zip(plain, shuffled, strict=True):
        after.shuffle_responses(0)
        assert as_set(after.rates) == as_set(before.rates)
        assert after.stimulus_ids == before.stimulus_ids
    assert not set(plain[0].stimulus_ids) & set(plain[1].stimulus_ids)


def left_out_score(run) -> float:
    return float((run / "log.txt").read_text().partition("leave-one-out: ")[2].partition(")")[0])


def test_a_shuffled_run_scores_at_chance_and_is_scored_on_the_true_responses(data, tmp_path):
    """The shards and the responses used for evaluation stay unshuffled, also on train."""
    before = {path.name: path.read_bytes() for path in data.iterdir()}
    options = ["--readout.kind", "flattened", "--backbone.cut", "stages.1", "--readout.start", "ridge", "--epochs", "1"]
    plain = trained(tmp_path / "plain", data, *options)
    control = trained(tmp_path / "control", data, *options, "--task.shuffle-responses")
    assert left_out_score(plain) > 0.3
    assert left_out_score(control) < 0.1
    assert "CONTROL" in (control / "log.txt").read_text()
    assert "CONTROL" not in (plain / "log.txt").read_text()
    for split in ("train", "val"):
        np.testing.assert_array_equal(evaluated(control, split)["target"], ShardFolder(data).split(split).rates())
    assert {path.name: path.read_bytes() for path in data.iterdir()} == before


# ---- the same again ------------------------------------------------------------------------------------------------


RANDOM = [
    *("--backbone.name", "dropping_convnext", "--ema", "0.9", "--epochs", "2"),
    *("--augment.shift", "0.1", "--augment.zoom", "0.1", "--augment.brightness", "0.2", "--augment.flip"),
]


def test_a_run_repeats_bitwise_and_another_seed_does_not(data, tmp_path):
    """With all randomness on: augmentation, dropped branches, order and initial weights."""
    try:
        first, second, other_seed = (
            trained(tmp_path / name, data, *RANDOM, "--deterministic", "--seed", seed)
            for name, seed in (("first", 5), ("second", 5), ("other_seed", 6))
        )
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert_identical(first, second)
    network = {name: x for name, x in weights(other_seed).items() if name.endswith("weight")}
    assert network
    assert not any(torch.equal(x, weights(first)[name]) for name, x in network.items() if "norm" not in name)
    assert losses(first) != losses(other_seed)


def test_dropped_branches_and_augmentation_change_the_losses(data, tmp_path):
    """Otherwise the test above would prove nothing."""
    plain = trained(tmp_path / "plain", data, "--ema", "0.9", "--epochs", "2")
    dropping = trained(tmp_path / "dropping", data, "--ema", "0.9", "--epochs", "2", *RANDOM[:2])
    augmented = trained(tmp_path / "augmented", data, "--ema", "0.9", "--epochs", "2", *RANDOM[-7:])
    assert len({tuple(losses(run)) for run in (plain, dropping, augmented)}) == 3


# ---- the running average -------------------------------------------------------------------------------------------


def decay_after(step: int, decay: float) -> float:
    return min(decay, (1 + step) / (10 + step))


def test_the_running_average_is_the_moving_average_of_weights_and_statistics():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    average = RunningAverage(network, 0.8)
    runtime = SimpleNamespace(ranks=1, device=torch.device("cpu"))
    average.follow(Engine(runtime, network, network, optimizer, accumulation_steps=1, clip_norm=None))
    expected = {name: x.double().clone() for name, x in network.state_dict().items()}
    for step in range(1, 60):
        optimizer.zero_grad()
        (network(torch.randn(8, 4)) - torch.randn(3)).square().mean().backward()
        optimizer.step()
        before = {name: x.clone() for name, x in network.state_dict().items()}
        average.update(step)
        decay = decay_after(step, 0.8)
        assert decay == (0.8 if step >= 35 else (1 + step) / (10 + step))
        for name, x in network.state_dict().items():
            assert torch.equal(x, before[name])
            expected[name] = decay * expected[name] + (1 - decay) * x.double()
    averaged = average.network.state_dict()
    for name in ("0.weight", "0.bias", "1.weight", "1.running_mean", "1.running_var"):
        torch.testing.assert_close(averaged[name].double(), expected[name], rtol=1e-4, atol=1e-6)
        assert not torch.equal(averaged[name], network.state_dict()[name])
    assert not any(parameter.requires_grad for parameter in average.network.parameters())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_run_saves_the_moving_average_of_the_weights_after_each_step(data, tmp_path, monkeypatch):
    """The trained weights are saved beside it, to resume from."""
    seen, update = [], RunningAverage.update

    def watch(self, step):
        if not seen:
            seen.append({name: x.double().clone() for name, x in self.network.state_dict().items()})
        seen.append({name: x.double().clone() for name, x in self._engine.network.state_dict().items()})
        update(self, step)

    monkeypatch.setattr(RunningAverage, "update", watch)
    run = trained(tmp_path / "run", data, "--backbone.name", "test_resnet", "--ema", "0.7", "--epochs", "4")
    expected, *steps = seen
    assert len(steps) == 4 * (54 // 16)
    for number, state in enumerate(steps, start=1):
        decay = decay_after(number, 0.7)
        expected = {name: decay * x + (1 - decay) * state[name] for name, x in expected.items()}
    saved, trained_weights = weights(run), load_file(run / "checkpoints" / "last" / "training.safetensors")
    floats = [name for name, x in saved.items() if x.is_floating_point()]
    for name in floats:
        torch.testing.assert_close(saved[name].double(), expected[name], rtol=1e-4, atol=1e-6)
        assert torch.equal(trained_weights[name].double(), steps[-1][name])
    assert any(not torch.equal(saved[name], trained_weights[name]) for name in floats)


@pytest.mark.parametrize("killed_in", ["an epoch", "the first epoch", "saving"])
def test_an_interrupted_run_with_all_randomness_resumes_bit_for_bit(data, tmp_path, monkeypatch, killed_in):
    """The running average, the trained weights and the optimizer state are all identical."""
    options = [*RANDOM, "--epochs", "4", "--schedule.cycle-momentum"]
    undisturbed = trained(tmp_path / "undisturbed", data, *options)
    at_step = {"an epoch": 8, "the first epoch": 2, "saving": None}[killed_in]
    update = RunningAverage.update

    def interrupted(self, step):
        update(self, step)
        if step == at_step:
            raise KeyboardInterrupt

    def half_saved(folder, tensors, progress, keep):
        if progress.epoch == 3:
            (folder / f".step_{progress.step}.tmp").mkdir()
            raise KeyboardInterrupt
        save(folder, tensors, progress, keep)

    save = checkpointing.save_checkpoint
    with monkeypatch.context() as patched:
        patched.setattr(RunningAverage, "update", interrupted)
        if at_step is None:
            patched.setattr(checkpointing, "save_checkpoint", half_saved)
        assert finetune(tmp_path / "run", data, *options).returncode == 130
    resumed = run_here("train/finetune.py", "--data", data, "--out", tmp_path / "run", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    expected = "starting from the beginning" if killed_in == "the first epoch" else "resumed after epoch 2"
    assert expected in resumed.stdout
    assert_identical(tmp_path / "run", undisturbed)


# ---- losses and what they refuse -----------------------------------------------------------------------------------


def test_poisson_refuses_negative_rates_by_site_and_stimulus(holey, tmp_path):
    """The squared error accepts them."""
    options = ["--early-stopping.split", "val", "--epochs", "1"]
    refused = finetune(tmp_path / "run", holey, *options, "--loss.responses", "poisson")
    assert_refused(refused, "loss.responses", "poisson", "site_005", "stim0007", "-0.25")
    assert not (tmp_path / "run").exists()
    trained(tmp_path / "run", holey, *options)


def test_correlation_refuses_more_than_one_micro_batch(data, tmp_path):
    options = ["--loss.responses", "correlation", "--batch.per-device", "8"]
    assert_refused(finetune(tmp_path / "run", data, *options), "loss.responses", "correlation", "batch.per_device")
    assert not (tmp_path / "run").exists()


def test_a_poisson_run_predicts_positive_rates(data, tmp_path):
    run = trained(tmp_path / "run", data, "--loss.responses", "poisson", "--readout.start", "ridge", "--epochs", "3")
    assert losses(run)[-1] < losses(run)[0]
    assert (evaluated(run)["prediction"] > 0).all()


@pytest.mark.parametrize("ema", [[], ["--ema", "0.8"]], ids=["plain", "averaged"])
def test_a_correlation_run_is_calibrated_on_the_fitted_stimuli(data, tmp_path, ema):
    options = ["--loss.responses", "correlation", "--early-stopping.split", "val", "--epochs", "3"]
    run = trained(tmp_path / "run", data, *options, *ema)
    assert "best Pearson r" in (run / "log.txt").read_text()
    arrays = evaluated(run, "train")
    for site in range(SITES):
        line = np.polyfit(arrays["prediction"][:, site], arrays["target"][:, site], 1)
        assert line == pytest.approx((1, 0), abs=0.05)
