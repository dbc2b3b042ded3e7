"""A probe's results do not depend on how large matrices are kept, in which groups, or on where it was interrupted."""

import numpy as np
import pytest
from helpers import run_here, succeed_here
from launching import metrics, predictions

from train.probing import layer_regressions, product_store
from train.probing.layer_regressions import LayerRegressions
from train.probing.product_store import ProductStore
from train.probing.stored_layers import StoredLayers
from train.regression import krylov

NETWORK = ["--backbone.name", "test_convnext", "--backbone.weights", "random", "--images.size", "32"]
PIXELS = ["--layers", "pixels", "--images.size", "16"]  # more features than stimuli
WINDOWS = [*NETWORK, "--layers", "stages.2", "--field", "gaussian", "--pool", "2"]


def probe(recording, out, *options):
    """Probe in this process; the scores and the predictions."""
    succeed_here("train/probe.py", "--data", recording, "--out", out, *options)
    return metrics(out), predictions(out)["prediction"]


def probe_split(recording, out, split, *options):
    """The same of another split."""
    succeed_here("train/probe.py", "--data", recording, "--out", out, *options)
    return metrics(out, split), predictions(out, split)["prediction"]


def of_layers(scores, name) -> np.ndarray:
    """A number of every layer."""
    return np.array([block[name] for block in scores["layers"].values()])


def assert_alike(found, expected, tolerance=1e-4):
    scores, predicted = found
    expected_scores, expected_predicted = expected
    scale = np.abs(expected_predicted).max()
    np.testing.assert_allclose(predicted / scale, expected_predicted / scale, atol=tolerance)
    for name in ("inner_r2", "rsa", "cka"):
        np.testing.assert_allclose(of_layers(scores, name), of_layers(expected_scores, name), atol=tolerance)


@pytest.mark.parametrize("readout", ["ridge", "ols", "pls"])
def test_products_that_ranks_share_give_the_results_of_one_owner(recording, tmp_path, monkeypatch, readout):
    options = [*PIXELS, "--readout", readout, *(["--latent", "4"] if readout == "pls" else ["--components", "6"])]
    expected = probe(recording, tmp_path / "owned", *options)
    for module in (product_store, krylov):
        monkeypatch.setattr(module, "LEAST_STIMULI", 50)
    found = probe(recording, tmp_path / "shared", *options, "--memory", "0.0005")
    assert_alike(found, expected)


@pytest.mark.parametrize("options", [["--layers", "stages.3"], ["--layers", "stages.1+stages.2"]], ids=str)
def test_a_layer_of_few_features_is_regressed_on_them(recording, tmp_path, monkeypatch, options):
    """Without a matrix of stimuli x stimuli, and with the results that it gives."""
    options = [*NETWORK, *options, "--pool", "1"]
    found = probe(recording, tmp_path / "features", *options)
    monkeypatch.setattr(product_store, "FEW_FEATURES", 0.0)
    expected = probe(recording, tmp_path / "products", *options, "--products", "float64")
    assert_alike(found, expected)
    methods = [next(iter(scores["layers"].values()))["components"]["method"] for scores, _ in (found, expected)]
    assert methods == ["features", "full"]


def test_windows_in_groups_give_the_results_of_all_at_once(recording, tmp_path, monkeypatch):
    """Also those of sites in blocks."""
    options = [*WINDOWS, "--sites-learn", "together", "--response", "curved"]
    expected = probe(recording, tmp_path / "at_once", *options)
    monkeypatch.setattr(ProductStore, "_most_matrices", lambda self, key, free: 30)
    monkeypatch.setattr(layer_regressions, "STACK_COPIES", 40_000)
    assert_alike(probe(recording, tmp_path / "groups", *options), expected, 1e-6)


@pytest.mark.parametrize("split", ["val", "cv"])
def test_curves_and_sites_together_reach_the_scores(recording, tmp_path, split):
    """In each fold too: what is scored, and what is said of the training stimuli, is after the curves."""
    options = [*NETWORK, "--layers", "stages.2", "--split", split]
    plain = probe_split(recording, tmp_path / "plain", split, *options)
    together = probe_split(recording, tmp_path / "together", split, *options, "--sites-learn", "together")
    curved = probe_split(
        recording, tmp_path / "curved", split, *options, "--sites-learn", "together", "--response", "curved"
    )
    changed = [np.abs(found[1] - plain[1]).max() / np.abs(plain[1]).max() for found in (together, curved)]
    assert min(changed) > 1e-3
    assert np.abs(together[1] - curved[1]).max() > 0
    inner = [of_layers(found[0], "inner_r2")[0] for found in (plain, together, curved)]
    assert len(set(inner)) == 3
    penalties = [np.log(found[0]["layers"]["stages.2"]["penalty"][0]).std() for found in (plain, together)]
    assert penalties[1] < penalties[0]


def test_windows_over_few_features_need_no_products(recording, tmp_path, monkeypatch):
    monkeypatch.setattr(product_store, "FEW_FEATURES", 0.0)
    expected = probe(recording, tmp_path / "products", *WINDOWS, "--products", "float64")
    monkeypatch.setattr(product_store, "FEW_FEATURES", 2.0)
    assert_alike(probe(recording, tmp_path / "features", *WINDOWS), expected)


@pytest.mark.parametrize("options", [[*NETWORK, "--layers", "all"], WINDOWS], ids=["layers", "windows"])
def test_a_probe_resumes_after_the_last_regression_that_was_done(recording, tmp_path, monkeypatch, options):
    expected = probe(recording, tmp_path / "whole", *options)
    regress, done = LayerRegressions._regress, []

    def until(count):
        def regress_or_fail(self, source):
            if len(done) == count:
                raise OSError("no power")
            done.append(source.layer_window)
            return regress(self, source)

        return regress_or_fail

    out = tmp_path / "cut"
    monkeypatch.setattr(LayerRegressions, "_regress", until(3))
    with pytest.raises((OSError, AssertionError)):
        succeed_here("train/probe.py", "--data", recording, "--out", out, *options)
    (out / "scratch" / "1_of_2").mkdir()  # of an earlier start, by two processes
    monkeypatch.setattr(LayerRegressions, "_regress", until(1000))
    succeed_here("train/probe.py", "--data", recording, "--out", out, "--resume")
    assert len(set(done)) == len(done)
    assert metrics(out) == expected[0]
    assert not (out / "scratch").exists()


def test_a_probe_that_was_killed_after_its_results_resumes(recording, tmp_path, monkeypatch):
    """A job that is restarted resumes by itself."""
    clear = StoredLayers.clear

    def killed(self):
        raise OSError("no power")

    monkeypatch.setattr(StoredLayers, "clear", killed)
    assert run_here("train/probe.py", "--data", recording, "--out", tmp_path / "run", *PIXELS).returncode != 0
    expected = metrics(tmp_path / "run")
    monkeypatch.setattr(StoredLayers, "clear", clear)
    succeed_here("train/probe.py", "--data", recording, "--out", tmp_path / "run", "--resume")
    assert metrics(tmp_path / "run") == expected
    assert not (tmp_path / "run" / "scratch").exists()


@pytest.mark.parametrize(
    ("writer", "named"),
    [
        ("train.regression.row_writer.os.pwrite", "the inner products"),
        ("train.probing.layer_results.np.save", "the results"),
    ],
)
def test_what_does_not_fit_on_the_disk_is_told_of(recording, tmp_path, monkeypatch, writer, named):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, full)
    done = run_here("train/probe.py", "--data", recording, "--out", tmp_path / "run", *PIXELS)
    assert done.returncode != 0
    assert f"has no room for {named} (No space left on device)" in done.stderr
    assert "Traceback" not in done.stderr
