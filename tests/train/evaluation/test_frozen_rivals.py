"""An evaluation says when a frozen layer that was probed beside a run predicts the same stimuli better."""

import json
import shutil
from unittest.mock import Mock

import pytest
from helpers import succeed_here
from make_runs import guess, make_probe, make_run, responses

from train.evaluation.frozen_rivals import frozen_ahead
from train.run.recipe import ProbeRecipe, save_recipe


@pytest.fixture
def runs(tmp_path):
    """A run, and probes that are better and worse."""
    target = responses()
    make_run(tmp_path / "tuned", target, guess(target, 0.6))
    layers = {"x": guess(target, 0.3), "y": guess(target, 0.9)}
    make_probe(tmp_path / "better", target, layers, "x")
    make_probe(tmp_path / "worse", target, {"z": guess(target, 0.9)}, "z")
    pixels = ProbeRecipe(layers=["pixels"])
    make_probe(tmp_path / "pixels", target, {"pixels": guess(target, 0.1)}, "pixels", recipe=pixels)
    make_run(tmp_path / "another", target, guess(target, 0.1))
    return tmp_path


def content(run):
    return json.loads((run / "eval/val/metrics.json").read_text())


def change(run, **facts):
    (run / "eval/val/metrics.json").write_text(json.dumps(content(run) | facts))


def said(runs):
    return frozen_ahead(runs / "tuned", "val", "made_up", content(runs / "tuned"))


def test_the_best_probe_is_named(runs):
    expected = content(runs / "better")["regression"]["r2"]["mean"]
    assert said(runs).startswith(
        f"a frozen layer is ahead of this run: x of {runs / 'better'}, R2 {expected:.4f} against "
    )


@pytest.mark.parametrize(
    "facts",
    [
        {"fingerprint": "of other stimuli"},
        {"recording": "another"},
        {"control": "shuffled responses"},
        {"seen": {"fitted": 3, "taught": 0, "selected": 0, "dropped": 0}},
        {"regression": None},
    ],
)
def test_probes_that_say_nothing_of_these_stimuli_do_not_count(runs, facts):
    change(runs / "better", **facts)
    assert said(runs) == ""


def test_probes_of_fine_tuned_networks_are_not_frozen_layers(runs):
    recipe = ProbeRecipe.model_validate({"layers": ["x"], "backbone": {"weights": str(runs / "tuned")}})
    save_recipe(recipe, runs / "better" / "recipe.yaml")
    assert said(runs) == ""


def test_a_folder_that_may_not_be_listed_has_no_rivals(runs, monkeypatch):
    monkeypatch.setattr("pathlib.Path.iterdir", Mock(side_effect=PermissionError))
    assert said(runs) == ""


def test_damaged_neighbours_are_passed_over(runs):
    (runs / "better" / "eval/val/metrics.json").write_text("[1")
    (runs / "worse" / "recipe.yaml").write_text("a: [1")
    assert said(runs) == ""
    shutil.rmtree(runs / "another")
    assert said(runs) == ""


def test_an_evaluation_says_it(trained, recording, tmp_path):
    run, probe = tmp_path / "run", tmp_path / "frozen"
    shutil.copytree(trained, run, symlinks=True)
    assert "frozen layer" not in succeed_here("train/evaluate.py", run).stdout
    facts = content(run)
    make_run(probe, responses(), guess(responses(), 0.5), recipe=ProbeRecipe(layers=["stages.1"]))
    change(probe, recording=facts["recording"], fingerprint=facts["fingerprint"], chosen="stages.1")
    done = succeed_here("train/evaluate.py", run)
    assert f"note: a frozen layer is ahead of this run: stages.1 of {probe}, R2 " in done.stdout
