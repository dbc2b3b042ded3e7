"""A site that no model can be fitted to has no score in any command, and packing names it."""

import json

import numpy as np
import pytest
from helpers import succeed_here
from launching import SMALL
from make_sources import make_folder

from data_prep.shards.folder import ShardFolder
from data_prep.shards.packing import pack
from data_prep.shards.summary import summary
from data_prep.sources.folder import Folder
from train.reporting.run_reading import read_run

SITES = 6
CONSTANT, MISSING, SILENT_IN_VAL = 1, 2, 3  # over train, over train, over val


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sites")
    written = make_folder(folder / "src", n=60, sites=SITES, splits=True, size=32)
    splits, rates = np.array(written.splits), written.rates
    rates[splits == "train", CONSTANT] = 0.1  # in float32: its mean is not exactly that
    rates[splits == "train", MISSING] = np.nan
    rates[splits == "val", SILENT_IN_VAL] = 2.5
    rates[np.flatnonzero(splits == "val")[0]] = np.nan
    np.save(folder / "src" / "rates.npy", rates)
    pack(Folder(source=folder / "src").open(), folder / "packed", stimuli_per_shard=100, workers=1)
    return folder


def test_packing_names_them(packed):
    text = summary(ShardFolder(packed / "packed"))
    assert "warning: 2 of 6 sites have no score, because their responses in train are constant or missing" in text
    assert "site_001, site_002" in text
    assert "val        12 stimuli with responses (1 without any, e.g. stim0003)" in text
    assert "train      36 stimuli with responses," in text


def check(regression: dict) -> None:
    for metric in ("r2", "explained_variance", "mse", "pearson_r"):
        per_site = regression[metric]["per_site"]
        known = {site for site, score in enumerate(per_site) if score is not None}
        fitted = {0, SILENT_IN_VAL, 4, 5} if metric == "mse" else {0, 4, 5}
        assert known == fitted, metric
        assert regression[metric]["mean"] == pytest.approx(np.mean([per_site[site] for site in sorted(known)]))
    low, high = regression["r2"]["ci95"]
    assert low <= regression["r2"]["mean"] <= high
    assert regression["sites_without_r2"] == ["site_001", "site_002", "site_003"]


@pytest.mark.usefixtures("figures")
def test_they_have_no_score_in_finetune_evaluate_probe_and_report(packed):
    run, probe = packed / "run", packed / "probe"
    words = ("--data", packed / "packed")
    succeed_here("train/finetune.py", *words, *SMALL, "--early-stopping.split", "val", "--out", run)
    succeed_here("train/evaluate.py", run, "--split", "val")
    succeed_here("train/probe.py", *words, "--layers", "pixels", "--split", "val", "--out", probe)

    evaluated = json.loads((run / "eval" / "val" / "metrics.json").read_text())["regression"]
    check(evaluated)
    probed = json.loads((probe / "eval" / "val" / "metrics.json").read_text())
    check(probed["regression"])
    assert np.isfinite(probed["layers"]["pixels"]["inner_r2"])
    assert probed["layers"]["pixels"]["inner_r2"] > -100  # a constant's R2 would be divided by rounding errors
    epochs = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    best = [epoch["val"]["r2"] for epoch in epochs if epoch["best"]][-1]
    assert evaluated["r2"]["mean"] == pytest.approx(best, rel=1e-4)
    for path, regression in ((run, evaluated), (probe, probed["regression"])):
        (reported,) = read_run(path, "val", path.name)
        predictions = reported.predictions
        assert predictions is not None
        assert predictions.resampled(100)["r2"].mean() == pytest.approx(regression["r2"]["mean"], abs=0.5)
        assert np.isnan(predictions.response[:, [CONSTANT, MISSING]]).all()
