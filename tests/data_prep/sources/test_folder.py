"""The source `folder`: what it reads, and how it refuses what it cannot read."""

import csv
import inspect
import io
from pathlib import Path

import numpy as np
import pytest
import tyro
from helpers import DATA
from make_sources import encode, make_folder, write_csv, write_rates
from PIL import Image
from recordings import pixels, read_all

from data_prep.common.errors import BadInput
from data_prep.shards.folder import ShardFolder
from data_prep.shards.packing import pack
from data_prep.sources.folder import Folder
from data_prep.splits import assign_splits


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
    written = make_folder(tmp_path, rates=kind, splits=True, site_table=True)
    recording = Folder(source=tmp_path).open()
    stimuli = read_all(recording)
    rates = np.stack([s.rates for s in stimuli])
    assert rates.dtype == np.float32
    assert np.array_equal(rates, written.rates)
    assert recording.splits == written.splits
    assert recording.objects == written.objects
    assert recording.sites[3] == {"id": "n3", "region": "V4", "depth": 3.5}
    assert stimuli[7].meta == {"object": written.objects[7], "category": stimuli[7].meta["category"], "session": 1}
    assert all(np.array_equal(pixels(s.image), image) for s, image in zip(stimuli, written.images, strict=True))


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_rows_and_sites_are_matched_by_name(tmp_path, kind):
    written = make_folder(tmp_path, rates=None, trials=1, site_table=True)
    (tmp_path / "trials.npy").unlink()
    site_ids = [f"n{k}" for k in range(10)]
    order = np.random.default_rng(0).permutation(len(written.ids))
    write_rates(tmp_path / f"rates.{kind}", written.rates[order, ::-1], [written.ids[i] for i in order], site_ids[::-1])
    recording = Folder(source=tmp_path).open()
    assert np.array_equal(np.stack([s.rates for s in read_all(recording)]), written.rates[:, ::-1])
    assert recording.sites[0] == {"id": "n9", "region": "V4", "depth": 9.5}


def test_csv_rates_without_ids_are_in_the_order_of_the_stimuli(tmp_path):
    written = make_folder(tmp_path, rates=None, trials=1)
    (tmp_path / "trials.npy").unlink()
    cells = written.rates.astype(object)
    cells[2, 0], cells[3, 1] = "", "NA"
    write_csv(tmp_path / "rates.csv", {f"n{k}": cells[:, k] for k in range(10)})
    expected = written.rates.copy()
    expected[2, 0] = expected[3, 1] = np.nan
    recording = Folder(source=tmp_path).open()
    assert np.array_equal(np.stack([s.rates for s in read_all(recording)]), expected, equal_nan=True)
    assert recording.sites[1] == {"id": "n1"}


def test_trials_are_averaged_and_kept(tmp_path):
    written = make_folder(tmp_path, rates=None, trials=4)
    stimuli = read_all(Folder(source=tmp_path).open())
    np.testing.assert_array_equal(np.stack([s.trials for s in stimuli]), written.trials)
    np.testing.assert_allclose(np.stack([s.rates for s in stimuli]), written.rates, rtol=1e-6)


def test_rates_beside_trials_must_be_their_means(tmp_path):
    written = make_folder(tmp_path, trials=4)
    np.save(tmp_path / "rates.npy", written.rates.astype(np.float16))
    recording = Folder(source=tmp_path).open()
    stimuli = read_all(recording)
    assert np.array_equal(np.stack([s.rates for s in stimuli]), written.rates.astype(np.float16))
    assert stimuli[0].trials.shape == (4, 10)
    assert recording.provenance["rates"] == "as given"

    wrong = written.rates.copy()
    wrong[7, 2] += 1
    np.save(tmp_path / "rates.npy", wrong)
    message = (
        rf"disagree in 1 of 400 responses: .*'site_002' to stimulus 'stim0007' is {wrong[7, 2]:.3g}.* mean .*remove"
    )
    with pytest.raises(BadInput, match=message):
        Folder(source=tmp_path).open()


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32, np.uint8])
def test_other_number_types_become_float32(tmp_path, dtype):
    written = make_folder(tmp_path)
    np.save(tmp_path / "rates.npy", np.asfortranarray(written.rates.astype(dtype)))
    rates = np.stack([s.rates for s in read_all(Folder(source=tmp_path).open())])
    assert rates.dtype == np.float32
    assert np.array_equal(rates, written.rates.astype(dtype).astype(np.float32))


def test_a_split_without_any_response_has_no_rates(tmp_path):
    written = make_folder(tmp_path, splits=True)
    test = np.array(written.splits) == "test"
    rates = written.rates.copy()
    rates[test] = np.nan
    rates[0] = np.nan  # one unrecorded stimulus of a recorded split keeps its NaN
    np.save(tmp_path / "rates.npy", rates)
    stimuli = read_all(Folder(source=tmp_path).open())
    assert all((s.rates is None) == is_test for s, is_test in zip(stimuli, test, strict=True))
    assert np.isnan(stimuli[0].rates).all()


@pytest.mark.parametrize("encoding", ["bmp", "tiff", "ppm"])
def test_other_image_formats_become_lossless_png(tmp_path, encoding):
    written = make_folder(tmp_path, n=12, encoding=encoding)
    recording = Folder(source=tmp_path).open()
    assert "12 of 12" in recording.provenance["converted_to_png"]
    folder = pack(recording, tmp_path / "shards", 50, 1)
    image_of = dict(zip(written.ids, written.images, strict=True))
    for split in map(folder.split, folder.manifest.splits):
        for position, stimulus in enumerate(split.stimulus_ids):
            data, stored = split.image(position)
            assert stored == "png"
            assert split.meta(position)["converted_from"] == encoding
            assert np.array_equal(pixels(bytes(data)), image_of[stimulus])


def test_the_bytes_count_not_the_ending(tmp_path):
    written = make_folder(tmp_path)
    jpeg = encode(written.images[0], "jpg")
    (tmp_path / "images" / f"{written.ids[0]}.png").write_bytes(jpeg)
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


def test_the_command_line(tmp_path):
    make_folder(tmp_path)
    source = tyro.cli(Folder, args=[str(tmp_path), "--window-ms", "70", "170", "--units", "spikes/s"])
    recording = source.open()
    assert (recording.response_window_ms, recording.units) == ((70, 170), "spikes/s")


def test_folder_reads_one_image_at_a_time(tmp_path):
    written = make_folder(tmp_path)
    recording = Folder(source=tmp_path).open()
    (tmp_path / "images" / f"{written.ids[2]}.png").unlink()
    reader = recording.read([0, 1, 2])
    assert inspect.isgenerator(reader)
    assert [next(reader).id, next(reader).id] == written.ids[:2]
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
    "unprintable id": (lambda f: edit_stimuli(f, stimulus_id={4: "a\x07b"}), {}, r"line 6: stimulus_id 'a\\x07b'"),
    "no id": (lambda f: edit_stimuli(f, stimulus_id={4: ""}), {}, "line 6: .*'stimulus_id' is empty"),
    "id twice": (lambda f: edit_stimuli(f, stimulus_id={4: "stim0001"}), {}, "line 6: .*line 3.*unique"),
    "absolute path": (lambda f: edit_stimuli(f, image={0: "/etc/passwd"}), {}, "line 2: .*inside"),
    "path outside": (lambda f: edit_stimuli(f, image={0: "images/../../x.png"}), {}, "line 2: .*inside"),
    "no image": (lambda f: edit_stimuli(f, image={1: "images/x.png"}), {}, "line 3: .*x.png cannot be read"),
    "unknown split": (lambda f: edit_stimuli(f, split=["train"] * 39 + ["dev"]), {}, "line 41: split .*'dev'"),
    "seed ignored": (lambda f: edit_stimuli(f, split=["train"] * 40), {"seed": 1}, "--seed .*ignored"),
    "no group": (lambda f: None, {"group_by": "sesion"}, "no column 'sesion'.*session"),
    "no object": (lambda f: None, {"object_column": "synset"}, "no column 'synset'"),
    "empty object": (lambda f: edit_stimuli(f, object={0: ""}), {}, "line 2: .*'object' is empty"),
    "no training": (lambda f: None, {"val_fraction": 0.5, "test_fraction": 0.5}, "leave none of 40 stimuli"),
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


def test_ids_that_no_file_may_have_are_changed_and_their_rates_are_found_all_the_same(tmp_path):
    written = make_folder(tmp_path / "source", n=12, splits=True)
    names = [f"im {k}.v2/é" for k in range(12)]
    edit_stimuli(tmp_path / "source", stimulus_id=dict(enumerate(names)))
    rates = np.load(tmp_path / "source" / "rates.npy")
    (tmp_path / "source" / "rates.npy").unlink()
    order = np.random.default_rng(0).permutation(12)
    columns = {"stimulus_id": [names[k] for k in order]}
    write_csv(tmp_path / "source" / "rates.csv", columns | {f"n{k}": list(rates[order, k]) for k in range(10)})
    folder = ShardFolder(pack(Folder(source=tmp_path / "source").open(), tmp_path / "shards", 50, 1).folder)
    found = 0
    for split in folder.manifest.splits:
        opened = folder.split(split)
        for position, (stimulus, of_stimulus) in enumerate(zip(opened.stimulus_ids, opened.rates(), strict=True)):
            number = names.index(opened.meta(position)["source_id"])
            assert stimulus == f"im_{number}_v2__"
            np.testing.assert_allclose(of_stimulus, rates[number], rtol=1e-6)
            found += 1
    assert found == len(written.images)


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders_are_refused_in_one_sentence(tmp_path, case):
    spoil, options, message = BAD_FOLDERS[case]
    make_folder(tmp_path)
    spoil(tmp_path)
    with pytest.raises(BadInput, match=message) as caught:
        Folder(source=tmp_path, **options).open()
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_refused(tmp_path):
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
def test_bad_images_are_refused_when_they_are_packed(tmp_path, spoil, message):
    written = make_folder(tmp_path, n=12)
    path = tmp_path / "images" / "stim0003.png"
    path.write_bytes(spoil(written.images[3]))
    with pytest.raises(BadInput, match=f"{path}: the image cannot be read .*{message}"):
        pack(Folder(source=tmp_path).open(), tmp_path / "shards", 50, 1)
    assert not (tmp_path / "shards").exists()
