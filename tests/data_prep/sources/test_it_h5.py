"""The source `it-h5`: the very images come back, and what it cannot read is refused."""

import inspect
from pathlib import Path

import h5py
import numpy as np
import pytest
from make_sources import make_it_h5, normalise
from recordings import pixels, read_all

from data_prep.common.errors import BadInput
from data_prep.sources.files import hdf5
from data_prep.sources.it_h5 import ROUNDING_WARNING, ItH5


@pytest.mark.parametrize("chunks", [None, 1, 5, 24])
def test_it_h5_gives_back_the_very_images(tmp_path, chunks):
    written = make_it_h5(tmp_path / "IT_data.h5", chunks=chunks)
    recording = ItH5(source=tmp_path / "IT_data.h5").open()
    stimuli = read_all(recording)
    assert recording.name == "IT_data"
    assert recording.response_window_ms == (70, 170)
    assert recording.sites[9] == {"id": "site_009", "region": "IT"}
    assert recording.provenance["warnings"] == []
    assert [s.id for s in stimuli] == recording.stimulus_ids == [i for m in written.values() for i in m.ids]
    assert recording.splits == [split for m in written.values() for split in m.splits]
    assert (
        recording.objects
        == [name for m in written.values() for name in m.objects]
        == [s.meta["object"] for s in stimuli]
    )
    by_id = {s.id: s for s in stimuli}
    for split, m in written.items():
        for i, name in enumerate(m.ids):
            assert np.array_equal(pixels(by_id[name].image), m.images[i])
            assert by_id[name].meta["uint8_rounding_error"] < 1e-3
            if split == "test":
                assert by_id[name].rates is None
            else:
                assert np.array_equal(by_id[name].rates, m.rates[i])


def test_every_uint8_value_survives_in_every_channel_and_precision(tmp_path):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    images = np.stack([ramp, ramp[::-1], ramp.T], axis=-1)[None].repeat(24, axis=0)
    make_it_h5(tmp_path / "it.h5", size=16)
    for dtype in (np.float16, np.float32, np.float64):
        replace(tmp_path / "it.h5", "stimulus_train", normalise(images).astype(dtype))
        recording = ItH5(source=tmp_path / "it.h5").open()
        (stimulus,) = recording.read([0])
        assert np.array_equal(pixels(stimulus.image), images[0])
        assert stimulus.meta["uint8_rounding_error"] < ROUNDING_WARNING
        assert recording.provenance["warnings"] == []


def test_it_h5_reads_any_order(tmp_path):
    make_it_h5(tmp_path / "it.h5")
    recording = ItH5(source=tmp_path / "it.h5").open()
    everything = read_all(recording)
    order = [23, 24, 25, 3, 4, 5, 39, 0, 31, 32, 16, 15, 17, 3]
    stimuli_again = list(recording.read(order))
    assert [s.id for s in stimuli_again] == [everything[i].id for i in order]
    assert all(s.image == everything[i].image for s, i in zip(stimuli_again, order, strict=True))


def test_it_h5_is_streamed_in_blocks(tmp_path, monkeypatch):
    make_it_h5(tmp_path / "it.h5", n_train=100)
    recording = ItH5(source=tmp_path / "it.h5").open()
    with h5py.File(tmp_path / "it.h5") as file:
        monkeypatch.setattr(hdf5, "BLOCK_BYTES", 16 * file["stimulus_train"][0].nbytes)
    rows = []
    plain = h5py.Dataset.__getitem__

    def counted(dataset, key, *args, **kwargs):
        result = plain(dataset, key, *args, **kwargs)
        if dataset.name.startswith("/stimulus"):
            rows.append(len(result))
        return result

    monkeypatch.setattr(h5py.Dataset, "__getitem__", counted)
    reader = recording.read(range(len(recording.stimulus_ids)))
    assert inspect.isgenerator(reader)
    next(reader)
    assert sum(rows) == 16
    list(reader)
    assert sum(rows) == 116
    assert max(rows) == 16


def test_images_that_never_were_uint8_are_reported(tmp_path):
    written = make_it_h5(tmp_path / "it.h5")
    smooth = written["val"].images * np.float32(0.93) + np.float32(4.2)
    replace(tmp_path / "it.h5", "stimulus_val", normalise(smooth))
    recording = ItH5(source=tmp_path / "it.h5").open()
    (warning,) = recording.provenance["warnings"]
    assert "were never uint8" in warning
    errors = {s.id: s.meta["uint8_rounding_error"] for s in read_all(recording)}
    assert all((error > ROUNDING_WARNING) == name.startswith("val") for name, error in errors.items())


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (lambda x: x / 255, r"cannot be ImageNet-normalised.*0\.\.1"),
        (lambda x: x, "cannot be ImageNet-normalised.*0 to 255"),
        (lambda x: x / 127.5 - 1, r"cannot be ImageNet-normalised.*-1\.\.1"),
        (lambda x: (x - 128) / 20, "cannot be ImageNet-normalised"),
    ],
    ids=["0..1", "0..255", "-1..1", "other"],
)
def test_images_in_another_scale_are_refused(tmp_path, scale, message):
    written = make_it_h5(tmp_path / "it.h5")
    raw = written["train"].images.astype(np.float32).transpose(0, 3, 1, 2)
    replace(tmp_path / "it.h5", "stimulus_train", scale(raw).astype(np.float32))
    with pytest.raises(BadInput, match=f"stimulus_train.*{message}"):
        ItH5(source=tmp_path / "it.h5").open()


def test_pale_images_are_not_taken_for_another_scale(tmp_path):
    """Whole uint8 steps that happen to lie in 0..1 once normalised."""
    make_it_h5(tmp_path / "it.h5")
    pale = np.random.default_rng(0).integers(130, 170, (24, 32, 32, 3), dtype=np.uint8)
    replace(tmp_path / "it.h5", "stimulus_train", normalise(pale))
    (stimulus,) = ItH5(source=tmp_path / "it.h5").open().read([5])
    assert np.array_equal(pixels(stimulus.image), pale[5])


def test_a_bad_image_that_open_did_not_look_at_is_found_by_read(tmp_path):
    written = make_it_h5(tmp_path / "it.h5")
    images = normalise(written["train"].images)
    images[2, 1, 5, 5] = np.nan
    images[3] *= 10
    replace(tmp_path / "it.h5", "stimulus_train", images)
    recording = ItH5(source=tmp_path / "it.h5").open()
    assert len(list(recording.read([0, 1]))) == 2
    with pytest.raises(BadInput, match=r"image 2 of stimulus_train.*NaN"):
        list(recording.read([1, 2]))
    with pytest.raises(BadInput, match=r"image 3 of stimulus_train.*ImageNet"):
        list(recording.read([3]))


def replace(path: Path, name: str, value=None) -> None:
    """Replace a value, dataset or link; None removes it."""
    with h5py.File(path, "r+") as file:
        del file[name]
        if value is not None:
            file[name] = value


def external_storage(path):
    shape = (8, 3, 32, 32)
    np.zeros(shape, np.float32).tofile(path.parent / "raw.bin")
    with h5py.File(path, "r+") as file:
        del file["stimulus_val"]
        file.create_dataset("stimulus_val", shape, np.float32, external=[(str(path.parent / "raw.bin"), 0, 98304)])


def virtual(path):
    layout = h5py.VirtualLayout((8, 3, 32, 32), np.float32)
    layout[:] = h5py.VirtualSource(path.parent / "other.h5", "stimulus_val", (8, 3, 32, 32))
    with h5py.File(path, "r+") as file:
        del file["stimulus_val"]
        file.create_virtual_dataset("stimulus_val", layout)


def variable(path):
    with h5py.File(path, "r+") as file:
        del file["object_val"]
        data = file.create_dataset("object_val", (8,), h5py.vlen_dtype(np.int32))
        data[0] = [1, 2]


def external_link(path):
    make_it_h5(path.parent / "other.h5", seed=1)
    replace(path, "stimulus_val", h5py.ExternalLink("other.h5", "/stimulus_val"))


def infinite_spikes(path):
    with h5py.File(path, "r+") as file:
        file["spikes_val"][3, 2] = np.inf


BAD_FILES = {
    "not hdf5": (lambda p: p.write_bytes(b"stimulus"), "not a readable HDF5 file"),
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:20000]), "not a readable HDF5 file"),
    "missing": (lambda p: replace(p, "object_test"), "no dataset 'object_test'; it holds object_train"),
    "no spikes": (lambda p: replace(p, "spikes_val"), "no dataset 'spikes_val'"),
    "integers": (lambda p: replace(p, "stimulus_val", np.zeros((8, 3, 32, 32), np.uint8)), "uint8 .*expected float"),
    "channels last": (lambda p: replace(p, "stimulus_val", np.zeros((8, 32, 32, 3))), r"\(stimuli, 3, height, width\)"),
    "sizes": (lambda p: replace(p, "stimulus_val", np.zeros((8, 3, 16, 16))), "different image sizes"),
    "spike rows": (lambda p: replace(p, "spikes_val", np.zeros((7, 10))), r"spikes_val .*\(7, 10\); expected .*\(8, "),
    "spike sites": (lambda p: replace(p, "spikes_val", np.zeros((8, 9))), "different numbers of sites"),
    "spike text": (lambda p: replace(p, "spikes_val", np.full((8, 10), b"1")), "expected numbers"),
    "infinite": (infinite_spikes, "spikes_val: .*site 2 to stimulus 3 is infinite"),
    "object count": (lambda p: replace(p, "object_val", np.full(9, b"dog")), r"object_val .*\(9,\).*\(8,\)"),
    "object numbers": (lambda p: replace(p, "object_val", np.zeros(8, int)), "latin-1 strings"),
    "object lists": (variable, "latin-1 strings"),
    "object empty": (lambda p: replace(p, "object_val", np.full(8, b" ")), "stimulus 0 is empty"),
    "external link": (external_link, "stimulus_val is a link"),
    "soft link": (lambda p: replace(p, "stimulus_val", h5py.SoftLink("/stimulus_test")), "stimulus_val is a link"),
    "external storage": (external_storage, "data in other files"),
    "virtual": (virtual, "data in other files"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused_in_one_sentence(tmp_path, case):
    spoil, message = BAD_FILES[case]
    make_it_h5(tmp_path / "it.h5")
    spoil(tmp_path / "it.h5")
    with pytest.raises(BadInput, match=message) as caught:
        ItH5(source=tmp_path / "it.h5").open()
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(BadInput, match="no such file"):
        ItH5(source=tmp_path / "it.h5").open()


@pytest.mark.parametrize("dtype", ["S20", h5py.string_dtype("ascii"), h5py.string_dtype("utf-8")])
def test_object_names_of_every_kind_of_string(tmp_path, dtype):
    make_it_h5(tmp_path / "it.h5")
    replace(tmp_path / "it.h5", "object_val", np.array([b"dog "] * 8, dtype=dtype if dtype == "S20" else object))
    assert ItH5(source=tmp_path / "it.h5").open().objects[24:32] == ["dog"] * 8


def test_test_spikes_are_used_where_a_file_has_them(tmp_path):
    written = make_it_h5(tmp_path / "it.h5")
    with h5py.File(tmp_path / "it.h5", "r+") as file:
        file["spikes_test"] = written["test"].rates
    assert np.array_equal(read_all(ItH5(source=tmp_path / "it.h5").open())[-1].rates, written["test"].rates[-1])
