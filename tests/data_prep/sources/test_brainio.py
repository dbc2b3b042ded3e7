"""The source `brainio` on assemblies as BrainIO writes them."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from make_field_files import make_assembly, write_images
from make_sources import write_csv
from recordings import check_packed, order_free, packed, read_by_id, refused

from data_prep.common.errors import BadInput
from data_prep.sources.brainio import Brainio
from data_prep.sources.files import hdf5, presentations


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
    check_packed(result, written)
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
    stimuli = read_by_id(recording)
    tolerance = 1e-4 if "encoding" in layout else 1e-6
    for row, name in enumerate(written.ids):
        trials = stimuli[name].trials
        assert trials.dtype == np.float32
        np.testing.assert_allclose(order_free(trials), order_free(written.trials[row]), atol=tolerance)
        np.testing.assert_allclose(stimuli[name].rates, np.nanmean(written.trials[row], axis=0), atol=tolerance)
        assert stimuli[name].meta["object"] == written.objects[row]
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
        stimuli = read_by_id(recording)
        for row, name in enumerate(written.ids):
            expected = written.trials[row][:, keep] + added
            np.testing.assert_allclose(order_free(stimuli[name].trials), order_free(expected), rtol=1e-6)
    for time_bin in ((70, 165), (75, 170), (0, 50), (70, 220)):  # two bins overlap in the last
        with pytest.raises(BadInput, match="70-120, 120-170"):
            brainio(tmp_path, time_bin=time_bin).open()
    with pytest.raises(BadInput, match="--time-bin START END; there are 70-120"):
        brainio(tmp_path).open()


def test_the_public_assembly_of_averages_has_rates_and_no_trials(tmp_path):
    pytest.importorskip("xarray")
    written = make_assembly(tmp_path, repetitions=1, drop=("repetition",))
    stimuli = read_by_id(brainio(tmp_path).open())
    assert all(stimulus.trials is None for stimulus in stimuli.values())
    assert np.array_equal(np.stack([stimuli[name].rates for name in written.ids]), written.trials[:, 0])


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
    stimuli = list(recording.read(range(len(written.ids))))
    assert max(longest) <= 16
    row_of = {name: row for row, name in enumerate(written.ids)}
    for stimulus in stimuli:
        np.testing.assert_array_equal(stimulus.trials, written.trials[row_of[stimulus.id]])


BAD_ASSEMBLIES = {
    "no ids": ({"drop": ("image_id",)}, {}, "no coordinate stimulus_id or image_id along presentation; there is rep"),
    "no sites": ({"drop": ("neuroid_id",)}, {}, "no coordinate neuroid_id or neuroid along neuroid; there is"),
    "no bins": ({"drop": ("time_bin_end",), "bins": ((0, 10), (10, 20))}, {"time_bin": (0, 10)}, "along time_bin"),
    "no region": ({}, {"region": ("V1",)}, r"region 'V1' \(--region\); the sites have: IT, V4"),
    "region not told": ({"drop": ("region",)}, {"region": ("V1",)}, "the sites have: none"),
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
