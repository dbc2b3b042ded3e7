"""Folders of tars from elsewhere: WebDataset's own writer, or plain tar in any of its formats."""

import io
import json
import os
import pickle
import shutil
import subprocess
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import webdataset
from helpers import assert_refused, run_here, succeed_here
from make_sources import encode
from make_tars import IMAGES, OBJECTS, RATES, members_of, npy, sample, write_samples, write_tar
from PIL import Image

from data_prep.common.errors import BadInput, CannotWrite
from data_prep.shards import foreign_tars
from data_prep.shards.folder import ShardFolder
from data_prep.shards.manifest import from_json_list

SHOW = "data_prep/show.py"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two train tars and one val tar."""
    write_samples(tmp_path / "tars" / "train-0.tar", range(8))
    write_samples(tmp_path / "tars" / "train-1.tar", range(8, 14))
    write_samples(tmp_path / "tars" / "val-0.tar", range(14, 20))
    return tmp_path / "tars"


def pixels(split, position: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(split.image(position)[0])).convert("RGB"))


# ---- whoever wrote them --------------------------------------------------------------------------------------------


def test_what_img2dataset_and_macos_add_is_passed_over(tmp_path):
    """img2dataset writes captions beside its images, and tar on macOS a file of attributes before each file."""
    members = []
    for row in range(5):
        caption = json.dumps({"caption": "a face", "status": "success", "key": f"{row:09d}"}).encode()
        kinds = {"jpg": encode(IMAGES[row], "jpg"), "json": caption, "txt": b"a face", "cls": str(row % 2).encode()}
        members += [
            member
            for kind, data in kinds.items()
            for member in ((f"./._{row:09d}.{kind}", b"\0\5\x16\7"), (f"./{row:09d}.{kind}", data))
        ]
    extra = [("__MACOSX/._x.jpg", b"\0\5\x16\7"), ("./.DS_Store", b"Bud1")]
    write_tar(tmp_path / "00000.tar", [*members, *extra])
    folder = ShardFolder(tmp_path)
    split = folder.split("train")
    assert split.stimulus_ids == [f"{row:09d}" for row in range(5)]
    assert folder.manifest.classes == ["0", "1"]
    assert split.meta(3)["caption"] == "a face"


LONG = "a_folder_whose_name_alone_is_so_long_that_no_old_tar_header_has_room_for_it/" * 2


@pytest.mark.parametrize("prefix", ["", "./", "deep.er/er/", LONG])
@pytest.mark.parametrize("format", ["gnu", "pax", "ustar"])
def test_plain_tars_are_read_as_webdataset_reads_them(tmp_path, format, prefix):
    files = tmp_path / "files"
    for row in range(6):
        for kind, data in sample(row, json=json.dumps({"label": int(OBJECTS[row])}).encode()).items():
            path = files / prefix / f"s{row:02d}.{kind}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    tar, inside = tmp_path / "tars" / "some.tar", prefix.split("/")[0] if prefix not in ("", "./") else "."
    names = [inside] if prefix else sorted(path.name for path in files.iterdir())
    tar.parent.mkdir()
    subprocess.run(["tar", f"--format={format}", "--sort=name", "-cf", tar, "-C", files, *names], check=True)
    split = ShardFolder(tar.parent).split("train")
    theirs = list(webdataset.WebDataset([str(tar)], shardshuffle=False))
    assert [key.removeprefix("./") for key in (raw["__key__"] for raw in theirs)] == split.stimulus_ids
    assert split.stimulus_ids == [f"{prefix.removeprefix('./')}s{row:02d}" for row in range(6)]
    assert np.array_equal(split.rates(), RATES[:6], equal_nan=True)
    assert split.labels().tolist() == [sorted(set(OBJECTS[:6])).index(label) for label in OBJECTS[:6]]
    for row in range(6):
        assert bytes(split.image(row)[0]) == theirs[row]["png"]
        assert np.array_equal(pixels(split, row), IMAGES[row])


def test_shards_of_webdatasets_own_writer(tmp_path):
    """As its documentation shows them: encoded by the writer, double precision, a number as the class."""
    with webdataset.ShardWriter(str(tmp_path / "shard-%06d.tar"), maxcount=8, verbose=0) as writer:
        for row in range(20):
            image = {"jpeg": Image.fromarray(IMAGES[row])} if row % 2 else {"JPG": encode(IMAGES[row], "jpg")}
            rates = RATES[row].astype(np.float64)
            writer.write({"__key__": f"{row:06d}", **image, "rates.npy": rates, "cls": int(OBJECTS[row]) + 9})
    folder = ShardFolder(tmp_path)
    split = folder.split("train")
    assert list(folder.manifest.splits) == ["train"]
    assert [shard.stimuli for shard in folder.manifest.splits["train"].shards] == [8, 8, 4]
    assert folder.manifest.classes == ["9", "10", "11", "12"]  # by number, not "10" before "9"
    assert [folder.manifest.classes[label] for label in split.labels()] == [str(label + 9) for label in OBJECTS]
    assert split.rates().dtype == np.float32
    assert np.array_equal(split.rates(), RATES, equal_nan=True)
    assert all(split.image(row)[1] == "jpg" for row in range(20))


def test_the_manifest_says_what_is_in_the_tars(folder):
    manifest = ShardFolder(folder).manifest
    assert {name: split.stimuli for name, split in manifest.splits.items()} == {"train": 14, "val": 6}
    assert [site["id"] for site in manifest.sites] == [f"site_{site:03d}" for site in range(5)]
    assert (manifest.image.width, manifest.image.height, manifest.image.mode) == (24, 24, "RGB")
    assert manifest.classes is None
    np.testing.assert_allclose(from_json_list(manifest.rates.mean), np.nanmean(RATES[:14], axis=0), rtol=1e-6)
    np.testing.assert_allclose(from_json_list(manifest.rates.std), np.nanstd(RATES[:14], axis=0), rtol=1e-5)


def test_labels_alone_are_enough(tmp_path):
    samples = {f"{row}": {"png": encode(IMAGES[row], "png"), "cls": str(OBJECTS[row]).encode()} for row in range(9)}
    write_tar(tmp_path / "train.tar", members_of(samples))
    folder = ShardFolder(tmp_path)
    assert folder.manifest.sites == []
    assert folder.split("train").labels().tolist() == OBJECTS[:9].tolist()
    with pytest.raises(BadInput, match=r"'train' has no responses \(rates.npy\)"):
        folder.split("train").rates()
    succeed_here(SHOW, tmp_path)


def test_members_that_describe_the_tar_are_passed_over_as_webdataset_does(tmp_path):
    members = [("__index__/notes.txt", b"?"), ("__meta__", b"?"), *members_of({"s": sample(0)})]
    write_tar(tmp_path / "a.tar", members)
    assert ShardFolder(tmp_path).split("train").stimulus_ids == ["s"]


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["a.tar", "b.tar"], {"train": 2}),
        (["train-0.tar", "validation-0.tar", "test_0.tar"], {"train": 1, "val": 1, "test": 1}),
        (["train/0.tar", "train/1.tar", "val/0.tar"], {"train": 2, "val": 1}),
        (["imagenet1k-Train-0000.tar", "imagenet1k-valid-00.tar"], {"train": 1, "val": 1}),
        (["constrained.tar", "trainer.tar"], {"train": 2}),
        (["test.tar"], {"test": 1}),
    ],
)
def test_names_tell_the_split(tmp_path, names, splits):
    for number, name in enumerate(names):
        write_samples(tmp_path / name, [number])
    recorded_splits = ShardFolder(tmp_path).manifest.splits
    assert {name: len(split.shards) for name, split in recorded_splits.items()} == splits


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["train-0.tar", "more.tar"], "more.tar: its name contains no split"),
        (["train-of-test.tar"], "more than one split"),
        (["train.tar", "val.tar.gz"], "val.tar.gz is compressed"),
        (["pipe:touch hacked.tar"], "rename it to letters, digits"),
    ],
)
def test_ambiguous_names_are_refused(tmp_path, names, words):
    for number, name in enumerate(names):
        write_samples(tmp_path / name, [number])
    with pytest.raises(BadInput, match=words):
        ShardFolder(tmp_path)
    assert not (tmp_path / "hacked.tar").exists()


# ---- what is kept of them ------------------------------------------------------------------------------------------


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def rewrite(path: Path, change) -> None:
    """Change the bytes of a file but not its size and time."""
    status, data = path.stat(), bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_the_tars_are_read_once(folder):
    first = ShardFolder(folder)
    assert contents(folder) == ["index.npz", "train-0.tar", "train-1.tar", "val-0.tar"]
    rewrite(folder / "train-0.tar", lambda data: data.__setitem__(slice(None), bytes(len(data))))
    reopened = ShardFolder(folder)
    assert reopened.manifest == first.manifest
    assert np.array_equal(reopened.split("val").rates(), RATES[14:])


@pytest.mark.parametrize("change", ["rewritten", "more", "fewer", "damaged index", "index of a pack"])
def test_other_tars_are_read_again(folder, change):
    ShardFolder(folder)
    if change == "rewritten":
        write_samples(folder / "train-1.tar", range(8, 11))
    elif change == "more":
        write_samples(folder / "train-2.tar", [7], prefix="t")
    elif change == "fewer":
        (folder / "train-1.tar").unlink()
    elif change == "damaged index":
        rewrite(folder / "index.npz", lambda data: data.__setitem__(slice(50, 400), bytes(350)))
    else:
        with np.load(folder / "index.npz") as arrays:
            np.savez(
                folder / "index.npz", **{name: arrays[name] for name in arrays if name not in ("manifest", "tars")}
            )
        with pytest.raises(BadInput, match=r"no manifest.json, so it is an incomplete copy"):
            ShardFolder(folder)
        return
    stimuli = {"rewritten": 11, "more": 15, "fewer": 8, "damaged index": 14}[change]
    assert len(ShardFolder(folder).split("train").rates()) == stimuli
    assert not [name for name in contents(folder) if name.startswith(".")]


def test_a_folder_that_cannot_be_written_has_its_index_elsewhere_or_in_memory(folder, tmp_path, monkeypatch, capfd):
    def write(path, arrays, write=foreign_tars.write_npz):
        if folder in path.parents or nowhere:
            raise CannotWrite(path, OSError(30, "Read-only file system"))
        write(path, arrays)

    monkeypatch.setattr(foreign_tars, "write_npz", write)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for nowhere in (True, False):
        assert len(ShardFolder(folder).split("train")) == 14
        notes = capfd.readouterr().err
        assert notes.count("note: ") == 1
        assert f"{folder} cannot be written (Read-only file system)" in notes
        assert ("read again each time" if nowhere else f"kept in {tmp_path / 'cache'}") in notes
    rewrite(folder / "train-0.tar", lambda data: data.__setitem__(slice(None), bytes(len(data))))
    assert len(ShardFolder(folder).split("train")) == 14
    assert capfd.readouterr().err == ""
    assert "index.npz" not in contents(folder)


def test_one_of_many_processes_reads_the_tars(folder, monkeypatch):
    read, start = [], threading.Barrier(4)
    monkeypatch.setattr(
        foreign_tars, "derive", lambda *given, derive=foreign_tars.derive: read.append(1) or derive(*given)
    )

    def open_it(_):
        start.wait()
        return ShardFolder(folder).manifest

    with ThreadPoolExecutor(4) as pool:
        manifests = list(pool.map(open_it, range(4)))
    assert len(read) == 1
    assert all(manifest == manifests[0] for manifest in manifests)


def test_show_indexes_and_verifies_them(folder):
    shown = run_here(SHOW, folder)
    assert shown.returncode == 0, shown.stderr
    assert "train      14 stimuli with responses, 2 shards" in shown.stdout
    assert "sites  5" in shown.stdout
    succeed_here(SHOW, folder, "--verify")
    rewrite(folder / "train-1.tar", lambda data: data.__setitem__(1000, data[1000] ^ 1))
    assert_refused(run_here(SHOW, folder, "--verify"), "1 of 3 shards")
    shutil.copy(folder / "val-0.tar", folder / "train-1.tar")
    assert "train      14" in run_here(SHOW, folder, "--index").stdout


def test_a_lost_index_is_rebuilt(folder, tmp_path):
    """The tars tell it, and the manifest what they must hold."""
    (folder / "manifest.json").write_text(ShardFolder(folder).manifest.model_dump_json())
    (folder / "index.npz").unlink()
    assert_refused(run_here(SHOW, folder), "has no index.npz", "--index")
    succeed_here(SHOW, folder, "--index")
    succeed_here(SHOW, folder, "--verify")


# ---- damage --------------------------------------------------------------------------------------------------------


def cut(place):
    def damage(folder: Path) -> None:
        path = folder / "train-1.tar"
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        os.truncate(path, place(members))

    return damage


def end_of(member: tarfile.TarInfo) -> int:
    return member.offset_data + -(-member.size // 512) * 512


def changed(**kinds: bytes | None):
    """One stimulus of train-1.tar with other members."""

    def damage(folder: Path) -> None:
        samples = {f"s{row:02d}": sample(row) for row in range(8, 14)}
        members = samples["s10"] | {name.replace("_", "."): data for name, data in kinds.items()}
        samples["s10"] = {kind: data for kind, data in members.items() if data is not None}
        write_tar(folder / "train-1.tar", members_of(samples))

    return damage


def also(*members: tuple[str, bytes]):
    return lambda folder: write_tar(folder / "train-1.tar", [*members_of({"s10": sample(10)}), *members])


def link(folder: Path) -> None:
    with tarfile.open(folder / "train-1.tar", "a") as tar:
        info = tarfile.TarInfo("s99.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)


def joined(folder: Path) -> None:
    with (folder / "train-1.tar").open("ab") as file:
        file.write((folder / "val-0.tar").read_bytes())


def bad_header(folder: Path) -> None:
    with tarfile.open(folder / "train-1.tar") as tar:
        header = tar.getmembers()[5].offset
    rewrite(folder / "train-1.tar", lambda data: data.__setitem__(header, data[header] ^ 1))


DAMAGE = {
    "cut at the end of a stimulus": (cut(lambda members: end_of(members[3])), "train-1.tar", "without an end mark"),
    "cut between its members": (cut(lambda members: end_of(members[4])), "train-1.tar", "without an end mark"),
    "cut in a member": (cut(lambda members: members[4].offset_data + 100), "train-1.tar", "not a whole tar file"),
    "cut in a header": (cut(lambda members: members[4].offset + 100), "train-1.tar", "not a whole tar file"),
    "empty file": (cut(lambda members: 0), "train-1.tar", "not a whole tar file"),
    "a header damaged": (bad_header, "train-1.tar", "no header at byte"),
    "two tars in one": (joined, "train-1.tar", "after its end mark"),
    "no stimuli": (lambda folder: write_tar(folder / "train-1.tar", []), "train-1.tar", "contains no stimuli"),
    "no image": (changed(png=None), "train-1.tar: s10", "has no image"),
    "no responses": (changed(rates_npy=None), "train-1.tar: s10", "has no rates.npy"),
    "another number of sites": (
        changed(rates_npy=npy(RATES[0, :4])),
        "train-1.tar: s10",
        "earlier stimuli have 5",
    ),
    "a table of responses": (changed(rates_npy=npy(RATES)), "train-1.tar: s10.rates.npy", "(sites,)"),
    "an infinite response": (changed(rates_npy=npy(np.float32([1, np.inf]))), "train-1.tar: s10", "infinite"),
    "objects": (changed(rates_npy=npy(np.array([{}] * 5), allow_pickle=True)), "train-1.tar: s10", "plain npy"),
    "a pickle": (changed(rates_npy=pickle.dumps([1.0] * 5)), "train-1.tar: s10.rates.npy", "plain npy"),
    "text": (changed(rates_npy=npy(np.array(["a"] * 5))), "train-1.tar: s10.rates.npy", "real numbers"),
    "a cut image": (changed(png=sample(10)["png"][:-20]), "train-1.tar: s10.png", "cut short"),
    "a wrong name": (changed(png=encode(IMAGES[0], "jpg")), "train-1.tar: s10.png", "is not that of its name"),
    "no JSON": (changed(json=b"{"), "train-1.tar: s10.json", "not readable as JSON"),
    "no JSON object": (changed(json=b"[1]"), "train-1.tar: s10.json", "JSON object"),
    "a class for one only": (changed(cls=b"3"), "train-0.tar: s00", "has no label"),
    "no class": (changed(cls=b"\xff"), "train-1.tar: s10.cls", "as text"),
    "a key twice": (also(*members_of({"s11": sample(11), "s10": sample(10)})), "train-1.tar: s10", "twice"),
    "a member twice": (also(("s10.png", sample(10)["png"])), "train-1.tar: s10", "has png twice"),
    "a key in two tars": (also(*members_of({"s03": sample(3)})), "train-1.tar: s03", "is also in train-0.tar"),
    "a pickle as a member": (also(("s10.pyd", pickle.dumps(1))), "train-1.tar: s10.pyd", "not plain data"),
    "a torch file": (also(("s10.pth", b"")), "train-1.tar: s10.pth", "not plain data"),
    "a name without an ending": (also(("README", b"")), "train-1.tar: README", "not plain data"),
    "a link": (link, "train-1.tar: s99.png", "a link"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_reported_with_tar_and_key(folder, kind):
    damage, *words = DAMAGE[kind]
    damage(folder)
    assert_refused(run_here(SHOW, folder), *words)
    assert "index.npz" not in contents(folder)
