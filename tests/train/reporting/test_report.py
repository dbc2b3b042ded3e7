"""The report shows the numbers of metrics.json, names what is missing, and executes nothing from a run folder."""

import csv
import json
import re
import shutil
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
from blank_figures import drawn_figures
from helpers import assert_refused, run_here
from make_runs import SITES, epoch_line, guess, make_classifier, make_probe, make_run, responses
from markupsafe import escape

from train.models.saved_probe import SAVED_PROBE
from train.reporting.groups import groups_of
from train.reporting.reproduction import commands_of
from train.reporting.run_reading import read_run
from train.run.recipe import ProbeRecipe, Recipe

NASTY = '<script>alert(1)</script>"><img src=x onerror=alert(2)>'
SCORES = ("r2", "explained_variance", "mse", "pearson_r", "ceiled_explained_variance")


def report(out, *runs, **options):
    words = [word for name, value in options.items() for word in (f"--{name}", *value)]
    return run_here("train/report.py", *runs, "--out", out, *words)


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A probe of two layers, one of pixels, three fine-tuned runs and a classifier, and the report over them."""
    folder, target = tmp_path_factory.mktemp("reported"), responses()
    known = {"reliability": np.linspace(0.5, 0.9, SITES)}
    make_probe(folder / "pixels", target, {"pixels": guess(target, 2)}, "pixels", recipe=ProbeRecipe(layers=["pixels"]))
    layers = {"layer2": guess(target, 0.9), "layer3": guess(target, 0.8)}
    make_probe(folder / "frozen", target, layers, "layer3", **known)
    make_run(folder / "whole", target, guess(target, 0.4), **known)
    make_run(
        folder / "nearly",
        target,
        guess(target, 0.8, seed=2),
        recipe=Recipe.model_validate({"task": {"kind": "hybrid"}}),
    )
    shown = np.arange(30) % 3
    make_classifier(folder / "classes", shown, np.where(np.arange(30) < 24, shown, 0), ["cat", "dog", "<b>egg"])
    runs = sorted(path for path in folder.iterdir())
    with drawn_figures():
        done = report(folder / "out", *runs)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def metrics(run):
    return json.loads((run / "eval/val/metrics.json").read_text())


def lines(folder):
    return lines_of(folder / "out" / "table.csv")


def lines_of(table):
    """The lines of a table.csv by the names of their runs."""
    with table.open(newline="") as file:
        return {line["run"].rsplit("/", 1)[-1]: line for line in csv.DictReader(file)}


class Page(HTMLParser):
    """Tags with their attributes, and the cells of every table's rows."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.rows, self._cell = [], [], None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self._cell = []

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.rows[-1].append(" ".join("".join(self._cell).split()))
            self._cell = None

    def handle_data(self, data):
        if self._cell is not None:
            self._cell.append(f"{data} ")


def test_every_format_shows_the_numbers_of_metrics_json(reported):
    folder, output = reported
    page, text = Page(folder / "out" / "report.html"), (folder / "out" / "table.md").read_text()
    for run in ("pixels", "frozen", "whole", "nearly"):
        block, line = metrics(folder / run)["regression"], lines(folder)[run]
        row = next(row for row in page.rows if row and row[0].startswith(run))
        marked = next(line for line in text.splitlines() if line.startswith(f"| {run}"))
        for score in (name for name in SCORES if name in block):
            assert float(line[score]) == block[score]["mean"]
            shown = f"{block[score]['mean']:.3f}"
            if ci95 := block[score]["ci95"]:
                assert (float(line[f"{score}_low"]), float(line[f"{score}_high"])) == tuple(ci95)
                shown += f" [{ci95[0]:.3f}, {ci95[1]:.3f}]"
            assert shown in row, (run, score)
            assert shown in marked
        assert f"{block['r2']['mean']:.3f}" in output


def test_metrics_of_other_papers_have_a_table_of_their_own_with_the_numbers_of_metrics_json(reported):
    folder, _ = reported
    page, text = Page(folder / "out" / "report.html"), (folder / "out" / "table.md").read_text()
    own_table = text[text.index("#### Metrics of other papers") :]
    for run in ("pixels", "whole"):
        block, line = metrics(folder / run)["regression"], lines(folder)[run]
        squared, brain_score = block["squared_pearson_r"], block.get("brain_score")
        expected = {
            "squared_pearson_r": (squared["mean"], squared["ci95"]),
            "squared_pearson_r_median": (squared["median"], squared["median_ci95"]),
        }
        if brain_score:
            expected["brain_score"] = (brain_score["score"], brain_score["ci95"])
            earlier = brain_score["before_2026_01"]
            expected["brain_score_before_2026_01"] = (earlier["score"], earlier["ci95"])
        marked = next(row for row in own_table.splitlines() if row.startswith(f"| {run}"))
        rows = [row for row in page.rows if row and row[0].startswith(run)]
        for name, (value, (low, high)) in expected.items():
            assert [float(line[f"{name}{end}"]) for end in ("", "_low", "_high")] == [value, low, high]
            shown = f"{value:.3f} [{low:.3f}, {high:.3f}]"
            assert shown in marked
            assert any(shown in row for row in rows)
    assert lines(folder)["pixels"]["brain_score"] == lines(folder)["whole"]["r2_er"] == ""
    assert "r²_ER" not in own_table  # no run has single trials


def test_runs_scored_by_earlier_versions_are_reported_without_metrics_of_other_papers(tmp_path):
    target = responses()
    run = make_run(tmp_path / "old", target, guess(target, 0.5))
    content = metrics(run)
    del content["regression"]["squared_pearson_r"]
    (run / "eval/val/metrics.json").write_text(json.dumps(content))
    done = report(tmp_path / "out", run)
    assert done.returncode == 0, done.stderr
    assert "other papers" not in (tmp_path / "out" / "table.md").read_text()


def test_families_and_facts_of_each_run_are_listed(reported):
    folder, _ = reported
    by_run = lines(folder)
    assert {run: line["family"] for run, line in by_run.items()} == {
        "pixels": "Linear regression",
        "frozen": "Task-driven",
        "whole": "Data-driven",
        "nearly": "Hybrid",
        "classes": "Classification",
    }
    assert (by_run["whole"]["parameters"], by_run["whole"]["training_seconds"]) == ("25600000", "90.0")
    assert by_run["frozen"]["parameters_fitted"] == str(11 * SITES)
    assert by_run["whole"]["hardware"] == "2 × GPU X"
    assert by_run["whole"]["command"].startswith("launch/local.sh -n 2 train/finetune.py --data data/mine")
    row = next(row for row in Page(folder / "out" / "report.html").rows if row and row[0].startswith("whole"))
    assert {"25.6 M (100 fitted)", "1.5 min", "2 × GPU X", "inner"} <= set(row)


def test_bold_is_the_best_where_the_next_is_clearly_behind(reported, tmp_path):
    folder, _ = reported
    text = (folder / "out" / "table.md").read_text()
    assert next(line for line in text.splitlines() if line.startswith("| whole")).count("**") == 2 * 6
    assert text.count("**") == 2 * 6
    target = responses()
    for name, seed in (("one", 5), ("two", 6)):
        make_run(tmp_path / name, target, guess(target, 0.5, seed))
    assert report(tmp_path / "out", tmp_path / "one", tmp_path / "two").returncode == 0
    assert "**" not in (tmp_path / "out" / "table.md").read_text()


def test_figures_lie_beside_the_page_in_three_formats(reported):
    folder, _ = reported
    files = {path.name for path in (folder / "out" / "figures").iterdir()}
    names = {"sites", "layers_frozen", "site_by_site", "power", "learning_curves", "confusion_classes"}
    assert files == {f"{name}.{kind}" for name in names for kind in ("png", "svg", "pdf")}
    images = [facts for tag, facts in Page(folder / "out" / "report.html").tags if tag == "img"]
    assert len(images) == len(names)
    assert all(image["src"].startswith("data:image/svg+xml;base64,") and image["alt"] for image in images)


@pytest.mark.usefixtures("figures")
def test_the_same_report_is_the_same_file(reported, tmp_path):
    folder, _ = reported
    runs = [folder / name for name in ("classes", "frozen", "nearly", "pixels", "whole")]
    assert report(tmp_path / "again", *runs).returncode == 0
    for path in sorted((folder / "out").rglob("*.*")):
        assert (tmp_path / "again" / path.relative_to(folder / "out")).read_bytes() == path.read_bytes(), path.name


def test_the_page_needs_no_network_and_lets_no_other_script_run(reported):
    folder, _ = reported
    page = Page(folder / "out" / "report.html")
    policy = next(facts["content"] for tag, facts in page.tags if "http-equiv" in facts)
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy
    addresses = [facts[name] for _, facts in page.tags for name in ("src", "href") if name in facts]
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert sum(tag == "script" for tag, _ in page.tags) == 1


@pytest.mark.usefixtures("figures")
def test_the_text_of_a_foreign_run_is_escaped(tmp_path):
    target = responses()
    layers = {NASTY: guess(target, 0.5), "b": guess(target, 1)}
    nasty = {"selected_on": [NASTY], "control": NASTY, "recording": NASTY, "command": ["finetune.py", NASTY]}
    make_probe(tmp_path / "<img src=x onerror=alert(3)>|$x$", target, layers, NASTY, **nasty)
    make_run(tmp_path / "=HYPERLINK(1)\x1b[31m", target, guess(target, 0.3), recording=NASTY)
    done = report(tmp_path / "out", *[path for path in tmp_path.iterdir() if path.is_dir()])
    assert done.returncode == 0, done.stderr
    page = Page(tmp_path / "out" / "report.html")
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert not [facts for _, facts in page.tags if any(name.startswith("on") for name in facts)]
    assert str(escape(NASTY)) in (tmp_path / "out" / "report.html").read_text()
    assert "<img" not in (tmp_path / "out" / "table.md").read_text()
    assert "\x1b" not in done.stdout
    for line in (tmp_path / "out" / "table.csv").read_text().splitlines()[1:]:
        assert ",=" not in line


def test_a_run_in_progress_is_reported_and_is_not_a_failure(tmp_path):
    target = responses()
    make_run(tmp_path / "done", target, guess(target, 0.5))
    running = make_run(tmp_path / "running", recipe=Recipe(epochs=30), history=[epoch_line(1, 0.12)])
    with (running / "history.jsonl").open("a") as file:
        file.write('{"epoch": 2, "step": 20, "lo')  # as it is while a line is written
    fresh = make_run(tmp_path / "fresh", history=[])
    (fresh / "env.json").unlink()
    done = report(tmp_path / "out", tmp_path / "done", running, fresh)
    assert done.returncode == 0, done.stderr
    assert "running: not scored on val yet: 1 of 30 epochs done, best R2 0.120" in done.stdout
    assert "fresh: not scored on val yet: no epoch done yet" in done.stdout
    assert "train/evaluate.py" in done.stdout
    assert "1 of 30 epochs done" in (tmp_path / "out" / "report.html").read_text()
    alone = report(tmp_path / "alone", fresh)
    assert alone.returncode == 0, alone.stderr
    assert "No run has been scored on val yet" in (tmp_path / "alone" / "report.html").read_text()


def test_incomplete_predictions_are_ignored(tmp_path):
    target = responses()
    runs = [make_run(tmp_path / name, target, guess(target, noise)) for name, noise in (("a", 0.3), ("b", 0.9))]
    whole = (runs[0] / "eval/val/predictions.npz").read_bytes()
    (runs[0] / "eval/val/predictions.npz").write_bytes(whole[: len(whole) // 2])
    done = report(tmp_path / "out", *runs)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "table.md").read_text()
    assert "not compared in pairs: a" in text
    assert "**" not in text


def test_runs_on_other_stimuli_have_a_table_of_their_own(tmp_path):
    target, other = responses(), responses(9)
    make_run(tmp_path / "a", target, guess(target, 0.5))
    make_run(tmp_path / "b", other, guess(other, 0.5), fingerprint="g")
    make_run(tmp_path / "c", target, guess(target, 0.6), fingerprint=None)  # of an earlier version
    done = report(tmp_path / "out", *(tmp_path / name for name in "abc"))
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "table.md").read_text()
    assert text.count("### made\\_up") + text.count("### made_up") == 2
    first, second = text.split("\n\n### ")
    assert "| c |" in first
    assert "| b |" in second


def test_the_best_trial_of_a_search_takes_part(tmp_path):
    target, sweep = responses(), tmp_path / "sweep"
    make_run(sweep / "trials" / "0001", target, guess(target, 0.5))
    (sweep / "sweep.yaml").write_text("grid: {}\n")
    table = f"trial,optimizer.lr,r2 on inner,state,reason,run\n0001,0.001,0.25,done,,x\n0000,0.1,,failed,{NASTY!r},x\n"
    (sweep / "table.csv").write_text(table)
    done = report(tmp_path / "out", sweep)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "report.html").read_text()
    assert "2 of 2 trials ended" in text
    assert "sweep: best" in (tmp_path / "out" / "table.md").read_text()
    assert text.count("<script") == 1


def test_two_runs_may_have_the_same_name(tmp_path):
    target = responses()
    for folder in ("x", "y"):
        make_run(tmp_path / folder / "run", target, guess(target, 0.5))
    assert report(tmp_path / "out", tmp_path / "x/run", tmp_path / "y/run").returncode == 0
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| x/run |" in text
    assert "| y/run |" in text


def test_a_score_selected_on_the_reported_split_is_marked(tmp_path):
    target = responses()
    make_run(tmp_path / "a", target, guess(target, 0.5), selected_on=["val"], simulated=True)
    done = report(tmp_path / "out", tmp_path / "a")
    for text in (
        done.stdout,
        (tmp_path / "out" / "table.md").read_text(),
        (tmp_path / "out" / "report.html").read_text(),
    ):
        assert "flattered" in text
        assert "SIMULATED" in text


@pytest.mark.parametrize(
    ("checkpoint", "epoch", "mark"),
    [("best", 2, ""), ("best", 1, " (OF EPOCH 1, NOW 2)"), ("last", 3, ""), ("last", 2, " (OF EPOCH 2, NOW 3)")],
)
def test_the_score_of_a_run_that_trained_on_is_marked(tmp_path, checkpoint, epoch, mark):
    target = responses()
    history = [epoch_line(1, 0.1), epoch_line(2, 0.2), epoch_line(3, 0.1, best=False)]
    scored = {"checkpoint": checkpoint, "epoch": epoch}
    run = make_run(tmp_path / "run", target, guess(target, 0.5), history=history, **scored)
    (read,) = read_run(run, "val", "run")
    assert read.title == f"run{mark}"


def test_published_numbers_are_labelled(reported):
    folder, _ = reported
    text = (folder / "out" / "report.html").read_text()
    assert "Published, not measured here" in text
    assert ["ResNet-152 (the study's own)", "Data-driven", "0.440", "0.063", "0.453"] in Page(
        folder / "out" / "report.html"
    ).rows


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda run: shutil.rmtree(run), ["is not a run folder"]),
        (lambda run: (run / "eval/val/metrics.json").write_text("{"), ["metrics.json", "damaged"]),
        (lambda run: (run / "eval/val/metrics.json").write_text("[" * 10**5), ["metrics.json"]),
        (lambda run: (run / "eval/val/metrics.json").write_text('{"split": "val"}'), ["metrics.json", "stimuli"]),
        (
            lambda run: (run / "eval/val/metrics.json").write_text('{"split":"val","stimuli":3,"recording":"x"}'),
            ["has no scores"],
        ),
        (lambda run: (run / "recipe.yaml").write_text("a: [1"), ["recipe.yaml", "YAML"]),
        (lambda run: (run / "env.json").write_text('{"command": 3}'), ["env.json", "command"]),
    ],
)
def test_a_damaged_run_is_named(tmp_path, spoil, words):
    target = responses()
    run = make_run(tmp_path / "run", target, guess(target, 0.5))
    spoil(run)
    assert_refused(report(tmp_path / "out", run), *words)
    assert not (tmp_path / "out").exists()


def test_the_pair_that_is_compared_can_be_chosen(tmp_path):
    target = responses()
    runs = [make_run(tmp_path / name, target, guess(target, 0.5, k)) for k, name in enumerate("abc")]
    done = report(tmp_path / "out", *runs, pair=(runs[2], runs[0]))
    assert done.returncode == 0, done.stderr
    assert "site by site: c and a" in (tmp_path / "out" / "report.html").read_text()
    assert_refused(report(tmp_path / "out", *runs[:2], pair=(runs[2], runs[0])), "--pair", "c")
    assert_refused(report(tmp_path / "out", runs[0], runs[0]), "twice")


def make_ensemble(path, target, prediction, members, combine="mean"):
    """The folder of an ensemble that train/evaluate.py has scored on val."""
    make_run(path, target, prediction, history=[])
    for name in ("recipe.yaml", "history.jsonl", "env.json"):
        (path / name).unlink()
    facts = {"combine": combine, "members": [{"runs": runs} for runs in members], "data": "data/mine"}
    (path / "ensemble.json").write_text(json.dumps(facts))
    return path


def test_the_row_of_an_ensemble_says_what_reproduces_it(tmp_path):
    target = responses()
    a, b = (make_run(tmp_path / name, target, guess(target, 0.5, k)) for k, name in enumerate("ab"))
    inner = make_ensemble(tmp_path / "inner", target, guess(target, 0.4), [[str(b)]])
    members = [[str(a)], [str(inner)], [str(tmp_path / "gone")]]
    ensemble = make_ensemble(tmp_path / "all", target, guess(target, 0.3), members, "stack")
    done = report(tmp_path / "out", a, ensemble)
    assert done.returncode == 0, done.stderr
    (read,) = read_run(ensemble, "val", "all")
    assert read.commands == [
        f"launch/local.sh -n 2 train/finetune.py --data data/mine --out {a}",
        f"launch/local.sh -n 2 train/finetune.py --data data/mine --out {b}",
        f"launch/local.sh train/evaluate.py {b} --combine mean --split val --out {inner}",
        f"# {tmp_path / 'gone'}: how this member was made is not known here",
        f"launch/local.sh train/evaluate.py {' '.join(run for runs in members for run in runs)} --combine stack "
        f"--split val --out {ensemble}",
    ]
    line = lines(tmp_path)["all"]
    assert (line["family"], line["what"]) == ("Ensemble", "stack of a, inner, gone")
    assert line["command"] == read.commands[-1]
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(str(escape(command)) in page for command in read.commands)
    # Members are found beside an ensemble that was moved with them.
    moved = tmp_path / "moved"
    facts = json.loads((inner / "ensemble.json").read_text()) | {"relative": {str(b): "../b"}}
    (inner / "ensemble.json").write_text(json.dumps(facts))
    for name in ("b", "inner"):
        shutil.copytree(tmp_path / name, moved / name)
    shutil.rmtree(b)
    (read,) = read_run(moved / "inner", "val", "inner")
    assert read.commands[0] == f"launch/local.sh -n 2 train/finetune.py --data data/mine --out {b}"
    # The command on record says more, for the split that it scored.
    recorded = ["evaluate.py", str(a), "--combine", "stack", "--out", str(ensemble), "--seen", "keep"]
    (ensemble / "env.json").write_text(json.dumps({"command": recorded, "world_size": 3}))
    (read,) = read_run(ensemble, "val", "all")
    assert read.command == f"launch/local.sh -n 3 train/{' '.join(recorded)}"
    (read,) = read_run(ensemble, "test", "all")
    assert "--split test" in read.command
    assert "the ensemble was not scored on test; to score it: launch/local.sh train/evaluate.py" in read.progress


def test_a_probe_that_was_scored_on_another_split_says_how(tmp_path):
    target, command = responses(), ["probe.py", "--data", "data/mine", "--out", str(tmp_path / "probe")]
    probe = make_probe(tmp_path / "probe", target, {"blocks.1": guess(target, 0.5)}, "blocks.1", command=command)
    made = f"launch/local.sh -n 2 train/{' '.join(command)}"
    assert commands_of(probe, "val") == [made]
    assert commands_of(probe, "test") == [made, f"launch/local.sh train/evaluate.py {probe} --split test"]
    (read,) = read_run(probe, "test", "probe")
    assert read.progress == "the probe is not done, or was not scored on test"
    (probe / SAVED_PROBE).touch()  # it can predict any split
    assert read.progress == f"the probe is done; to score it: train/evaluate.py {probe} --split test"


def test_a_folder_of_runs_is_searched(tmp_path):
    target, runs = responses(), tmp_path / "runs"
    for name in ("a", "project/b", "project/deeper/c"):
        make_run(runs / name, target, guess(target, 0.5))
    make_ensemble(runs / "ensemble", target, guess(target, 0.4), [["runs/a"]])
    damaged = make_run(runs / "damaged", target, guess(target, 0.5))
    (damaged / "eval/val/metrics.json").write_text("{")
    (runs / "notes" / "old").mkdir(parents=True)
    (runs / ".hidden").mkdir()
    (runs / "earlier" / "figures").mkdir(parents=True)
    (runs / "earlier" / "report.html").touch()  # a report is not a run, and nobody misses it in the list
    (runs / "readme.txt").write_text("no folder")
    for _ in range(2):  # the second time beside the first report
        done = report(runs, runs)
        assert done.returncode == 0, done.stderr
        assert {"a", "b", "c", "ensemble"} == set(lines_of(runs / "table.csv"))
        skipped = [line for line in done.stdout.splitlines() if line.startswith("skipped: ")]
        assert len(skipped) == 2
        assert skipped[0].startswith("skipped: damaged: ")
        assert "metrics.json is damaged" in skipped[0]
        assert skipped[1] == "skipped: notes: no run"
    assert "notes: no run" in (runs / "report.html").read_text()
    named = report(tmp_path / "out", runs / "a", runs)  # a run that is named and found is one
    assert named.returncode == 0, named.stderr
    assert_refused(report(tmp_path / "none", runs / "notes"), "notes is not a run folder and holds none", "old: no run")
    assert_refused(report(tmp_path / "none", damaged), "metrics.json is damaged")


def test_a_frozen_layer_that_is_ahead_is_named(reported, tmp_path):
    target = responses()
    make_probe(tmp_path / "frozen", target, {"x": guess(target, 0.3), "y": guess(target, 0.9)}, "x")
    make_run(tmp_path / "tuned", target, guess(target, 0.6))
    done = report(tmp_path / "out", tmp_path / "frozen", tmp_path / "tuned")
    sentence = "A frozen layer is ahead of every fine-tuned network here: frozen (x), R2 "
    assert sentence in done.stdout
    assert sentence.replace("R2", "R²") in (tmp_path / "out" / "report.html").read_text()
    assert "A frozen layer" not in reported[1]
    recipe = ProbeRecipe.model_validate({"layers": ["x"], "backbone": {"weights": "runs/tuned"}})
    make_probe(tmp_path / "of_tuned", target, {"x": guess(target, 0.3)}, "x", recipe=recipe)
    runs = [run for name in ("of_tuned", "tuned") for run in read_run(tmp_path / name, "val", name)]
    assert groups_of(runs)[0].frozen_ahead == ""


def test_every_metric_on_the_page_is_explained(reported):
    folder, _ = reported
    page = Page(folder / "out" / "report.html")
    text = (folder / "out" / "report.html").read_text()
    headings = {facts.get("title") for tag, facts in page.tags if tag == "th" and "title" in facts}
    for term in ("R²", "MSE", "EV", "Pearson r", "ceiled EV", "r²", "Brain-Score", "ceiling", "top-1", "seen"):
        meaning = re.search(rf"<dt>{re.escape(term)}</dt><dd>(.*?)</dd>", text)
        assert meaning, term
        if term != "ceiling":  # which is a row
            assert unescape(meaning[1]) in headings, term
    assert "FEVE" not in text  # no run has it
