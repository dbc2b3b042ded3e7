"""benchmarks/transfer.py reads each session with the sites of the others, and resumes where it stopped."""

import importlib
import json
import sys

import pytest
import yaml
from helpers import ROOT, succeed_here
from make_sources import make_folder

RECIPE = {"layers": ["stages.0"], "backbone": {"name": "test_convnext", "weights": "random"}, "images": {"size": 32}}


@pytest.fixture
def transfer(monkeypatch):
    """benchmarks/transfer.py as a module that runs its commands in this process, and the commands."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = importlib.import_module("transfer")
    ran = []

    def command(words, **_):
        ran.append([str(word) for word in words[1:]])
        succeed_here(*words[1:])

    monkeypatch.setattr(module, "run_checked", command)
    return module, ran


def test_sessions_are_read_with_those_that_share_no_image(transfer, tmp_path, monkeypatch):
    """`again` shows the images of `new`, and `v4_pe_x` is the only session of its animal."""
    module, ran = transfer
    for name, seed in (("new", 0), ("again", 0), ("v4_pe_x", 1)):
        make_folder(tmp_path / name, n=60, sites=3 + seed, seed=seed)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    out, others = tmp_path / "out", ["--others", tmp_path / "again", tmp_path / "v4_pe_x"]
    words = [tmp_path / "new", "--out", out, *others, "--sizes", 20, 40, "--recipe", tmp_path / "recipe.yaml"]
    monkeypatch.setattr(sys, "argv", ["transfer.py", *map(str, words)])
    module.main()
    results = json.loads((out / "results.json").read_text())
    found = [(row["system"], row["size"], row["fitted"], row["scored"], row["sites"]) for row in results]
    assert found == [
        ("alone", "20", 20, 30, 0),
        ("with the population", "20", 20, 30, 4),
    ]
    metrics = json.loads((out / "new" / "new" / "alone_20" / "eval" / "test" / "metrics.json").read_text())
    assert results[0]["r2"] == metrics["regression"]["r2"]["mean"]
    assert results[0]["median_r2"] == metrics["regression"]["squared_pearson_r"]["median"]
    assert results[0]["r2"] != results[1]["r2"]
    table = (out / "table.md").read_text()
    assert all(f"{row['r2']:.3f}" in table for row in results)
    assert (out / "transfer.png").is_file()
    before = len(ran)
    module.main()
    assert len(ran) == before


def test_animals_of_the_sessions_that_are_shared(transfer):
    module, _ = transfer
    names = ["v4_we_190927", "v4_pe_210305", "v4_hvm640", "v4_natural800", "v4_ra_210621", "mine"]
    assert [module.animal_of(name) for name in names] == ["WE", "PE", "PE", "PE", "RA", "mine"]
