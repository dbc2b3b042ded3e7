"""Curves of score against training stimuli join like runs, and only those."""

import csv
import math

import numpy as np
import pytest
from blank_figures import drawn_figures
from helpers import assert_refused, run_here, succeed_here
from make_runs import SITES, guess, make_probe, make_run, responses
from sklearn.metrics import r2_score

from data_prep.common.atomic_writes import write_json
from train.reporting.groups import groups_of
from train.reporting.run_reading import read_run
from train.run.recipe import ProbeRecipe, Recipe

TARGET = responses()
SIZES = (100, 200, 400)
KNOWN = {"reliability": np.linspace(0.5, 0.9, SITES)}


def probe(path, stimuli, noise, seed=0, told=True, **settings):
    """A probe that had so many training stimuli; `told` of by its subset too, as where that is less than all."""
    recipe = ProbeRecipe.model_validate({"seed": seed, "data": str(path)} | settings)
    recipe = recipe.model_copy(update={"subset": stimuli if told else None})
    prediction = {"stages.1": guess(TARGET, noise, 10 * stimuli + seed)}
    return make_probe(path, TARGET, prediction, "stages.1", recipe=recipe, training_stimuli=stimuli, **KNOWN)


def tuned(path, stimuli, noise, seed=0, more=None, **settings):
    """A fine-tuned run that had so many training stimuli; `more` is what else metrics.json says."""
    recipe = Recipe.model_validate({"seed": seed, "subset": stimuli} | settings)
    prediction = guess(TARGET, noise, 10 * stimuli + seed)
    return make_run(path, TARGET, prediction, recipe=recipe, training_stimuli=stimuli, **KNOWN, **(more or {}))


def joined(path, *members, stimuli=None, combine="mean"):
    """An ensemble of runs, as train/evaluate.py writes it."""
    training_facts = {} if stimuli is None else {"training_stimuli": stimuli}
    make_run(path, TARGET, guess(TARGET, 0.3, stimuli or 1), history=[], **training_facts)
    for name in ("recipe.yaml", "env.json", "history.jsonl"):
        (path / name).unlink()
    facts = {"combine": combine, "members": [{"runs": [str(run)]} for run in members], "data": "data/mine"}
    write_json(path / "ensemble.json", facts)
    return path


def curves(*runs, split="val"):
    (group,) = groups_of([reported for run in runs for reported in read_run(run, split, run.name)])
    return group.curves


def members(curve):
    return {point.stimuli: [scored.run.path.name for scored in point.runs] for point in curve.points}


def r2(run):
    with np.load(run / "eval/val/predictions.npz") as arrays:
        return r2_score(arrays["target"], arrays["prediction"])


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """Frozen and fine-tuned, two seeds of these, and their ensemble, on three sizes, and the report over them."""
    folder = tmp_path_factory.mktemp("curves")
    runs = []
    for number, size in enumerate(SIZES):
        noise = 0.8 - 0.1 * number
        frozen = probe(folder / f"runs_{size}" / "frozen", size, noise, told=size < 400)
        pair = [tuned(folder / f"runs_{size}" / f"tuned_{seed}", size, noise - 0.2, seed) for seed in (0, 1)]
        runs += [frozen, *pair, joined(folder / f"runs_{size}" / "both", frozen, *pair, stimuli=size)]
    with drawn_figures():
        done = succeed_here("train/report.py", *runs, "--out", folder / "out")
    return folder, done.stdout


def test_the_curves_have_the_scores_of_the_runs(reported):
    folder, output = reported
    text = (folder / "out" / "table.md").read_text().splitlines()
    assert "| training stimuli | 100 | 200 | 400 | per doubling |" in text
    for name, runs in (("frozen", ["frozen"]), ("tuned", ["tuned_0", "tuned_1"]), ("both", ["both"])):
        cells = next(line for line in text if line.startswith(f"| {name} | 0.")).split("|")[2:-1]
        scores = [[r2(folder / f"runs_{size}" / run) for run in runs] for size in SIZES]
        means = [np.mean(of_seeds) for of_seeds in scores]
        assert [float(cell.split()[0]) for cell in cells[:3]] == pytest.approx(means, abs=5e-4)
        for cell, of_seeds in zip(cells, scores, strict=False):
            if len(runs) > 1:
                assert f"({min(of_seeds):.3f} to {max(of_seeds):.3f})" in cell
            else:
                assert "[" in cell
        gain = (means[2] - means[0]) / 2  # the slope of three evenly spaced points
        assert float(cells[3]) == pytest.approx(gain, abs=6e-4)
        assert f"{gain:+.3f} ({name})" in output
    page = (folder / "out" / "report.html").read_text()
    assert "Score against training stimuli" in page
    assert "figures/data_efficiency.pdf, .svg, .png" in page
    assert len(list((folder / "out" / "figures").glob("data_efficiency.*"))) == 3


def test_the_csv_lists_the_points(reported):
    folder, _ = reported
    with (folder / "out" / "table.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 12
    for line in lines:
        size, name = line["run"].split("/")[-2:]
        assert line["training_stimuli"] == size.removeprefix("runs_")
        assert line["curve"] == name.partition("_")[0]


@pytest.mark.parametrize(
    "other",
    [
        {"layers": ["pixels"]},
        {"images": {"size": 112}},
        {"readout": "ols"},
        {"shuffle_responses": True},
        {"backbone": {"weights": "random"}},
    ],
)
def test_unlike_probes_are_not_joined(tmp_path, other):
    runs = [probe(tmp_path / "a_100", 100, 0.8), probe(tmp_path / "b_200", 200, 0.7, **other)]
    assert curves(*runs) == []
    runs.append(probe(tmp_path / "a_400", 400, 0.6))
    (curve,) = curves(*runs)
    assert members(curve) == {100: ["a_100"], 400: ["a_400"]}


def test_unlike_fine_tuned_runs_are_not_joined(tmp_path):
    first = tuned(tmp_path / "first", 100, 0.8)
    others = [
        tuned(tmp_path / "rate", 200, 0.7, optimizer={"lr": 1e-5}),
        tuned(tmp_path / "epochs", 200, 0.7, epochs=7),
        tuned(tmp_path / "control", 200, 0.7, task={"shuffle_responses": True}),
        tuned(tmp_path / "recordings", 200, 0.7, more={"trained_on": ["made_up", "another"]}),
        tuned(tmp_path / "taught", 200, 0.7, distill={"teacher": "runs/both"}),
        tuned(tmp_path / "taught_more", 400, 0.6, distill={"teacher": "runs/both"}),
        probe(tmp_path / "probe", 200, 0.7),
    ]
    assert curves(first, *others) == []


def test_paths_and_seeds_do_not_separate_curves(tmp_path):
    runs = [
        tuned(tmp_path / "a", 100, 0.8, data="here", early_stopping={"folds": 5, "fold": 1}),
        tuned(tmp_path / "b", 100, 0.8, 1, data="there", early_stopping={"folds": 5, "fold": 2}),
        tuned(tmp_path / "c", 200, 0.7, 2, loader={"workers": 3}, early_stopping={"folds": 5, "fold": 3}),
    ]
    (curve,) = curves(*runs)
    assert members(curve) == {100: ["a", "b"], 200: ["c"]}
    assert curve.points[0].mean == pytest.approx(np.mean([r2(run) for run in runs[:2]]))
    assert curve.points[0].spread == pytest.approx(sorted(r2(run) for run in runs[:2]))
    assert curve.points[0].ci95 is None
    assert curve.points[1].spread is None
    assert curve.gain is None  # two points fit any line


def test_the_gain_is_per_doubling(tmp_path):
    runs = [probe(tmp_path / f"frozen_{size}", size, 0.9 - size / 1000) for size in (64, 100, 128, 400)]
    (curve,) = curves(*runs)
    design = np.array([[math.log2(size), 1] for size in (64, 100, 128, 400)])
    slope = np.linalg.lstsq(design, np.array([r2(run) for run in runs]), rcond=None)[0][0]
    assert curve.gain == pytest.approx(slope)


def test_only_ensembles_of_like_members_are_joined(tmp_path):
    few, many, more = (tuned(tmp_path / f"tuned_{size}", size, 0.7) for size in SIZES)
    other = [probe(tmp_path / f"frozen_{size}", size, 0.8) for size in SIZES]
    pairs = [
        joined(tmp_path / "both_100", few, other[0], stimuli=100),
        joined(tmp_path / "both_200", many, other[1], stimuli=200),
    ]
    unlike = [
        joined(tmp_path / "stack", more, other[2], stimuli=400, combine="stack"),
        joined(tmp_path / "twice", more, more, other[2], stimuli=400),
        joined(tmp_path / "alone", more, stimuli=400),
        joined(tmp_path / "mixed", more, other[0]),  # of different sizes: metrics.json tells none
        joined(tmp_path / "gone", tmp_path / "nowhere", other[2], stimuli=400),
        joined(tmp_path / "gone_too", tmp_path / "nowhere", other[1], stimuli=200),
        joined(tmp_path / "itself", tmp_path / "itself", stimuli=400),
    ]
    (joined_curve,) = curves(*pairs, *unlike)
    assert members(joined_curve) == {100: ["both_100"], 200: ["both_200"]}
    again = [joined(tmp_path / f"again_{n}", pair, stimuli=n) for n, pair in zip(SIZES, pairs, strict=False)]
    assert [members(curve) for curve in curves(*again)] == [{100: ["again_100"], 200: ["again_200"]}]


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["frozen_100", "frozen_150", "wide_100", "wide_150"], ["frozen", "wide"]),
        (["n100_a/frozen", "n150_a/frozen", "n100/wide", "n150/wide"], ["frozen", "wide"]),
        (["100-resnet18", "150-resnet18", "100-wide", "150-wide"], ["resnet18", "wide"]),
        (["run1", "run2", "run3", "run4"], ["run, pool 3", "run, pool 5"]),
        (["1", "2", "3", "4"], ["resnet18, frozen, ridge, pool 3", "resnet18, frozen, ridge, pool 5"]),
    ],
)
def test_a_system_is_named_by_what_its_runs_have_in_common(tmp_path, folders, names):
    systems = [(pool, size) for pool in (3, 5) for size in (100, 150)]
    backbone = {"name": "resnet18"}
    runs = [
        probe(tmp_path / folder, size, 0.7, pool=pool, backbone=backbone)
        for folder, (pool, size) in zip(folders, systems, strict=True)
    ]
    assert [curve.name for curve in curves(*runs)] == names


def test_without_several_sizes_there_is_no_curve(tmp_path):
    runs = [probe(tmp_path / f"frozen_{seed}", 100, 0.7, seed) for seed in (0, 1)]
    untold = make_run(tmp_path / "earlier", TARGET, guess(TARGET, 0.4))
    assert curves(*runs, untold) == []
    done = succeed_here("train/report.py", *runs, untold, "--out", tmp_path / "out")
    assert not list((tmp_path / "out" / "figures").glob("data_efficiency*"))
    assert "per doubling" not in (tmp_path / "out" / "table.md").read_text()
    assert "doubling" not in done.stdout


def test_missing_sizes_are_left_blank(tmp_path):
    runs = [probe(tmp_path / f"frozen_{size}", size, 0.7) for size in (100, 400)]
    runs += [tuned(tmp_path / f"tuned_{size}", size, 0.5) for size in (100, 200)]
    succeed_here("train/report.py", *runs, "--out", tmp_path / "out")
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    blank = {}
    for name in ("frozen", "tuned"):
        line = next(line for line in lines if line.startswith(f"| {name} |"))
        blank[name] = [cell.strip() == "-" for cell in line.split("|")[2:-1]]
    assert blank == {"frozen": [False, True, False, True], "tuned": [False, False, True, True]}


def test_training_stimuli_must_be_a_number(tmp_path):
    run = probe(tmp_path / "run", 100, 0.7)
    path = run / "eval/val/metrics.json"
    path.write_text(path.read_text().replace('"training_stimuli": 100', '"training_stimuli": 0'))
    assert_refused(run_here("train/report.py", run, "--out", tmp_path / "out"), "metrics.json", "training_stimuli")


def test_scores_on_the_training_stimuli_make_no_curve(tmp_path):
    runs = [probe(tmp_path / f"frozen_{size}", size, 0.7) for size in SIZES]
    for run in runs:
        (run / "eval/val").rename(run / "eval/train")
        path = run / "eval/train/metrics.json"
        path.write_text(path.read_text().replace('"split": "val"', '"split": "train"'))
    assert curves(*runs, split="train") == []
