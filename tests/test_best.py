"""The command that makes the tables of docs/best.md: it goes on where it was stopped."""

import json

import numpy as np
from helpers import run_here
from make_sources import make_folder


def test_tables_of_splits_folds_and_subsets(tmp_path):
    make_folder(tmp_path / "mine", n=60, sites=4)
    out = tmp_path / "out"
    words = ["benchmarks/best.py", tmp_path / "mine", "--out", out, "--only", "pixels", "--folds", 2, "--subsets", 20]
    done = run_here(*words)
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    assert [(found["division"], found["subset"]) for found in results] == [
        ("given", None),
        ("2-fold", None),
        ("given", 20),
    ]
    assert [found["stimuli"] for found in results] == [12, 60, 12]
    assert [found["training_stimuli"] for found in results] == [48, 30, 20]
    metrics = out / "mine" / "given" / "runs" / "pixels" / "eval" / "val" / "metrics.json"
    assert results[0]["r2"] == np.float64(json.loads(metrics.read_text())["regression"]["r2"]["mean"])
    assert all(found["seconds"] > 0 for found in results)
    assert "| pixels |" in (out / "table.md").read_text()
    before = metrics.stat().st_mtime_ns
    assert run_here(*words).returncode == 0
    assert metrics.stat().st_mtime_ns == before
