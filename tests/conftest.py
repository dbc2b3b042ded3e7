"""Fixtures that the end-to-end tests share: a small packed recording, a trained run, shards behind a URL."""

import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from blank_figures import blank_figures, drawn_figures
from forked_python import share_forked_python
from helpers import succeed_here, unchanged_environment
from launching import SMALL, succeed_on
from make_sources import make_folder
from web_server import serve

from data_prep.common.process_identity import own_identity
from data_prep.remote.url import SIGNED
from data_prep.shards import remote_files
from data_prep.shards.packing import pack
from data_prep.sources.folder import Folder

# A shell makes background jobs ignore Ctrl-C, which the commands that tests interrupt would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def fresh_identity():
    """Each test reads its own environment, as a new process would."""
    own_identity.cache_clear()


def pytest_configure(config: pytest.Config) -> None:
    """In the parent of several processes that run tests, start what they share."""
    if config.getoption("numprocesses", None):
        share_forked_python()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files that start processes first: they are the slowest."""
    starters = {"launch", "start", "start_group", "succeed"}
    items.sort(key=lambda item: not starters & vars(item.module).keys())


@pytest.fixture(autouse=True)
def _unchanged_environment() -> Iterator[None]:
    with unchanged_environment():
        yield


@pytest.fixture(scope="session", autouse=True)
def _blank_figures() -> Iterator[None]:
    with blank_figures():
        yield


@pytest.fixture
def figures() -> Iterator[None]:
    """For tests that look at figures: they are drawn."""
    with drawn_figures():
        yield


@pytest.fixture(scope="session")
def recording(tmp_path_factory) -> Path:
    """A small simulated recording, packed by the real command: 240 stimuli of 48 px, 12 sites."""
    out = tmp_path_factory.mktemp("packed") / "simulated"
    options = ["--stimuli", "240", "--sites", "12", "--repetitions", "6", "--image-size", "48"]
    options += ["--stimuli-per-shard", "64"]
    succeed_here("data_prep/pack.py", "simulated", "--out", out, *options)
    return out


@pytest.fixture(scope="session")
def holey(tmp_path_factory) -> Path:
    """60 training stimuli of 32 px and 6 sites: some responses missing or below 0."""
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
    """A network trained on `recording` for two epochs by one process."""
    out = tmp_path_factory.mktemp("runs") / "trained"
    succeed_here("train/finetune.py", "--data", recording, "--out", out, *SMALL)
    return out


@pytest.fixture(scope="session")
def predictors(recording, trained, tmp_path_factory) -> Path:
    """A folder with `run` (32 px), `probe` (48 px, windows, curves), `pixels`, `mean` and `stack` of run and probe."""
    folder = tmp_path_factory.mktemp("predictors")
    shutil.copytree(trained, folder / "run", symlinks=True)
    succeed_here("train/evaluate.py", folder / "run")
    probe, network = ["train/probe.py", "--data", recording, "--out"], ["--backbone.name", "test_convnext"]
    network += ["--backbone.weights", "random", "--layers", "stages.0", "--field", "gaussian"]
    network += ["--sites-learn", "together", "--response", "curved"]
    succeed_here(*probe, folder / "probe", *network)
    succeed_here(*probe, folder / "pixels", "--layers", "pixels", "--images.size", "16")
    for combine in ("mean", "stack"):
        members = [folder / "run", folder / "probe"]
        succeed_here("train/evaluate.py", *members, "--combine", combine, "--out", folder / combine)
    return folder


@pytest.fixture(scope="session")
def hybrid_run_on(recording, tmp_path_factory):
    """A function from a number of processes to a run with everything that must not depend on that number.

    A hybrid with both readouts started at a ridge, augmented images and a running average of the weights.
    """
    folder = tmp_path_factory.mktemp("hybrid_run_on")
    settings = [
        *("--backbone.cut", "stages.1", "--task.kind", "hybrid", "--task.weighting", "uncertainty"),
        *("--readout.kind", "flattened", "--readout.start", "ridge", "--ema", "0.9"),
        *("--augment.shift", "0.1", "--augment.zoom", "0.1", "--augment.flip"),
        *("--augment.brightness", "0.2", "--augment.contrast", "0.2"),
    ]

    def run(processes: int) -> Path:
        out = folder / f"on_{processes}"
        if not out.exists():
            succeed_on(processes, "train/finetune.py", "--data", recording, "--out", out, *SMALL, *settings)
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
def web(packed, fast_retries):
    """A web server that serves these shards."""
    with serve(packed) as server:
        yield server


@pytest.fixture
def fast_retries(monkeypatch, tmp_path):
    """Retry after milliseconds, and cache in a temporary folder."""
    monkeypatch.setattr(remote_files, "RETRIES", replace(remote_files.RETRIES, first_pause=0.01))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(SIGNED, raising=False)


@pytest.fixture
def cache(tmp_path) -> Path:
    """An empty cache folder."""
    return tmp_path / "cache"
