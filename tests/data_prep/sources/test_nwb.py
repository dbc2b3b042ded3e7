"""The source `nwb` on sessions as pynwb writes them."""

import h5py
import numpy as np
import pytest
from make_field_files import make_nwb
from recordings import check_packed, packed, read_by_id, refused

from data_prep.common.errors import BadInput
from data_prep.sources.nwb import Nwb


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """An NWB file as pynwb writes it, and images in a sub-folder."""
    pytest.importorskip("pynwb")
    folder = tmp_path_factory.mktemp("session")
    return folder, make_nwb(folder / "session.nwb")


def test_a_session_is_packed_as_rates(session, tmp_path):
    folder, written = session
    template = folder / "stimuli" / "set_a" / "{stimulus_id}.png"
    result = packed(tmp_path, "nwb", folder / "session.nwb", "--images", template, "--ignore", "blank")
    check_packed(result, written, scale=10)
    assert result.manifest.rates.units == "spikes/s"
    assert result.manifest.response_window_ms == (70, 170)
    assert result.manifest.sites[1] == {"id": "unit_1", "region": "V4", "subject": "M1", "quality": "good"}
    assert result.manifest.classes == sorted(set(written.objects))
    assert "correct" in result.split("train").meta(0)
    late = np.array([np.isnan(stimulus[:, -1]).all() for stimulus in result.split("train").trials()])
    assert late.any()
    assert not late.all()


def test_several_windows_give_a_site_each(session):
    folder, written = session
    windows = ((70.0, 120.0), (120.0, 170.0))
    options = {"source": folder / "session.nwb", "images": str(folder / "stimuli"), "ignore": ("blank",)}
    recording = Nwb(**options, window_ms=windows, region=("IT",)).open()
    assert [site["id"] for site in recording.sites[:2]] == ["unit_0_70-120ms", "unit_0_120-170ms"]
    assert recording.sites[1]["window_ms"] == [120, 170]
    assert len(recording.sites) == 2 * 3
    assert recording.response_window_ms is None
    stimuli = read_by_id(recording)
    expected_mean = np.stack([stimuli[name].trials.reshape(3, 3, 2).mean(axis=2) for name in written.ids])
    np.testing.assert_allclose(expected_mean, written.trials[:, :, ::2] * 10, rtol=1e-5)


def test_tables_and_columns_are_found_or_named(tmp_path):
    pytest.importorskip("pynwb")
    written = make_nwb(tmp_path / "a.nwb", table="scenes", column="scene")
    options = {"source": tmp_path / "a.nwb", "images": str(tmp_path / "stimuli"), "ignore": ("blank",)}
    with pytest.raises(
        BadInput, match=r"no column stimulus_id or .*; there are .*scene, start_time.*--stimulus-column"
    ):
        Nwb(**options).open()
    recording = Nwb(**options, stimulus_column="scene").open()
    assert sorted(recording.stimulus_ids) == written.ids
    template = str(tmp_path / "stimuli" / "set_a" / "{scene}.png")
    assert Nwb(**options | {"images": template}, stimulus_column="scene").open().stimulus_ids == recording.stimulus_ids
    stimuli = tmp_path / "stimuli"
    for bad, message in {
        f"{stimuli}/{{name}}.png": "'name' is not known for stimulus .*scene",
        f"{stimuli}/{{scene": "not a template",
        f"{stimuli}/{{scene.upper}}": "'scene.upper' is not known",
        str(tmp_path / "none" / "{scene}.png"): "neither a folder nor a zip",
    }.items():
        with pytest.raises(BadInput, match=message):
            Nwb(**options | {"images": bad}, stimulus_column="scene").open()


BAD_SESSIONS = {
    "table": ({"table": "scenes"}, "--table; /intervals holds trials"),
    "column": ({"stimulus_column": "scene"}, "no column scene; there are .*stimulus_id.*--stimulus-column"),
    "onset": ({"onset_column": "flash"}, "no column flash; .*start_time.*--onset-column"),
    "region": ({"region": ("V1",)}, "'V1'.*IT, V4"),
    "region column": ({"region_column": "depth"}, "no column depth.*quality.*--region-column"),
    "window": ({"window_ms": ((170.0, 70.0),)}, "a window must start before it ends"),
    "blank": ({"ignore": ()}, "1 of 21 stimuli have no image there, e.g. 'blank'"),
    "image column": ({"image_column": "file"}, "--image-column: 'file' is not known"),
}


@pytest.mark.parametrize("case", BAD_SESSIONS)
def test_sessions_that_cannot_be_read(session, case):
    folder, _ = session
    options, message = BAD_SESSIONS[case]
    known = {"source": folder / "session.nwb", "images": str(folder / "stimuli"), "ignore": ("blank",)}
    with pytest.raises(BadInput, match=message) as caught:
        Nwb(**known | options).open()
    assert "\n" not in str(caught.value)


def test_links_and_other_files_are_refused(tmp_path, session):
    folder, _ = session
    (tmp_path / "a.nwb").write_bytes((folder / "session.nwb").read_bytes())
    with h5py.File(tmp_path / "a.nwb", "r+") as file:
        del file["units"]
        file["units"] = h5py.ExternalLink(str(folder / "session.nwb"), "/units")
    refused(tmp_path, ("units is a link",), "nwb", tmp_path / "a.nwb", "--images", folder / "stimuli")
    (tmp_path / "b.nwb").write_bytes(b"no HDF5")
    refused(tmp_path, ("not a readable HDF5 file",), "nwb", tmp_path / "b.nwb", "--images", folder / "stimuli")
