"""The commands and examples in README.md and docs/ work as written.

Every command goes through the parser of the program it calls, with and without what stands in brackets.
test_first_hour.py runs those of README. Examples of a source, a readout and a recipe are used as they stand.
"""

import ast
import importlib
import os
import re
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import offline
import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from documents import PAGES, Command, commands, fenced
from helpers import ROOT, run_here, succeed_here
from make_runs import guess, make_run, responses
from PIL import Image
from tensorboard import program
from torch.distributed.run import get_args_parser as torchrun_parser

import data_prep.common.command_line
from data_prep.shards.folder import ShardFolder
from data_prep.shards.packing import pack
from train.models import readouts
from train.models.network import Network
from train.run.recipe import Recipe, load_recipe

# Commands that are for people to look at, not to be parsed: what they are is checked, not what follows.
SETS_UP = (
    "bash launch/quickstart.sh",
    "bash launch/test.sh",
    "bash benchmarks/gpu_check.sh",
    "source .venv/bin/activate",
)
# What an abbreviated command leaves to the reader.
REQUIRED = {
    "train/finetune.py": ["--data", "DIR", "--out", "RUN"],
    "train/probe.py": ["--data", "DIR", "--out", "RUN"],
    "train/evaluate.py": ["RUN"],
    "data_prep/pack.py": ["--out", "DIR"],
    "data_prep/fetch.py": ["--out", "DIR"],
}
KINDS = {"data_prep/pack.py": "simulated", "data_prep/fetch.py": "majaj2015"}
PLACEHOLDERS = {"N": "2", "R": "2", "SOURCE": "simulated", "$k": "1"}
BATCH_SCRIPTS = {name: f"train/{name}.py" for name in ("finetune", "evaluate", "probe", "sweep", "study")}
BATCH_SCRIPTS["check"] = "benchmarks/check.py"


class Parsed(BaseException):
    """The command line was parsed."""


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A working folder with the project's programs and the user's files that the pages mention."""
    for name in ("data_prep", "train", "launch", "ds_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "my_vit.yaml").write_text(fenced("recipes.md", "yaml")[0])
    (tmp_path / "best.yaml").write_text("epochs: 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


@pytest.fixture
def only_parsing(monkeypatch):
    """Make commands end once their command line is parsed."""
    parse = data_prep.common.command_line.parse

    def understood(*args, **options):
        parse(*args, **options)
        raise Parsed

    monkeypatch.setattr(data_prep.common.command_line, "parse", understood)


def check_script(script: str, words: list[str]) -> None:
    """One of our commands accepts these words."""
    if script.startswith(("benchmarks/", "docs/")):
        options = re.findall(r"--[\w-]+", (ROOT / script).read_text())
        assert all(word in options for word in words if word.startswith("--")), script
        return
    words = [PLACEHOLDERS.get(word, word) for word in words]
    if script in KINDS and (not words or words[0].startswith("--")):
        words = [KINDS[script], *words]
    required = REQUIRED.get(script, [])
    if not {"--out", "--help"} & set(words) and (not words or len(required) > 1):
        words += required
    try:
        done = run_here(script, *words)
    except Parsed:
        return
    assert "--help" in words, (script, words, done.stderr)
    assert done.returncode in (0, None)


def check(words: list[str]) -> None:
    """Every program in a command accepts its words."""
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    first, *words = words
    if first in ("python", "python3"):
        first, *words = words
    if first == "torchrun":
        options = torchrun_parser().parse_args(words)
        check_script(options.training_script, options.training_script_args)
    elif first == "accelerate":
        options = launch_command_parser().parse_args(words[1:])
        assert options.config_file is None or (ROOT / options.config_file).is_file()
        check_script(options.training_script, options.training_script_args)
    elif first == "sbatch":
        script = next(k for k, word in enumerate(words) if word.endswith(".sbatch"))
        assert (ROOT / words[script]).is_file()
        check_script(BATCH_SCRIPTS[Path(words[script]).stem], words[script + 1 :])
    elif first == "bash":
        check_script(
            {"launch/study.sh": "train/study.py", "launch/foundation.sh": "train/foundation.py"}[words[0]], words[1:]
        )
    elif first == "launch/check.sh":
        text = "".join((ROOT / "launch" / name).read_text() for name in ("check.sh", "processes.py"))
        assert all(word in text for word in words if word.startswith("-"))
    elif first == "launch/offline.sh":
        offline.command_parser().parse_args(words)
    elif first.startswith("launch/"):
        script = next(k for k, word in enumerate(words) if word.endswith(".py"))
        text = (ROOT / first).read_text() + (ROOT / "launch/processes.py").read_text()
        assert all(word in text for word in words[:script] if word.startswith("-"))
        check_script(words[script], words[script + 1 :])
    elif first == "tensorboard":
        program.TensorBoard().configure(argv=[None, *words])
    elif first == "pip":
        extra = re.search(r"\.\[(\w+)\]", words[-1])[1]
        assert extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    else:
        script = first if "/" in first else f"data_prep/{first}"
        check_script(script, words)


@pytest.mark.parametrize("command", commands(), ids=str)
@pytest.mark.usefixtures("desk", "only_parsing")
def test_every_command_is_understood(command: Command):
    if command.text.startswith(SETS_UP):
        script = command.text.split()[1]
        assert subprocess.run(["bash", "-n", ROOT / script]).returncode == 0
        return
    alternatives = re.search(r"\{([\w-]+(?:,[\w-]+)+)\}", command.text)
    for choice in alternatives[1].split(",") if alternatives else [""]:
        text = command.text.replace(alternatives[0], choice) if alternatives else command.text
        for keep_optional in (True, False):
            check(Command(command.page, text).words(keep_optional))


def test_the_documented_commands_are_found():
    """A change in the layout of the pages must not hide commands from the test above."""
    documented = commands()
    assert len(documented) > 60
    assert {page.name for page in PAGES} - {command.page.name for command in documented} <= {
        "design.md",
        "private_apis.md",
    }


# -------------------------------------------------------------------------------------------------------- examples


def test_the_example_of_a_source_packs(tmp_path, monkeypatch):
    (text,) = fenced("data_format.md", "python")
    (tmp_path / "npz_source.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)  # of the packing process as well
    module = importlib.import_module("npz_source")
    rng, names = np.random.default_rng(0), [f"im {k}" for k in range(20)]
    trials = rng.normal(5, 1, (20, 3, 4)).astype(np.float32)
    np.savez(tmp_path / "session.npz", stimulus_id=np.array(names), trials=trials, site_id=np.array(list("abcd")))
    (tmp_path / "images").mkdir()
    for name in names:
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / "images" / f"{name}.png")
    source = module.Npz(source=tmp_path / "session.npz", images=tmp_path / "images")
    folder = pack(source.open(), tmp_path / "packed", stimuli_per_shard=50, workers=1).folder
    packed_rates = {}
    for split in ShardFolder(folder).manifest.splits:
        opened = ShardFolder(folder).split(split)
        packed_rates |= dict(zip(opened.stimulus_ids, opened.rates(), strict=True))
    expected = {f"im_{k}": trials[k].mean(0) for k in range(20)}
    assert packed_rates.keys() == expected.keys()
    for name, rates in expected.items():
        np.testing.assert_allclose(packed_rates[name], rates, rtol=1e-5)


def test_the_example_of_a_readout_learns(recording, monkeypatch):
    """The class and the case are added as the page says."""
    (text,) = fenced("recipes.md", "python")
    scope = dict(vars(readouts))
    exec(compile(text, "recipes.md", "exec"), scope)
    case = re.search(r'case "strongest":.*\n\s+return (.*)', (ROOT / "docs/recipes.md").read_text())[1]
    build = readouts.build_readout

    def extended(settings, features, map_shape, sites):
        if settings.kind != "strongest":
            return build(settings, features, map_shape, sites)
        return eval(case, scope, {"map_shape": map_shape, "sites": sites})

    monkeypatch.setattr("train.models.network.build_readout", extended)
    recipe = Recipe(images={"size": 32}, backbone={"name": "test_convnext", "weights": "random", "cut": "stages.1"})
    recipe.readout.kind = "strongest"
    network = Network(recipe, ShardFolder(recording).manifest, 32)
    head, images = network.heads["rates"], torch.rand(8, 3, 32, 32) * 255
    features = network.read(images)["rates"]
    assert not head(features).any()
    weight, bias = torch.randn(12, features.shape[1]), torch.randn(12)
    head.start_from(weight, bias, torch.empty(0))
    torch.testing.assert_close(head(features), features.amax((2, 3)) @ weight.T + bias)
    network(images)["rates"].square().sum().backward()
    assert head.sites.weight.grad.abs().sum() > 0


def test_the_example_in_pandas_reads_what_is_written(desk):
    pytest.importorskip("pandas")
    (text,) = fenced("sharing.md", "python")
    target = responses()
    make_run(desk / "runs" / "mine", target, guess(target, 0.5))
    succeed_here("train/report.py", "runs", "--out", "report")
    scope: dict = {}
    exec(compile(text, "sharing.md", "exec"), scope)
    assert scope["table"]["model"].tolist() == ["mine"]
    assert scope["epochs"]["loss"].tolist() == [1.0, 0.5]
    assert scope["table"]["r2"][0] == pytest.approx(scope["sites"]["r2"].mean())
    np.testing.assert_array_equal(scope["responses"], target)


def test_the_example_of_a_recipe_trains(recording, tmp_path):
    """With random weights and small images; the rest of the recipe stays."""
    (text,) = fenced("recipes.md", "yaml")
    (tmp_path / "my_vit.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "my_vit.yaml", Recipe)
    recipe.check()
    assert recipe.readout.kind == "gaussian"
    smaller = ["--backbone.weights", "random", "--images.size", "32", "--epochs", "1", "--loader.workers", "0"]
    words = [tmp_path / "my_vit.yaml", "--data", recording, "--out", tmp_path / "run", *smaller, "--precision", "fp32"]
    done = succeed_here("train/finetune.py", *words)
    assert "vit_tiny_patch16_224 cut after blocks.8" in done.stdout


def test_the_example_of_a_search_is_one(tmp_path):
    text = (ROOT / "docs/sweeps.md").read_text()
    block = re.search(r"## What is searched\n\n((?:    .*\n|\n)+)", text)[1]
    content = yaml.safe_load(re.sub(r"^    ", "", block, flags=re.MULTILINE))
    assert set(content["grid"]) == {"optimizer.lr", "optimizer.name"}


# -------------------------------------------------------------------------------------------------------- messages


def texts(node: ast.AST) -> str | None:
    """A literal text, with \\0 for what is put into it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
    return None


def messages() -> list[tuple[str, str]]:
    """Failures, warnings and notes in the code: file, text."""
    quoted = []
    for path in [*ROOT.glob("train/**/*.py"), *ROOT.glob("data_prep/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not node.args or (text := texts(node.args[0])) is None:
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name == "RunFailed" or (text.startswith(("warning:", "note:")) and len(text) > 15):
                quoted.append((path.name, text))
    return quoted


def test_every_failure_and_warning_is_in_troubleshooting():
    page = re.sub(r"\s+", " ", (ROOT / "docs" / "troubleshooting.md").read_text())
    quoted = [part for cell in re.findall(r"`([^`]+)`", page) for part in cell.split("...") if len(part.strip()) > 11]
    assert len(messages()) > 25
    for file, text in messages():
        fragments = [" ".join(fragment.split()) for fragment in text.split("\0")]
        assert any(part.strip() in fragment for part in quoted for fragment in fragments), (file, text)


NO_SETTINGS = {"PATH", "BASH_SOURCE", "SLURM_CONF"}  # and what Slurm tells its jobs


def variables() -> set[str]:
    """The environment variables that the code and the scripts read or set."""
    quoted = re.compile(r"environ(?:\.get|\.setdefault|\.pop)?[\[(]\s*\"([A-Z][A-Z0-9_]+)\"")
    names = set()
    for package in ("train", "data_prep", "launch"):
        for path in ROOT.glob(f"{package}/**/*.py"):
            names |= set(quoted.findall(path.read_text()))
    for path in [*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/slurm/*")]:
        names |= set(re.findall(r"\$\{?([A-Z][A-Z0-9_]+)", path.read_text()))
    return {name for name in names if name not in NO_SETTINGS and not name.startswith("SLURM_")}


def test_every_environment_variable_is_explained():
    page = (ROOT / "docs" / "environment.md").read_text()
    found = variables()
    assert {"SPIKETUNE_JOB", "PYTHON", "MAX_RESTARTS", "HF_HUB_CACHE"} <= found
    assert [name for name in sorted(found) if f"`{name}" not in page] == []


def test_links_between_pages_are_valid():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_no_page_names_the_machine_it_was_written_on():
    for page in PAGES:
        assert not re.search(rf"{re.escape(os.path.expanduser('~'))}/|/tmp/", page.read_text()), page.name
