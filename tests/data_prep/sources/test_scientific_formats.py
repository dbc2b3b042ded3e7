"""The sources `brainio`, `nwb`, `tvsd` and `mbs-h5` on files as the field writes them."""

import importlib
import io
import pickle
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers import ROOT, assert_refused, run_here
from make_field_files import Written, make_assembly, make_mbs, make_nwb, make_trials, make_tvsd, write_images
from make_sources import make_images, write_csv
from PIL import Image

from data_prep.common.errors import BadInput
from data_prep.recording import Recording, Stimulus, trial_average
from data_prep.shards.folder import ShardFolder
from data_prep.shards.packing import pack
from data_prep.sources.brainio import Brainio
from data_prep.sources.files import hdf5, presentations
from data_prep.sources.files.ids import safe_ids
from data_prep.sources.files.image_files import ImageFiles
from data_prep.sources.files.presentations import gather_trials, rows_by_stimulus
from data_prep.sources.mbs_h5 import MbsH5
from data_prep.sources.nwb import Nwb
from data_prep.sources.tvsd import Tvsd

PACK = "data_prep/pack.py"


def read_all(recording: Recording) -> dict[str, Stimulus]:
    """Everything by id, through a pickle and in another order than the source's, as packing processes may read."""
    recording = pickle.loads(pickle.dumps(recording))
    order = np.random.default_rng(0).permutation(len(recording.stimulus_ids))
    return {stimulus.id: stimulus for stimulus in recording.read(order.tolist())}


def packed(tmp_path: Path, *args) -> ShardFolder:
    """Pack with the real command."""
    out = tmp_path / "packed"
    done = run_here(PACK, *args, "--out", out, "--workers", 1)
    assert done.returncode == 0, done.stderr
    return ShardFolder(out)


def refused(tmp_path: Path, words: tuple[str, ...], *args) -> None:
    """The real command ends with one sentence and leaves nothing behind."""
    out = tmp_path / "refused"
    assert_refused(run_here(PACK, *args, "--out", out, "--workers", 1), *words)
    assert not list(tmp_path.glob("*refused*"))


def pixels(data) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def check_pack(folder: ShardFolder, written: Written, columns=slice(None), scale: float = 1.0) -> None:
    """What was packed is what was written: images, averages, and trials where there are several."""
    row_of = {name: row for row, name in enumerate(safe_ids(written.ids))}
    found = set()
    for name in folder.manifest.splits:
        split = folder.split(name)
        for position, stimulus in enumerate(split.stimulus_ids):
            row = row_of[stimulus]
            assert np.array_equal(pixels(split.image(position)[0]), written.images[row])
            trials = written.trials[row][:, columns] * np.float32(scale)
            np.testing.assert_allclose(split.array(position, "rates.npy"), trial_average(trials), rtol=1e-5)
            if written.trials.shape[1] > 1:
                np.testing.assert_allclose(split.array(position, "trials.npy"), trials, rtol=1e-5)
            found.add(stimulus)
    assert found == set(row_of)


def order_free(trials: np.ndarray) -> np.ndarray:
    """Repetitions of one stimulus sorted, missing ones last."""
    return np.sort(trials, axis=-2)


# ---- brainio -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def assembly(tmp_path_factory):
    """An assembly as BrainIO writes it: compressed NetCDF-4, neuroid x presentation x time_bin."""
    pytest.importorskip("xarray")
    folder = tmp_path_factory.mktemp("assembly")
    encoding = {"data": {"zlib": True, "complevel": 1, "chunksizes": (5, 16, 1)}}
    return folder, make_assembly(folder, format="NETCDF4", encoding=encoding)


def brainio(folder: Path, **options) -> Brainio:
    return Brainio(source=folder / "assy.nc", stimuli=folder / "stimuli.csv", images=folder / "images.zip", **options)


def test_an_assembly_is_packed_as_it_was_recorded(assembly, tmp_path):
    folder, written = assembly
    result = packed(
        tmp_path,
        "brainio",
        folder / "assy.nc",
        "--stimuli",
        folder / "stimuli.csv",
        "--images",
        folder / "images.zip",
    )
    check_pack(result, written)
    manifest = result.manifest
    assert manifest.response_window_ms == (70, 170)
    assert manifest.classes == sorted(set(written.objects))
    assert manifest.sites[1] == {"id": "Chabo_L_1", "region": "V4", "subject": "Chabo", "depth": 0.5}
    assert "depth" not in manifest.sites[0]
    assert (manifest.ceiling.repetitions["min"], manifest.ceiling.repetitions["max"]) == (3, 4)
    train = result.split("train")
    row = written.ids.index(train.stimulus_ids[0])
    assert train.meta(0) == {
        "object": written.objects[row],
        "category": train.meta(0)["category"],
        "rxy": row / 4,
    }


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ({"format": "NETCDF4", "axes": ("time_bin", "presentation", "neuroid")}, {}),
        ({"format": "NETCDF4", "axes": ("presentation", "neuroid"), "id_name": "stimulus_id", "variable": None}, {}),
        ({"format": "NETCDF3_CLASSIC", "engine": "scipy"}, {}),
        ({"format": "NETCDF3_64BIT", "engine": "scipy", "axes": ("presentation", "time_bin", "neuroid")}, {}),
        ({"format": "NETCDF4", "encoding": {"data": {"dtype": "int32", "scale_factor": 1e-4, "_FillValue": -1}}}, {}),
        ({"format": "NETCDF4", "drop": ("repetition", "object_name")}, {}),
    ],
    ids=["turned", "two axes, unnamed", "netcdf-3", "netcdf-3, 64 bit", "integers", "without repetition"],
)
def test_assemblies_of_every_layout(tmp_path, layout, options):
    pytest.importorskip("xarray")
    written = make_assembly(tmp_path, **layout)
    recording = brainio(tmp_path, **options).open()
    found = read_all(recording)
    tolerance = 1e-4 if "encoding" in layout else 1e-6
    for row, name in enumerate(written.ids):
        trials = found[name].trials
        assert trials.dtype == np.float32
        np.testing.assert_allclose(order_free(trials), order_free(written.trials[row]), atol=tolerance)
        np.testing.assert_allclose(found[name].rates, np.nanmean(written.trials[row], axis=0), atol=tolerance)
        assert found[name].meta["object"] == written.objects[row]
    assert recording.response_window_ms == (None if "time_bin" not in layout.get("axes", ("time_bin",)) else (70, 170))


def test_regions_animals_and_time_bins_are_selected(tmp_path):
    pytest.importorskip("xarray")
    bins = ((70, 120), (120, 170), (170, 220), (70, 170.5))
    written = make_assembly(tmp_path, bins=bins)
    keep = [k for k in range(10) if written.regions[k] == "IT" and written.subjects[k] == "Tito"]
    options = {"region": ("IT",), "animal": ("Tito",)}
    for time_bin, added in {(120, 170): 1, (70, 170): 0.5}.items():
        recording = brainio(tmp_path, time_bin=time_bin, **options).open()
        assert [site["id"] for site in recording.sites] == [f"Tito_L_{k}" for k in keep]
        assert recording.response_window_ms == time_bin
        found = read_all(recording)
        for row, name in enumerate(written.ids):
            expected = written.trials[row][:, keep] + added
            np.testing.assert_allclose(order_free(found[name].trials), order_free(expected), rtol=1e-6)
    for time_bin in ((70, 165), (75, 170), (0, 50), (70, 220)):  # two bins overlap in the last
        with pytest.raises(BadInput, match="70-120, 120-170"):
            brainio(tmp_path, time_bin=time_bin).open()
    with pytest.raises(BadInput, match="--time-bin START END; there are 70-120"):
        brainio(tmp_path).open()


def test_the_public_assembly_of_averages_has_rates_and_no_trials(tmp_path):
    pytest.importorskip("xarray")
    written = make_assembly(tmp_path, repetitions=1, drop=("repetition",))
    found = read_all(brainio(tmp_path).open())
    assert all(stimulus.trials is None for stimulus in found.values())
    assert np.array_equal(np.stack([found[name].rates for name in written.ids]), written.trials[:, 0])


def test_presentations_are_read_in_pieces(assembly, monkeypatch):
    folder, written = assembly
    monkeypatch.setattr(hdf5, "BLOCK_BYTES", 4 * 10 * 20)
    monkeypatch.setattr(presentations, "TRIALS_BYTES", 4 * 10 * 30)
    recording, longest = brainio(folder).open(), []
    plain = h5py.Dataset.__getitem__

    def counted(dataset, key, *args, **kwargs):
        values = plain(dataset, key, *args, **kwargs)
        if dataset.name == "/data":
            longest.append(values.shape[1])
        return values

    monkeypatch.setattr(h5py.Dataset, "__getitem__", counted)
    found = list(recording.read(range(len(written.ids))))
    assert max(longest) <= 16
    row_of = {name: row for row, name in enumerate(written.ids)}
    for stimulus in found:
        np.testing.assert_array_equal(stimulus.trials, written.trials[row_of[stimulus.id]])


BAD_ASSEMBLIES = {
    "no ids": ({"drop": ("image_id",)}, {}, "no coordinate stimulus_id or image_id along presentation; there is rep"),
    "no sites": ({"drop": ("neuroid_id",)}, {}, "no coordinate neuroid_id or neuroid along neuroid; there is"),
    "no bins": ({"drop": ("time_bin_end",), "bins": ((0, 10), (10, 20))}, {"time_bin": (0, 10)}, "along time_bin"),
    "no region": ({}, {"region": ("V1",)}, r"region 'V1' \(--region\); there are: IT, V4"),
    "region not told": ({"drop": ("region",)}, {"region": ("V1",)}, "there are: the file names none"),
    "no animal": ({}, {"animal": ("Nano",)}, "'Nano'.*Chabo, Tito"),
    "no variable": ({}, {"variable": "rates"}, "no variable 'rates'.*there is data"),
    "no group": ({}, {"group_by": "pose"}, "--group-by pose: .*category, object, rxy"),
    "bin of none": ({"axes": ("presentation", "neuroid")}, {"time_bin": (70, 170)}, "no axis time_bin"),
}


@pytest.mark.parametrize("case", BAD_ASSEMBLIES)
def test_assemblies_that_cannot_be_read(tmp_path, case):
    pytest.importorskip("xarray")
    layout, options, message = BAD_ASSEMBLIES[case]
    make_assembly(tmp_path, **layout)
    with pytest.raises(BadInput, match=message) as caught:
        brainio(tmp_path, **options).open()
    assert "\n" not in str(caught.value)


def test_stimuli_without_row_or_image_are_refused_with_one_of_them(assembly, tmp_path):
    folder, written = assembly
    command = ["brainio", folder / "assy.nc", "--stimuli", folder / "stimuli.csv"]
    write_images(tmp_path / "few", [f"{name}.png" for name in written.ids[:-2]], written.images[:-2])
    refused(tmp_path, ("2 of 24 stimuli have no image", written.ids[-2]), *command, "--images", tmp_path / "few")
    refused(tmp_path, ("neither a folder nor a zip",), *command, "--images", tmp_path / "nowhere")
    write_csv(tmp_path / "other.csv", {"image_id": ["a"], "filename": ["a.png"]})
    refused(
        tmp_path, ("24 of the 24 stimuli", "no row"),
        *command[:2], "--stimuli", tmp_path / "other.csv", "--images", folder / "images.zip",
    )  # fmt: skip


def test_an_image_that_turns_out_bad_while_packing_leaves_nothing_behind(assembly, tmp_path):
    folder, written = assembly
    write_images(tmp_path / "images", [f"{name}.png" for name in written.ids], written.images)
    (tmp_path / "images" / f"{written.ids[9]}.png").write_bytes(b"no image")
    command = ["brainio", folder / "assy.nc", "--stimuli", folder / "stimuli.csv", "--images", tmp_path / "images"]
    refused(tmp_path, (f"{written.ids[9]}.png: the image cannot be read",), *command)


# ---- nwb -----------------------------------------------------------------------------------------------------------


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
    check_pack(result, written, scale=10)
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
    found = read_all(recording)
    whole = np.stack([found[name].trials.reshape(3, 3, 2).mean(axis=2) for name in written.ids])
    np.testing.assert_allclose(whole, written.trials[:, :, ::2] * 10, rtol=1e-5)


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
        f"{stimuli}/{{name}}.png": "'name' is not known of stimulus .*scene",
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


# ---- tvsd ----------------------------------------------------------------------------------------------------------


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
    found = read_all(recording)
    for row, name in enumerate(written.ids):
        is_test = row >= 30
        assert (recording.splits[row] == "test") == is_test
        np.testing.assert_allclose(found[name].rates, np.nanmean(written.trials[row][:, keep], axis=0), rtol=1e-5)
        assert (found[name].trials is not None) == is_test
        if is_test:
            np.testing.assert_array_equal(found[name].trials, written.trials[row][:, keep])
        assert found[name].meta["object"] == written.objects[row]
        path = tmp_path / "object_images" / written.objects[row] / f"{name}.jpg"
        assert found[name].image == path.read_bytes()


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


def test_whose_file_it_is_must_be_known(tmp_path):
    make_tvsd(tmp_path)
    (tmp_path / "monkeyF").rename(tmp_path / "mine")
    options = {"source": tmp_path / "mine" / "THINGS_normMUA.mat", "images": tmp_path / "object_images"}
    with pytest.raises(BadInput, match="--monkey F or --monkey N"):
        Tvsd(**options).open()
    sites = Tvsd(**options, monkey="N").open().sites
    assert [sites[k]["region"] for k in (511, 512, 767, 768)] == ["V1", "V4", "V4", "IT"]


# ---- mbs-h5 --------------------------------------------------------------------------------------------------------


def test_splits_subjects_and_regions_of_a_comparison_file(tmp_path):
    written = make_mbs(tmp_path / "mbs.h5")
    result = packed(tmp_path, "mbs-h5", tmp_path / "mbs.h5")
    check_pack(result, written)
    site = result.manifest.sites[0]
    assert (site["id"], site["noise_ceiling"]) == ("s1_IT_0000", pytest.approx(0.2))
    assert {name: split.stimuli for name, split in result.manifest.splits.items()} == {"train": 19, "val": 1, "test": 6}
    assert result.split("train").meta(0) == {"source_id": written.ids[0]}


def test_subjects_that_saw_other_stimuli(tmp_path):
    written = make_mbs(tmp_path / "mbs.h5", own_ids=True)
    recording = MbsH5(source=tmp_path / "mbs.h5", region=("IT",)).open()
    assert [site["subject"] for site in recording.sites] == ["s1"] * 4 + ["s2"] * 2
    found = read_all(recording)
    keep = [k for k, region in enumerate(written.regions) if region == "IT"]
    rates = np.stack([found[name].rates for name in written.ids])
    np.testing.assert_array_equal(rates, written.trials[:, 0, keep])
    assert np.isnan(rates[:5, :4]).sum() == 16
    assert all(stimulus.trials is None for stimulus in found.values())
    assert all(
        np.array_equal(pixels(found[name].image), image)
        for name, image in zip(written.ids, written.images, strict=True)
    )


def test_images_may_lie_in_a_folder_or_another_file(tmp_path):
    written = make_mbs(tmp_path / "mbs.h5", with_images=False, val=True)
    with pytest.raises(BadInput, match=r"no array of images called stimuli or .*--image-dataset.*--images"):
        MbsH5(source=tmp_path / "mbs.h5").open()
    write_images(tmp_path / "folder", written.ids, written.images)
    recording = MbsH5(source=tmp_path / "mbs.h5", images=tmp_path / "folder").open()
    assert recording.splits[20:22] == ["val", "val"]
    assert recording.splits.count("val") == 2
    assert np.array_equal(pixels(read_all(recording)["im1004_png"].image), written.images[4])
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
    "in two": ("test/stimulus_ids", [b"im1003.png"] * 6, "'im1003.png' is in train and in test"),
    "ceilings": ("noise_ceilings/s1/V4", np.zeros(4), "4 values for 3 sites"),
    "floats": ("train/stimuli", np.zeros((21, 8, 8, 3)), r"expected uint8 \(21, height, width, 3\)"),
    "soft link": ("train/neural_data/s1/V4", h5py.SoftLink("/test/neural_data/s1/V4"), "is a link to elsewhere"),
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


# ---- what they share -----------------------------------------------------------------------------------------------


def test_ids_become_safe_and_stay_different():
    assert safe_ids(["a.png", "b", "a_png", "ü"]) == [
        *safe_ids(["a.png", "a_png"])[:1],
        "b",
        safe_ids(["a.png", "a_png"])[1],
        "_",
    ]
    assert len(set(safe_ids(["a.b", "a_b", "a b"]))) == 3
    assert safe_ids(["a.b"]) == ["a_b"]


def test_presentations_of_a_stimulus_are_in_order_of_repetition():
    rows = rows_by_stimulus(["b", "a", "b", "b"], [2, 0, 0, 1])
    assert {name: found.tolist() for name, found in rows.items()} == {"b": [2, 3, 0], "a": [1]}
    assert list(rows) == ["b", "a"]


def test_gathering_reads_only_what_holds_a_wanted_presentation():
    data, pieces = np.arange(200.0).reshape(100, 2), []

    def read(rows):
        pieces.append((rows.start, rows.stop))
        return data[rows]

    rows = [np.array([71, 3]), np.array([], int), np.array([4, 99, 72])]
    found = list(gather_trials(read, rows, 2, 10))
    assert all(np.array_equal(part, data[wanted]) for part, wanted in zip(found, rows, strict=True))
    assert pieces == [(3, 5), (71, 73), (99, 100)]


def test_images_are_found_by_path_name_or_stem(tmp_path):
    image = np.zeros((2, 4, 4, 3), np.uint8)
    write_images(tmp_path / "p", ["a/one.png", "b/two.jpg"], image)
    write_images(tmp_path / "p", ["a/same.png", "b/same.png"], image)
    (tmp_path / "secret.png").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        for path in (tmp_path / "p").rglob("*.*"):
            archive.write(path, path.relative_to(tmp_path / "p"))
    for files in (ImageFiles(tmp_path / "p"), ImageFiles(tmp_path / "p.zip")):
        assert files.find(["a/one.png"]) == "a/one.png"
        assert files.find(["elsewhere\\one.png"]) == "a/one.png"
        assert files.find(["", "two"]) == "b/two.jpg"
        assert files.find(["a/same.png"]) == "a/same.png"
        assert files.find(["same.png"]) is None
        assert files.find(["../secret.png"]) is None
        assert files.find([str(tmp_path / "secret.png")]) is None


def test_a_locked_archive_is_refused(tmp_path):
    write_images(tmp_path / "p.zip", ["one.png"], np.zeros((1, 4, 4, 3), np.uint8))
    data = bytearray((tmp_path / "p.zip").read_bytes())
    entry = data.index(b"PK\x01\x02")
    data[entry + 8] |= 1
    (tmp_path / "p.zip").write_bytes(data)
    with ImageFiles(tmp_path / "p.zip").reading() as load, pytest.raises(BadInput, match=r"one\.png.*password"):
        load("one.png")


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
    check_pack(folder, Written(names, images, [], trials, [], []))
    assert folder.manifest.site_ids == list("abcd")
