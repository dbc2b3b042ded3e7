"""One small packed recording and one trained run that the end-to-end tests share."""

import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import run_command, succeed_here
from launching import SMALL, launch
from make_sources import make_folder
from web_server import serve

from data_prep.remote.url import SIGNED
from data_prep.shards import remote_files
from data_prep.shards.packing import pack
from data_prep.sources.folder import Folder

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in its background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # or the commands that tests interrupt would inherit it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start processes come first: they take long, and two of them at a time fill the cores."""
    items.sort(key=lambda item: not {"launch", "start", "succeed"} & vars(item.module).keys())


@pytest.fixture(scope="session")
def recording(tmp_path_factory) -> Path:
    """A small simulated recording, packed by the real command: 240 stimuli of 48 px, 12 sites."""
    out = tmp_path_factory.mktemp("packed") / "simulated"
    options = ["--stimuli", "240", "--sites", "12", "--repetitions", "6", "--image-size", "48"]
    options += ["--stimuli-per-shard", "64"]
    done = run_command(["data_prep/pack.py", "simulated", "--out", out, *options])
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def holey(tmp_path_factory) -> Path:
    """60 stimuli of 32 px to train on, 6 sites: two lack a third of the responses, one lacks all, one goes below 0."""
    path = tmp_path_factory.mktemp("holey")
    written = make_folder(path / "src", n=100, splits=True, sites=6, noise=0.5)
    missing = np.random.default_rng(0).uniform(size=(100, 2)) < 0.3
    written.rates[:, 1:3][missing] = np.nan
    written.rates[:, 4] = np.nan
    written.rates[7, 5] = -0.25
    np.save(path / "src" / "rates.npy", written.rates)
    return pack(Folder(source=path / "src").open(), path / "shards", stimuli_per_shard=50, workers=1).folder


@pytest.fixture(scope="session")
def trained(recording, tmp_path_factory) -> Path:
    """A network trained on it for two epochs by one process."""
    out = tmp_path_factory.mktemp("runs") / "trained"
    done = launch(1, "train/finetune.py", "--data", recording, "--out", out, *SMALL)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def head_first(recording, tmp_path_factory):
    """The run of a network with everything that must not depend on the number of processes, by that number.

    A hybrid, both readouts begun at the ridge, images augmented, the weights' running average. One process runs here.
    """
    folder = tmp_path_factory.mktemp("head_first")
    settings = [
        *("--backbone.cut", "stages.1", "--task.kind", "hybrid", "--task.weighting", "uncertainty"),
        *("--readout.kind", "flattened", "--readout.start", "ridge", "--ema", "0.9"),
        *("--augment.shift", "0.1", "--augment.zoom", "0.1", "--augment.flip"),
        *("--augment.brightness", "0.2", "--augment.contrast", "0.2"),
    ]

    def run(processes: int) -> Path:
        out = folder / f"on_{processes}"
        if not out.exists():
            command = ["train/finetune.py", "--data", recording, "--out", out, *SMALL, *settings]
            succeed_here(*command) if processes == 1 else launch(processes, *command)
        return out

    return run


# ---- shards behind a URL -------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def packed(tmp_path_factory) -> Path:
    """100 PNGs, 60 of them for training, in shards of 6."""
    path = tmp_path_factory.mktemp("packed")
    written = make_folder(path / "src", n=100, splits=True)
    written.rates[::7, 2] = np.nan
    np.save(path / "src" / "rates.npy", written.rates)
    pack(Folder(source=path / "src").open(), path / "shards", stimuli_per_shard=6, workers=1)
    return path / "shards"


@pytest.fixture
def web(packed, impatient):
    """A web server that serves these shards."""
    with serve(packed) as server:
        yield server


@pytest.fixture
def impatient(monkeypatch, tmp_path):
    """Retries after milliseconds; copies go to a folder of the test's own."""
    monkeypatch.setattr(remote_files, "RETRIES", replace(remote_files.RETRIES, first_pause=0.01))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(SIGNED, raising=False)


@pytest.fixture
def cache(tmp_path) -> Path:
    """A folder for copies."""
    return tmp_path / "cache"
