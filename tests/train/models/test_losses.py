"""Losses have the textbook values and gradients, add up over micro-batches and ranks, and map outputs to rates."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from data_prep.shards.folder import ShardFolder
from data_prep.shards.manifest import Manifest
from train.data.batches import Batch
from train.data.loader import TrainLoader
from train.data.stimuli import RecordingStimuli
from train.evaluation.moments import SiteMoments
from train.models.losses import Correlation, Objective, PoissonLikelihood, SiteLines, SquaredError, cross_entropy
from train.models.network import Network
from train.run.recipe import Recipe

STIMULI, SITES, CLASSES = 23, 5, 4
LOSSES = (SquaredError, PoissonLikelihood, Correlation)


def single_rank(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over the ranks of a run on one process."""
    return tensor


@pytest.fixture(scope="module")
def rates() -> torch.Tensor:
    """Responses like firing rates, a quarter of them not recorded, the last site's constant."""
    generator = torch.Generator().manual_seed(0)
    rates = torch.rand(STIMULI, SITES, generator=generator) * torch.arange(1, SITES + 1) * 8
    rates[torch.rand(STIMULI, SITES, generator=generator) < 0.25] = float("nan")
    rates[:, -1] = 3.0
    return rates


@pytest.fixture(scope="module")
def manifest(rates) -> Manifest:
    """The manifest of a train split whose means differ from the batch."""
    mean, std = np.nanmean(rates.double(), axis=0) + 1.5, np.nanstd(rates.double(), axis=0) + 0.7
    return Manifest.model_validate(
        {
            "name": "made",
            "simulated": True,
            "provenance": {},
            "splits": {},
            "sites": [{"id": str(k)} for k in range(SITES)],
            "classes": [str(k) for k in range(CLASSES)],
            "image": {"width": 8, "height": 8, "mode": "RGB"},
            "rates": {"units": "Hz", "mean": mean.tolist(), "std": std.tolist()},
            "response_window_ms": None,
        }
    )


@pytest.fixture(scope="module")
def outputs() -> torch.Tensor:
    return torch.randn(STIMULI, SITES, generator=torch.Generator().manual_seed(1))


def batch_of(rates, labels=None, weight=None, stimuli=None, observed=None) -> Batch:
    return Batch(
        images=torch.zeros(len(rates), 3, 8, 8, dtype=torch.uint8),
        positions=torch.arange(len(rates)),
        weight=torch.ones(len(rates)) if weight is None else weight,
        rates=rates,
        labels=labels,
        draws=None,
        global_stimuli=len(rates) if stimuli is None else stimuli,
        global_observed=int((~torch.isnan(rates)).sum()) if observed is None else observed,
    )


def value_and_gradient(part, outputs: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Value and gradient of a function of the outputs."""
    leaf = outputs.clone().requires_grad_()
    value = part(leaf)
    value.backward()
    return value.item(), leaf.grad


def micro_batches_of(batch: Batch) -> list[Batch]:
    """A batch in three uneven micro-batches, one with padding."""
    parts = []
    for start, end, padding in ((0, 9, 0), (9, 10, 3), (10, STIMULI, 0)):
        rows = torch.tensor([*range(start, end), *[0] * padding])
        weight = torch.tensor([1.0] * (end - start) + [0.0] * padding)
        labels = None if batch.labels is None else batch.labels[rows]
        parts.append(replace(batch, rates=batch.rates[rows], labels=labels, weight=weight, positions=rows))
    return parts


# ---- values and gradients --------------------------------------------------------------------------------------------


def squared_error_by_hand(outputs, rates, manifest) -> torch.Tensor:
    mean, std = torch.tensor(manifest.rates.mean), torch.tensor(manifest.rates.std)
    recorded = ~torch.isnan(rates)
    return F.mse_loss(outputs[recorded], ((rates - mean) / std)[recorded].float())


def poisson_by_hand(outputs, rates, manifest) -> torch.Tensor:
    """Lambda is m (1 + z) above 0 and m exp(z) below."""
    mean = torch.tensor(manifest.rates.mean)
    recorded = ~torch.isnan(rates)
    expected = mean * torch.where(outputs > 0, 1 + outputs, torch.exp(outputs))
    return F.poisson_nll_loss(expected[recorded], rates[recorded].double(), log_input=False, eps=0)


def correlation_by_hand(outputs, rates, _manifest) -> torch.Tensor:
    """Sites with a variance; the least variance of the predictions is added to theirs."""
    losses = []
    for site in range(SITES - 1):
        recorded = ~torch.isnan(rates[:, site])
        y, p = rates[recorded, site].double(), outputs[recorded, site].double()
        y, p = y - y.mean(), p - p.mean()
        losses.append(1 - (y * p).mean() / (y.square().mean() * (p.square().mean() + 1e-4)).sqrt())
    return torch.stack(losses).mean()


BY_HAND = {
    SquaredError: squared_error_by_hand,
    PoissonLikelihood: poisson_by_hand,
    Correlation: correlation_by_hand,
}


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_is_the_textbooks_in_value_and_gradient(kind, rates, manifest, outputs):
    value = value_and_gradient(lambda z: kind(manifest).contribution(z, batch_of(rates), single_rank), outputs)
    expected = value_and_gradient(lambda z: BY_HAND[kind](z, rates, manifest), outputs)
    assert value[0] == pytest.approx(expected[0], rel=1e-5)
    assert expected[1].abs().max() > 1e-3
    torch.testing.assert_close(value[1], expected[1], rtol=1e-4, atol=1e-7)


def test_the_correlation_is_scipys(rates, manifest, outputs):
    """To the least variance that keeps its gradient finite; the constant site contributes nothing."""
    expected = []
    for site in range(SITES - 1):
        recorded = ~np.isnan(rates[:, site].numpy())
        expected.append(1 - stats.pearsonr(rates[recorded, site].numpy(), outputs[recorded, site].numpy()).statistic)
    value = Correlation(manifest).contribution(outputs, batch_of(rates), single_rank)
    assert float(value) == pytest.approx(np.mean(expected), rel=2e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_the_textbooks(smoothing):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(STIMULI, CLASSES, generator=generator) * 3
    labels = torch.randint(0, CLASSES, (STIMULI,), generator=generator)
    batch = batch_of(torch.zeros(STIMULI, 1), labels)

    def by_hand(z: torch.Tensor) -> torch.Tensor:
        log_p = z - torch.log(torch.exp(z).sum(1, keepdim=True))
        of_label = log_p[torch.arange(STIMULI), labels]
        return -((1 - smoothing) * of_label + smoothing * log_p.mean(1)).mean()

    value = value_and_gradient(lambda z: cross_entropy(z, batch, smoothing), logits)
    expected = value_and_gradient(by_hand, logits)
    assert value[0] == pytest.approx(expected[0], rel=1e-6)
    torch.testing.assert_close(value[1], expected[1])


def hybrid(manifest: Manifest, **task) -> Objective:
    return Objective(Recipe.model_validate({"task": {"kind": "hybrid", **task}}), manifest)


def hybrid_outputs(outputs: torch.Tensor) -> dict[str, torch.Tensor]:
    classes = torch.randn(STIMULI, CLASSES, generator=torch.Generator().manual_seed(3))
    return {"rates": outputs.clone().requires_grad_(), "classes": classes.requires_grad_()}


def test_a_hybrids_loss_is_the_weighted_sum(rates, manifest, outputs):
    batch = batch_of(rates, torch.arange(STIMULI) % CLASSES)
    predicted = hybrid_outputs(outputs)
    parts = hybrid(manifest, regression_weight=0.3, classification_weight=2.0).losses(predicted, batch, single_rank)
    mse, entropy = squared_error_by_hand(outputs, rates, manifest), F.cross_entropy(predicted["classes"], batch.labels)
    torch.testing.assert_close(parts["mse"], mse)
    torch.testing.assert_close(parts["cross_entropy"], entropy)
    torch.testing.assert_close(parts["loss"], 0.3 * mse + 2 * entropy)


def test_uncertainty_weighting_is_that_of_kendall_et_al(rates, manifest, outputs):
    """L = L_r exp(-s_r) / 2 + L_c exp(-s_c) + (s_r + s_c) / 2, and its derivatives by the log variances s."""
    objective, batch = hybrid(manifest, weighting="uncertainty"), batch_of(rates, torch.arange(STIMULI) % CLASSES)
    s = torch.tensor([0.4, -0.7])
    with torch.no_grad():
        objective.log_variance.copy_(s)
    predicted = hybrid_outputs(outputs)
    parts = objective.losses(predicted, batch, single_rank)
    parts["loss"].backward()
    mse = squared_error_by_hand(outputs, rates, manifest).item()
    entropy = F.cross_entropy(predicted["classes"], batch.labels).item()
    expected = mse * np.exp(-0.4) / 2 + entropy * np.exp(0.7) + (0.4 - 0.7) / 2
    assert parts["loss"].item() == pytest.approx(expected, rel=1e-5)
    slopes = [-mse * np.exp(-0.4) / 2 + 0.5, -entropy * np.exp(0.7) + 0.5]
    assert objective.log_variance.grad.tolist() == pytest.approx(slopes, rel=1e-5)
    plain = value_and_gradient(lambda z: squared_error_by_hand(z, rates, manifest), outputs)[1]
    torch.testing.assert_close(predicted["rates"].grad, plain * np.exp(-0.4) / 2)
    weights = objective.learned_weights()
    assert weights["weight/responses"] == pytest.approx(np.exp(-0.4) / 2)
    assert weights["weight/classes"] == pytest.approx(np.exp(0.7))


# ---- missing responses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOSSES)
def test_stimuli_without_responses_do_not_count(kind, rates, manifest, outputs):
    """As if their rows were absent; no NaN gets through."""
    rows = torch.arange(0, STIMULI, 2)
    holes = rates.clone()
    holes[1::2] = float("nan")
    loss = kind(manifest)
    value, gradient = value_and_gradient(lambda z: loss.contribution(z, batch_of(holes), single_rank), outputs)
    expected, plain = value_and_gradient(
        lambda z: loss.contribution(z, batch_of(rates[rows]), single_rank), outputs[rows]
    )
    assert value == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(gradient[rows], plain)
    assert not gradient[1::2].any()


@pytest.mark.parametrize("kind", LOSSES)
def test_a_site_without_responses_in_the_batch_contributes_nothing(kind, rates, manifest, outputs):
    holes = rates.clone()
    holes[:, 2] = float("nan")
    loss = kind(manifest)
    value, gradient = value_and_gradient(lambda z: loss.contribution(z, batch_of(holes), single_rank), outputs)
    assert np.isfinite(value)
    assert torch.isfinite(gradient).all()
    assert not gradient[:, 2].any()
    assert gradient[:, 0].any()
    other = outputs.clone()
    other[:, 2] = 7.0
    assert loss.contribution(other, batch_of(holes), single_rank).item() == value


@pytest.mark.parametrize("kind", LOSSES)
def test_a_batch_without_any_response_has_a_loss_of_nothing(kind, rates, manifest, outputs):
    nothing = torch.full_like(rates, float("nan"))
    value, gradient = value_and_gradient(
        lambda z: kind(manifest).contribution(z, batch_of(nothing), single_rank), outputs
    )
    assert value == 0
    assert not gradient.any()


def test_one_response_to_a_site_gives_no_correlation(rates, manifest, outputs):
    loss, lonely = Correlation(manifest), rates.clone()
    lonely[1:, 0] = float("nan")
    lonely[0, 0] = 5.0
    value, gradient = value_and_gradient(lambda z: loss.contribution(z, batch_of(lonely), single_rank), outputs)
    assert not gradient[:, 0].any()
    without = torch.where(torch.arange(SITES) > 0, lonely, torch.nan)
    assert value == pytest.approx(loss.contribution(outputs, batch_of(without), single_rank).item())


def test_the_correlation_has_a_gradient_where_all_outputs_are_alike(rates, manifest):
    """As at the start of training."""
    _, gradient = value_and_gradient(
        lambda z: Correlation(manifest).contribution(z, batch_of(rates), single_rank), torch.zeros(STIMULI, SITES)
    )
    assert torch.isfinite(gradient).all()
    assert gradient[:, :-1].any(0).all()


# ---- contributions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["fixed", "uncertainty"])
@pytest.mark.parametrize("responses", ["mse", "poisson"])
def test_the_contributions_of_micro_batches_add_up(responses, weighting, rates, manifest, outputs):
    """To the losses and gradients of the whole batch, padding or not."""
    settings = {"task": {"kind": "hybrid", "weighting": weighting}, "loss": {"responses": responses}}
    objective = Objective(Recipe.model_validate(settings), manifest)
    whole = batch_of(rates, torch.arange(STIMULI) % CLASSES)
    predicted = hybrid_outputs(outputs)
    expected = objective.losses(predicted, whole, single_rank)
    expected["loss"].backward()
    gradients = {name: x.grad.clone() for name, x in predicted.items()}
    learned = [p.grad.clone() for p in objective.parameters()]
    objective.zero_grad()
    again, total = hybrid_outputs(outputs), dict.fromkeys(expected, 0.0)
    for micro_batch in micro_batches_of(whole):
        parts = objective.losses(
            {name: x[micro_batch.positions] for name, x in again.items()}, micro_batch, single_rank
        )
        parts["loss"].backward()
        total = {name: total[name] + parts[name].item() for name in total}
    assert total == pytest.approx({name: x.item() for name, x in expected.items()}, rel=1e-5)
    for name, x in again.items():
        torch.testing.assert_close(x.grad, gradients[name])
    for parameter, gradient in zip(objective.parameters(), learned, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_the_correlation_of_several_ranks_is_that_of_the_whole_batch(rates, manifest, outputs):
    """Each rank gets the sums of all and differentiates by its own; contributions add up to value and gradient."""
    loss, whole = Correlation(manifest), batch_of(rates)
    value, gradient = value_and_gradient(lambda z: loss.contribution(z, whole, single_rank), outputs)
    shares, sums = micro_batches_of(whole), []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        sums.append(tensor)
        return tensor

    for share in shares:
        loss.contribution(outputs[share.positions], share, note)
    sums_of_all_ranks = torch.stack(sums).sum(0)
    leaf, total = outputs.clone().requires_grad_(), 0.0
    for share in shares:
        part = loss.contribution(leaf[share.positions], share, lambda _: sums_of_all_ranks)
        part.backward()
        total += part.item()
    assert total == pytest.approx(value, rel=1e-5)
    torch.testing.assert_close(leaf.grad, gradient, rtol=1e-4, atol=1e-7)


# ---- hybrids ---------------------------------------------------------------------------------------------------------


def network_of(recording, **task) -> Network:
    settings = {
        "task": task,
        "backbone": {"name": "test_convnext", "weights": "random"},
        "precision": "fp32",
        "seed": 3,
    }
    return Network(Recipe.model_validate(settings), ShardFolder(recording).manifest, 32)


@pytest.mark.parametrize(
    ("kind", "weights", "head"), [("regression", (1, 0), "rates"), ("classification", (0, 1), "classes")]
)
def test_a_hybrid_is_the_single_task_when_the_other_weight_is_zero(recording, kind, weights, head):
    """The same initial weights from the same seed, the same outputs and loss, the same gradient of the backbone."""
    single = network_of(recording, kind=kind)
    both = network_of(recording, kind="hybrid", regression_weight=weights[0], classification_weight=weights[1])
    initial = both.state_dict()
    assert single.state_dict().keys() < initial.keys()
    assert all(torch.equal(x, initial[name]) for name, x in single.state_dict().items())
    if head == "rates":  # a readout at 0 would send no gradient on
        weight = torch.randn(single.heads["rates"].sites.weight.shape, generator=torch.Generator().manual_seed(0))
        for network in (single, both):
            network.heads["rates"].sites.weight.data.copy_(weight)
    stimuli = RecordingStimuli(ShardFolder(recording).split("train"), 32, np.arange(16), responses=True, classes=True)
    options = {"seed": 0, "global_size": 16, "per_device": None, "workers": 0, "pin": False}
    (batch,) = next(TrainLoader(stimuli, rank=0, ranks=1, **options).epoch(0))
    losses, outputs = [], []
    for network in (single, both):
        outputs.append(network(batch.images))
        losses.append(network.objective.losses(outputs[-1], batch, single_rank)["loss"])
        losses[-1].backward()
    torch.testing.assert_close(outputs[1][head], outputs[0][head], rtol=0, atol=0)
    torch.testing.assert_close(losses[1], losses[0])
    gradients = dict(both.named_parameters())
    for name, parameter in single.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, msg=name)
    assert float(single.backbone.net.stem[0].weight.grad.abs().max()) > 1e-6
    other = next(name for name in both.heads if name != head)
    assert not any(parameter.grad.any() for parameter in both.heads[other].parameters())


def test_another_seed_gives_other_initial_weights(recording):
    settings = {"backbone": {"name": "test_convnext", "weights": "random"}, "task": {"kind": "classification"}}
    manifest = ShardFolder(recording).manifest
    one, again, other = (
        Network(Recipe.model_validate({**settings, "seed": seed}), manifest, 32).state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(one[name], again[name]) for name in one)
    for part in ("backbone.net.stem.0.weight", "heads.classes.weight"):
        assert not torch.equal(one[part], other[part])


# ---- outputs to rates ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOSSES)
def test_an_output_of_0_is_the_mean_rate(kind, manifest):
    rates = kind(manifest).to_rates(torch.zeros(1, SITES))
    np.testing.assert_allclose(rates[0], manifest.rates.mean, rtol=1e-6)


def test_z_scores_are_converted_back_to_the_recordings_units(rates, manifest):
    loss = SquaredError(manifest)
    torch.testing.assert_close(loss.to_rates(loss.target(rates)), rates, equal_nan=True)
    mean, std = np.array(manifest.rates.mean), np.array(manifest.rates.std)
    np.testing.assert_allclose(loss.target(rates), (rates.numpy() - mean) / std, rtol=1e-5, atol=1e-6)


def test_a_poisson_rate_is_positive_and_continuous(manifest):
    """Its slope at the mean is the same from both sides."""
    loss = PoissonLikelihood(manifest)
    z = torch.linspace(-6, 6, 1201)[:, None].expand(-1, SITES)
    rates = loss.to_rates(z)
    assert (rates > 0).all()
    steps = rates.diff(dim=0) / torch.tensor(manifest.rates.mean)
    assert (steps > 0).all()
    assert steps.max() < 0.0101  # one step of z, above 0
    above, below = (loss.to_rates(torch.full((1, SITES), z))[0] for z in (1e-2, -1e-2))
    np.testing.assert_allclose((above - below) / 2e-2, manifest.rates.mean, rtol=1e-2)


def test_a_poisson_target_gives_back_rates_above_the_mean_and_less_below(rates, manifest):
    loss, mean = PoissonLikelihood(manifest), torch.tensor(manifest.rates.mean)
    rates_again = loss.to_rates(loss.target(rates))
    above, below = rates > mean, rates < mean
    assert above.any()
    assert below.any()
    torch.testing.assert_close(rates_again[above], rates[above])
    assert (rates_again[below] >= rates[below]).all()
    assert (rates_again[below] < mean.expand_as(rates)[below]).all()


def test_a_poisson_loss_is_least_at_the_rate_itself(manifest):
    """Above and below the mean, and near 0 for a silent stimulus."""
    loss = PoissonLikelihood(manifest)
    z = torch.linspace(-8, 4, 2401)[:, None].expand(-1, SITES)
    for rate in (0.3, 1.0, 2.5):
        rates = torch.tensor(manifest.rates.mean, dtype=torch.float32)[None] * rate
        values = torch.stack([loss.contribution(row[None], batch_of(rates), single_rank) for row in z])
        assert loss.to_rates(z[values.argmin()][None])[0].numpy() == pytest.approx(rates[0].numpy(), rel=0.02)


def test_a_site_silent_over_train_is_harmless(rates, manifest):
    quiet = manifest.model_copy(deep=True)
    quiet.rates.mean[0], quiet.rates.std[0] = 0.0, 0.0
    silent = rates.clone()
    silent[:, 0] = 0.0
    for kind in LOSSES:
        value, gradient = value_and_gradient(
            lambda z, kind=kind: kind(quiet).contribution(z, batch_of(silent), single_rank), torch.zeros(STIMULI, SITES)
        )
        assert np.isfinite(value)
        assert torch.isfinite(gradient).all()


def test_calibration_makes_the_line_from_predictions_to_responses_the_identity(rates, manifest, outputs):
    loss = Correlation(manifest)
    loss.calibrate(lines_of(loss, outputs, rates))  # of some earlier epoch
    loss.reset()
    predicted = outputs * 5 - 3
    predicted[:, 1] = 2.0  # constant: the best line is the mean
    loss.calibrate(lines_of(loss, predicted, rates))
    calibrated = loss.to_rates(predicted).numpy()
    for site in range(SITES):
        recorded = ~np.isnan(rates[:, site].numpy())
        y, p = rates[recorded, site].numpy(), calibrated[recorded, site]
        if site in (1, SITES - 1):  # there is no line through a constant
            np.testing.assert_allclose(p, y.mean(), rtol=1e-5)
        else:
            assert np.polyfit(p, y, 1) == pytest.approx((1, 0), abs=2e-3)


def lines_of(loss: Correlation, outputs: torch.Tensor, rates: torch.Tensor) -> SiteLines:
    return SiteMoments.of(loss.to_rates(outputs), rates).least_squares_lines()


def test_the_lines_are_saved_with_the_network(rates, manifest, outputs):
    loss = Correlation(manifest)
    loss.calibrate(lines_of(loss, outputs, rates))
    other = Correlation(manifest)
    other.load_state_dict(copy.deepcopy(loss.state_dict()))
    assert torch.equal(other.to_rates(outputs), loss.to_rates(outputs))
    assert not torch.equal(Correlation(manifest).to_rates(outputs), loss.to_rates(outputs))
