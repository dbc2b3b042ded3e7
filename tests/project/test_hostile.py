"""Bad and malicious input is refused in one error message, in bounded time; nothing runs or is left behind."""

import signal
import time
from pathlib import Path

import bad_runs
import bad_shards
import bad_sources
import pytest
from helpers import assert_refused, run_here, started_as, succeed_here
from hostile import Case, Kit, edit, sealed
from launching import SMALL
from make_sources import make_folder

from data_prep.shards.packing import pack
from data_prep.sources.folder import Folder

SECONDS = 20  # that refusing may take on a busy machine; what hangs takes for ever

CORPORA: dict[str, dict[str, Case]] = {
    "manifest": bad_shards.MANIFESTS,
    "index": bad_shards.INDEXES,
    "tar": bad_shards.TARS,
    "stranger's tar": bad_shards.STRANGERS,
    "address": bad_shards.ADDRESSES,
    "folder": bad_sources.FOLDERS,
    "archive": bad_sources.ARCHIVES,
    "hdf5": bad_sources.HDF5,
    "recipe": bad_runs.RECIPES,
    "contradiction": bad_runs.CONTRADICTIONS,
    "weights": bad_runs.WEIGHTS,
    "run": bad_runs.RUNS,
}
CASES = {f"{corpus}: {name}": case for corpus, cases in CORPORA.items() for name, case in cases.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """A shard folder (12 stimuli to train on in two shards, 4 sites, trials and objects) and a run on it."""
    folder = tmp_path_factory.mktemp("whole")
    make_folder(folder / "src", n=20, splits=True, sites=4, trials=3)
    packed = pack(Folder(source=folder / "src").open(), folder / "shards", stimuli_per_shard=8, workers=1).folder
    options = [*SMALL, "--epochs", "1", "--batch.global-size", "4", "--task.kind", "hybrid"]
    succeed_here("train/finetune.py", "--data", packed, "--out", folder / "run", *options)
    return packed, folder / "run"


@pytest.fixture
def kit(made, tmp_path) -> Kit:
    return Kit(tmp_path, *made)


@pytest.fixture(autouse=True)
def _never_for_ever():
    """Interrupt a test that hangs."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"it took longer than {SECONDS} s"))
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)


def everything_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_by_name(kit, case, monkeypatch):
    make, words = CASES[case]
    command = make(kit)
    monkeypatch.chdir(kit.folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(kit.folder / "cache"))
    before, started = everything_in(kit.folder), time.monotonic()
    done = run_here(*command)
    assert_refused(done, *words)
    assert done.stderr.isprintable() or all(line.isprintable() for line in done.stderr.splitlines())
    assert not kit.canary.exists()
    assert everything_in(kit.folder) == before
    assert time.monotonic() - started < SECONDS


def test_a_contact_sheet_that_leads_elsewhere_overwrites_nothing(kit):
    """The target of a link in the folder stays unchanged, and the sheet replaces the link."""
    folder, precious = kit.shards(), kit.write("precious", "mine")
    (folder / "contact_sheet.png").symlink_to(precious)
    succeed_here("data_prep/show.py", folder)
    assert precious.read_text() == "mine"
    assert not (folder / "contact_sheet.png").is_symlink()
    assert (folder / "contact_sheet.png").read_bytes().startswith(b"\x89PNG")


def test_shown_text_cannot_control_the_terminal(kit):
    folder = sealed(kit.shards())

    def change(content: dict) -> None:
        content["sites"][0]["region"] = content["provenance"]["split"] = "\x1b[2J\x07"
        content["provenance"]["warnings"] = ["\x1b]0;owned\x07\nerror: all is well"]

    edit(folder / "manifest.json", change)
    done = succeed_here("data_prep/show.py", folder)
    assert all(line.isprintable() for line in done.stdout.splitlines())
    assert "\\x1b]0;owned" in done.stdout


def test_more_processes_than_stimuli_are_refused(kit, monkeypatch):
    for name, value in started_as(rank=0, ranks=64).items():
        monkeypatch.setenv(name, value)
    done = run_here("train/finetune.py", "--data", kit.packed, "--out", kit.folder / "out", *SMALL)
    assert_refused(done, "64 processes cannot share")


def test_there_are_many_hostile_cases():
    assert len(CASES) >= 300
