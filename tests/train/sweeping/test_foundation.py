"""One command probes recordings, makes a population of their sites, and reads new recordings with it."""

import shutil

import numpy as np
import pytest
import yaml
from helpers import assert_refused, run_here, succeed_here
from launching import metrics
from make_sources import make_folder

from data_prep.common import locks
from data_prep.common.markdown import tables_as_columns
from data_prep.shards.packing import pack
from data_prep.sources.folder import Folder
from train.models.population import read_population
from train.run.folder import open_probe
from train.sweeping.foundation import Foundation, FoundationOptions
from train.sweeping.foundation_commands import BEAT_FILE
from train.sweeping.queue_worker import StopRequest

SETTINGS = {
    "layers": ["stages.0+stages.1"],
    "backbone": {"name": "test_convnext", "weights": "random"},
    "images": {"size": 32},
}


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Shard folders a, b, c, and twin with the images of a."""
    path = tmp_path_factory.mktemp("foundation")
    for name, seed in {"a": 0, "b": 1, "c": 2, "twin": 0}.items():
        make_folder(path / "src" / name, n=50, sites=4, splits=True, seed=seed)
        pack(Folder(source=path / "src" / name).open(), path / name, stimuli_per_shard=50, workers=1)
    (path / "probe.yaml").write_text(yaml.safe_dump(SETTINGS))
    return path


def words(recordings, out, *options, names="ab", rounds=1):
    data = [recordings / name for name in names]
    settings = ["--recipe", recordings / "probe.yaml", "--rounds", rounds]
    return ["train/foundation.py", *data, "--out", out, *settings, *options]


def test_new_recordings_are_read_with_the_sites_of_others(recordings, tmp_path, started):
    out, new = tmp_path / "runs", ["--new", recordings / "c", "--compare"]
    assert "is made" in succeed_here(*words(recordings, out)).stdout
    assert read_population(out / "population").facts.sites == 8
    shown = succeed_here(*words(recordings, out, *new)).stdout
    assert len(started) == 4  # the first two were done
    table = (out / "table.md").read_text()
    assert tables_as_columns(table) in shown
    assert "on val" in table
    with_sites, without = (metrics(out / kind / "c") for kind in ("new", "alone"))
    for scores in (with_sites, without):
        assert f"{scores['regression']['r2']['mean']:.3f}" in table
    assert [layer.endswith("+population") for layer in (with_sites["chosen"], without["chosen"])] == [True, False]
    succeed_here(*words(recordings, out, *new))
    assert len(started) == 4
    joined = [open_probe(out / kind).joined for kind in ("sites/a", "sites/b", "new/c", "alone/c")]
    assert joined == ["by_channels", "by_channels", "alike", "alike"]
    other = tmp_path / "others" / "c"  # of the same name
    shutil.copytree(recordings / "a", other)
    assert_refused(run_here(*words(recordings, out, "--new", other)), "has read other data called c")


def test_probes_of_several_networks_are_stacked(recordings, tmp_path, started):
    networks = ["test_convnext", "test_convnext2"]
    options = ["--new", recordings / "c", "--compare", "--networks", *networks]
    command = words(recordings, tmp_path / "runs", *options)
    table = succeed_here(*command).stdout
    assert len(started) == 10  # of each network four probes, and two stacks
    folders = [tmp_path / "runs" / network / "new" / "c" for network in networks]
    recipes = [yaml.safe_load((folder / "recipe.yaml").read_text()) for folder in folders]
    assert [recipe["backbone"]["name"] for recipe in recipes] == networks
    members = [metrics(folder) for folder in folders]
    stack = metrics(tmp_path / "runs" / "new" / "c")
    for scores in (*members, stack):
        assert f"{scores['regression']['r2']['mean']:.3f}" in table
    succeed_here(*command)
    assert len(started) == 10
    assert_refused(run_here(*command[:-1]), "begun with --networks test_convnext test_convnext2")
    assert_refused(run_here(*command, networks[0]), "name each network once")


def test_in_the_second_round_each_recording_is_read_with_the_sites_of_the_others(recordings, tmp_path, started):
    out = tmp_path / "runs"
    succeed_here(*words(recordings, out, rounds=2))
    assert len(started) == 4
    succeed_here("train/population.py", out / "sites" / "b", "--out", tmp_path / "b")
    by_hand = ["train/probe.py", recordings / "probe.yaml", "--data", recordings / "a", "--population", tmp_path / "b"]
    succeed_here(*by_hand, "--joined", "by_channels", "--out", tmp_path / "a")
    succeed_here("train/population.py", tmp_path / "a", out / "again" / "b", "--out", tmp_path / "both")
    found, expected = (read_population(folder).weights for folder in (out / "population", tmp_path / "both"))
    for module, weights in expected.items():
        np.testing.assert_allclose(found[module], weights, rtol=1e-6)


def test_a_recording_is_not_read_with_the_sites_of_one_that_shows_its_images(recordings, tmp_path, started):
    succeed_here(*words(recordings, tmp_path / "runs", names=["a", "twin"], rounds=2))
    assert len(started) == 2


def test_bad_input_is_refused_before_anything_runs(recordings, tmp_path, started):
    out = tmp_path / "runs"
    assert_refused(run_here(*words(recordings, out, "--new", recordings / "a")), "have the same name, a")
    assert_refused(run_here(*words(recordings, out, "--new", tmp_path / "nowhere")), "nowhere")
    assert not out.exists()
    succeed_here(*words(recordings, out))
    assert_refused(run_here(*words(recordings, out, names="a")), "begun on other recordings (a, b)")
    assert_refused(run_here(*words(recordings, out, rounds=2)), "begun with --rounds 1")
    assert_refused(run_here(*words(recordings, out, "--recipe", tmp_path / "missing.yaml")), "missing.yaml")
    assert len(started) == 2


def test_a_probe_that_ends_with_an_error_ends_the_command_with_its_sentence(recordings, tmp_path, started):
    """A new recording that shows images of the others is refused by its probe."""
    shards = tmp_path / "mixed"
    succeed_here("data_prep/pack.py", "folder", recordings / "src" / "a", "--out", shards, "--split", "ordered")
    done = run_here(*words(recordings, tmp_path / "runs", "--new", shards))
    assert_refused(done, "were fitted before")
    assert "Traceback" not in (tmp_path / "runs" / "new" / "mixed.log").read_text()


def test_two_commands_do_not_work_on_a_folder_at_once(recordings, tmp_path, started, capsys):
    class AskedToEnd(StopRequest):
        def check(self):
            raise KeyboardInterrupt

    options = FoundationOptions(
        data=[str(recordings / "a")],
        new=[],
        out=tmp_path / "runs",
        recipe=recordings / "probe.yaml",
        networks=[],
        rounds=1,
        split="val",
        compare=False,
        licence=None,
        processes=1,
    )
    second = Foundation(options, AskedToEnd())
    with locks.exclusive(options.out / BEAT_FILE), pytest.raises(KeyboardInterrupt):
        second.run()
    assert "another command works on" in capsys.readouterr().out
    assert started == []
