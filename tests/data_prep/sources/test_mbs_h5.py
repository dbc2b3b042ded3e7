"""The source `mbs-h5` on files of model-brain comparisons."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from make_field_files import make_mbs, write_images
from recordings import check_packed, packed, pixels, read_by_id, refused

from data_prep.common.errors import BadInput
from data_prep.sources.mbs_h5 import MbsH5


def test_splits_subjects_and_regions_of_a_comparison_file(tmp_path):
    written = make_mbs(tmp_path / "mbs.h5")
    result = packed(tmp_path, "mbs-h5", tmp_path / "mbs.h5")
    check_packed(result, written)
    site = result.manifest.sites[0]
    assert (site["id"], site["noise_ceiling"]) == ("s1_IT_0000", pytest.approx(0.2))
    assert {name: split.stimuli for name, split in result.manifest.splits.items()} == {"train": 19, "val": 1, "test": 6}
    assert result.split("train").meta(0) == {"source_id": written.ids[0]}


def test_subjects_that_saw_other_stimuli(tmp_path):
    written = make_mbs(tmp_path / "mbs.h5", own_ids=True)
    recording = MbsH5(source=tmp_path / "mbs.h5", region=("IT",)).open()
    assert [site["subject"] for site in recording.sites] == ["s1"] * 4 + ["s2"] * 2
    stimuli = read_by_id(recording)
    keep = [k for k, region in enumerate(written.regions) if region == "IT"]
    rates = np.stack([stimuli[name].rates for name in written.ids])
    np.testing.assert_array_equal(rates, written.trials[:, 0, keep])
    assert np.isnan(rates[:5, :4]).sum() == 16
    assert all(stimulus.trials is None for stimulus in stimuli.values())
    assert all(
        np.array_equal(pixels(stimuli[name].image), image)
        for name, image in zip(written.ids, written.images, strict=True)
    )


def test_images_may_lie_in_a_folder_or_another_file(tmp_path):
    written = make_mbs(tmp_path / "mbs.h5", with_images=False, val=True)
    with pytest.raises(BadInput, match=r"no array of images named stimuli or .*--image-dataset.*--images"):
        MbsH5(source=tmp_path / "mbs.h5").open()
    write_images(tmp_path / "folder", written.ids, written.images)
    recording = MbsH5(source=tmp_path / "mbs.h5", images=tmp_path / "folder").open()
    assert recording.splits[20:22] == ["val", "val"]
    assert recording.splits.count("val") == 2
    assert np.array_equal(pixels(read_by_id(recording)["im1004_png"].image), written.images[4])
    with pytest.raises(BadInput, match="has a split val, so --seed would be ignored"):
        MbsH5(source=tmp_path / "mbs.h5", images=tmp_path / "folder", seed=1).open()
    with h5py.File(tmp_path / "brick.h5", "w") as file:
        file["imgBrick"] = np.zeros((1000 + len(written.ids), 8, 8, 3), np.uint8)
    make_mbs(tmp_path / "own.h5", own_ids=True, with_images=False)
    by_number = MbsH5(source=tmp_path / "own.h5", images=tmp_path / "brick.h5").open()
    assert by_number.image_names[:2] == ["imgBrick#1005", "imgBrick#1006"]


def edit(path: Path, name: str, value) -> None:
    with h5py.File(path, "r+") as file:
        if name in file:
            del file[name]
        if value is not None:
            file[name] = value


BAD_MBS = {
    "rows": ("test/neural_data/s1/V4", np.zeros((5, 3)), r"test/neural_data/s1/V4 has the shape \(5, 3\); .*\(6, 3\)"),
    "sites": ("test/neural_data/s1/V4", np.zeros((6, 4)), r"\(6, 4\); expected \(6, 3\)"),
    "times": ("train/neural_data/s1/V4", np.zeros((21, 3, 80)), "plain numbers with 2 axes"),
    "objects": ("train/stimulus_ids", np.zeros(21, [("id", int)]), "expected strings or integers"),
    "no ids": ("test/stimulus_ids", None, "no dataset 'test/stimulus_ids'; test holds neural_data"),
    "in two": ("test/stimulus_ids", [b"im1003.png"] * 6, "'im1003.png' is in both train and test"),
    "ceilings": ("noise_ceilings/s1/V4", np.zeros(4), "4 values for 3 sites"),
    "floats": ("train/stimuli", np.zeros((21, 8, 8, 3)), r"expected uint8 \(21, height, width, 3\)"),
    "soft link": ("train/neural_data/s1/V4", h5py.SoftLink("/test/neural_data/s1/V4"), "is a link; the data must"),
}


@pytest.mark.parametrize("case", BAD_MBS)
def test_comparison_files_that_cannot_be_read(tmp_path, case):
    name, value, message = BAD_MBS[case]
    make_mbs(tmp_path / "mbs.h5")
    edit(tmp_path / "mbs.h5", name, value)
    with pytest.raises(BadInput, match=message) as caught:
        MbsH5(source=tmp_path / "mbs.h5").open()
    assert "\n" not in str(caught.value)


def test_comparison_files_know_their_subjects_and_regions(tmp_path):
    make_mbs(tmp_path / "mbs.h5")
    refused(tmp_path, ("'V9'", "IT, V4"), "mbs-h5", tmp_path / "mbs.h5", "--region", "V9")
    refused(tmp_path, ("'s9'", "s1, s2"), "mbs-h5", tmp_path / "mbs.h5", "--subject", "s9")
    refused(tmp_path, ("no responses of subject",), "mbs-h5", tmp_path / "mbs.h5", "--subject", "s2", "--region", "V4")
