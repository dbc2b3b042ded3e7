"""What would fail at the first step or after the first epoch is refused before the run begins."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from helpers import assert_refused, run_here
from launching import SMALL
from torch import nn

from data_prep.common.errors import BadInput
from data_prep.shards.folder import ShardFolder
from train.data.loader import TrainLoader
from train.data.stimuli import RecordingStimuli
from train.finetuning.setup.recipe_checks import check_selection
from train.models.batch_norm import single_value_norms

NAN = np.nan


@dataclass
class Responses:
    """What of a recording's stimuli is checked."""

    rates: np.ndarray
    name: str = "it"

    def __len__(self) -> int:
        return len(self.rates)


@pytest.mark.parametrize(
    ("rates", "defined"),
    [
        ([[1.0, 2.0]], {"mse"}),  # a single stimulus
        ([[1.0, NAN], [NAN, 2.0]], {"mse"}),
        ([[1.0, 5.0], [1.0, 5.0], [1.0, NAN]], {"mse"}),
        ([[NAN, NAN], [NAN, NAN]], set()),
        ([[1.0, 5.0], [1.0, 5.1]], {"mse", "r2", "pearson_r", "explained_variance"}),
    ],
)
@pytest.mark.parametrize("metric", ["mse", "r2", "pearson_r", "explained_variance"])
def test_stimuli_on_which_a_metric_has_no_value_are_refused(rates, defined, metric):
    stimuli = Responses(np.array(rates, np.float32))
    if metric in defined:
        check_selection(stimuli, metric, "inner")
        return
    with pytest.raises(BadInput, match=f"early_stopping: {metric} has no value on the {len(rates)} stimuli of inner"):
        check_selection(stimuli, metric, "inner")


def test_an_inner_part_of_one_stimulus_is_refused_before_the_run_begins(recording, tmp_path):
    words = ["--data", recording, "--out", tmp_path / "run", *SMALL, "--early-stopping.inner-fraction", "0.001"]
    assert_refused(run_here("train/finetune.py", *words), "r2 has no value on the 1 stimuli of inner", "metric mse")
    assert not (tmp_path / "run").exists()


def test_layers_that_see_one_value_per_channel_are_found_and_nothing_changes():
    map_of_4, map_of_1 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    network = nn.Sequential(map_of_4, nn.AdaptiveAvgPool2d(1), map_of_1, nn.Flatten(), nn.BatchNorm1d(3))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images = torch.rand(1, 3, 4, 4)
    assert single_value_norms(network, images) == ["2", "4"]
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        network(images)
    map_of_1.train = lambda _mode=True: nn.Module.train(map_of_1, False)  # as a backbone freezes it
    assert single_value_norms(network, images) == ["4"]


BATCH_NORM = ["--backbone.name", "test_efficientnet", "--images.size", "32", "--batch.global-size", "3"]


def test_a_micro_batch_of_one_is_refused_where_batch_norm_has_one_position(recording, tmp_path):
    words = ["--data", recording, "--out", tmp_path / "run", *SMALL, *BATCH_NORM, "--batch.per-device", "2"]
    words += ["--epochs", "1"]
    done = run_here("train/finetune.py", *words)
    assert_refused(done, "a global batch of 3 over 1 processes, in 2 micro-batches each", "is 1 x 1", "frozen")
    assert not (tmp_path / "run").exists()
    done = run_here("train/finetune.py", *words, "--backbone.batch-norm", "frozen")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("size", "ranks", "per_device"), [(32, 1, None), (32, 3, 5), (7, 3, 2), (5, 5, 1), (3, 2, 1)])
def test_the_smallest_and_the_largest_micro_batch_are_known(recording, size, ranks, per_device):
    stimuli = RecordingStimuli(ShardFolder(recording).split("train"), 32)
    loaders = [
        TrainLoader(
            stimuli, seed=0, global_size=size, per_device=per_device, rank=rank, ranks=ranks, workers=0, pin=False
        )
        for rank in range(ranks)
    ]
    sizes = [len(parts.positions) for x in loaders for parts in x._micro_batches(x._global_batch(0, 0))]
    assert min(sizes) == loaders[0].smallest_micro_batch
    assert max(sizes) == loaders[0].largest_micro_batch
