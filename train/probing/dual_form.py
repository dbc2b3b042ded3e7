"""A probe's predictor in terms of the stimuli that it was fitted on, from which the weights of the features follow.

Every regression here is linear in the features, and its weights are X' dual, with X the centred features of the stimuli
to fit (`train/regression/fit.py`). A site may read several windows or layers, each with a weight of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from train.probing.layer_window import LayerWindow
from train.regression.rows import Rows


@dataclass(frozen=True)
class DualTerm:
    """What a layer contributes through a window.

    Attributes:
        layer_window: which.
        dual: float64 (sites, n), weights of the n stimuli to fit; 0 where a site has no response.
        site_weights: float64 (sites,), that the contribution is multiplied with.
    """

    layer_window: LayerWindow
    dual: Rows
    site_weights: np.ndarray

    def weighted(self, sites: slice) -> np.ndarray:
        """`dual` times `site_weights` of some sites, float64 (n, sites)."""
        return np.ascontiguousarray((self.dual[sites] * self.site_weights[sites, None]).T)


@dataclass(frozen=True)
class DualForm:
    """Prediction = intercept + the sum of all terms, which a curve may bend.

    Attributes:
        intercept: float64 (sites,), the prediction at the mean features of a site's stimuli; NaN for a site that could
            not be fitted.
        terms: of layers and windows.
        curve: float64 (5, sites), see `train/models/saved_probe.py`; None where predictions stay as they are.
    """

    intercept: np.ndarray
    terms: Sequence[DualTerm]
    curve: np.ndarray | None = None

    @property
    def layer_windows(self) -> list[LayerWindow]:
        """Of the terms."""
        return [term.layer_window for term in self.terms]
