"""Every command answers --help and typing errors at once, without importing heavy libraries."""

import subprocess
import sys

import pytest
from helpers import ROOT, assert_refused, run_here

from train.finetune import parse_command_line

COMMANDS = [f"data_prep/{name}.py" for name in ("pack", "show", "fetch")]
COMMANDS += [f"train/{name}.py" for name in ("finetune", "evaluate", "probe", "sweep", "report", "plan", "export")]
COMMANDS += [f"train/{name}.py" for name in ("population", "foundation")]
SLOW = ("torch", "timm", "accelerate", "deepspeed", "webdataset", "h5py", "pyarrow", "scipy", "matplotlib", "optuna")
IMPORTS = """
import runpy, sys
script, *sys.argv = sys.argv[1:]
sys.argv.insert(0, script)
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit:
    pass
print("imported:", *sorted({name.split(".")[0] for name in sys.modules}))
"""


def imported_by(*command: str) -> set[str]:
    """The packages that a command has imported when it ends."""
    words = [sys.executable, "-c", IMPORTS, *command]
    done = subprocess.run(words, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_slow(command):
    assert imported_by(command, "--help") & {*SLOW} == set()


@pytest.mark.parametrize(
    "words",
    [
        ["--data", "d", "--out", "o", "--epoch", "3"],
        ["--data", "d", "--out", "o", "--optimizer.lrr", "1"],
        ["--data", "d", "--out", "o", "--batch.per_device", "64"],
        ["nosuch.yaml"],
        [],
    ],
    ids=" ".join,
)
def test_a_bad_command_line_imports_nothing_slow(words):
    assert imported_by("train/finetune.py", *words) & {*SLOW} == set()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["train/finetune.py", "--epoch", "3"], ["--epoch is not an option", "did you mean --epochs?"]),
        (["train/finetune.py", "--optimizer.lrr", "1"], ["did you mean --optimizer.lr?"]),
        (["train/finetune.py", "--lr", "1"], ["did you mean --optimizer.lr?"]),
        (["train/finetune.py", "--batch-size", "8"], ["did you mean --batch.global_size?"]),
        (["train/finetune.py", "--learning-rate", "1"], ["did you mean --optimizer.lr?"]),
        (["train/finetune.py", "--num-workers", "1"], ["did you mean --loader.workers?"]),
        (["train/finetune.py", "--model", "vit"], ["did you mean --backbone.name?"]),
        (["train/study.py", "--output-dir", "o"], ["did you mean --out?"]),
        (
            ["train/sweep.py", "lr_x_optim.yaml", "--data", "d", "--out", "o"],
            ["did you mean train/recipes/sweeps/lr_x_"],
        ),
        (["train/evaluate.py"], ["RUNS is missing: Folder of a run, a probe", "evaluate.py runs/a --split"]),
        (["train/evaluate.py", "--split", "val"], ["RUNS is missing", "for example: ", "evaluate.py runs/a"]),
        (["train/report.py", "--out", "o"], ["RUNS is missing: Folders made by", "report.py runs --out report"]),
        (["train/report.py"], ["RUNS ... and --out PATH are missing; usage: "]),
        (["train/finetune.py", "resnet5.yaml"], ["no such recipe; did you mean train/recipes/resnet50.yaml?"]),
        (["train/probe.py", "resnet50"], ["no such recipe", "resnet50.yaml"]),
        (
            ["train/finetune.py", "--out", "o"],
            ["--data PATH|URL ... is missing", "usage: train/finetune.py"],
        ),
        (["train/finetune.py", "--data", "d", "--out", "o", "--optimizer.lr", "-1"], ["optimizer.lr: ", "-1"]),
        (["train/finetune.py", "--data", "d", "--out", "o", "--epochs", "x"], ["--epochs: 'x' is not a whole number"]),
        (["train/evaluate.py", "r", "--split", "vall"], ["--split", "did you mean val?"]),
        (["data_prep/pack.py", "foldr"], ["did you mean folder?"]),
    ],
)
def test_a_mistake_is_named_with_what_is_right(command, words):
    assert_refused(run_here(*command), *words)


def test_a_switch_that_a_run_has_on_may_be_named_again_when_it_resumes(tmp_path, monkeypatch):
    """The command of a run and --resume: its own recipe gives the defaults then."""
    words = ["--data", "d", "--out", str(tmp_path / "run"), "--deterministic", "--augment.no-flip"]
    _, recipe = parse_command_line(words)
    assert recipe.deterministic
    monkeypatch.setattr("train.finetune.open_run", lambda run: (None, recipe))
    options, resumed = parse_command_line([*words, "--resume"])
    assert options.resume
    assert resumed == recipe


def test_help_begins_with_what_people_need():
    page = run_here("train/finetune.py", "--help").stdout
    usage, _, examples, required, often, *_ = page.split("\n\n")
    assert " ".join(usage.split()).startswith("usage: train/finetune.py [RECIPE.yaml] --data PATH|URL ... --out PATH")
    assert examples.count("train/finetune.py") == 2
    assert [line.split()[0] for line in required.splitlines() if line.startswith("  --")] == ["--data", "--out"]
    assert sum(line.startswith("  --") for line in often.splitlines()) == 10


def test_help_shows_the_defaults_of_the_recipe():
    page = run_here("train/finetune.py", "train/recipes/resnet50.yaml", "--help").stdout
    assert "[resnet50" in page


def test_help_of_a_source_lists_its_options():
    page = run_here("data_prep/pack.py", "folder", "--help").stdout
    assert "usage: data_prep/pack.py folder SOURCE --out PATH" in page
    assert "--rasters PATH" in page
    assert "--spikes" not in page
