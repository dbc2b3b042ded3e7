"""The notebooks run as they are, on runs that are named like those of the quickstart."""

import io
import json
import shutil

import matplotlib.pyplot as plt
import pytest
from helpers import ROOT
from PIL import Image

from data_prep.shards.folder import ShardFolder


@pytest.fixture
def desk(predictors, recording, tmp_path, monkeypatch):
    """A working folder with runs and images."""
    shutil.copytree(predictors / "probe", tmp_path / "runs/quickstart/frozen")
    shutil.copytree(predictors / "run", tmp_path / "runs/quickstart/finetuned", symlinks=True)
    (tmp_path / "my_images").mkdir()
    val = ShardFolder(recording).split("val")
    for number in range(12):
        image = Image.open(io.BytesIO(val.image(number)[0]))
        image.resize((60 + number, 50)).save(tmp_path / "my_images" / f"{number:02}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_notebook_runs(desk, capsys):
    (notebook,) = (ROOT / "examples").glob("*.ipynb")
    content = json.loads(notebook.read_text())
    assert content["nbformat"] == 4
    assert all(not cell.get("outputs") for cell in content["cells"])  # they would be those of one machine
    scope: dict = {}
    cells = ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]
    with plt.rc_context({"backend": "agg"}):
        for number, source in enumerate(cells):
            exec(compile(source, f"{notebook.name}, code cell {number}", "exec"), scope)
    plt.close("all")
    printed = capsys.readouterr().out
    assert "(12, 12)" in printed
    assert "my_images/" in printed
    assert (desk / "two_models.png").stat().st_size > 10_000
