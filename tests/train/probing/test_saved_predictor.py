"""The predictor that a probe saves is the mean of its folds' fits."""

import numpy as np
from helpers import succeed_here
from launching import predictions

import spiketune
from data_prep.shards.folder import ShardFolder
from data_prep.shards.image_identity import first_copies
from train.data.seen import images_of_split, joined
from train.data.stimuli import RecordingStimuli
from train.probing.preparation import held_out_folds
from train.run.folder import open_probe

SIDE, COMPONENTS = 16, 20


def least_squares(features, rates, to_predict):
    """Ordinary least squares on principal components."""
    mean = features.mean(0)
    u, s, v = np.linalg.svd(features - mean, full_matrices=False)
    scores = (u * s)[:, :COMPONENTS]
    weights = np.linalg.lstsq(scores, rates - rates.mean(0), rcond=None)[0]
    return (to_predict - mean) @ v[:COMPONENTS].T @ weights + rates.mean(0)


def test_a_cross_validated_probe_predicts_the_mean_of_its_folds(recording, tmp_path):
    run = tmp_path / "run"
    options = ["--layers", "pixels", "--images.size", SIDE, "--readout", "ols", "--components", COMPONENTS]
    options += ["--split", "cv", "--cross-validation.folds", "3", "--products", "float64"]
    succeed_here("train/probe.py", "--data", recording, "--out", run, *options)
    shards = ShardFolder(recording)
    splits = {name: RecordingStimuli(shards.split(name), SIDE) for name in shards.manifest.splits}
    pixels = np.concatenate([stimuli.images(stimuli.subset).numpy() for stimuli in splits.values()])
    rates = np.concatenate([stimuli.rates for stimuli in splits.values()]).astype(np.float64)
    features = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1) / 255
    copies = first_copies(joined([images_of_split(shards, name) for name in splits]))
    folds = held_out_folds([{}] * len(rates), copies, open_probe(run))
    expected = []
    for fold in folds:
        fit = np.setdiff1d(np.arange(len(rates)), fold)
        expected.append(least_squares(features[fit], rates[fit], features[:10]))
    found = spiketune.load(run).predict(pixels[:10])
    np.testing.assert_allclose(found, np.mean(expected, axis=0), rtol=1e-4, atol=1e-4)
    assert np.abs(found - predictions(run, "cv")["prediction"][:10]).max() > 1e-3  # those are out of fold
