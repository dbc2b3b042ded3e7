"""Starts the readouts at the ridge solution on the features of the backbone before training, in closed form.

Each rank computes the features of its share of the stimuli and gets all stimuli of a slice of the features
(`train/regression/sliced_ridge.py`). A site's penalty is chosen by exact leave-one-out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from train.data.loader import rank_positions
from train.data.stimuli import StimulusSet
from train.distributed.runtime import Runtime
from train.evaluation.metrics import mean_score
from train.models.network import Network
from train.models.readouts import MaskedReadout
from train.models.windows import Window, gaussian_windows
from train.regression.activations import activations_of_share
from train.regression.feature_slices import exchange_features
from train.regression.sliced_ridge import LinearMap, as_linear_map, fit_ridge, linear_outputs

SHARPNESS = np.logspace(-1, 2, 61)  # of the logits, from ridge predictions of the classes


@dataclass(frozen=True)
class WindowedRidge:
    """The ridges of a recording's sites, each through its own window.

    Attributes:
        score: mean over sites of the leave-one-out R2.
        windows: int64 (sites,), the number of each site's window.
        map: from the channels through each site's window.
    """

    score: float
    windows: np.ndarray
    map: LinearMap


def start_from_ridge(
    network: Network,
    stimuli: StimulusSet,
    runtime: Runtime,
    *,
    batch_size: int,
    workers: int,
    copies: np.ndarray | None = None,
    through_windows: bool = False,
) -> dict[str, float]:
    """Set the readouts to the ridge solution on the training stimuli.

    Responses: the targets are the ideal outputs (z-scored rates), and a readout that is not linear in all its
    parameters approximates the solution in its own way (`start_from`). Classes: the targets are 0 and 1; the logits
    are as sharp as minimises the cross-entropy of the leave-one-out predictions.

    The sites of each recording have a ridge of their own, on its stimuli; the classes have one on all stimuli.

    Args:
        network: on the runtime's device.
        stimuli: that are trained on.
        runtime: this process.
        batch_size: stimuli per forward pass.
        workers: decoding processes.
        copies: (stimuli,), equal for those that show the same image, which are left out together; None if all differ.
        through_windows: whether to choose a window for each site by leave-one-out; the readout has masks.

    Returns:
        By readout, the leave-one-out score of its ridge: R2, mean over sites (and then over recordings), of "rates";
        top1 of "classes".
    """
    windows = gaussian_windows() if through_windows else []

    def extract(images: torch.Tensor) -> dict[str, torch.Tensor]:
        features = network.read(images)
        if "rates" in features:
            features["rates"] = _site_features(network, features["rates"], windows)
        return features

    training = network.training
    network.eval()
    features_of_share = activations_of_share(
        extract, stimuli, runtime, batch_size=batch_size, workers=workers, label="features for the ridge"
    )
    rows = [len(rank_positions(len(stimuli), rank, runtime.ranks)) for rank in range(runtime.ranks)]
    scores = {}
    for name, all_features in features_of_share.items():
        features = exchange_features(all_features, runtime, rows)
        if name == "classes":
            scores[name] = _start_classes(network, features, stimuli, runtime, copies)
            continue
        recordings = list(_recordings(network, features, stimuli, runtime, copies))
        if through_windows:
            scores[name] = _start_sites_in_windows(network, recordings, all_features.shape[1], windows, runtime)
        else:
            scores[name] = _start_sites(network, features, recordings, runtime)
    network.train(training)
    return scores


def _site_features(network: Network, features: torch.Tensor, windows: Sequence[Window]) -> torch.Tensor:
    """The features in which the readout to the sites is linear, seen through one window after the other if given."""
    readout = network.site_readout
    if not windows:
        return readout.start_features(features)
    assert isinstance(readout, MaskedReadout)
    return readout.windowed_start_features(features, windows)


@dataclass(frozen=True)
class _RecordingFeatures:
    """What the ridges of a recording are fitted on.

    Attributes:
        features: of its stimuli, this rank's slice, float32 (stimuli, features).
        targets: the ideal outputs to its sites, float32 (stimuli, sites).
        copies: see `start_from_ridge`.
    """

    features: torch.Tensor
    targets: np.ndarray
    copies: np.ndarray | None


def _recordings(
    network: Network, features: torch.Tensor, stimuli: StimulusSet, runtime: Runtime, copies: np.ndarray | None
) -> Iterator[_RecordingFeatures]:
    """Each recording's part of the features of all stimuli."""
    rates, responses = stimuli.rates_of(np.arange(len(stimuli))), network.objective.responses
    assert rates is not None
    assert responses is not None
    targets, first = responses.target(rates.to(runtime.device)).cpu().numpy(), 0
    for recording in stimuli.recordings:
        own = slice(first, first + len(recording))
        own_copies = None if copies is None or len(np.unique(copies[own])) == len(recording) else copies[own]
        yield _RecordingFeatures(features[own], targets[own, recording.columns], own_copies)
        first = own.stop


def _start_sites(
    network: Network, features: torch.Tensor, recordings: Sequence[_RecordingFeatures], runtime: Runtime
) -> float:
    """Start the readout to the sites at a ridge per recording; returns the mean leave-one-out score."""
    maps, scores = [], []
    for recording in recordings:
        fit = fit_ridge(recording.features, recording.targets, runtime, recording.copies)
        maps.append(as_linear_map(recording.features, fit, runtime))
        scores.append(mean_score(fit.inner_r2))
    start = LinearMap.stacked(maps)
    network.site_readout.start_from(start.weight, start.bias, linear_outputs(features, start, runtime))
    return float(np.mean(scores))


def _start_sites_in_windows(
    network: Network,
    recordings: Sequence[_RecordingFeatures],
    width: int,
    windows: Sequence[Window],
    runtime: Runtime,
) -> float:
    """As `_start_sites`, each site through the window whose ridge best predicts its left-out responses.

    Args:
        network: its readout has masks.
        recordings: this rank's slice of their features, which are those through one window after the other.
        width: number of all features.
        windows: to choose from.
        runtime: this process.
    """
    ridges = [_best_windows(recording, width, len(windows), runtime) for recording in recordings]
    start, readout = LinearMap.stacked([ridge.map for ridge in ridges]), network.site_readout
    assert isinstance(readout, MaskedReadout)
    readout.set_windows([windows[number] for ridge in ridges for number in ridge.windows])
    readout.start_from(start.weight, start.bias, start.weight.new_zeros(0))
    return float(np.mean([ridge.score for ridge in ridges]))


def _best_windows(recording: _RecordingFeatures, width: int, windows: int, runtime: Runtime) -> WindowedRidge:
    """The ridges of a recording's sites, each through its best window; arguments as of `_start_sites_in_windows`."""
    channels, first, sites = width // windows, runtime.rank * width // runtime.ranks, recording.targets.shape[1]
    best_r2, best_window = np.full(sites, -np.inf), np.zeros(sites, int)
    weight = torch.zeros(sites, channels, device=runtime.device)
    bias = torch.zeros(sites, device=runtime.device)
    for window in range(windows):
        start, stop = (max(edge * channels - first, 0) for edge in (window, window + 1))
        windowed_features = recording.features[:, start:stop]
        fit = fit_ridge(windowed_features, recording.targets, runtime, recording.copies)
        better = np.nan_to_num(fit.inner_r2, nan=-np.inf) > best_r2
        best_r2[better], best_window[better] = fit.inner_r2[better], window
        linear_map = as_linear_map(windowed_features, fit, runtime)
        chosen = torch.from_numpy(better).to(runtime.device)
        weight[chosen], bias[chosen] = linear_map.weight[chosen], linear_map.bias[chosen]
    score = mean_score(np.where(np.isfinite(best_r2), best_r2, np.nan))
    return WindowedRidge(score, best_window, LinearMap(weight, bias))


def _start_classes(
    network: Network, features: torch.Tensor, stimuli: StimulusSet, runtime: Runtime, copies: np.ndarray | None
) -> float:
    """Start the readout to the classes at a ridge; returns the leave-one-out accuracy."""
    readout, labels = network.class_readout, stimuli.labels
    assert labels is not None
    fit = fit_ridge(features, np.eye(readout.out_features, dtype=np.float32)[labels], runtime, copies)
    sharpness = min(SHARPNESS, key=lambda factor: _mean_cross_entropy(factor * fit.left_out, labels))
    start = as_linear_map(features, fit, runtime)
    with torch.no_grad():
        readout.weight.copy_(start.weight * sharpness)
        readout.bias.copy_(start.bias * sharpness)
    return float((fit.left_out.argmax(1) == labels).mean())


def _mean_cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(F.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(labels)))
