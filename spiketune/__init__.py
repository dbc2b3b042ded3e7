"""Spiketune in a program: load a run, a probe or an ensemble, and predict responses to images.

import spiketune

predictor = spiketune.load("runs/a")
rates = predictor.predict(["a.jpg", "b.png"])     # float32 (2, sites), in predictor.units
predictor.site_ids, predictor.scores("val")
"""

from data_prep.common.errors import BadInput
from spiketune.predictor import Predictor, load

__all__ = ["BadInput", "Predictor", "load"]
