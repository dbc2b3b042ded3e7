"""What the documentation says about sources: the worked example, and that their options load no slow library."""

import importlib
import subprocess
import sys
from typing import get_args

import numpy as np
import pytest
from helpers import ROOT
from make_field_files import Written, make_trials, write_images
from make_sources import make_images
from recordings import check_packed

from data_prep.pack import Pack
from data_prep.shards.packing import pack

SLOW = ("h5py", "pyarrow", "scipy", "PIL", "simplejpeg", "webdataset", "torch")


def test_the_source_that_the_documentation_adds(tmp_path, monkeypatch):
    """The worked example of docs/data_format.md, packed as it stands there."""
    text = (ROOT / "docs" / "data_format.md").read_text()
    (tmp_path / "npz_source.py").write_text(text.split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    source = importlib.import_module("npz_source")
    images, _ = make_images(20)
    trials = make_trials(images, 3, 4)
    names = [f"im {k}" for k in range(20)]
    write_images(tmp_path / "images", [f"{name}.png" for name in names], images)
    np.savez(tmp_path / "session.npz", stimulus_id=names, site_id=list("abcd"), trials=trials)
    recording = source.Npz(source=tmp_path / "session.npz", images=tmp_path / "images").open()
    folder = pack(recording, tmp_path / "shards", 10, 1)
    check_packed(folder, Written(names, images, [], trials, [], []))
    assert folder.manifest.site_ids == list("abcd")


def test_the_options_of_sources_import_no_slow_library():
    """Help and command-line errors must appear at once."""
    names = [f"data_prep.sources.{path.stem}" for path in (ROOT / "data_prep" / "sources").glob("[!_]*.py")]
    code = f"import sys, {', '.join(names)}; print(*({set(SLOW)!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("source", get_args(Pack.model_fields["source"].annotation), ids=lambda kind: kind.__name__)
def test_every_option_has_a_help_text(source):
    assert all(field.description for field in source.model_fields.values())
