"""Packing with the real command, reading the shards with WebDataset itself, and damage of every kind."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import webdataset
from helpers import ROOT, assert_refused, finish, run_command, run_here, start_command
from make_sources import encode, make_folder, make_it_h5
from PIL import Image

from data_prep.common.errors import BadInput
from data_prep.shards.folder import ShardFolder
from data_prep.shards.index import index_shard
from data_prep.shards.manifest import from_json_list
from data_prep.shards.members import MEMBERS
from data_prep.shards.new_folder import new_folder
from data_prep.shards.packing import pack
from data_prep.sources.folder import Folder

PACK, SHOW = "data_prep/pack.py", "data_prep/show.py"


def read_with_webdataset(folder: Path, split: str) -> list[dict]:
    """The raw samples of a split as WebDataset's own reader gives them."""
    urls = sorted(map(str, folder.glob(f"{split}-*.tar")))
    return list(webdataset.WebDataset(urls, shardshuffle=False))


def checksums(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.tar")}


def leftovers(out: Path) -> list[Path]:
    return list(out.parent.glob(f".{out.name}*"))


def rows_of(written, split: str) -> list[int]:
    return [row for row, name in enumerate(written.splits) if name == split]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with PNG, JPEG and a BMP, single trials, and a site that some stimuli lack."""
    path = tmp_path_factory.mktemp("recording") / "src"
    written = make_folder(path, n=30, splits=True, trials=3, site_table=True)
    for row in (1, 3, 5, 10):
        (path / "images" / f"{written.ids[row]}.png").write_bytes(encode(written.images[row], "jpg"))
    (path / "images" / f"{written.ids[6]}.png").write_bytes(encode(written.images[6], "bmp"))
    written.trials[5:12, :, 2] = np.nan
    written.rates[5:12, 2] = np.nan
    np.save(path / "trials.npy", written.trials)
    np.save(path / "rates.npy", written.rates)
    written.path = path
    return written


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    """That folder packed by the command, in shards of 8."""
    out = tmp_path_factory.mktemp("packed") / "shards"
    result = run_command([PACK, "folder", source.path, "--out", out, "--workers", 2, "--stimuli-per-shard", 8])
    assert result.returncode == 0, result.stderr
    return SimpleNamespace(path=out, stdout=result.stdout, stderr=result.stderr)


@pytest.fixture
def copied(packed, tmp_path):
    """A copy of the packed folder to damage."""
    shutil.copytree(packed.path, tmp_path / "copy")
    return tmp_path / "copy"


# ---- what is in the shards -----------------------------------------------------------------------------------------


def test_the_command_says_what_it_packed(packed):
    assert not leftovers(packed.path)
    assert {path.name for path in packed.path.iterdir()} == {
        "manifest.json",
        "index.npz",
        "targets.npz",
        *(f"train-{number:06d}.tar" for number in range(3)),
        "val-000000.tar",
        "test-000000.tar",
    }
    for words in ("18 stimuli with responses, 3 shards", "32 x 32 px", "sites  10 in V4", "objects 4: apple, bear"):
        assert words in packed.stdout
    assert "Traceback" not in packed.stderr


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_webdataset_reads_what_the_source_holds(source, packed, split):
    samples, rows = read_with_webdataset(packed.path, split), rows_of(source, split)
    assert [sample["__key__"] for sample in samples] == [source.ids[row] for row in rows]
    for sample, row in zip(samples, rows, strict=True):
        file = (source.path / "images" / f"{source.ids[row]}.png").read_bytes()
        kind = "jpg" if row in (1, 3, 5, 10) else "png"
        assert {name for name in sample if not name.startswith("__")} == {kind, "rates.npy", "trials.npy", "json"}
        if row == 6:  # the BMP
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample["png"]))), source.images[6])
        else:
            assert sample[kind] == file
        rates, trials = (np.load(io.BytesIO(sample[name]), allow_pickle=False) for name in ("rates.npy", "trials.npy"))
        assert rates.dtype == trials.dtype == np.float32
        assert np.array_equal(rates, source.rates[row], equal_nan=True)
        assert np.array_equal(trials, source.trials[row], equal_nan=True)
        meta = json.loads(sample["json"])
        assert (meta["object"], meta["session"]) == (source.objects[row], row // 5)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_our_reader_and_webdataset_agree(packed, split):
    ours, theirs = ShardFolder(packed.path).split(split), read_with_webdataset(packed.path, split)
    assert ours.stimulus_ids == [sample["__key__"] for sample in theirs]
    for position in reversed(range(len(ours))):
        sample = theirs[position]
        data, kind = ours.image(position)
        assert data == sample[kind]
        assert ours.meta(position) == json.loads(sample["json"])
        for name in ("rates.npy", "trials.npy"):
            assert np.array_equal(ours.array(position, name), np.load(io.BytesIO(sample[name])), equal_nan=True)
        assert ours.array(position, "truth.npy") is None


def test_labels_that_a_recording_lacks_are_asked_for_with_their_column(packed):
    split = ShardFolder(packed.path).split("train")
    split.manifest = split.manifest.model_copy(update={"classes": None})
    with pytest.raises(BadInput, match=r"nothing to classify; add a column `object` to stimuli\.csv and pack again"):
        split.labels()


def test_a_split_gives_rates_trials_and_labels_in_its_order(source, packed):
    folder = ShardFolder(packed.path)
    for name in ("train", "val", "test"):
        split, rows = folder.split(name), rows_of(source, name)
        assert np.array_equal(split.rates(), source.rates[rows], equal_nan=True)
        assert np.array_equal(split.trials(), source.trials[rows], equal_nan=True)
        assert [folder.manifest.classes[label] for label in split.labels()] == [source.objects[row] for row in rows]
    with pytest.raises(BadInput, match="no split 'valid'; it has train, val, test"):
        folder.split("valid")


def test_the_manifest_counts_and_averages_what_is_there(source, packed):
    manifest = ShardFolder(packed.path).manifest
    assert {name: split.stimuli for name, split in manifest.splits.items()} == {"train": 18, "val": 6, "test": 6}
    assert [shard.stimuli for shard in manifest.splits["train"].shards] == [8, 8, 2]
    for split in manifest.splits.values():
        for shard in split.shards:
            assert shard.bytes == (packed.path / shard.file).stat().st_size
            assert shard.sha256 == checksums(packed.path)[shard.file]
    assert manifest.classes == sorted(set(source.objects))
    assert manifest.sites[3] == {"id": "n3", "region": "V4", "depth": 3.5}
    assert (manifest.image.width, manifest.image.height, manifest.image.mode) == (32, 32, "RGB")
    train = source.rates[rows_of(source, "train")].astype(np.float64)
    assert np.isnan(train).any()
    np.testing.assert_allclose(from_json_list(manifest.rates.mean), np.nanmean(train, axis=0), rtol=1e-12)
    np.testing.assert_allclose(from_json_list(manifest.rates.std), np.nanstd(train, axis=0), rtol=1e-9)
    assert manifest.ceiling.stimuli == 30
    assert manifest.ceiling.repetitions == {"min": 2, "mean": pytest.approx(8 / 3), "max": 3}
    assert len(manifest.ceiling.reliability) == 10
    assert all(0 < rho < 1 for rho in manifest.ceiling.reliability)


def test_the_course_file_keeps_its_test_responses_back(tmp_path):
    written = make_it_h5(tmp_path / "IT_data.h5")
    out = tmp_path / "it"
    result = run_here(PACK, "it-h5", tmp_path / "IT_data.h5", "--out", out, "--workers", 1)
    assert result.returncode == 0, result.stderr
    assert "test        8 stimuli without responses" in result.stdout
    folder = ShardFolder(out)
    assert {name: split.responses for name, split in folder.manifest.splits.items()} == {
        "train": True,
        "val": True,
        "test": False,
    }
    assert folder.manifest.classes == sorted({name for split in written.values() for name in split.objects})
    assert folder.manifest.response_window_ms == (70, 170)
    assert 0 < folder.manifest.provenance["largest_uint8_rounding_error"] < 1e-3
    assert folder.manifest.ceiling is None
    test = folder.split("test")
    assert all("rates.npy" not in sample for sample in read_with_webdataset(out, "test"))
    with pytest.raises(BadInput, match="'test' has no responses"):
        test.rates()
    for split in written:
        for position in range(8):
            image = Image.open(io.BytesIO(folder.split(split).image(position)[0]))
            assert np.array_equal(np.asarray(image), written[split].images[position])
    assert np.array_equal(folder.split("val").rates(), written["val"].rates)


# ---- whole or not at all -------------------------------------------------------------------------------------------


def test_an_existing_folder_is_refused_and_left_alone(source, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "precious.txt").write_text("keep me")
    assert_refused(run_here(PACK, "folder", source.path, "--out", out), out, "exists")
    assert [path.name for path in out.iterdir()] == ["precious.txt"]
    assert (out / "precious.txt").read_text() == "keep me"
    assert not leftovers(out)


def test_a_place_that_cannot_be_written_is_refused(source, tmp_path):
    (tmp_path / "file").write_text("")
    assert_refused(run_here(PACK, "folder", source.path, "--out", tmp_path / "file" / "shards"), tmp_path / "file")


def test_of_two_packs_into_one_folder_one_wins_and_the_other_is_refused(source, packed, tmp_path):
    out = tmp_path / "shards"
    args = [PACK, "folder", source.path, "--out", out, "--workers", 1, "--stimuli-per-shard", 8]
    results = [finish(process) for process in [start_command(args), start_command(args)]]
    loser, winner = sorted(results, key=lambda result: result.returncode == 0)
    assert winner.returncode == 0, winner.stderr
    assert_refused(loser, out)
    assert not leftovers(out)
    assert checksums(out) == checksums(packed.path)  # and one worker packs the same bytes as two
    assert json.loads((out / "manifest.json").read_text()) == json.loads((packed.path / "manifest.json").read_text())


def test_in_a_close_race_one_pack_wins_and_the_others_are_refused(tmp_path):
    def contend(out: Path, start: threading.Barrier) -> str:
        start.wait()
        try:
            with new_folder(out) as hidden:
                (hidden / "shard").write_text("")
        except BadInput:
            return "told"
        return "won"

    with ThreadPoolExecutor(3) as pool:
        for number in range(100):
            out, start = tmp_path / f"shards{number}", threading.Barrier(3)
            outcomes = [pool.submit(contend, out, start) for _ in range(3)]
            assert sorted(future.result() for future in outcomes) == ["told", "told", "won"]
            assert [path.name for path in out.iterdir()] == ["shard"]
    assert len(list(tmp_path.iterdir())) == 100


def test_an_image_that_cannot_be_read_leaves_nothing_behind(source, tmp_path):
    shutil.copytree(source.path, tmp_path / "src")
    image = tmp_path / "src" / "images" / f"{source.ids[29]}.png"
    image.write_bytes(image.read_bytes()[:-20])
    result = run_here(PACK, "folder", tmp_path / "src", "--out", tmp_path / "out", "--workers", 1)
    assert_refused(result, source.ids[29], "cut short")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


@pytest.fixture(scope="module")
def long_source(tmp_path_factory):
    """Enough stimuli for a pack to be interrupted."""
    path = tmp_path_factory.mktemp("long") / "src"
    make_folder(path, n=600, size=16, sites=4, splits=True)
    return path


def start_pack(source: Path, out: Path):
    """Start a pack of many shards with one worker."""
    return start_command([PACK, "folder", source, "--out", out, "--workers", 1, "--stimuli-per-shard", 5])


def wait_until_it_writes(process, out: Path) -> None:
    while not any(out.parent.glob(f".{out.name}.*/*.tar")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill(process, out: Path) -> SimpleNamespace:
    """Kill the first process of a pack; workers that do not notice within seconds are killed too."""
    wait_until_it_writes(process, out)
    workers = children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)
    deadline = time.monotonic() + 4
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    survivors = [pid for pid in workers if is_alive(pid)]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    finish(process, timeout=10)
    return SimpleNamespace(out=out, returncode=process.returncode, survivors=survivors)


def interrupt(process, out: Path) -> SimpleNamespace:
    """Press Ctrl-C, which reaches the command and its workers."""
    wait_until_it_writes(process, out)
    os.killpg(process.pid, signal.SIGINT)
    result = finish(process, timeout=30)
    return SimpleNamespace(out=out, returncode=result.returncode, stderr=result.stderr)


@pytest.fixture(scope="module")
def stopped(long_source, tmp_path_factory):
    """Two packs, stopped in the middle."""
    folder = tmp_path_factory.mktemp("stopped")
    outs = [folder / "killed", folder / "interrupted"]
    processes = [start_pack(long_source, out) for out in outs]
    with ThreadPoolExecutor() as pool:
        killed, interrupted = pool.map(lambda stop, *pack: stop(*pack), (kill, interrupt), processes, outs)
    return SimpleNamespace(killed=killed, interrupted=interrupted)


def test_a_killed_pack_leaves_nothing_under_the_name_and_can_be_repeated(long_source, stopped):
    killed = stopped.killed
    assert killed.returncode == -signal.SIGKILL
    assert not killed.out.exists()
    assert len(leftovers(killed.out)) == 1
    folder = pack(Folder(source=long_source).open(), killed.out, stimuli_per_shard=60, workers=1)
    assert not leftovers(killed.out)
    assert {name: len(folder.split(name)) for name in folder.manifest.splits} == {"train": 360, "val": 120, "test": 120}
    assert [fault for _, fault in folder.verify()] == [None] * 10


def test_the_workers_of_a_killed_pack_end(stopped):
    assert stopped.killed.survivors == []


def test_an_interrupted_pack_ends_quietly_and_leaves_nothing(stopped):
    assert stopped.interrupted.returncode == 130
    assert not stopped.interrupted.out.exists()
    assert not leftovers(stopped.interrupted.out)
    assert "Traceback" not in stopped.interrupted.stderr


# ---- show ----------------------------------------------------------------------------------------------------------


def test_show_prints_the_folder_and_draws_its_images(packed, copied):
    result = run_here(SHOW, copied)
    assert result.returncode == 0, result.stderr
    assert packed.stdout.splitlines()[1:] == result.stdout.splitlines()[1:-1]
    with Image.open(copied / "contact_sheet.png") as sheet:
        sheet.load()
        assert sheet.format == "PNG"
        assert len(set(sheet.resize((64, 64)).getdata())) > 100  # not a blank page


def test_show_verifies_a_whole_folder(copied, tmp_path):
    result = run_command([SHOW, copied, "--verify", "--contact-sheet", tmp_path / "sheet.png"])
    assert result.returncode == 0, result.stderr
    assert "all 5 shards are as they were packed" in result.stdout
    assert Image.open(tmp_path / "sheet.png").format == "PNG"
    assert not (copied / "contact_sheet.png").exists()


def test_show_refuses_a_place_it_cannot_draw_to(packed):
    assert_refused(run_here(SHOW, packed.path, "--contact-sheet", "/nowhere/sheet.png"), "/nowhere/sheet.png")


def test_show_refuses_a_folder_without_shards(source, tmp_path):
    assert_refused(run_here(SHOW, tmp_path / "nowhere"), tmp_path / "nowhere", "is not a folder")
    command = f"data_prep/pack.py folder {source.path} --out {source.path}_packed"
    assert_refused(run_here(SHOW, source.path), source.path, "no manifest.json", command)


# ---- damage --------------------------------------------------------------------------------------------------------


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


def place_of(folder: Path, member: str) -> tuple[int, int]:
    """Offset and size of a member of the first train stimulus that has it."""
    index = index_shard(folder / "train-000000.tar")
    column = MEMBERS.index(member)
    row = np.flatnonzero(index.offset[:, column] >= 0)[0]
    return int(index.offset[row, column]), int(index.size[row, column])


@pytest.mark.parametrize("member", ["png", "jpg", "rates.npy", "trials.npy", "json"])
@pytest.mark.parametrize("where", ["start", "middle"])
def test_verify_finds_a_flipped_byte(copied, member, where):
    offset, size = place_of(copied, member)
    flip(copied / "train-000000.tar", offset + (2 if where == "start" else size // 2))
    result = run_here(SHOW, copied, "--verify")
    assert_refused(result)
    assert str(copied / "train-000000.tar") in result.stderr
    assert "val-000000.tar" not in result.stderr


def test_verify_finds_a_flipped_byte_in_a_header_and_in_the_padding(copied):
    flip(copied / "train-000000.tar", place_of(copied, "json")[0] - 500)
    flip(copied / "test-000000.tar", (copied / "test-000000.tar").stat().st_size - 1)
    result = run_here(SHOW, copied, "--verify")
    assert_refused(result, "2 of 5 shards")
    assert "train-000000.tar" in result.stderr
    assert "test-000000.tar" in result.stderr


def without_sums(folder: Path) -> None:
    """Remove the checksums of the manifest and of the tables, as in older packs."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest |= {"files": {}, "checksum": None}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_verify_finds_an_index_of_another_pack(copied):
    without_sums(copied)
    with np.load(copied / "index.npz") as index:
        arrays = dict(index)
    arrays["val.offset"] = np.where(arrays["val.offset"] >= 0, arrays["val.offset"] + 512, -1)
    np.savez(copied / "index.npz", **arrays)
    result = run_here(SHOW, copied, "--verify", "--contact-sheet", copied / "sheet.png")
    assert_refused(result, "1 of 5 shards")
    assert "val-000000.tar" in result.stderr


@pytest.mark.parametrize("member", ["png", "json"])
def test_a_damaged_stimulus_is_named_when_it_is_shown(copied, member):
    offset, size = place_of(copied, member)
    flip(copied / "train-000000.tar", offset + size // 2)
    assert_refused(run_here(SHOW, copied), "train-000000.tar", "stim00")


@pytest.mark.parametrize("cut", ["anywhere", "at a member's border", "empty"])
def test_a_truncated_tar_is_refused_at_once(copied, cut):
    tar = copied / "train-000001.tar"
    size = {
        "anywhere": 3333,
        "at a member's border": int(index_shard(tar).offset[-1, MEMBERS.index("trials.npy")]) - 512,
        "empty": 0,
    }[cut]
    os.truncate(tar, size)
    if cut == "at a member's border":
        with pytest.raises(BadInput, match="without an end mark"):
            index_shard(tar)
    with pytest.raises(BadInput, match=r"train-000001\.tar has .* bytes"):
        ShardFolder(copied)
    assert_refused(run_here(SHOW, copied), "train-000001.tar")


def test_a_missing_shard_is_refused_at_once(copied):
    (copied / "val-000000.tar").unlink()
    assert_refused(run_here(SHOW, copied), "val-000000.tar is missing")


DAMAGED_INDEX = {
    "missing": (lambda path: path.unlink(), "no index.npz"),
    "cut": (lambda path: os.truncate(path, 1000), "index.npz cannot be read"),
    "flipped": (lambda path: flip(path, path.read_bytes().index(b"'shape'")), "index.npz"),
    "no index": (lambda path: path.write_bytes(b"{}"), "index.npz cannot be read"),
    "objects": (
        lambda path: np.savez(path, members=np.array([{}], dtype=object)),
        "index.npz cannot be read",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED_INDEX)
def test_a_damaged_index_is_refused(copied, damage):
    spoil, message = DAMAGED_INDEX[damage]
    spoil(copied / "index.npz")
    with pytest.raises(BadInput, match=r"index\.npz"):
        ShardFolder(copied)
    without_sums(copied)
    with pytest.raises(BadInput, match=message):
        ShardFolder(copied)


def test_the_index_of_a_folder_with_other_stimuli_is_refused(copied):
    without_sums(copied)
    with np.load(copied / "index.npz") as index:
        arrays = {name: array[:-1] if name.startswith("train") else array for name, array in index.items()}
    np.savez(copied / "index.npz", **arrays)
    with pytest.raises(BadInput, match="train"):
        ShardFolder(copied)


def set_in(document: dict, key: str, value) -> None:
    """Set `a.b.0.c` in a JSON document; None removes it."""
    *parents, last = (int(part) if part.isdigit() else part for part in key.split("."))
    for part in parents:
        document = document[part]
    if value is None:
        del document[last]
    else:
        document[last] = value


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rates.mean", [1.0] * 9, "rates.mean has 9 values for 10 sites"),
        ("rates.std", [1.0] * 11, "rates.std has 11 values for 10 sites"),
        ("ceiling.reliability", [0.5], "ceiling.reliability has 1 values for 10 sites"),
        ("rates.mean.3", "high", "rates.mean.3"),
        ("colour", "blue", "colour"),
        ("splits.train.shards.0.size", 3, "splits.train.shards.0.size"),
        ("splits.train.stimuli", 19, "splits.train.stimuli is 19, but its shards hold 18"),
        ("splits.valid", {"stimuli": 1}, "valid"),
        ("splits.train.shards.0.file", "../../secret.tar", "splits.train.shards.0.file"),
        ("splits.train.shards.0.sha256", "0", "splits.train.shards.0.sha256"),
        ("format_version", 2, "format_version"),
        ("format", "tables", "format"),
        ("sites", None, "sites"),
        ("sites.0", {"region": "IT"}, "needs its own id"),
        ("sites.0.id", "n3", "needs its own id"),
        ("classes", None, "classes"),
        ("image.width", 0, "image.width"),
    ],
)
def test_a_wrong_manifest_is_refused_by_name(copied, key, value, message):
    manifest = json.loads((copied / "manifest.json").read_text())
    set_in(manifest, key, value)
    (copied / "manifest.json").write_text(json.dumps(manifest))
    assert_refused(run_here(SHOW, copied), copied / "manifest.json", message)


@pytest.mark.parametrize("content", [b"", b"{", b'{"format": }', b"\xff\xfe", b"[]", b"null"])
def test_a_manifest_must_be_a_json_object(copied, content):
    (copied / "manifest.json").write_bytes(content)
    assert_refused(run_here(SHOW, copied), copied / "manifest.json")


def write_tar(path: Path, members: list[str]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name in members:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    return path


@pytest.mark.parametrize("name", ["a.pyd", "a.pkl", "a.pth", "a.rates.npy.gz", "a.doc", "a"])
def test_anything_but_plain_data_is_refused_by_name(tmp_path, name):
    with pytest.raises(BadInput, match=f": {name}: not plain data"):
        index_shard(write_tar(tmp_path / "foreign.tar", ["a.png", name]))


def test_members_that_lie_apart_are_refused(tmp_path):
    with pytest.raises(BadInput, match="b: occurs twice in the tar, or its members are not adjacent"):
        index_shard(write_tar(tmp_path / "mixed.tar", ["b.png", "a.png", "a.json", "b.json"]))


# ---- bad command lines ---------------------------------------------------------------------------------------------

BAD_COMMAND_LINES = {
    "unknown option": (["--trails", "t.npy"], "did you mean", "--trials"),
    "unknown option of the command": (["--worker", "3"], "--workers"),
    "a word too many": (["and more"], "and more"),
    "below its bound": (["--workers", "0"], "workers", "at least 1"),
    "no number": (["--stimuli-per-shard", "many"], "--stimuli-per-shard", "many"),
    "no fraction": (["--val-fraction", "a lot"], "--val-fraction", "a lot"),
    "one number of two": (["--window-ms", "70"], "--window-ms"),
    "no value": (["--name"], "--name"),
    "fractions above one": (["--val-fraction", "0.9", "--test-fraction", "0.3"], "fraction"),
}


@pytest.mark.parametrize("case", BAD_COMMAND_LINES)
def test_a_bad_command_line_is_refused_in_one_sentence(tmp_path, case):
    more, *words = BAD_COMMAND_LINES[case]
    make_folder(tmp_path / "src", n=10)
    result = run_here(PACK, "folder", tmp_path / "src", "--out", tmp_path / "x", *more)
    assert_refused(result, *words)
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([PACK, "folder", "src"], ["--out"]),
        ([PACK, "foldr", "src", "--out", "x"], ["foldr", "folder"]),
        ([PACK], ["simulated", "--help"]),
        ([SHOW], ["FOLDER"]),
        ([SHOW, "a", "--verfy"], ["--verify"]),
    ],
)
def test_missing_and_misspelt_options_are_named(args, words):
    result = run_here(*args)
    assert_refused(result, *words)
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", [[PACK], [PACK, "folder"], [PACK, "it-h5"], [SHOW]])
def test_help_is_not_an_error(command):
    result = run_here(*command, "--help")
    assert result.returncode in (0, None)
    assert result.stderr == ""
    assert "usage: " in result.stdout
    assert (ROOT / command[0]).is_file()
