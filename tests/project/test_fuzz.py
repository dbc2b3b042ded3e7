"""A short, repeatable run of benchmarks/fuzz.py for every reader."""

import sys
from pathlib import Path

import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import fuzz

READERS = (
    *("manifest", "index", "targets", "tar", "npy", "json", "image", "zip", "recipe", "probe", "sweep", "progress"),
    *("sums", "checkpoint", "weights", "predictions", "seen"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def targets(folder) -> dict[str, fuzz.Target]:
    return fuzz.targets(folder)


@pytest.mark.parametrize("name", READERS)
def test_a_reader_ends_with_what_it_read_or_with_the_one_error(targets, folder, tmp_path, name):
    judge = fuzz.Judge(name, targets[name], folder / "canary", tmp_path)
    fuzz.with_hypothesis(judge, 0.1, derandomize=True)
    assert judge.faults == {}
    assert judge.tried >= fuzz.BATCH


def test_every_reader_is_tried(targets):
    assert set(READERS) == set(targets)


def test_the_judge_notices_crashes_delays_and_code(folder, tmp_path, monkeypatch):
    def crash(data: bytes) -> None:
        if data == b"late":
            while True:
                pass
        if data == b"code":
            (folder / "canary").write_text("executed")
        elif data == b"crash":
            raise KeyError("x")

    monkeypatch.setattr(fuzz, "SECONDS_AN_INPUT", 1)
    judge = fuzz.Judge("x", fuzz.Target(crash, []), folder / "canary", tmp_path)
    for data in (b"fine", b"late", b"code", b"crash"):
        judge(data)
    assert set(judge.faults) == {"TookTooLong", "EXECUTED", "KeyError"}
