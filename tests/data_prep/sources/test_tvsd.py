"""The source `tvsd` on files as MATLAB lays them out."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from make_field_files import make_tvsd
from recordings import packed, read_by_id

from data_prep.common.errors import BadInput
from data_prep.sources.tvsd import Tvsd


@pytest.mark.parametrize("turned", [False, True])
def test_the_things_ventral_stream_dataset(tmp_path, turned):
    written = make_tvsd(tmp_path, turned=turned)
    source = tmp_path / "monkeyF" / "THINGS_normMUA.mat"
    recording = Tvsd(source=source, images=tmp_path / "object_images", region=("IT",), min_reliability=0.5).open()
    reliability = np.linspace(-0.1, 0.9, 1024)
    keep = [k for k in range(512, 832) if reliability[k] >= 0.5]
    assert 0 < len(keep) < 320
    assert [site["channel"] for site in recording.sites] == keep
    first = recording.sites[0]
    assert (first["id"], first["region"], first["subject"]) == (f"F_{keep[0]:04d}", "IT", "F")
    assert first["reliability"] == pytest.approx(reliability[keep[0]])
    assert first["snr_max"] == keep[0]
    assert recording.response_window_ms == (75, 175)
    assert (recording.splits.count("test"), recording.splits.count("val")) == (5, 2)
    stimuli = read_by_id(recording)
    for row, name in enumerate(written.ids):
        is_test = row >= 30
        assert (recording.splits[row] == "test") == is_test
        np.testing.assert_allclose(stimuli[name].rates, np.nanmean(written.trials[row][:, keep], axis=0), rtol=1e-5)
        assert (stimuli[name].trials is not None) == is_test
        if is_test:
            np.testing.assert_array_equal(stimuli[name].trials, written.trials[row][:, keep])
        assert stimuli[name].meta["object"] == written.objects[row]
        path = tmp_path / "object_images" / written.objects[row] / f"{name}.jpg"
        assert stimuli[name].image == path.read_bytes()


def test_it_is_packed_by_the_command(tmp_path):
    make_tvsd(tmp_path)
    source = tmp_path / "monkeyF" / "THINGS_normMUA.mat"
    result = packed(tmp_path, "tvsd", source, "--images", tmp_path, "--region", "V4", "IT", "--group-by", "object")
    assert len(result.manifest.sites) == 512
    assert result.manifest.response_window_ms is None
    assert result.manifest.sites[0]["window_ms"] == [75, 175]
    assert result.manifest.ceiling.stimuli == 5
    val = {result.split("val").meta(k)["object"] for k in range(result.manifest.splits["val"].stimuli)}
    train = {result.split("train").meta(k)["object"] for k in range(result.manifest.splits["train"].stimuli)}
    assert not val & train


def spoil_tvsd(change):
    def spoil(folder: Path) -> None:
        with h5py.File(folder / "monkeyF" / "THINGS_normMUA.mat", "r+") as file:
            change(file)

    return spoil


def set_array(name, array):
    def change(file):
        del file[name]
        file[name] = array

    return spoil_tvsd(change)


def plain_text(folder: Path) -> None:
    with h5py.File(folder / "monkeyF" / "_logs" / "things_imgs.mat", "r+") as file:
        del file["train_imgs/things_path"]
        file["train_imgs/things_path"] = np.zeros((30, 1))


BAD_TVSD = {
    "stimuli": (set_array("train_MUA", np.zeros((29, 1024))), {}, r"train_MUA .*\(29, 1024\).*\(30, 1024\)"),
    "channels": (set_array("test_MUA_reps", np.zeros((4, 5, 96))), {}, r"test_MUA_reps.*\(repetitions, 5, 1024\)"),
    "missing": (spoil_tvsd(lambda file: file.__delitem__("reliab")), {}, "no dataset 'reliab'; it holds"),
    "reliable": (lambda folder: None, {"min_reliability": 0.95}, "no channel has a reliability of 0.95"),
    "paths": (plain_text, {}, "expected references to text"),
    "images": (lambda folder: (folder / "object_images/bear").rename(folder / "bear"), {}, "have no image there"),
    "image_list": (lambda folder: None, {"image_list": Path("x.mat")}, "x.mat: no such file.*--image-list"),
}


@pytest.mark.parametrize("case", BAD_TVSD)
def test_tvsd_files_that_cannot_be_read(tmp_path, case):
    spoil, options, message = BAD_TVSD[case]
    make_tvsd(tmp_path, train=30)
    spoil(tmp_path)
    source = tmp_path / "monkeyF" / "THINGS_normMUA.mat"
    with pytest.raises(BadInput, match=message) as caught:
        Tvsd(source=source, images=tmp_path / "object_images", **options).open()
    assert "\n" not in str(caught.value)


def test_the_monkey_must_be_known(tmp_path):
    make_tvsd(tmp_path)
    (tmp_path / "monkeyF").rename(tmp_path / "mine")
    options = {"source": tmp_path / "mine" / "THINGS_normMUA.mat", "images": tmp_path / "object_images"}
    with pytest.raises(BadInput, match="--monkey F or --monkey N"):
        Tvsd(**options).open()
    sites = Tvsd(**options, monkey="N").open().sites
    assert [sites[k]["region"] for k in (511, 512, 767, 768)] == ["V1", "V4", "V4", "IT"]
