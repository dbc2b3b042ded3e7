"""Optimizers and learning rates: torch's own schedules, weight decay on the right parameters, saved state."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.shards.manifest import Manifest
from train.distributed.engine import Engine, clear_if
from train.distributed.loss_scale import LossScale
from train.finetuning.optimizer import build_optimizer, set_momentum
from train.finetuning.schedule import momentum, plateaus, rate_factor
from train.models.network import Network, parameter_groups
from train.run.checkpoint import load_tensors, save_checkpoint
from train.run.progress import Progress
from train.run.recipe import Recipe, Schedule

settings.register_profile("unhurried", deadline=None)  # the machine may be busy
settings.load_profile("unhurried")

OPTIMIZERS = ("nadam", "adam", "adamw", "radam", "lion", "sgd")
CPU = torch.device("cpu")


def optimizer_of(name: str, *peaks: float, **options) -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.ones(3))], "weight_decay": 0.0, "peak_lr": peak} for peak in peaks]
    return build_optimizer(Recipe.model_validate({"optimizer": {"name": name, **options}}).optimizer, groups, CPU)


# ---- rates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nadam", "sgd", "lion"])
@pytest.mark.parametrize(("warmup", "total"), [(0.3, 100), (0.3, 7), (0.5, 33), (0.05, 96), (0.9, 20)])
def test_onecycle_is_torchs_with_its_momentum_in_every_step(name, warmup, total):
    recipe = Schedule(kind="onecycle", warmup=warmup, cycle_momentum=True)
    ours, theirs = (optimizer_of(name, 1e-3, 3e-4) for _ in range(2))
    engine = SimpleNamespace(optimizer=ours)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        theirs, max_lr=[1e-3, 3e-4], total_steps=total, pct_start=warmup, cycle_momentum=True
    )
    for step in range(total):
        Engine.set_learning_rate(engine, rate_factor(recipe, step, total))
        set_momentum(ours, momentum(recipe, step, total))
        for mine, torchs in zip(ours.param_groups, theirs.param_groups, strict=True):
            assert mine["lr"] == pytest.approx(torchs["lr"], rel=1e-9)
            key = "momentum" if name == "sgd" else "betas"
            assert mine[key] == pytest.approx(torchs[key], rel=1e-9)
        theirs.step()
        if step < total - 1:
            reference.step()


def test_without_being_asked_the_momentum_is_left_alone():
    assert all(momentum(Schedule(kind="onecycle"), step, 10) is None for step in range(10))


@given(st.floats(0, 0.9), st.integers(1, 300))
def test_onecycle_ends_low_whatever_its_length(warmup, total):
    factors = [rate_factor(Schedule(kind="onecycle", warmup=warmup), step, total) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
    if total * (1 - warmup) > 1:
        assert factors[-1] == pytest.approx(1 / 25e4)


@given(st.sampled_from(["cosine", "constant", "plateau"]), st.floats(0, 0.9), st.integers(1, 300))
def test_other_schedules_rise_in_a_line_and_then_follow_their_form(kind, warmup, total):
    recipe = Schedule(kind=kind, warmup=warmup, plateau_factor=0.5)
    rising = round(warmup * total)
    for step in range(total):
        factor = rate_factor(recipe, step, total, drops=0)
        if step < rising:
            expected = (step + 1) / rising
        elif kind == "cosine":
            expected = (1 + math.cos(math.pi * (step - rising) / (total - rising))) / 2
        else:
            expected = 1.0
        assert factor == pytest.approx(expected)
        assert factor > 0
        if kind == "plateau":
            assert rate_factor(recipe, step, total, drops=3) == pytest.approx(expected / 8)
        else:
            assert rate_factor(recipe, step, total, drops=3) == factor


@given(st.lists(st.integers(0, 8), max_size=40), st.integers(1, 5))
def test_plateaus_are_torchs(scores, patience):
    """torch waits for one bad epoch more than its patience."""
    optimizer = optimizer_of("sgd", 1.0)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="max", factor=0.5, patience=patience - 1, threshold=0, eps=0
    )
    recipe, improved, best = Schedule(kind="plateau", plateau_patience=patience, plateau_factor=0.5), [], -1
    optimizer.param_groups[0]["lr"] = 1.0
    for score in scores:
        improved.append(score > best)
        best = max(best, score)
        reference.step(score)
        rate = rate_factor(recipe, 50, 100, plateaus(recipe, improved))
        assert rate == pytest.approx(max(optimizer.param_groups[0]["lr"], 1e-30), rel=1e-6)


# ---- parameter groups ----------------------------------------------------------------------------------------------

MANIFEST = Manifest.model_validate(
    {
        "name": "made",
        "simulated": True,
        "provenance": {},
        "splits": {},
        "sites": [{"id": str(k)} for k in range(3)],
        "classes": ["a", "b"],
        "image": {"width": 32, "height": 32, "mode": "RGB"},
        "rates": {"units": "Hz", "mean": [1.0, 2.0, 3.0], "std": [1.0, 1.0, 1.0]},
        "response_window_ms": None,
    }
)


def network_and_recipe(**settings) -> tuple[Network, Recipe]:
    settings = {"precision": "fp32", **settings}
    settings["backbone"] = {"name": "test_resnet", "weights": "random", **settings.get("backbone", {})}
    recipe = Recipe.model_validate(settings)
    return Network(recipe, MANIFEST, 32), recipe


@pytest.mark.parametrize("readout", ["linear", "low_rank", "factorised", "gaussian"])
def test_each_trained_parameter_has_its_decay_and_rate(readout):
    network, recipe = network_and_recipe(
        task={"kind": "hybrid", "weighting": "uncertainty"},
        readout={"kind": readout},
        optimizer={"lr": 0.01, "backbone_lr_factor": 0.1, "weight_decay": 0.3},
    )
    groups = parameter_groups(network, recipe)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    group_of = {names[id(parameter)]: group for group in groups for parameter in group["params"]}
    assert len(group_of) == sum(len(group["params"]) for group in groups) == len(names)
    for name, group in group_of.items():
        in_backbone, parameter = name.startswith("backbone."), network.get_parameter(name)
        assert group["part"] == ("backbone" if in_backbone else "readout")
        assert group["peak_lr"] == pytest.approx(0.001 if in_backbone else 0.01)
        matrix = parameter.ndim > 1 and "centre" not in name
        assert group["weight_decay"] == (0.3 if matrix else 0.0), name
    spared = [name for name, group in group_of.items() if not group["weight_decay"]]
    assert "backbone.net.bn1.weight" in spared
    assert "objective.log_variance" in spared
    assert ("heads.rates.centre" in spared) == (readout == "gaussian")
    assert "backbone.net.conv1.weight" not in spared


def test_frozen_parameters_are_in_no_group():
    network, recipe = network_and_recipe(backbone={"trainable": "head"})
    parameters = [parameter for group in parameter_groups(network, recipe) for parameter in group["params"]]
    assert {id(parameter) for parameter in parameters} == {id(p) for p in network.heads.parameters()}


# ---- steps ---------------------------------------------------------------------------------------------------------


def engine_of(name: str, *, clip_norm: float | None = None, scales_loss: bool = False, **options) -> Engine:
    network, recipe = network_and_recipe(optimizer={"name": name, "lr": 1e-2, "weight_decay": 0.1, **options})
    optimizer = build_optimizer(recipe.optimizer, parameter_groups(network, recipe), CPU)
    runtime = SimpleNamespace(ranks=1, device=CPU)
    return Engine(
        runtime, network, network, optimizer, accumulation_steps=1, clip_norm=clip_norm, scales_loss=scales_loss
    )


def step(engine: Engine, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in engine.network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    engine.set_learning_rate(0.5)
    engine.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizers_state_survives_a_checkpoint(name, tmp_path):
    """The step after a checkpoint is identical in another network and optimizer that loaded it."""
    engine, other = engine_of(name), engine_of(name)
    before = {key: x.clone() for key, x in engine.network.named_parameters()}
    for seed in range(2):
        step(engine, seed)
    assert not any(torch.equal(x, before[key]) for key, x in engine.network.named_parameters())
    progress = Progress(
        recording="", selection_metric="r2", selection_split="inner", site_ids=[], classes=None, image_size=32
    )
    tensors = {"network": engine.network.state_dict(), "optimizer": engine.optimizer_tensors()}
    assert {key.partition("|")[0] for key in tensors["optimizer"]} == before.keys()
    save_checkpoint(tmp_path / "checkpoints", tensors, progress, keep=1)
    last = tmp_path / "checkpoints" / "last"
    other.network.load_state_dict(load_tensors(last, "network"))
    other.load_optimizer(load_tensors(last, "optimizer"))
    for each in (engine, other):
        step(each, 2)
    for key, x in engine.network.named_parameters():
        assert torch.equal(other.network.get_parameter(key), x), key
    fresh = engine_of(name)
    fresh.network.load_state_dict(load_tensors(last, "network"))
    step(fresh, 2)
    assert not torch.equal(fresh.network.heads["rates"].sites.weight, engine.network.heads["rates"].sites.weight)


def test_a_scaled_loss_takes_the_same_steps_and_finds_its_scale_again(tmp_path):
    """As for float16: an infinite gradient skips the step and halves the scale, which checkpoints store."""
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    plain, scaled, resumed = (
        engine_of("adamw"),
        engine_of("adamw", scales_loss=True),
        engine_of("adamw", scales_loss=True),
    )
    for engine in (plain, scaled):
        engine.set_learning_rate(1.0)
        for clip_norm in (None, 0.1):
            engine._clip_norm = clip_norm
            engine.backward(engine.forward(images)["rates"].square().sum() + 1)
            engine.step()
    for key, x in plain.network.named_parameters():
        torch.testing.assert_close(scaled.network.get_parameter(key), x)
    before = scaled._loss_scale.tensors()["scale"]
    scaled.backward(scaled.forward(images)["rates"].sum() * torch.inf)
    assert scaled.step().left_out
    assert scaled._loss_scale.tensors()["scale"] == before / 2
    torch.testing.assert_close(scaled.network.heads["rates"].sites.bias, plain.network.heads["rates"].sites.bias)
    resumed.load_optimizer(scaled.optimizer_tensors())
    assert resumed._loss_scale.tensors() == scaled._loss_scale.tensors()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_shrinks_matrices_and_spares_the_rest(name):
    """With gradients of 0, only weight decay changes parameters."""
    engine = engine_of(name)
    with torch.no_grad():
        for parameter in engine.network.heads.parameters():
            parameter.fill_(1.0)
    for parameter in engine.network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    engine.set_learning_rate(1.0)
    engine.step()
    head = engine.network.heads["rates"].sites
    assert (head.weight < 1).all()
    assert torch.equal(head.bias, torch.ones_like(head.bias))
    if name not in ("sgd", "adam"):  # decoupled: the rate times the decay, whatever the gradient
        torch.testing.assert_close(head.weight, torch.full_like(head.weight, 1 - 0.01 * 0.1))


def test_the_gradient_is_clipped_to_its_norm_as_a_whole():
    norms, moved = [], []
    for clip_norm in (None, 0.5):
        engine = engine_of("sgd", clip_norm=clip_norm, momentum=0.0, weight_decay=0.0)
        before = [parameter.detach().clone() for parameter in engine.network.parameters()]
        step(engine, 0)
        after = [parameter.detach() for parameter in engine.network.parameters()]
        moved.append([(b - a) / 0.005 for a, b in zip(after, before, strict=True)])
        norms.append(math.sqrt(sum(float(x.double().square().sum()) for x in moved[-1])))
    assert norms[0] > 100
    assert norms[1] == pytest.approx(0.5, rel=1e-3)
    for plain, clipped in zip(*moved, strict=True):
        np.testing.assert_allclose(clipped, plain * (0.5 / norms[0]), atol=2e-5)


# ---- what a GPU does instead of reading a flag ---------------------------------------------------------------------


def test_the_loss_scale_adapts_as_gradscaler_does():
    """2,000 good steps double it, an overflow halves it, also at a scale other than the first."""
    ours, theirs = LossScale(CPU), torch.amp.GradScaler("cpu")
    loss = theirs.scale(torch.ones(()))
    assert torch.equal(ours.of(torch.ones(())), loss)
    for overflowed in [*[0.0] * 1999, 1.0, *[0.0] * 2001, 1.0, 1.0]:
        found = torch.tensor(overflowed)
        ours.update(found)
        theirs._per_optimizer_states[0]["found_inf_per_device"] = {CPU: found}
        theirs.update()
        assert torch.equal(ours.of(torch.ones(())), theirs.scale(torch.ones(())))
    assert torch.equal(ours.inverse, 1 / theirs.scale(torch.ones(())))


def test_gradients_are_cleared_with_what_is_not_finite_in_them():
    gradients = [
        torch.tensor([1.5, torch.nan, -torch.inf]),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    ]
    before = [gradient.clone() for gradient in gradients]
    clear_if(torch.tensor(False), gradients)
    for gradient, kept in zip(gradients, before, strict=True):
        assert torch.equal(gradient.nan_to_num(7), kept.nan_to_num(7))
    clear_if(torch.tensor(True), gradients)
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)
