"""Head first: readouts that begin at the ridge solution on the features of the backbone as it is, in closed form.

Each rank computes the features of its own stimuli and gets all stimuli of a slice of them
(`train/regression/feature_slices.py`); weights are computed slice by slice. A site's penalty is chosen by exact
leave-one-out.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from train.data.loader import rank_positions
from train.data.stimuli import StimulusSet
from train.distributed.runtime import Runtime
from train.evaluation.metrics import mean_score
from train.models.network import Network
from train.models.windows import Window, gaussian_windows
from train.regression.activations import activations_of_share
from train.regression.feature_slices import exchange_features
from train.regression.gram import FeatureMatrix, centred_gram
from train.regression.precision import COLUMNS_PER_PRODUCT, ROUNDING, symmetric_product
from train.regression.ridge import RidgeFit, ridge

SHARPNESS = np.logspace(-1, 2, 61)  # of the logits, from ridge predictions of the classes


def start_from_ridge(
    network: Network,
    stimuli: StimulusSet,
    runtime: Runtime,
    *,
    batch_size: int,
    workers: int,
    through_windows: bool = False,
) -> dict[str, float]:
    """Set the readouts to the ridge solution on the stimuli to fit.

    Responses: the target is what the outputs should be (z-scored rates), and a readout that is not linear in all its
    parameters takes the solution in its own way (`start_from`). Classes: the targets are 0 and 1; the predictions of
    the stimuli left out one at a time tell how sharp the logits must be to minimise the cross-entropy.

    The sites of each recording have a ridge of their own, on its stimuli; the classes have one on all stimuli.

    Args:
        network: on the runtime's device.
        stimuli: to fit.
        runtime: this process.
        batch_size: stimuli per forward pass.
        workers: decoding processes.
        through_windows: whether to choose a window for each site by leave-one-out; the readout has masks.

    Returns:
        By readout, the leave-one-out score of its ridge: R2, mean over sites (and then over recordings), of "rates";
        top1 of "classes".
    """
    training = network.training
    network.eval()
    heads, tried = network.heads, gaussian_windows()

    def look(images: torch.Tensor) -> dict[str, torch.Tensor]:
        read = network.read(images)
        return {name: seen(x) if name == "rates" else x for name, x in read.items()}

    def seen(x: torch.Tensor) -> torch.Tensor:
        return heads["rates"].windowed_start_features(x, tried) if through_windows else heads["rates"].start_features(x)

    found = activations_of_share(
        look, stimuli, runtime, batch_size=batch_size, workers=workers, label="features for the ridge"
    )
    rows = [len(rank_positions(len(stimuli), rank, runtime.ranks)) for rank in range(runtime.ranks)]
    scores = {}
    for name, own in found.items():
        features = exchange_features(own, runtime, rows)
        if name == "rates" and through_windows:
            scores[name] = _start_fields(network, features, own.shape[1], tried, stimuli, runtime)
        elif name == "rates":
            scores[name] = _start_rates(network, features, stimuli, runtime)
        else:
            scores[name] = _start_classes(heads["classes"], features, stimuli, runtime)
    network.train(training)
    return scores


def _solve(features: torch.Tensor, targets: np.ndarray, runtime: Runtime) -> RidgeFit:
    """The ridge on every rank, from its slice of the features; it predicts nothing but what it leaves out."""
    width = int(runtime.sum(torch.tensor(features.shape[1], device=features.device)))
    found = None
    if width < len(features):
        whole = runtime.gather_rows(features.T.contiguous()).T
        if runtime.is_main:
            found = ridge(FeatureMatrix.centred(whole, whole[:0]), targets)
    elif (products := _inner_products(features, runtime)) is not None:
        everyone = np.arange(len(features))
        gram = centred_gram(products.cpu().numpy(), everyone, everyone[:0], ROUNDING["float32"])
        found = ridge(gram, targets)
    return runtime.gather_objects(found)[0]


def _inner_products(features: torch.Tensor, runtime: Runtime) -> torch.Tensor | None:
    """Float64 (n, n), on the leading rank."""
    total = torch.zeros(len(features), len(features), dtype=torch.float64, device=features.device)
    for start in range(0, features.shape[1], COLUMNS_PER_PRODUCT):
        chunk = features[:, start : start + COLUMNS_PER_PRODUCT]
        total += symmetric_product(chunk - chunk.mean(0, dtype=torch.float64).float(), "float32")
    return runtime.reduce_to(total, 0)


def _primal(features: torch.Tensor, found: RidgeFit, runtime: Runtime) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (outputs, features) and bias (outputs,), float32, from the weights of the stimuli.

    An output that lacks responses to some stimuli has a dual of 0 there, and its features are centred on the others.
    One that has none predicts 0.
    """
    device = features.device
    dual = torch.from_numpy(found.dual).to(device)
    used = (dual != 0).double()
    used /= used.sum(0).clamp(min=1)
    weights, shift = [], torch.zeros(dual.shape[1], dtype=torch.float64, device=device)
    for start in range(0, features.shape[1], COLUMNS_PER_PRODUCT):
        chunk = features[:, start : start + COLUMNS_PER_PRODUCT].double()
        weights.append((chunk - chunk.mean(0)).T @ dual)
        shift += ((used.T @ chunk) * weights[-1].T).sum(1)
    own = torch.cat(weights).float() if weights else torch.zeros(0, dual.shape[1], device=device)
    weight = torch.from_numpy(runtime.gather_rows(own)).to(device).T
    bias = torch.from_numpy(np.nan_to_num(found.mean)).to(device) - runtime.sum(shift)
    return weight, bias.float()


def _of_each(
    network: Network, features: torch.Tensor, stimuli: StimulusSet, runtime: Runtime
) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
    """Of each recording, the features of its stimuli, and what the outputs to its sites should be."""
    rates = stimuli.rates_of(np.arange(len(stimuli))).to(runtime.device)
    targets = network.objective.responses.target(rates).cpu().numpy()
    sizes = [len(part) for part in stimuli.recordings]
    own_targets = np.split(targets, np.cumsum(sizes)[:-1])
    for part, own, wanted in zip(stimuli.recordings, features.split(sizes), own_targets, strict=True):
        yield own, wanted[:, part.columns]


def _start_rates(network: Network, features: torch.Tensor, stimuli: StimulusSet, runtime: Runtime) -> float:
    ridges, scores = [], []
    for own, target in _of_each(network, features, stimuli, runtime):
        found = _solve(own, target, runtime)
        ridges.append(_primal(own, found, runtime))
        scores.append(mean_score(found.inner_r2))
    weight, bias = map(torch.cat, zip(*ridges, strict=True))
    network.heads["rates"].start_from(weight, bias, _outputs(features, weight, bias, runtime))
    return float(np.mean(scores))


def _outputs(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, runtime: Runtime) -> torch.Tensor:
    """What weights (outputs, features) and bias make of all stimuli, float32 (stimuli, outputs)."""
    first = runtime.rank * weight.shape[1] // runtime.ranks
    own = weight[:, first : first + features.shape[1]].double()
    total = torch.zeros(len(features), len(weight), dtype=torch.float64, device=features.device)
    for start in range(0, features.shape[1], COLUMNS_PER_PRODUCT):
        total += (
            features[:, start : start + COLUMNS_PER_PRODUCT].double() @ own[:, start : start + COLUMNS_PER_PRODUCT].T
        )
    return (runtime.sum(total) + bias).float()


def _start_fields(
    network: Network, features: torch.Tensor, width: int, tried: list[Window], stimuli: StimulusSet, runtime: Runtime
) -> float:
    """As `_start_rates`, with the window of each site whose ridge predicts its left-out responses best.

    Args:
        features: this rank's slice of the `width` features, which are those through one window after the other.
    """
    found = [
        _best_windows(own, width, len(tried), target, runtime)
        for own, target in _of_each(network, features, stimuli, runtime)
    ]
    scores, places, weights, biases = zip(*found, strict=True)
    head, weight = network.heads["rates"], torch.cat(weights)
    head.set_windows([tried[index] for index in np.concatenate(places)])
    head.start_from(weight, torch.cat(biases), weight.new_zeros(0))
    return float(np.mean(scores))


def _best_windows(
    features: torch.Tensor, width: int, windows: int, target: np.ndarray, runtime: Runtime
) -> tuple[float, np.ndarray, torch.Tensor, torch.Tensor]:
    """Of the sites of a recording: their mean leave-one-out score, windows, weights (sites, channels) and biases."""
    channels, first, sites = width // windows, runtime.rank * width // runtime.ranks, target.shape[1]
    best, place = np.full(sites, -np.inf), np.zeros(sites, int)
    weight = torch.zeros(sites, channels, device=runtime.device)
    bias = torch.zeros(sites, device=runtime.device)
    for index in range(windows):
        start, stop = (max(edge * channels - first, 0) for edge in (index, index + 1))
        through = features[:, start:stop]
        found = _solve(through, target, runtime)
        better = np.nan_to_num(found.inner_r2, nan=-np.inf) > best
        best[better], place[better] = found.inner_r2[better], index
        own_weight, own_bias = _primal(through, found, runtime)
        chosen = torch.from_numpy(better).to(runtime.device)
        weight[chosen], bias[chosen] = own_weight[chosen], own_bias[chosen]
    return mean_score(np.where(np.isfinite(best), best, np.nan)), place, weight, bias


def _start_classes(head: torch.nn.Linear, features: torch.Tensor, stimuli: StimulusSet, runtime: Runtime) -> float:
    labels = stimuli.labels
    found = _solve(features, np.eye(head.out_features, dtype=np.float32)[labels], runtime)
    sharpness = min(SHARPNESS, key=lambda factor: _mean_cross_entropy(factor * found.left_out, labels))
    weight, bias = _primal(features, found, runtime)
    with torch.no_grad():
        head.weight.copy_(weight * sharpness)
        head.bias.copy_(bias * sharpness)
    return float((found.left_out.argmax(1) == labels).mean())


def _mean_cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(F.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(labels)))
