"""The source `cowley2023` on sessions laid out as in the repository, downloaded by fetch and packed as it says."""

import re
import shlex
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, assert_refused, run_here, succeed_here
from make_field_files import make_cowley2023
from mirrors import cowley_mirror
from recordings import read_by_id, refused

from data_prep.common.errors import BadInput
from data_prep.remote.datasets import DATASETS
from data_prep.shards.folder import ShardFolder
from data_prep.sources.cowley2023 import Cowley2023

ARCHIVE = "images/images_210325.zip"
AVERAGES = "responses_repeat_averaged/responses_210325.npy"
TRIALS = "responses_raw/responses_210325.npy"
KEPT_APART = ("190923", "201025", "210225", "211022")


def image_bytes(folder: Path) -> dict[str, bytes]:
    """{stimulus: its encoded image} of the archive."""
    with zipfile.ZipFile(folder / ARCHIVE) as archive:
        return {f"210325_{name[5:9]}": archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("trials", [True, False])
def test_images_and_responses_belong_together(tmp_path, trials):
    written = make_cowley2023(tmp_path, trials=trials)
    recording = Cowley2023(source=tmp_path / ARCHIVE).open()
    assert (recording.name, recording.units, recording.stimulus_ids) == ("v4_210325", "spikes in 100 ms", written.ids)
    assert recording.sites[0] == {"id": "210325_000", "region": "V4", "subject": "PE"}
    stimuli, images = read_by_id(recording), image_bytes(tmp_path)
    for row, name in enumerate(written.ids):
        assert stimuli[name].image == images[name]
        np.testing.assert_allclose(stimuli[name].rates, np.nanmean(written.trials[row], axis=0), rtol=1e-6)
        if trials:
            np.testing.assert_array_equal(stimuli[name].trials, written.trials[row])
        else:
            assert stimuli[name].trials is None


@pytest.mark.parametrize(
    ("session", "animal"), [("190925", "WE"), ("201016", "PE"), ("210621", "RA"), ("230101", None)]
)
def test_the_date_tells_the_animal(tmp_path, session, animal):
    make_cowley2023(tmp_path, session, trials=False)
    assert Cowley2023(source=tmp_path / f"images/images_{session}.zip").open().sites[0].get("subject") == animal


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """The URL of a server that has one small session."""
    with cowley_mirror(tmp_path / "repository", monkeypatch, images=20) as url:
        yield url


def test_what_fetch_downloads_is_packed_by_the_command_that_it_prints(mirror, tmp_path, monkeypatch):
    out = tmp_path / "downloads"
    told = succeed_here("data_prep/fetch.py", "cowley2023", "--out", out, "--mirror", mirror).stdout
    for words in ("Cowley, Stan, Pillow & Smith 2023", "GPL-3.0", "HvM"):
        assert words in told
    assert (out / TRIALS).read_bytes() == (tmp_path / "repository" / TRIALS).read_bytes()
    command = next(line for line in told.splitlines() if "210325" in line and "pack.py" in line)
    monkeypatch.chdir(tmp_path)
    succeed_here(*shlex.split(command)[1:], "--workers", 1)
    packed = ShardFolder(tmp_path / "data/v4_hvm640")
    assert packed.manifest.name == "v4_hvm640"
    assert {name: split.stimuli for name, split in packed.manifest.splits.items()} == {"train": 16, "val": 4}


def test_a_changed_download_is_refused(mirror, tmp_path):
    succeed_here("data_prep/fetch.py", "cowley2023", "--out", tmp_path / "out", "--mirror", mirror)
    (tmp_path / "out" / AVERAGES).write_bytes(b"other")
    again = run_here("data_prep/fetch.py", "cowley2023", "--out", tmp_path / "out", "--mirror", mirror)
    assert_refused(again, "already exists, but its sha1 is")


def test_published_test_sessions_are_not_offered():
    """They are for checking models, so nobody trains on them by mistake."""
    known = DATASETS["cowley2023"]
    offered = {re.search(r"\d{6}", file.path)[0] for file in known.files}
    assert len(offered) == len(known.pack) == 9
    assert not offered & set(KEPT_APART)
    assert all(re.search(r"images_(\d{6})", words)[1] in offered for words in known.pack.values())
    readme = (ROOT / "README.md").read_text()
    assert not any(session in readme for session in KEPT_APART)


def save(name: str, array: np.ndarray):
    return lambda folder: np.save(folder / name, array)


BAD = {
    "renamed": (lambda folder: (folder / ARCHIVE).rename(folder / "images/a.zip"), "images_210325.zip: no such file"),
    "no averages": (lambda folder: (folder / AVERAGES).unlink(), "responses_210325.npy: no such file; it belongs to"),
    "two axes": (save(AVERAGES, np.zeros(12)), r"the shape is \(12,\), expected \(sites, images\)"),
    "transposed": (save(AVERAGES, np.zeros((12, 3))), "3 sites and 12 images, but .* has 12 and 3"),
    "few images": (save(AVERAGES, np.zeros((3, 13))), "3 sites and 12 images, but .* has 3 and 13"),
    "infinite": (save(AVERAGES, np.full((3, 12), np.inf)), "is infinite"),
    "other trials": (save(TRIALS, np.ones((3, 12, 4))), "disagree in 36 of 36 responses"),
    "pickles": (save(AVERAGES, np.array([[{}]])), "not a readable .npy file"),
}


@pytest.mark.parametrize("case", BAD)
def test_sessions_that_cannot_be_read(tmp_path, case):
    spoil, message = BAD[case]
    make_cowley2023(tmp_path)
    spoil(tmp_path)
    with pytest.raises(BadInput, match=message) as caught:
        Cowley2023(source=tmp_path / ARCHIVE).open()
    assert "\n" not in str(caught.value)


def test_images_and_responses_must_be_as_many(tmp_path):
    make_cowley2023(tmp_path, trials=False)
    averages = np.load(tmp_path / AVERAGES)
    np.save(tmp_path / AVERAGES, averages[:, :11])
    refused(tmp_path, ("more images than the 11",), "cowley2023", tmp_path / ARCHIVE)
    np.save(tmp_path / AVERAGES, np.concatenate([averages, averages], axis=1))
    refused(tmp_path, ("12 of 24 stimuli have no image there",), "cowley2023", tmp_path / ARCHIVE)
