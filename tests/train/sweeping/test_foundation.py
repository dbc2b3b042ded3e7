"""One command probes recordings, makes a population of their sites, and reads new recordings with it."""

import sys

import pytest
import yaml
from helpers import assert_refused, run_here, succeed_here
from launching import metrics
from make_sources import make_folder

from data_prep.shards.packing import pack
from data_prep.sources.folder import Folder
from train.models.population import read_population
from train.sweeping import foundation

SETTINGS = {
    "layers": ["stages.0+stages.1"],
    "backbone": {"name": "test_convnext", "weights": "random"},
    "images": {"size": 32},
}


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Shard folders a, b and c."""
    path = tmp_path_factory.mktemp("foundation")
    for seed, name in enumerate("abc"):
        make_folder(path / "src" / name, n=50, sites=4, splits=True, seed=seed)
        pack(Folder(source=path / "src" / name).open(), path / name, stimuli_per_shard=50, workers=1)
    (path / "probe.yaml").write_text(yaml.safe_dump(SETTINGS))
    return path


@pytest.fixture
def started(monkeypatch):
    """The commands that are started, which run in this process instead."""
    commands = []

    def run(command, log, _):
        assert command[0] == sys.executable
        commands.append(command[1:])
        done = run_here(*command[1:])
        log.write_text(done.stdout + done.stderr)
        return done.returncode

    monkeypatch.setattr(foundation, "run_logged", run)
    return commands


def words(recordings, out, *options):
    data = [recordings / "a", recordings / "b"]
    return ["train/foundation.py", *data, "--out", out, "--recipe", recordings / "probe.yaml", *options]


def test_new_recordings_are_read_with_the_sites_of_others(recordings, tmp_path, started):
    out, new = tmp_path / "runs", ["--new", recordings / "c", "--compare"]
    assert "is made" in succeed_here(*words(recordings, out)).stdout
    assert read_population(out / "population").facts.sites == 8
    table = succeed_here(*words(recordings, out, *new)).stdout
    assert len(started) == 4  # the first two were done
    assert (out / "table.md").read_text() in table
    with_sites, without = (metrics(out / kind / "c") for kind in ("new", "alone"))
    for scores in (with_sites, without):
        assert f"{scores['regression']['r2']['mean']:.3f}" in table
    assert [layer.endswith("+population") for layer in (with_sites["chosen"], without["chosen"])] == [True, False]
    succeed_here(*words(recordings, out, *new))
    assert len(started) == 4


def test_bad_input_is_refused_before_anything_runs(recordings, tmp_path, started):
    out = tmp_path / "runs"
    assert_refused(run_here(*words(recordings, out, "--new", recordings / "a")), "have the same name, a")
    assert_refused(run_here(*words(recordings, out, "--new", tmp_path / "nowhere")), "nowhere")
    assert not out.exists()
    succeed_here(*words(recordings, out))
    other = ["train/foundation.py", recordings / "a", "--out", out, "--recipe", recordings / "probe.yaml"]
    assert_refused(run_here(*other), "begun on other recordings (a, b)")
    assert_refused(run_here(*words(recordings, out)[:-1], tmp_path / "missing.yaml"), "missing.yaml")
    assert len(started) == 2


def test_a_probe_that_ends_with_an_error_ends_the_command_with_its_sentence(recordings, tmp_path, started):
    """A new recording that shows images of the others is refused by its probe."""
    shards = tmp_path / "mixed"
    succeed_here("data_prep/pack.py", "folder", recordings / "src" / "a", "--out", shards, "--split", "ordered")
    done = run_here(*words(recordings, tmp_path / "runs", "--new", shards))
    assert_refused(done, "were fitted before")
    assert "Traceback" not in (tmp_path / "runs" / "new" / "mixed.log").read_text()
