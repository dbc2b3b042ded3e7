"""The sources `folder` and `it-h5`: what they read, and how they refuse what they cannot read."""

import csv
import inspect
import io
import os
import pickle
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import tyro
from make_sources import encode, make_folder, make_images, make_it_h5, normalise, write_csv, write_rates
from PIL import Image

from data_prep.common import image_decoding as images_module
from data_prep.common.errors import BadInput
from data_prep.common.image_decoding import convert_to_png, encode_png, image_size, sniff_encoding
from data_prep.sources.folder import Folder
from data_prep.sources.it_h5 import ROUNDING_WARNING, ItH5
from data_prep.splits import assign_splits

DATA = Path(os.environ.get("SPIKETUNE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def read_all(recording):
    """Read everything, through a pickle as the packing processes do."""
    recording = pickle.loads(pickle.dumps(recording))
    return list(recording.read(range(len(recording.stimulus_ids))))


def edit_stimuli(folder: Path, **columns) -> None:
    """Set columns of stimuli.csv: a list, a dict {row: value}, or None to remove the column."""
    with (folder / "stimuli.csv").open() as file:
        rows = list(csv.DictReader(file))
    table = {name: [row[name] for row in rows] for name in rows[0]}
    for name, cells in columns.items():
        if cells is None:
            del table[name]
        elif isinstance(cells, dict):
            for row, value in cells.items():
                table[name][row] = value
        else:
            table[name] = cells
    write_csv(folder / "stimuli.csv", table)


# ---- images ------------------------------------------------------------------------------------------------------


def test_images_are_recognised_by_content_and_kept_exactly():
    image = make_images(1)[0][0]
    png = encode_png(image)
    assert np.array_equal(decode(png), image)
    assert sniff_encoding(png) == "png"
    assert sniff_encoding(encode(image, "jpg")) == "jpg"
    assert sniff_encoding(encode(image, "bmp")) is None
    assert image_size(png) == (32, 32, "RGB")
    converted, was = convert_to_png(encode(image, "bmp"))
    assert was == "bmp"
    assert np.array_equal(decode(converted), image)


@pytest.mark.parametrize("array", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8)])
def test_encode_png_refuses_other_arrays(array):
    with pytest.raises(ValueError, match="uint8"):
        encode_png(array)


@pytest.mark.parametrize("encoding", ["jpg", "png"])
def test_an_image_cut_short_is_found_from_its_bytes(encoding):
    data = encode(make_images(1)[0][0], encoding)
    with pytest.raises(ValueError, match="cut short"):
        image_size(data[:-20])


def test_a_header_that_claims_gigapixels_is_refused():
    png = bytearray(encode_png(np.zeros((8, 8, 3), np.uint8)))
    for side in (12_000, 100_000):  # above our limit, above Pillow's
        png[16:24] = side.to_bytes(4, "big") * 2
        png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
        with pytest.raises(ValueError, match="megapixels"):
            image_size(bytes(png))


def test_postscript_is_not_tried():
    """Pillow would hand it to Ghostscript."""
    assert "EPS" not in images_module.FORMATS
    with pytest.raises(ValueError, match="not a readable image"):
        image_size(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")


# ---- folder --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (DATA / "v4_hvm640").is_dir(), reason="the real recordings are not here")
@pytest.mark.parametrize(("folder", "n", "sites"), [("v4_hvm640", 640, 50), ("v4_natural800", 800, 67)])
def test_real_recordings(folder, n, sites):
    recording = Folder(source=DATA / folder).open()
    stimuli = read_all(recording)
    assert recording.name == folder
    assert (len(stimuli), len(recording.sites)) == (n, sites)
    assert recording.splits == assign_splits(n, {"train": 0.81, "val": 0.09, "test": 0.10}, seed=0)
    with (DATA / folder / "stimuli.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [s.id for s in stimuli] == recording.stimulus_ids == [row["stimulus_id"] for row in rows]
    assert all(s.image == (DATA / folder / row["image"]).read_bytes() for s, row in zip(stimuli, rows, strict=True))
    assert {s.encoding for s in stimuli} == {"jpg"}
    rates = np.stack([s.rates for s in stimuli])
    if folder == "v4_hvm640":
        trials = np.load(DATA / folder / "trials.npy")
        assert np.array_equal(np.stack([s.trials for s in stimuli]), trials, equal_nan=True)
        np.testing.assert_allclose(rates, np.nanmean(trials, axis=1), rtol=1e-6)
        assert recording.objects == [row["object"] for row in rows] == [s.meta["object"] for s in stimuli]
    else:
        assert np.array_equal(rates, np.load(DATA / folder / "rates.npy"))
        assert recording.objects is None
        assert all(s.trials is None for s in stimuli)


@pytest.mark.parametrize("kind", ["npy", "csv", "parquet"])
def test_rates_are_the_same_in_every_format(tmp_path, kind):
    made = make_folder(tmp_path, rates=kind, splits=True, site_table=True)
    recording = Folder(source=tmp_path).open()
    stimuli = read_all(recording)
    rates = np.stack([s.rates for s in stimuli])
    assert rates.dtype == np.float32
    assert np.array_equal(rates, made.rates)
    assert recording.splits == made.splits
    assert recording.objects == made.objects
    assert recording.sites[3] == {"id": "n3", "region": "V4", "depth": 3.5}
    assert stimuli[7].meta == {"object": made.objects[7], "category": stimuli[7].meta["category"], "session": 1}
    assert all(np.array_equal(decode(s.image), image) for s, image in zip(stimuli, made.images, strict=True))


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_rows_and_sites_are_matched_by_name(tmp_path, kind):
    made = make_folder(tmp_path, rates=None, trials=1, site_table=True)
    (tmp_path / "trials.npy").unlink()
    site_ids = [f"n{k}" for k in range(10)]
    order = np.random.default_rng(0).permutation(len(made.ids))
    write_rates(tmp_path / f"rates.{kind}", made.rates[order, ::-1], [made.ids[i] for i in order], site_ids[::-1])
    recording = Folder(source=tmp_path).open()
    assert np.array_equal(np.stack([s.rates for s in read_all(recording)]), made.rates[:, ::-1])
    assert recording.sites[0] == {"id": "n9", "region": "V4", "depth": 9.5}


def test_csv_rates_without_ids_are_in_the_order_of_the_stimuli(tmp_path):
    made = make_folder(tmp_path, rates=None, trials=1)
    (tmp_path / "trials.npy").unlink()
    cells = made.rates.astype(object)
    cells[2, 0], cells[3, 1] = "", "NA"
    write_csv(tmp_path / "rates.csv", {f"n{k}": cells[:, k] for k in range(10)})
    expected = made.rates.copy()
    expected[2, 0] = expected[3, 1] = np.nan
    recording = Folder(source=tmp_path).open()
    assert np.array_equal(np.stack([s.rates for s in read_all(recording)]), expected, equal_nan=True)
    assert recording.sites[1] == {"id": "n1"}


def test_trials_are_averaged_and_kept(tmp_path):
    made = make_folder(tmp_path, rates=None, trials=4)
    stimuli = read_all(Folder(source=tmp_path).open())
    np.testing.assert_array_equal(np.stack([s.trials for s in stimuli]), made.trials)
    np.testing.assert_allclose(np.stack([s.rates for s in stimuli]), made.rates, rtol=1e-6)


def test_rates_beside_trials_are_taken_as_given(tmp_path):
    made = make_folder(tmp_path, trials=4)
    np.save(tmp_path / "rates.npy", made.rates - 5)
    recording = Folder(source=tmp_path).open()
    stimuli = read_all(recording)
    assert np.array_equal(np.stack([s.rates for s in stimuli]), made.rates - 5)
    assert stimuli[0].trials.shape == (4, 10)
    assert recording.provenance["rates"] == "as given"


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32, np.uint8])
def test_other_number_types_become_float32(tmp_path, dtype):
    made = make_folder(tmp_path)
    np.save(tmp_path / "rates.npy", np.asfortranarray(made.rates.astype(dtype)))
    rates = np.stack([s.rates for s in read_all(Folder(source=tmp_path).open())])
    assert rates.dtype == np.float32
    assert np.array_equal(rates, made.rates.astype(dtype).astype(np.float32))


def test_a_split_without_any_response_has_no_rates(tmp_path):
    made = make_folder(tmp_path, splits=True)
    test = np.array(made.splits) == "test"
    rates = made.rates.copy()
    rates[test] = np.nan
    rates[0] = np.nan  # one unrecorded stimulus of a recorded split keeps its NaN
    np.save(tmp_path / "rates.npy", rates)
    stimuli = read_all(Folder(source=tmp_path).open())
    assert all((s.rates is None) == is_test for s, is_test in zip(stimuli, test, strict=True))
    assert np.isnan(stimuli[0].rates).all()


@pytest.mark.parametrize("encoding", ["bmp", "tiff", "ppm"])
def test_other_image_formats_become_lossless_png(tmp_path, encoding):
    made = make_folder(tmp_path, n=12, encoding=encoding)
    recording = Folder(source=tmp_path).open()
    assert "12 of 12" in recording.provenance["converted_to_png"]
    for stimulus, image in zip(read_all(recording), made.images, strict=True):
        assert stimulus.encoding == "png"
        assert stimulus.meta["converted_from"] == encoding
        assert np.array_equal(decode(stimulus.image), image)


def test_the_bytes_count_not_the_ending(tmp_path):
    made = make_folder(tmp_path)
    jpeg = encode(made.images[0], "jpg")
    (tmp_path / "images" / f"{made.ids[0]}.png").write_bytes(jpeg)
    stimulus = next(Folder(source=tmp_path).open().read([0]))
    assert (stimulus.image, stimulus.encoding) == (jpeg, "jpg")


def test_groups_stay_together_and_flags_find_files_below_the_source(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "rates.npy").rename(tmp_path / "counts.npy")
    source = Folder(source=tmp_path, rates=Path("counts.npy"), group_by="session", val_fraction=0.2, seed=3)
    recording = source.open()
    where = {}
    for i, split in enumerate(recording.splits):
        where.setdefault(i // 5, set()).add(split)
    assert all(len(splits) == 1 for splits in where.values())
    assert recording.splits.count("val") == 10
    assert recording.splits == source.open().splits


def test_columns_of_numbers_are_numbers_and_names_stay_names(tmp_path):
    make_folder(tmp_path)
    edit_stimuli(
        tmp_path, angle=["-1.5"] * 39 + [""], code=["007"] * 40, mixed=["1"] * 39 + ["one"], synset=["n1"] * 40
    )
    recording = Folder(source=tmp_path, object_column="synset").open()
    first, last = recording.read([0, 39])
    assert (first.meta["angle"], first.meta["code"], first.meta["mixed"]) == (-1.5, "007", "1")
    assert "angle" not in last.meta
    assert recording.objects == ["n1"] * 40
    assert first.meta["object"] == "n1"


def test_one_image_in_two_splits_is_warned_about(tmp_path):
    make_folder(tmp_path, splits=True)
    edit_stimuli(tmp_path, image={3: "images/stim0000.png"})
    (warning,) = Folder(source=tmp_path).open().provenance["warnings"]
    assert "more than one split" in warning


def test_the_command_line(tmp_path):
    make_folder(tmp_path)
    source = tyro.cli(Folder, args=[str(tmp_path), "--window-ms", "70", "170", "--units", "spikes/s"])
    recording = source.open()
    assert (recording.response_window_ms, recording.units) == ((70, 170), "spikes/s")


def test_folder_reads_one_image_at_a_time(tmp_path):
    made = make_folder(tmp_path)
    recording = Folder(source=tmp_path).open()
    (tmp_path / "images" / f"{made.ids[2]}.png").unlink()
    reader = recording.read([0, 1, 2])
    assert inspect.isgenerator(reader)
    assert [next(reader).id, next(reader).id] == made.ids[:2]
    with pytest.raises(BadInput, match="stim0002"):
        next(reader)


def save(name, array):
    return lambda folder: np.save(folder / name, array)


def with_infinity(folder):
    rates = np.load(folder / "rates.npy")
    rates[5, 2] = np.inf
    np.save(folder / "rates.npy", rates)


def csv_rates(change):
    def write(folder):
        rates = np.load(folder / "rates.npy").astype(object)
        (folder / "rates.npy").unlink()
        columns = {"stimulus_id": [f"stim{i:04d}" for i in range(len(rates))]}
        columns |= {f"n{k}": list(rates[:, k]) for k in range(10)}
        change(columns)
        write_csv(folder / "rates.csv", columns)

    return write


BAD_FOLDERS = {
    "no table": (lambda f: (f / "stimuli.csv").unlink(), {}, "stimuli.csv.*--stimuli"),
    "empty table": (lambda f: (f / "stimuli.csv").write_text("stimulus_id,image\n"), {}, "empty"),
    "not text": (lambda f: (f / "stimuli.csv").write_bytes(b"stimulus_id,image\n\xff\xfe,1\n"), {}, "UTF-8"),
    "ragged": (lambda f: (f / "stimuli.csv").write_text("stimulus_id,image\na,b,c\n"), {}, "line 2: 3 cells"),
    "no image column": (lambda f: edit_stimuli(f, image=None), {}, "no column 'image'"),
    "no id column": (lambda f: edit_stimuli(f, stimulus_id=None), {}, "no column 'stimulus_id'"),
    "id with a dot": (lambda f: edit_stimuli(f, stimulus_id={4: "a.b"}), {}, r"line 6: stimulus_id 'a\.b'"),
    "id twice": (lambda f: edit_stimuli(f, stimulus_id={4: "stim0001"}), {}, "line 6: .*line 3.*unique"),
    "absolute path": (lambda f: edit_stimuli(f, image={0: "/etc/passwd"}), {}, "line 2: .*inside"),
    "path outside": (lambda f: edit_stimuli(f, image={0: "images/../../x.png"}), {}, "line 2: .*inside"),
    "no image": (lambda f: edit_stimuli(f, image={1: "images/x.png"}), {}, "line 3: .*x.png cannot be read"),
    "unknown split": (lambda f: edit_stimuli(f, split=["train"] * 39 + ["dev"]), {}, "line 41: split .*'dev'"),
    "seed ignored": (lambda f: edit_stimuli(f, split=["train"] * 40), {"seed": 1}, "--seed .*ignored"),
    "no group": (lambda f: None, {"group_by": "sesion"}, "no column 'sesion'.*session"),
    "no object": (lambda f: None, {"object_column": "synset"}, "no column 'synset'"),
    "empty object": (lambda f: edit_stimuli(f, object={0: ""}), {}, "line 2: .*'object' is empty"),
    "no training": (lambda f: None, {"val_fraction": 0.5, "test_fraction": 0.5}, "none to train on"),
    "window": (lambda f: None, {"window_ms": (170.0, 70.0)}, "--window-ms"),
    "no responses": (lambda f: (f / "rates.npy").unlink(), {}, "no responses.*--rates, --trials or --rasters"),
    "two rates": (lambda f: (f / "rates.csv").write_text("a\n1\n"), {}, r"rates\.npy and rates\.csv.*--rates"),
    "no such rates": (lambda f: None, {"rates": Path("r.npy")}, "--rates r.npy: no such file"),
    "other rates": (lambda f: (f / "r.mat").touch(), {"rates": Path("r.mat")}, r"\.npy, \.csv or \.parquet"),
    "rows": (save("rates.npy", np.zeros((39, 10))), {}, r"\(39, 10\), expected \(40, sites\)"),
    "transposed": (save("rates.npy", np.zeros((10, 40))), {}, "transposed"),
    "no sites": (save("rates.npy", np.zeros((40, 0))), {}, r"\(40, 0\), expected"),
    "flat trials": (save("trials.npy", np.zeros((40, 10))), {}, r"expected \(40, repetitions, sites\)"),
    "fewer sites": (save("trials.npy", np.zeros((40, 2, 9))), {}, "has 10 sites but .* has 9"),
    "objects": (save("rates.npy", np.zeros((40, 10), object)), {}, "plain numbers"),
    "complex": (save("rates.npy", np.zeros((40, 10), complex)), {}, "complex128"),
    "no npy": (lambda f: (f / "rates.npy").write_bytes(b"\x93NUMPY"), {}, "not a readable .npy"),
    "infinite": (with_infinity, {}, "site 'site_002' to stimulus 'stim0005' is infinite"),
    "too large": (save("rates.npy", np.full((40, 10), 1e300)), {}, "infinite"),
    "all NaN": (save("rates.npy", np.full((40, 10), np.nan)), {}, "nothing was recorded"),
    "csv text": (csv_rates(lambda c: c["n3"].__setitem__(1, "high")), {}, "line 3, site 'n3': 'high'"),
    "csv stranger": (csv_rates(lambda c: c["stimulus_id"].__setitem__(1, "x")), {}, "e.g. 'stim0001'"),
    "csv twice": (csv_rates(lambda c: c["stimulus_id"].__setitem__(1, "stim0002")), {}, "'stim0002' is in two rows"),
    "csv index": (csv_rates(lambda c: c.__setitem__("", list(range(40)))), {}, "column 12 has no name"),
    "no parquet": (
        lambda f: ((f / "rates.npy").unlink(), (f / "rates.parquet").write_bytes(b"PAR1")),
        {},
        "not a readable parquet",
    ),
    "site count": (lambda f: write_csv(f / "sites.csv", {"id": ["a", "b"]}), {}, "2 sites, .* holds 10"),
    "site twice": (lambda f: write_csv(f / "sites.csv", {"id": ["a"] * 10}), {}, "id 'a' .*unique"),
    "site id": (lambda f: write_csv(f / "sites.csv", {"region": ["IT"] * 10}), {}, "no column 'id'"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders_are_refused_in_one_sentence(tmp_path, case):
    spoil, options, message = BAD_FOLDERS[case]
    make_folder(tmp_path)
    spoil(tmp_path)
    with pytest.raises(BadInput, match=message) as caught:
        Folder(source=tmp_path, **options).open()
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(BadInput, match="no such folder"):
        Folder(source=tmp_path / "nowhere").open()


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_the_header_of_the_rates_and_the_site_table_must_agree(tmp_path, kind):
    make_folder(tmp_path, rates=kind)
    write_csv(tmp_path / "sites.csv", {"id": [f"m{k}" for k in range(10)]})
    with pytest.raises(BadInput, match="different sites"):
        Folder(source=tmp_path).open()


def sixteen_bit(image):
    file = io.BytesIO()
    Image.fromarray(image[..., 0].astype(np.uint16) * 257).save(file, format="TIFF")
    return file.getvalue()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda image: b"no image at all", "not a readable image"),
        (lambda image: b"", "not a readable image"),
        (lambda image: encode(image, "jpg")[:-30], "cut short"),
        (lambda image: encode(image, "bmp")[:-30], "cannot be decoded"),
        (sixteen_bit, "more than 8 bits"),
    ],
)
def test_bad_images_are_refused_when_they_are_read(tmp_path, spoil, message):
    made = make_folder(tmp_path, n=12)
    (tmp_path / "images" / "stim0003.png").write_bytes(spoil(made.images[3]))
    recording = Folder(source=tmp_path).open()
    with pytest.raises(BadInput, match=f"stim0003.*{message}"):
        read_all(recording)


# ---- it-h5 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [None, 1, 5, 24])
def test_it_h5_gives_back_the_very_images(tmp_path, chunks):
    made = make_it_h5(tmp_path / "IT_data.h5", chunks=chunks)
    recording = ItH5(source=tmp_path / "IT_data.h5").open()
    stimuli = read_all(recording)
    assert recording.name == "IT_data"
    assert recording.response_window_ms == (70, 170)
    assert recording.sites[9] == {"id": "site_009", "region": "IT"}
    assert recording.provenance["warnings"] == []
    assert [s.id for s in stimuli] == recording.stimulus_ids == [i for m in made.values() for i in m.ids]
    assert recording.splits == [split for m in made.values() for split in m.splits]
    assert (
        recording.objects == [name for m in made.values() for name in m.objects] == [s.meta["object"] for s in stimuli]
    )
    by_id = {s.id: s for s in stimuli}
    for split, m in made.items():
        for i, name in enumerate(m.ids):
            assert np.array_equal(decode(by_id[name].image), m.images[i])
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
        assert np.array_equal(decode(stimulus.image), images[0])
        assert stimulus.meta["uint8_rounding_error"] < ROUNDING_WARNING
        assert recording.provenance["warnings"] == []


def test_it_h5_reads_any_order(tmp_path):
    make_it_h5(tmp_path / "it.h5")
    recording = ItH5(source=tmp_path / "it.h5").open()
    everything = read_all(recording)
    order = [23, 24, 25, 3, 4, 5, 39, 0, 31, 32, 16, 15, 17, 3]
    again = list(recording.read(order))
    assert [s.id for s in again] == [everything[i].id for i in order]
    assert all(s.image == everything[i].image for s, i in zip(again, order, strict=True))


def test_it_h5_is_streamed_in_blocks(tmp_path, monkeypatch):
    make_it_h5(tmp_path / "it.h5", n_train=100)
    recording = ItH5(source=tmp_path / "it.h5").open()
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
    made = make_it_h5(tmp_path / "it.h5")
    smooth = made["val"].images * np.float32(0.93) + np.float32(4.2)
    replace(tmp_path / "it.h5", "stimulus_val", normalise(smooth))
    recording = ItH5(source=tmp_path / "it.h5").open()
    (warning,) = recording.provenance["warnings"]
    assert "never were uint8" in warning
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
    made = make_it_h5(tmp_path / "it.h5")
    raw = made["train"].images.astype(np.float32).transpose(0, 3, 1, 2)
    replace(tmp_path / "it.h5", "stimulus_train", scale(raw).astype(np.float32))
    with pytest.raises(BadInput, match=f"stimulus_train.*{message}"):
        ItH5(source=tmp_path / "it.h5").open()


def test_pale_images_are_not_taken_for_another_scale(tmp_path):
    """Whole uint8 steps that happen to lie in 0..1 once normalised."""
    make_it_h5(tmp_path / "it.h5")
    pale = np.random.default_rng(0).integers(130, 170, (24, 32, 32, 3), dtype=np.uint8)
    replace(tmp_path / "it.h5", "stimulus_train", normalise(pale))
    (stimulus,) = ItH5(source=tmp_path / "it.h5").open().read([5])
    assert np.array_equal(decode(stimulus.image), pale[5])


def test_a_bad_image_that_open_did_not_look_at_is_found_by_read(tmp_path):
    made = make_it_h5(tmp_path / "it.h5")
    images = normalise(made["train"].images)
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
    """Put another value, dataset or link under a name; None removes it."""
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


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(BadInput, match="no such file"):
        ItH5(source=tmp_path / "it.h5").open()


@pytest.mark.parametrize("dtype", ["S20", h5py.string_dtype("ascii"), h5py.string_dtype("utf-8")])
def test_object_names_of_every_kind_of_string(tmp_path, dtype):
    make_it_h5(tmp_path / "it.h5")
    replace(tmp_path / "it.h5", "object_val", np.array([b"dog "] * 8, dtype=dtype if dtype == "S20" else object))
    assert ItH5(source=tmp_path / "it.h5").open().objects[24:32] == ["dog"] * 8


def test_test_spikes_are_used_where_a_file_has_them(tmp_path):
    made = make_it_h5(tmp_path / "it.h5")
    with h5py.File(tmp_path / "it.h5", "r+") as file:
        file["spikes_test"] = made["test"].rates
    assert np.array_equal(read_all(ItH5(source=tmp_path / "it.h5").open())[-1].rates, made["test"].rates[-1])


# ---- the makers ----------------------------------------------------------------------------------------------------


def test_made_rates_can_be_learned(tmp_path):
    made = make_folder(tmp_path, n=300, size=16, sites=5)
    coarse = made.images.reshape(300, 4, 4, 4, 4, 3).mean(axis=(2, 4)).reshape(300, -1)
    x = np.c_[coarse, np.ones(300)]
    weights = np.linalg.lstsq(x[:200], made.rates[:200], rcond=None)[0]
    rest = made.rates[200:]
    assert (1 - ((rest - x[200:] @ weights) ** 2).sum(0) / ((rest - rest.mean(0)) ** 2).sum(0)).min() > 0.3
