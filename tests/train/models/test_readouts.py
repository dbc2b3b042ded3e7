"""Readouts compute their documented formula, start at the mean or the ridge, and have the documented size."""

import re
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from launching import largest_difference, losses, weights
from sklearn.linear_model import Ridge, RidgeCV

from data_prep.shards.folder import ShardFolder
from data_prep.shards.manifest import Manifest
from train.data.loader import evaluation_loader
from train.data.stimuli import RecordingStimuli
from train.distributed.runtime import start_runtime
from train.finetuning.setup.ridge_start import SHARPNESS, start_from_ridge
from train.models.network import Network, parameter_count
from train.models.readouts import build_readout
from train.regression.ridge import PENALTIES
from train.run.recipe import Readout, Recipe

KINDS = ("linear", "flattened", "low_rank", "factorised", "gaussian")
CHANNELS, ROWS, COLUMNS, SITES, RANK, FEATURES = 5, 3, 4, 7, 3, 6


def build(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_readout(Readout(kind=kind, rank=RANK), FEATURES, (CHANNELS, ROWS, COLUMNS), SITES)


# ---- what they compute ---------------------------------------------------------------------------------------------


def by_hand(kind: str, p: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """The documented formulas, one site and one stimulus at a time; x (stimuli, channels, rows, columns)."""
    out = np.zeros((len(x), SITES))
    for b, s in np.ndindex(*out.shape):
        if kind in ("linear", "flattened"):
            out[b, s] = p["sites.weight"][s] @ x[b].ravel()
        elif kind == "low_rank":
            out[b, s] = p["sites.weight"][s] @ (p["shared.weight"] @ x[b].ravel())
        else:
            mask = p["mask"][s].reshape(ROWS, COLUMNS) / (ROWS * COLUMNS) if kind == "factorised" else field(p, s)
            out[b, s] = sum(
                p["sites.weight"][s, c] * mask[i, j] * x[b, c, i, j] for c, i, j in np.ndindex(CHANNELS, ROWS, COLUMNS)
            )
        out[b, s] += p["sites.bias"][s]
    return out


def field(p: dict[str, np.ndarray], s: int) -> np.ndarray:
    """A Gaussian over the positions of a map whose sides go from -1 to 1, adding up to 1."""
    mask = np.zeros((ROWS, COLUMNS))
    for i, j in np.ndindex(ROWS, COLUMNS):
        x, y = -1 + (2 * j + 1) / COLUMNS, -1 + (2 * i + 1) / ROWS
        squared = (x - p["centre"][s, 0]) ** 2 + (y - p["centre"][s, 1]) ** 2
        mask[i, j] = np.exp(-squared / (2 * np.exp(p["log_width"][s]) ** 2))
    return mask / mask.sum()


@pytest.mark.parametrize("kind", KINDS)
def test_a_readout_computes_its_formula(kind):
    readout = build(kind)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in readout.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    shape = (4, FEATURES) if kind == "linear" else (4, CHANNELS, ROWS, COLUMNS)
    x = torch.randn(shape, generator=generator)
    values = {name: parameter.detach().double().numpy() for name, parameter in readout.named_parameters()}
    computed = readout(x).detach().numpy()
    assert computed.shape == (4, SITES)
    np.testing.assert_allclose(computed, by_hand(kind, values, x.double().numpy()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_readout_has_as_many_parameters_as_documented(kind):
    positions, width = ROWS * COLUMNS, CHANNELS * ROWS * COLUMNS
    assert (
        parameter_count(build(kind))
        == {
            "linear": SITES * (FEATURES + 1),
            "flattened": SITES * (width + 1),
            "low_rank": RANK * (width + SITES) + SITES,
            "factorised": SITES * (CHANNELS + positions + 1),
            "gaussian": SITES * (CHANNELS + 4),
        }[kind]
    )


@pytest.mark.parametrize("kind", ["factorised", "gaussian"])
def test_masks_begin_alike_and_symmetric(kind):
    masks = build(kind).masks().detach().reshape(SITES, ROWS, COLUMNS)
    torch.testing.assert_close(masks.sum((1, 2)), torch.ones(SITES))
    assert torch.equal(masks, masks[:1].expand_as(masks))
    torch.testing.assert_close(masks, masks.flip(1, 2))
    if kind == "factorised":
        torch.testing.assert_close(masks, torch.full_like(masks, 1 / (ROWS * COLUMNS)))


# ---- where they begin ----------------------------------------------------------------------------------------------


@dataclass
class Data:
    """Stimuli to fit, and all images by split."""

    manifest: Manifest
    train: RecordingStimuli
    images: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def data(holey) -> Data:
    shards, images = ShardFolder(holey), {}
    for name in ("train", "val"):
        stimuli = RecordingStimuli(shards.split(name), 32, classes=True)
        (batch,) = evaluation_loader(stimuli, size=len(stimuli), rank=0, ranks=1, workers=0, pin=False)
        images[name] = batch.images
    return Data(shards.manifest, RecordingStimuli(shards.split("train"), 32, classes=True), images)


def network(data: Data, kind: str, task: str = "regression", **readout) -> Network:
    settings = {
        "task": {"kind": task},
        "backbone": {"name": "test_convnext", "weights": "random", "cut": "stages.1"},
        "readout": {"kind": kind, **readout},
        "precision": "fp32",
    }
    return Network(Recipe.model_validate(settings), data.manifest, 32).eval()


def ridge_started(data: Data, kind: str, task: str = "regression", **readout) -> tuple[Network, dict[str, float]]:
    net = network(data, kind, task, **readout)
    with start_runtime(None, "fp32") as runtime:
        scores = start_from_ridge(net, data.train, runtime, batch_size=16, workers=0)
    return net, scores


@torch.no_grad()
def outputs(net: Network, images: torch.Tensor, name: str = "rates") -> np.ndarray:
    return net.eval()(images)[name].numpy()


@torch.no_grad()
def features(net: Network, images: torch.Tensor, pooling: np.ndarray | None = None) -> np.ndarray:
    """Of the backbone: the whole map flattened, or its sum over positions weighted by `pooling`."""
    maps = net.backbone.map(net.backbone(images)).double().numpy()
    return maps.reshape(len(maps), -1) if pooling is None else maps.reshape(*maps.shape[:2], -1) @ pooling.ravel()


def choice_of_penalty(x: np.ndarray, y: np.ndarray, shown: int = 1) -> float:
    """For stimuli of which each was `shown` so many times, which is as much as a penalty divided by it."""
    unit = np.square(x - x.mean(0)).sum() / len(x) / shown
    return RidgeCV(alphas=PENALTIES * unit, gcv_mode="eigen").fit(x, y).alpha_


def sklearn_ridge(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Predictions for new features, each output from the stimuli that have it, at its own penalty."""
    predicted = np.zeros((len(new), y.shape[1]))
    for column, values in enumerate(y.T):
        recorded = ~np.isnan(values)
        if recorded.any():
            alpha = choice_of_penalty(x[recorded], values[recorded])
            predicted[:, column] = Ridge(alpha=alpha, solver="svd").fit(x[recorded], values[recorded]).predict(new)
    return predicted


def z_scores(data: Data) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of the site without responses
        rates = data.train.rates.astype(np.float64)
        return (rates - np.nanmean(rates, axis=0)) / np.nanstd(rates, axis=0)


def gaussian_pooling(rows: int) -> np.ndarray:
    """Sigma 0.5 in half sides, in the middle."""
    places = -1 + (2 * np.arange(rows) + 1) / rows
    mask = np.exp(-(places[:, None] ** 2 + places**2) / (2 * 0.5**2))
    return mask / mask.sum()


POOLING = {
    "linear": np.full((4, 4), 1 / 16),
    "flattened": None,
    "low_rank": None,
    "factorised": np.full((4, 4), 1 / 16),
    "gaussian": gaussian_pooling(4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_readout_begins_at_each_sites_mean(data, kind):
    net = network(data, kind)
    assert np.array_equal(outputs(net, data.images["val"]), np.zeros((20, 6), np.float32))
    rates = net.objective.responses.to_rates(torch.zeros(1, 6))[0].numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        np.testing.assert_allclose(rates, np.nan_to_num(np.nanmean(data.train.rates, axis=0)), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_ridge_start_predicts_new_stimuli_as_scikit_learn_does(data, kind):
    """With responses missing; low_rank has room for all six sites."""
    net, scores = ridge_started(data, kind, **({"rank": 8} if kind == "low_rank" else {}))
    x, new = (features(net, data.images[name], POOLING[kind]) for name in ("train", "val"))
    expected = sklearn_ridge(x, z_scores(data), new)
    predicted = outputs(net, data.images["val"])
    np.testing.assert_allclose(predicted, expected, atol=5e-4)
    assert np.median(predicted.std(0)) > 0.1  # the fit is no constant
    assert np.abs(predicted[:, 4]).max() < 1e-6  # it was never recorded
    assert np.isfinite(scores["rates"])


def test_a_ridge_sees_features_as_in_evaluation_and_leaves_the_backbone_as_it_is(data):
    """BatchNorm would make them depend on who else is in the batch."""
    settings = {"backbone": {"name": "test_resnet", "weights": "random", "cut": "layer2"}, "precision": "bf16"}
    net = Network(Recipe.model_validate(settings), data.manifest, 32).train()
    before = {name: x.clone() for name, x in net.backbone.state_dict().items()}
    with start_runtime(None, "bf16") as runtime:
        start_from_ridge(net, data.train, runtime, batch_size=16, workers=0)
    assert net.training
    assert all(torch.equal(x, before[name]) for name, x in net.backbone.state_dict().items())
    net.eval()
    x, new = (features(net, data.images[name], np.full((4, 4), 1 / 16)) for name in ("train", "val"))
    np.testing.assert_allclose(outputs(net, data.images["val"]), sklearn_ridge(x, z_scores(data), new), atol=2e-3)


@pytest.mark.parametrize("shown", [1, 2])
def test_the_score_of_a_ridge_start_is_that_of_the_stimuli_left_out(data, shown):
    """Those that show the same image are left out together: one would tell the response to the other."""
    net, copies = network(data, "linear"), np.tile(np.arange(len(data.train)), shown)
    stimuli = RecordingStimuli(data.train.split, 32, copies)
    with start_runtime(None, "fp32") as runtime:
        copies_if_any = None if shown == 1 else copies
        scores = start_from_ridge(net, stimuli, runtime, batch_size=16, workers=0, copies=copies_if_any)
    x, y = features(net, data.images["train"], POOLING["linear"]), z_scores(data)
    r2 = []
    for values in y[:, [0, 1, 2, 3, 5]].T:
        recorded = np.flatnonzero(~np.isnan(values))
        alpha = choice_of_penalty(x[recorded], values[recorded], shown)
        left_out = [
            Ridge(alpha=alpha, solver="svd").fit(x[rest], values[rest]).predict(x[[one]])[0]
            for one in recorded
            for rest in [recorded[recorded != one]]
        ]
        error = np.square(values[recorded] - left_out).sum()
        r2.append(1 - error / np.square(values[recorded] - values[recorded].mean()).sum())
    assert scores["rates"] == pytest.approx(np.mean(r2), abs=2e-3)  # the penalty's unit is that of all stimuli


def test_at_a_lower_rank_the_start_is_the_best_approximation_of_the_ridge(data):
    """No affine map of the features of that rank comes closer to the ridge on the stimuli it was fitted on."""
    net, _ = ridge_started(data, "low_rank", rank=2)
    x = features(net, data.images["train"])
    full = sklearn_ridge(x, z_scores(data), x)
    mean = full.mean(0)
    u, s, v = np.linalg.svd(full - mean, full_matrices=False)
    best = mean + (u[:, :2] * s[:2]) @ v[:2]
    assert np.abs(best - full).max() > 0.05  # a rank of 2 is not enough
    np.testing.assert_allclose(outputs(net, data.images["train"]), best, atol=2e-3)


def test_classes_start_at_a_ridge_with_calibrated_logits(data):
    net, scores = ridge_started(data, "linear", "hybrid")
    x, new = (features(net, data.images[name], POOLING["linear"]) for name in ("train", "val"))
    labels = data.train.labels
    targets = np.eye(4)[labels]
    plain = sklearn_ridge(x, targets, new)
    logits = outputs(net, data.images["val"], "classes")
    sharpness = (logits * plain).sum() / (plain * plain).sum()
    np.testing.assert_allclose(logits, sharpness * plain, atol=2e-3 * sharpness)
    alphas = [choice_of_penalty(x, column) for column in targets.T]
    left_out = np.zeros((len(x), 4))
    for one in range(len(x)):
        rest = np.arange(len(x)) != one
        left_out[one] = Ridge(alpha=np.array(alphas), solver="svd").fit(x[rest], targets[rest]).predict(x[[one]])[0]
    assert scores["classes"] == pytest.approx((left_out.argmax(1) == labels).mean(), abs=1.5 / len(x))

    def left_out_cross_entropy(factor: float) -> float:
        return float(torch.nn.functional.cross_entropy(torch.from_numpy(factor * left_out), torch.from_numpy(labels)))

    best = min(SHARPNESS, key=left_out_cross_entropy)
    assert sharpness == pytest.approx(best, rel=0.15)  # one step of the grid
    assert left_out_cross_entropy(sharpness) < np.log(4) - 0.1


# ---- on several processes ------------------------------------------------------------------------------------------


def left_out_scores(run) -> list[float]:
    return [float(value) for value in re.findall(r"leave-one-out: (-?[\d.]+)", (run / "log.txt").read_text())]


@pytest.mark.parametrize("processes", [2, 3])
def test_a_ridge_start_does_not_depend_on_the_number_of_processes(hybrid_run_on, processes):
    """A hybrid with both readouts at the ridge, the one to the sites on the whole map."""
    one, more = hybrid_run_on(1), hybrid_run_on(processes)
    assert len(left_out_scores(one)) == 2
    assert left_out_scores(more) == pytest.approx(left_out_scores(one), abs=2e-4)
    assert losses(more) == pytest.approx(losses(one), rel=1e-4)
    assert largest_difference(weights(more), weights(one)) < 1e-3  # Adam divides small sums by their own size
