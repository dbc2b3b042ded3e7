"""`backbone.cut: a+b` reads layers together: each averaged to one grid, all with the same variance."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import slow, succeed_here
from launching import SMALL, STOP_WHILE_SCORING, largest_difference, losses, run_patched, succeed, weights
from networks import backbone, images, refusal

from data_prep.common.errors import STOPPED, BadInput
from data_prep.shards.folder import ShardFolder
from train.data.stimuli import RecordingStimuli
from train.distributed.runtime import start_runtime
from train.finetuning.setup.layer_balance import balance_layers
from train.models.joined_layers import GRID, averages

LAYERS = {"test_resnet": ("layer1", "layer3"), "test_vit": ("blocks.0", "blocks.2")}


def alone(name: str, cut: str) -> torch.Tensor:
    """A layer's map of the same network, cut there."""
    network = backbone(name, cut, maps=True)
    with torch.no_grad():
        return network.map(network(images()))


@pytest.mark.parametrize("side", [4, 6, 7, 11, 14, 28])
def test_averages_are_means_over_equal_parts(side):
    values = torch.rand(side, dtype=torch.float64)
    fine = values.repeat_interleave(GRID).view(GRID, side).mean(1)
    torch.testing.assert_close(averages(side).double() @ values, fine, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("backwards", [False, True])
def test_a_joined_map_has_the_maps_of_its_layers_in_the_order_of_the_network(name, backwards):
    first, second = LAYERS[name]
    network = backbone(name, f"{second}+{first}" if backwards else f"{first}+{second}", pools=True, maps=True)
    network.join.scales.copy_(torch.tensor([2.0, 0.5]))
    maps = [alone(name, layer) for layer in (first, second)]
    expected = [averages(layer.shape[2]) @ layer @ averages(layer.shape[3]).T for layer in maps]
    with torch.no_grad():
        joined = network(images())
    torch.testing.assert_close(joined, torch.cat([2 * expected[0], expected[1] / 2], 1))
    assert network.map_shape == joined.shape[1:]
    assert network.features == joined.shape[1]
    torch.testing.assert_close(network.pool(joined), joined.mean((2, 3)))


def test_all_layers_learn():
    network = backbone("test_resnet", "layer1+layer3").train()
    network(images()).square().sum().backward()
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert not [name for name, parameter in trained.items() if parameter.grad is None]
    assert {name.split(".")[1] for name in trained} >= {"layer1", "layer2", "layer3"}
    assert not any(name.startswith("net.layer4") for name in trained)


def test_a_copy_reads_its_own_layers():
    original = backbone("test_resnet", "layer1+layer3")
    twin = copy.deepcopy(original)
    with torch.no_grad():
        expected = original(images())
        for parameter in original.parameters():
            parameter.zero_()
        torch.testing.assert_close(twin(images()), expected)
        assert not torch.equal(original(images()), expected)


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        ("layer1+layer1", "names a module twice"),
        ("layer1+layer9", "no module 'layer9'"),
        ("layer1+global_pool", "global_pool does not run in the forward pass"),
        ("layer1+", "no module ''"),
    ],
)
def test_layers_that_cannot_be_joined_are_refused(cut, words):
    assert words in refusal("test_resnet", cut)


def test_joined_layers_cannot_checkpoint_gradients():
    with pytest.raises(BadInput, match="needs a single cut"):
        backbone("test_convnext", "stages.0+stages.1").checkpoint_gradients(64)


@pytest.fixture(scope="module")
def words(recording):
    join = ["--backbone.cut", "stages.0+stages.1", "--readout.kind", "factorised", "--readout.start", "field"]
    return ["train/finetune.py", "--data", recording, *SMALL, *join, "--augment.shift", "0.05", "--ema", "0.9"]


@pytest.fixture(scope="module")
def run(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("joined") / "run"
    succeed_here(*words, "--out", folder)
    return folder


def test_layers_vary_alike_over_the_stimuli_to_fit(run):
    scales = weights(run)["backbone.join.scales"]
    assert len(scales) == 2
    assert (scales != 1).all()
    raw = backbone("test_convnext", "stages.0+stages.1", size=32)
    with torch.no_grad():
        joined = raw(F.interpolate(images(64).float(), 32, mode="area"))
    layers = joined.split(raw.join.channels, 1)
    spread = [float((part.square().mean((0, 2, 3)) - part.mean((0, 2, 3)).square()).sum()) ** 0.5 for part in layers]
    # The images are others, so the ratio is about the same.
    assert float(scales[0] / scales[1]) == pytest.approx(spread[1] / spread[0], rel=0.5)


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=slow)])
def test_joined_layers_train_the_same_on_any_number_of_processes(words, run, tmp_path, processes):
    succeed(processes, *words, "--out", tmp_path / "run")
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(run), rtol=1e-4)


def test_a_resumed_run_keeps_its_scales(words, run, tmp_path):
    options = [*words[1:], "--out", tmp_path / "run"]
    assert run_patched("finetuning.selection_scoring", STOP_WHILE_SCORING, *options).returncode == STOPPED
    succeed_here("train/finetune.py", "--data", words[2], "--out", tmp_path / "run", "--resume")
    assert largest_difference(weights(tmp_path / "run"), weights(run)) == 0


def test_balancing_leaves_batch_statistics_as_they_are(recording):
    """And does not depend on them being those of a batch, or the number of processes would matter."""
    network = backbone("test_resnet", "layer1+layer3", size=32).train()
    before = {name: tensor.clone() for name, tensor in network.net.state_dict().items()}
    with start_runtime(None, "fp32") as runtime:
        stimuli = RecordingStimuli(ShardFolder(recording).split("train"), 32)
        balance_layers(network, stimuli, runtime, batch_size=16, workers=0)
    assert network.training
    assert (network.join.scales != 1).all()
    assert largest_difference(before, network.net.state_dict()) == 0
    with torch.no_grad():
        shown = stimuli.images(np.arange(len(stimuli))).permute(0, 3, 1, 2)
        layers = network.eval()(shown).split(network.join.channels, 1)
    variances = [float((x.square().mean((0, 2, 3)) - x.mean((2, 3)).mean(0).square()).sum()) for x in layers]
    assert variances[0] == pytest.approx(variances[1], rel=1e-3)
