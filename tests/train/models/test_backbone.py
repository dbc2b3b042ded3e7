"""Backbones: a cut ends in the activations of the whole network, frozen parts stay, weights load from their source."""

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import timm
import torch
from launching import weights as checkpoint_weights
from networks import SIZE, backbone, images, refusal, skip_unless_timm_has
from safetensors.torch import save_file
from timm.models import register_model
from torch import nn

from data_prep.common.errors import BadInput
from train.models.backbone import BATCH_NORMS, Backbone
from train.models.network import parameter_count
from train.models.small_cnns import cnn2, cnn3


@register_model
def narrow_vgg(pretrained=False, **options):
    """VGG11 without most of the 100 M weights of its classifier, which take seconds to draw."""
    return timm.create_model("vgg11", mlp_ratio=0.004, **options)


@register_model
def dropping_resnet(pretrained=False, **options):
    """Half of what it computes is dropped in training."""
    return timm.create_model("test_resnet", drop_rate=0.5, drop_path_rate=0.5, **options)


@torch.no_grad()
def perturbed(network: Backbone) -> Backbone:
    """Change all weights a little, since layers that start at 0 would hide what they multiply."""
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return network


def random_sum(output: torch.Tensor) -> torch.Tensor:
    """A scalar that depends on every element of an output."""
    return (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(1))).sum()


def normalised(images: torch.Tensor, net: nn.Module) -> torch.Tensor:
    mean, std = (torch.tensor(net.pretrained_cfg[name]).view(1, 3, 1, 1) * 255 for name in ("mean", "std"))
    return ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)


def statistics(module: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: x.clone() for name, x in module.state_dict().items() if name.endswith(("running_mean", "running_var"))
    }


# ---- cuts ----------------------------------------------------------------------------------------------------------

# Network, cut, and the prefixes of the parameters that remain, all of them and no others.
CUTS = {
    "resnet stage": ("resnet10t", "layer2", ("conv1", "bn1", "layer1", "layer2")),
    "resnet block": ("resnet18", "layer2.0", ("conv1", "bn1", "layer1", "layer2.0")),
    "within a residual block": (
        "resnet18",
        "layer2.1.conv1",
        ("conv1", "bn1", "layer1", "layer2.0", "layer2.1.conv1"),
    ),
    "densenet stage": (
        "densenet121",
        "features.denseblock2",
        ("features.conv0", "features.norm0", "features.denseblock1", "features.transition1", "features.denseblock2"),
    ),
    "within a densenet block": (
        "densenet121",
        "features.denseblock1.denselayer2",
        ("features.conv0", "features.norm0", "features.denseblock1.denselayer1", "features.denseblock1.denselayer2"),
    ),
    "vgg": ("narrow_vgg", "features.8", ("features.0", "features.3", "features.6", "features.8")),
    "efficientnet stage": (
        "tf_efficientnet_lite0",
        "blocks.4",
        ("conv_stem", "bn1", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks.4"),
    ),
    "efficientnet block": (
        "tf_efficientnet_lite0",
        "blocks.2.0",
        ("conv_stem", "bn1", "blocks.0", "blocks.1", "blocks.2.0"),
    ),
    "convnext stage": ("test_convnext", "stages.1", ("stem", "stages.0", "stages.1")),
    "vit block": (
        "test_vit",
        "blocks.2",
        ("cls_token", "pos_embed", "patch_embed", *(f"blocks.{k}." for k in range(3))),
    ),
    "vit patches": ("vit_tiny_patch16_224", "patch_embed", ("cls_token", "pos_embed", "patch_embed")),
    "vit with relative positions": ("test_vit_relpos", "blocks.1", ("patch_embed", "blocks.0", "blocks.1")),
    "swin stage": ("swin_tiny_patch4_window7_224", "layers.1", ("patch_embed", "layers.0", "layers.1")),
    "maxvit stage": ("test_maxvit", "stages.1", ("stem", "stages.0", "stages.1")),
    "small cnn": ("cnn3", "stages.1", ("stages.0", "stages.1")),
}


def whole_network(name: str) -> nn.Module:
    skip_unless_timm_has(name)
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=0)
    if hasattr(net, "set_input_size"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net.set_input_size(img_size=SIZE)
    return net


def activations(net: nn.Module, module: str, images: torch.Tensor) -> torch.Tensor:
    """The output of a module of a whole network, before the next one changes it in place."""
    outputs = []

    def keep(_module, _inputs, output):
        outputs.append(output.clone())

    handle = net.get_submodule(module).register_forward_hook(keep)
    net.forward_features(normalised(images, net))
    handle.remove()
    return outputs[0]


@pytest.mark.parametrize("case", CUTS)
def test_a_cut_network_ends_in_that_modules_activations(case):
    """In evaluation and training mode; later modules are gone, and all trained weights get gradients."""
    name, cut, kept = CUTS[case]
    whole, short = perturbed(whole_network(name)), backbone(name, cut, seed=1)
    assert {n for n, _ in short.net.named_parameters()} == {
        n for n, _ in whole.named_parameters() if n.startswith(kept)
    }
    short.net.load_state_dict({n: whole.state_dict()[n] for n in short.net.state_dict()})
    with torch.no_grad():
        assert torch.equal(short(images()), activations(whole.eval(), cut, images()))
    torch.manual_seed(0)  # of a dropout
    expected = activations(whole.train(), cut, images())
    torch.manual_seed(0)
    output = short.train()(images())
    assert torch.equal(output, expected)
    for network in (expected, output):
        random_sum(network).backward()
    expected_gradients = {n: p.grad for n, p in whole.named_parameters() if p.grad is not None}
    gradients = {n: p.grad for n, p in short.net.named_parameters() if p.requires_grad}
    assert gradients.keys() == expected_gradients.keys()
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[parameter], msg=parameter)


@pytest.mark.parametrize("name", ["test_convnext", "test_maxvit", "test_vit_relpos", "tf_efficientnet_lite0"])
def test_without_pooled_features_only_what_leads_to_the_map_remains(name):
    """Weights after the map, such as the norm before a classifier, are dropped."""
    short, whole = backbone(name, pools=False, maps=True), backbone(name, maps=True)
    assert short.features is None
    assert short.map_shape == whole.map_shape
    with torch.no_grad():
        torch.testing.assert_close(short.map(short(images())), whole.map(whole(images())), rtol=1e-4, atol=1e-5)
    random_sum(short.train().map(short(images()))).backward()
    assert all(parameter.grad is not None for parameter in short.parameters() if parameter.requires_grad)
    if name == "test_convnext":
        assert parameter_count(whole) - parameter_count(short) == 2 * 64  # the norm before the classifier


@pytest.mark.parametrize("cut", [None, "layer2", "layer2.0.conv1"], ids=["whole", "stage", "within a block"])
def test_a_copy_is_independent_of_the_original(cut):
    original = backbone("test_resnet", cut)
    twin = copy.deepcopy(original)
    with torch.no_grad():
        expected = original(images())
        assert torch.equal(twin(images()), expected)
        for parameter in original.parameters():
            parameter.zero_()
        assert torch.equal(twin(images()), expected)
        assert not torch.equal(original(images()), expected)
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(twin(images()), original(images()))


@pytest.mark.parametrize("cut", ["layer2", "layer2.0.conv1"], ids=["stage", "within a block"])
def test_a_cut_networks_weights_can_be_saved_and_loaded(cut):
    one, other = backbone("test_resnet", cut), backbone("test_resnet", cut, seed=1)
    with torch.no_grad():
        assert not torch.equal(one(images()), other(images()))
        other.load_state_dict(one.state_dict())
        assert torch.equal(one(images()), other(images()))


@pytest.mark.parametrize("cut", [None, "layer2", "layer2.0.conv1"])
def test_training_and_evaluation_mode_reach_every_module(cut):
    network = backbone("test_resnet", cut)
    for mode in (True, False, True):
        assert {module.training for module in network.train(mode).modules()} == {mode}


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        ("layer5", "layer4"),
        ("layer2.0.conv9", "layer2.0.conv"),
        ("xyzzy", "layer1, layer2, layer3, layer4"),
        ("", "layer1, layer2, layer3, layer4"),
    ],
)
def test_an_unknown_cut_is_refused_with_the_nearest_names(cut, expected):
    message = refusal("test_resnet", cut)
    assert "backbone.cut" in message
    assert repr(cut) in message
    assert expected in message.partition("nearest are")[2]


@pytest.mark.parametrize(("name", "cut"), [("test_resnet", "global_pool"), ("test_vit", "head")])
def test_a_cut_that_the_forward_pass_does_not_reach_is_refused(name, cut):
    assert f"{cut} does not run in the forward pass" in refusal(name, cut)


def test_a_cut_that_does_not_give_one_output_per_image_is_refused():
    """Swin's attention sees windows: 2 x 2 and more of them per image."""
    message = refusal("swin_tiny_patch4_window7_224", "layers.0.blocks.0.attn")
    assert "backbone.cut" in message


@pytest.mark.parametrize(
    ("name", "size"), [("test_vit", 50), ("densenet121", 16), ("test_convnext", 16), ("cnn3", 40), ("narrow_vgg", 16)]
)
def test_a_size_that_the_network_cannot_take_is_refused(name, size):
    message = refusal(name, size=size)
    assert "images.size" in message
    assert name in message
    assert f"{size} px" in message


def test_an_unknown_network_is_refused_with_the_nearest_name():
    assert "did you mean resnet18" in refusal("resnet81")


# ---- maps ----------------------------------------------------------------------------------------------------------

# What the network ends in, and (channels, rows, columns) of its map at 64 px.
MAPS = {
    "whole resnet": ("test_resnet", None, (96, 2, 2)),
    "resnet stage": ("test_resnet", "layer2", (48, 8, 8)),
    "whole convnext": ("test_convnext", None, (64, 2, 2)),
    "convnext stage": ("test_convnext", "stages.1", (32, 8, 8)),
    "whole vit": ("test_vit", None, (64, 4, 4)),
    "vit block": ("vit_tiny_patch16_224", "blocks.1", (192, 4, 4)),
    "vit patches as tokens": ("vit_tiny_patch16_224", "patch_embed", (192, 4, 4)),
    "vit patches as a map": ("test_vit", "patch_embed", (64, 4, 4)),
    "vit without a class token": ("test_vit_relpos", "blocks.1", (96, 4, 4)),
    "vit with registers": ("vit_small_patch16_dinov3", "blocks.0", (384, 4, 4)),
    "whole swin": ("swin_tiny_patch4_window7_224", None, (768, 2, 2)),
    "swin stage": ("swin_tiny_patch4_window7_224", "layers.1", (192, 8, 8)),
    "within a convnext block": ("test_convnext", "stages.1.blocks.0.mlp", (32, 8, 8)),
    "mambaout stage": ("test_mambaout", "stages.1", (32, 8, 8)),
    "densenet stage": ("densenet121", "features.denseblock2", (512, 8, 8)),
}


@pytest.mark.parametrize("case", MAPS)
def test_maps_have_channels_first_and_lie_as_the_image_does(case):
    """What changes in the upper right of the image changes the upper right quarter of the map most."""
    name, cut, shape = MAPS[case]
    network = backbone(name, cut, pools=True, maps=True)
    assert network.map_shape == shape
    grey = torch.full((1, 3, SIZE, SIZE), 128, dtype=torch.uint8)
    bright = grey.clone()
    bright[:, :, :16, -16:] = 255
    with torch.no_grad():
        before, after = (network.map(network(images)) for images in (grey, bright))
        change = (after - before).abs().sum(1)[0]
        assert change.shape == shape[1:]
        quarters = change.unflatten(0, (2, -1)).unflatten(2, (2, -1)).sum((1, 3))
        assert divmod(int(quarters.argmax()), 2) == (0, 1)
        if cut is not None:
            torch.testing.assert_close(network.pool(network(bright)), after.mean((2, 3)))
    assert network.features == (shape[0] if cut else network.net.num_features)


def test_a_vits_map_is_its_tokens_row_by_row_without_the_class_token():
    network = backbone("vit_tiny_patch16_224", "blocks.0", maps=True)
    with torch.no_grad():
        tokens = network(images())
    assert tokens.shape == (2, 17, 192)
    rows = network.map(tokens)
    for row in range(4):
        for column in range(4):
            assert torch.equal(rows[:, :, row, column], tokens[:, 1 + 4 * row + column])


def test_registers_are_left_out_though_with_them_the_tokens_would_fill_a_square():
    """2 x 2 patches, a class token and 4 registers: 9 tokens."""
    network = backbone("vit_small_patch16_dinov3", "blocks.0", size=32, maps=True)
    assert network.map_shape == (384, 2, 2)


# ---- what is frozen ------------------------------------------------------------------------------------------------


def test_a_frozen_backbone_stays_as_it_is_whatever_mode_is_asked_for():
    network = perturbed(backbone("dropping_resnet"))
    assert not torch.equal(network.train()(images()), network(images()))
    network.freeze()
    before = {name: x.clone() for name, x in network.state_dict().items()}
    with torch.no_grad():
        expected = network.eval()(images())
    outer = nn.Sequential(network).train()  # as a network's part, as in training
    assert outer.training
    assert not any(module.training for module in network.modules())
    output = network.train()(images())
    assert torch.equal(output, expected)
    assert torch.equal(network.pool(output), network.eval().pool(expected))  # which has a dropout of its own
    assert not output.requires_grad
    assert parameter_count(network, trainable_only=True) == 0
    assert all(torch.equal(x, before[name]) for name, x in network.state_dict().items())


def test_frozen_batch_norm_keeps_its_statistics_and_trains_its_scale():
    live, frozen = (perturbed(backbone("test_resnet")) for _ in range(2))
    frozen.freeze_batch_norm()
    before = statistics(frozen)
    assert before
    with torch.no_grad():
        expected = frozen.eval()(images())
    output = frozen.train()(images())
    assert torch.equal(output, expected)
    random_sum(output).backward()
    norms = [module for module in frozen.modules() if isinstance(module, BATCH_NORMS)]
    assert not any(norm.training for norm in norms)
    assert all(float(p.grad.abs().max()) > 0 for norm in norms for p in norm.parameters())
    assert all(torch.equal(x, before[name]) for name, x in statistics(frozen).items())
    others = [m for m in frozen.modules() if not isinstance(m, BATCH_NORMS)]
    assert all(module.training for module in others)
    live.train()(images())
    assert not any(torch.equal(x, before[name]) for name, x in statistics(live).items())


# ---- gradient checkpointing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cut", "module"),
    [
        ("test_resnet", None, "layer2.0"),
        ("test_convnext", None, "stages.1.blocks.0"),
        ("tf_efficientnet_lite0", None, "blocks.3.0"),
        ("tf_efficientnet_lite0", "blocks.2", "blocks.1.0"),
        ("test_vit_relpos", "blocks.1", "blocks.0"),
    ],
)
def test_checkpointed_gradients_are_the_gradients(name, cut, module):
    """After a step: the same loss and gradients, and BatchNorm's statistics have moved as far, though it ran twice."""
    gradients_of = {}
    for checkpointed in (False, True):
        network, calls = perturbed(backbone(name, cut)), []
        before = statistics(network)
        if checkpointed:
            network.checkpoint_gradients(SIZE)
            assert all(torch.equal(x, before[key]) for key, x in statistics(network).items())
            assert all(parameter.grad is None for parameter in network.parameters())
        network.net.get_submodule(module).register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        losses = []
        for step in range(2):
            loss = random_sum(network.train().pool(network(images(4, seed=step)))) / 10
            loss.backward()
            losses.append(loss.item())
        gradients = {key: parameter.grad for key, parameter in network.named_parameters()}
        gradients_of[checkpointed] = losses, gradients, statistics(network)
        assert len(calls) == 2 * (1 + checkpointed)
    for plain, recomputed in zip(gradients_of[False], gradients_of[True], strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-5)


def test_a_network_that_cannot_checkpoint_gradients_is_refused():
    with pytest.raises(BadInput, match=r"gradient_checkpointing.*SmallCnn"):
        backbone("cnn2").checkpoint_gradients(SIZE)
    with pytest.raises(BadInput, match=r"gradient_checkpointing.*layer2\.0\.conv1"):
        backbone("test_resnet", "layer2.0.conv1").checkpoint_gradients(SIZE)


# ---- weights -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """The weights of a network with a classifier, none of which is what a new network has."""
    torch.manual_seed(7)
    return {
        name: torch.randn_like(x.float()).to(x.dtype)
        for name, x in timm.create_model("test_resnet").state_dict().items()
    }


FILES = {
    "plain.pth": lambda tensors: tensors,
    "state_dict.pth": lambda tensors: {"epoch": 3, "state_dict": tensors},
    "model.pth": lambda tensors: {"model": tensors, "args": {"lr": 0.1}},
    "module.pth": lambda tensors: {f"module.{name}": x for name, x in tensors.items()},
    "wrapped.pt": lambda tensors: {"state_dict": {f"model.{name}": x for name, x in tensors.items()}},
}


def assert_has(network: Backbone, tensors: dict[str, torch.Tensor]) -> None:
    state = network.net.state_dict()
    assert state
    assert all(torch.equal(state[name], tensors[name]) for name in state)


@pytest.mark.parametrize("cut", [None, "layer2"])
@pytest.mark.parametrize("file", ["weights.safetensors", *FILES])
def test_weights_come_from_a_file(tensors, tmp_path, file, cut):
    path = tmp_path / file
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(FILES[file](tensors), path)
    network = backbone("test_resnet", cut, weights=path)
    assert_has(network, tensors)
    assert str(path) in network.weights_from
    assert "leaving out" in network.weights_from


def test_weights_come_from_a_run_folder(trained):
    ours = {name.removeprefix("backbone.net."): x for name, x in checkpoint_weights(trained, "best").items()}
    for cut in (None, "stages.1"):
        assert_has(backbone("test_convnext", cut, size=32, weights=trained), ours)


def test_weights_that_do_not_fit_are_refused_with_their_names(tensors, tmp_path):
    path = tmp_path / "odd.safetensors"
    odd = {name: x for name, x in tensors.items() if name != "layer1.0.conv1.weight"}
    odd |= {"layer2.0.bn1.weight": torch.zeros(5), "extra.weight": torch.zeros(5)}
    save_file(odd, path)
    message = refusal("test_resnet", weights=path)
    assert str(path) in message
    assert "1 tensors missing (layer1.0.conv1.weight)" in message
    assert "1 tensors of another shape (layer2.0.bn1.weight)" in message
    assert "unexpected" in message
    assert "extra.weight" in message
    save_file({f"stage.{name}": x for name, x in tensors.items()}, path)
    assert "missing (conv1." in refusal("test_resnet", weights=path)


class Intruder:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_a_pickle_with_code_is_refused_and_not_run(tensors, tmp_path):
    trace, evil, zipped = tmp_path / "trace", tmp_path / "evil.pth", tmp_path / "zipped.pth"
    evil.write_bytes(pickle.dumps({**tensors, "evil": Intruder(trace)}))
    torch.save({**tensors, "evil": Intruder(trace)}, zipped)
    for path in (evil, zipped):
        assert "cannot be read as plain tensors" in refusal("test_resnet", weights=path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Intruder(trace)))
    assert trace.exists()  # it would have run


def test_files_without_weights_are_refused(tensors, tmp_path):
    torch.save([1, 2, 3], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "progress.pth")
    torch.save({0: torch.zeros(1)}, tmp_path / "numbers.pth")
    (tmp_path / "damaged.safetensors").write_bytes(b"\x00" * 50)
    (tmp_path / "empty_run").mkdir()
    for name, words in (
        ("list.pth", "state dict"),
        ("progress.pth", "state dict"),
        ("numbers.pth", "state dict"),
        ("damaged.safetensors", "cannot be read"),
        ("nowhere.pth", "is not a file"),
        ("empty_run", "is a folder without weights"),
    ):
        message = refusal("test_resnet", weights=tmp_path / name)
        assert "backbone.weights" in message
        assert name in message
        assert words in message


def test_a_folder_within_a_run_is_refused_with_what_to_give_instead(tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step_5").mkdir(parents=True)
    for name in ("network", "optimizer"):
        save_file({"x": torch.zeros(1)}, checkpoints / "step_5" / f"{name}.safetensors")
    (checkpoints / "best").symlink_to("step_5")
    message = refusal("test_resnet", weights=checkpoints / "best")
    assert message.endswith(f"the file in it that holds the network: {checkpoints / 'best' / 'network.safetensors'}")
    assert f"give the run folder {tmp_path / 'run'}," in refusal("test_resnet", weights=checkpoints)


# ---- the small CNNs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "convolutions"), [(cnn2, [(3, 32), (32, 64)]), (cnn3, [(3, 32), (32, 64), (64, 128)])]
)
def test_the_small_cnns_are_as_large_as_documented(make, convolutions):
    count = sum(before * after * 5 * 5 + after for before, after in convolutions)
    assert parameter_count(make()) == count
    assert f"{round(count, -3):,} parameters" in make.__doc__
    network = backbone(make.__name__, pools=True, maps=True)
    assert network.features == convolutions[-1][1]
    assert network.map_shape == (convolutions[-1][1], *(2 * [SIZE // 4 ** len(convolutions)]))


@pytest.mark.parametrize("name", ["cnn2", "cnn3"])
def test_there_are_no_pretrained_small_cnns(name):
    message = refusal(name, weights="pretrained")
    assert "backbone.weights" in message
    assert name in message
