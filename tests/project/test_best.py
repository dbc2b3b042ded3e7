"""benchmarks/best.py makes the tables of docs/results/best.md and resumes where it stopped."""

import importlib
import json
import sys

import pytest
from helpers import ROOT, succeed_here
from make_sources import make_folder


@pytest.fixture
def best(monkeypatch):
    """benchmarks/best.py as a module that runs its commands in this process."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = importlib.import_module("best")
    ran = []

    def command(words):
        ran.append(words[0])
        succeed_here(*words)

    monkeypatch.setattr(module, "command", command)
    return module, ran


def test_tables_of_splits_folds_and_subsets(best, tmp_path, monkeypatch):
    module, ran = best
    make_folder(tmp_path / "mine", n=60, sites=4)
    out = tmp_path / "out"
    words = [tmp_path / "mine", "--out", out, "--only", "pixels", "--folds", 2, "--subsets", 20]
    monkeypatch.setattr(sys, "argv", ["best.py", *map(str, words)])
    module.main()
    results = json.loads((out / "results.json").read_text())
    assert [(row["division"], row["subset"]) for row in results] == [("given", None), ("2-fold", None), ("given", 20)]
    assert [row["stimuli"] for row in results] == [12, 60, 12]
    assert [row["training_stimuli"] for row in results] == [48, 30, 20]
    metrics = json.loads((out / "mine" / "given" / "runs" / "pixels" / "eval" / "val" / "metrics.json").read_text())
    assert results[0]["r2"] == pytest.approx(metrics["regression"]["r2"]["mean"], rel=1e-6)
    assert all(row["seconds"] > 0 for row in results)
    assert "| pixels |" in (out / "table.md").read_text()
    assert len(ran) == 3 + 4
    module.main()
    assert len(ran) == 3 + 4


def test_every_system_is_known_and_needs_what_it_joins(best):
    module, _ = best
    systems = module.systems()
    assert set(module.CURVE) < set(systems)
    for system in systems.values():
        assert (ROOT / system.words[0]).is_file()
        assert all((ROOT / word).is_file() for word in system.words if word.endswith(".yaml"))
        assert bool(system.needs) == (system.is_ensemble or system.takes is not None)
