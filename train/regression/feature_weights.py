"""The weights of a layer's features in a regression, from the weights of the stimuli that it was fitted on.

A regression through a window g predicts sum_p g_p x_p' X_p' dual, with x_p the features at position p and X_p those of
the stimuli to fit (`train/regression/windowed_inner_products.py`). All windows of a layer together are therefore one
linear map of its features, whose weights at a position are X_p' sum_w g_wp dual_w.
"""

from dataclasses import dataclass

import numpy as np
import torch

from train.regression.feature_slices import StoredActivations
from train.regression.reused_memory import ReusedMemory


@dataclass(frozen=True)
class StimulusWeights:
    """Dual weights of the stimuli to fit, for some sites.

    Attributes:
        fit: int64 (n,), positions of the stimuli among all.
        dual: float64 (windows, n, sites).
        means: float64 (n, groups): multiplied with the features it gives their mean over the stimuli of a group of
            sites, those that were recorded for the same stimuli.
        group: int64 (sites,), the group of each site.
    """

    fit: torch.Tensor
    dual: torch.Tensor
    means: torch.Tensor
    group: torch.Tensor


@dataclass(frozen=True)
class FeatureWeights:
    """A linear map of a module's features: prediction = (features - centre) @ weight + offset; the same on every rank.

    Attributes:
        weight: float32 (features, sites).
        centre: float32 (features,).
        offset: float64 (sites,); the map is 0 at the mean features of a site's stimuli.
    """

    weight: np.ndarray
    centre: np.ndarray
    offset: np.ndarray


def feature_weights(
    activations: StoredActivations, module: str, windows: torch.Tensor, stimuli: StimulusWeights
) -> FeatureWeights:
    """The weights of a module's features; every rank must take part.

    Args:
        activations: of all stimuli.
        module: its name.
        windows: g, float64 (windows, positions of the module's map); one position stands for a whole map.
        stimuli: their weights.
    """
    runtime, positions = activations.runtime, windows.shape[1]
    mixed = _mixed(windows, stimuli.dual) if positions <= len(windows) else None
    fit = _in_one_stretch(stimuli.fit)
    centres: dict[int, torch.Tensor] = {}
    weights, centre, offset = [], [], torch.zeros_like(stimuli.dual[0, 0])
    blocks = activations.slices(module, positions, block_bytes=activations.memory_bytes / 4, centres=centres)
    memory = ReusedMemory(torch.float64, runtime.device)
    for number, features in enumerate(blocks):
        of_fit = memory.matrix(len(stimuli.fit), features.shape[1]).copy_(features[fit])
        if mixed is not None:
            by_position = of_fit.view(len(of_fit), -1, positions).permute(2, 1, 0)
            block = (by_position @ mixed).transpose(0, 1).flatten(0, 1)
        else:
            block = _window_by_window(of_fit, windows, stimuli.dual)
        offset -= ((of_fit.T @ stimuli.means)[:, stimuli.group] * block).sum(0)
        weights.append(runtime.gather_rows(block.float()))
        centre.append(runtime.gather_rows(list(centres.values())[number]))
    return FeatureWeights(np.concatenate(weights), np.concatenate(centre), runtime.sum(offset).cpu().numpy())


def _in_one_stretch(positions: torch.Tensor) -> slice | torch.Tensor:
    """Positions as a slice where each follows the one before, so that the rows there need not be copied."""
    return slice(int(positions[0]), int(positions[-1]) + 1) if (positions.diff() == 1).all() else positions


def _mixed(windows: torch.Tensor, dual: torch.Tensor) -> torch.Tensor:
    """The dual weights at each position, float64 (positions, n, sites)."""
    return (windows.T @ dual.flatten(1)).view(-1, *dual.shape[1:])


def _window_by_window(features: torch.Tensor, windows: torch.Tensor, dual: torch.Tensor) -> torch.Tensor:
    """The weights of features (n, features), where a map has more positions than there are windows."""
    channels = features.shape[1] // windows.shape[1]
    total = features.new_zeros(features.shape[1], dual.shape[2])
    for window, of_window in zip(windows, dual, strict=True):
        total += window.repeat(channels)[:, None] * (features.T @ of_window)
    return total
