"""The study's table and figure with our numbers: published ones stand only beside what they can be compared with."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import run_here
from make_runs import guess, make_probe, make_run

from data_prep.common.atomic_writes import write_json
from train.reporting.study_report import write_study_table
from train.reporting.study_table import read_study, runs_of_study
from train.run.recipe import ProbeRecipe
from train.sweeping.study.folder import RowState, StudyFacts, StudyFolder
from train.sweeping.study.rows import ROWS

COURSE, OTHER = (288, 168), (80, 12)  # stimuli and sites


def make_study(path: Path, shape: tuple[int, int], small: bool = False, random_weights: tuple[str, ...] = ()) -> Path:
    """A study with three rows that are done and one that has failed."""
    target = np.random.default_rng(0).normal(5, 1, shape).astype(np.float32)
    folder = StudyFolder(path)
    layers = {"layer2": guess(target, 0.5), "layer3": guess(target, 0.8), "layer4": guess(target, 0.9)}
    recipe = ProbeRecipe(layers=["all"], backbone={"name": "resnet50"})
    facts = StudyFacts(
        study="s", recording="f", data="made up", small=small, selects_on="inner", random_weights=list(random_weights)
    )
    run_of = {name: folder.run_of(ROWS[name], ROWS[name].steps[-1], facts) for name in ROWS}
    make_probe(run_of["resnet50_frozen"], target, layers, "layer2", recipe=recipe)
    make_run(run_of["resnet152_whole"], target, guess(target, 0.7))
    make_run(run_of["resnet18_head"], target, guess(target, 0.9, seed=2))
    states = {name: RowState("done") for name in ("resnet50_frozen", "resnet152_whole", "resnet18_head")}
    folder.write_states(states | {"cnn2": RowState("failed", "out of <b>memory</b>")})
    write_json(folder.study, facts.model_dump())
    return path


def rows(path: Path) -> dict[str, dict[str, str]]:
    write_study_table(StudyFolder(path))
    with (path / "table.csv").open(newline="") as file:
        return {row["row"]: row for row in csv.DictReader(file)}


def test_published_numbers_stand_beside_ours_on_their_own_recording(tmp_path):
    table = rows(make_study(tmp_path / "study", COURSE))
    assert [*table][:8] == [  # as in the study
        *("pixels_linear", "pixels_ridge", "resnet50_random", "resnet50_frozen", "cnn2", "cnn3"),
        *("resnet152_whole", "densenet169_frozen"),
    ]
    assert [*table][8:] == ["resnet18_head"]
    best = table["resnet152_whole"]
    assert (best["published_r2"], best["published_mse"], best["published_explained_variance"]) == (
        *("0.44", "0.063"),
        "0.453",
    )
    assert table["cnn2"]["state"] == "failed"
    assert table["cnn3"]["state"] == "not asked for"
    assert table["resnet18_head"]["published_r2"] == ""
    text = (tmp_path / "study" / "table.md").read_text()
    assert "Published: Benquet and Reategui" in text
    assert "Ours selected epochs on a part of train; the published models were selected on val." in text


def test_the_layer_that_the_study_names_is_shown(tmp_path):
    """Here another layer was chosen."""
    result = next(
        row for row in read_study(make_study(tmp_path / "study", OTHER)).rows if row.row.name == "resnet50_frozen"
    )
    assert result.metrics.chosen == "layer2"
    shown = result.regression.r2.mean
    assert shown == result.metrics.layers["layer3"].regression.r2.mean
    assert shown < result.metrics.regression.r2.mean
    assert result.title == "Pre-trained ResNet-50 - Layer 3"


@pytest.mark.parametrize(
    ("shape", "options"),
    [(OTHER, {}), (COURSE, {"small": True}), (COURSE, {"small": True, "random_weights": ("resnet50",)})],
)
def test_published_numbers_never_stand_beside_what_they_cannot_be_compared_with(tmp_path, shape, options):
    table = rows(make_study(tmp_path / "study", shape, **options))
    assert "published_r2" not in table["resnet152_whole"]
    text = (tmp_path / "study" / "table.md").read_text()
    assert "0.440" not in text
    assert "The published numbers are of another recording, or of larger runs" in text
    assert text.startswith("### SMALL, not the study: Table I" if options.get("small") else "### Table I")


def test_the_best_of_each_column_is_bold_but_not_at_reduced_size(tmp_path):
    """The row with the best R2 need not have the least error: errors of quiet sites cost more R2."""
    target = np.random.default_rng(0).normal(5, [1] * 6 + [9] * 6, (80, 12)).astype(np.float32)
    quiet, loud = target[:, :6], target[:, 6:]
    study = make_study(tmp_path / "study", OTHER)
    for name, parts in (
        ("resnet152_whole", [guess(quiet, 0.9), loud]),
        ("cnn2", [quiet, guess(loud, 3.0)]),
    ):
        shutil.rmtree(study / "rows" / name, ignore_errors=True)
        make_run(study / "rows" / name, target, np.concatenate(parts, axis=1))
    shutil.rmtree(study / "rows" / "resnet50_frozen")
    bold = {cells[1].text: [cell.is_best for cell in cells[2:5]] for cells in read_study(study).tables[0].rows}
    assert bold["ResNet-152, fine-tuned whole"] == [False, True, False]
    assert bold["2-layers CNN"] == [True, False, True]
    small = read_study(make_study(tmp_path / "small", OTHER, small=True)).tables[0]
    assert not any(cell.is_best for cells in small.rows for cell in cells)


def test_rows_with_random_weights_are_named_so(tmp_path):
    study = make_study(tmp_path / "study", OTHER, small=True, random_weights=("resnet50", "resnet18"))
    table = rows(study)
    assert table["resnet50_frozen"]["model"] == "Pre-trained ResNet-50 - Layer 3 (RANDOM weights)"
    assert table["resnet18_head"]["model"].endswith("(RANDOM weights)")
    assert "RANDOM" not in table["resnet152_whole"]["model"]
    figure = read_study(study).figure
    assert {path.name for path in runs_of_study(study)} == {
        *("resnet50_frozen_SMALL_RANDOM_WEIGHTS", "resnet152_whole_SMALL", "resnet18_head_SMALL_RANDOM_WEIGHTS")
    }
    assert figure.caption.startswith("The study's Figure 1. SMALL, not the study: ResNet-50, RANDOM weights")


@pytest.mark.usefixtures("figures")
def test_a_report_on_a_study_shows_its_table_figure_and_rows(tmp_path):
    study = make_study(tmp_path / "study", COURSE)
    done = run_here("train/report.py", study, "--out", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report" / "report.html").read_text()
    assert '<section id="study-1">' in page
    assert "the study has a mean of 0.404 at layer 3" in page
    assert "out of &lt;b&gt;memory&lt;/b&gt;" in page
    assert (tmp_path / "report" / "figures" / "study_figure_1.svg").is_file()
    with (tmp_path / "report" / "table.csv").open(newline="") as file:
        assert {Path(row["run"]).name for row in csv.DictReader(file)} == {
            *("resnet50_frozen", "resnet152_whole", "resnet18_head")
        }
