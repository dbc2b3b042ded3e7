"""What an image is, by content: hashes in the index, computed where the index has none, and copies found with them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import run_here, succeed_here
from hostile import sealed
from hypothesis import given
from hypothesis import strategies as st
from make_sources import encode, make_folder, make_images
from make_tars import members_of, npy, write_tar

from data_prep.common.atomic_writes import write_npz
from data_prep.common.image_decoding import decode
from data_prep.common.safe_reading import read_npz
from data_prep.shards import image_identity
from data_prep.shards.folder import ShardFolder
from data_prep.shards.image_hashes import encoded_hash, pixel_hash
from data_prep.shards.image_identity import ImageIdentities, first_copies, image_identities
from data_prep.shards.image_rules import ImageRules
from data_prep.shards.packing import pack
from data_prep.sources.folder import Folder
from data_prep.splits import merged_groups

SHOW = "data_prep/show.py"
IMAGES, _ = make_images(6, size=24)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user_cache"))


@pytest.fixture
def copied(packed, tmp_path):
    """A copy of a packed folder, to change."""
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def assert_of_its_images(folder: ShardFolder) -> None:
    for name in folder.manifest.splits:
        identities, split = image_identities(folder, name), folder.split(name)
        for position in range(len(split)):
            data, encoding = split.image(position)
            assert (identities.encoded[position] == encoded_hash(data)).all()
            assert (identities.pixels[position] == pixel_hash(decode(data, encoding))).all()


def without_hashes(folder) -> None:
    """Make the index and the manifest of a packed folder those of an earlier version."""
    arrays = read_npz(folder / "index.npz")
    write_npz(folder / "index.npz", {name: array for name, array in arrays.items() if "_hash" not in name})
    sealed(folder)


def test_packing_notes_what_the_images_are(packed):
    folder = ShardFolder(packed)
    split = folder.split("train")
    assert split.encoded_hash is not None
    assert split.pixel_hash is not None
    assert_of_its_images(folder)


def test_an_older_folder_is_read_once(copied, monkeypatch):
    known = {name: image_identities(ShardFolder(copied), name) for name in ("train", "val")}
    without_hashes(copied)
    folder = ShardFolder(copied)
    assert folder.split("train").pixel_hash is None
    for name, expected in known.items():
        found = image_identities(folder, name)
        assert (found.encoded == expected.encoded).all()
        assert (found.pixels == expected.pixels).all()
    monkeypatch.setattr(image_identity, "compute_identities", None)  # kept: also for another process
    assert (image_identities(ShardFolder(copied), "train").pixels == known["train"].pixels).all()
    succeed_here(SHOW, copied, "--index")
    assert ShardFolder(copied).split("train").pixel_hash is not None
    assert_of_its_images(ShardFolder(copied))


def test_a_folder_without_a_cache_is_read_each_time(copied, monkeypatch, tmp_path):
    without_hashes(copied)
    (tmp_path / "user_cache").write_text("a file where the folder should be")
    assert_of_its_images(ShardFolder(copied))


def test_a_damaged_cache_is_not_believed(copied, tmp_path):
    without_hashes(copied)
    image_identities(ShardFolder(copied), "train")
    for path in (tmp_path / "user_cache").rglob("*.npz"):
        write_npz(path, {"encoded": np.zeros((3, 16), np.uint8), "pixels": np.zeros((3, 16), np.uint8)})
    assert_of_its_images(ShardFolder(copied))


def test_hashes_of_another_shape_are_refused(copied):
    arrays = read_npz(copied / "index.npz")
    write_npz(copied / "index.npz", arrays | {"train.pixel_hash": arrays["train.pixel_hash"][:, :8]})
    sealed(copied)
    result = run_here(SHOW, copied)
    assert result.returncode == 2
    assert "train: pixel_hash is uint8" in result.stderr


def test_a_pack_without_decoding_leaves_the_pixels_open(tmp_path):
    make_folder(tmp_path / "src", n=12, splits=True)
    folder = pack(Folder(source=tmp_path / "src").open(), tmp_path / "shards", 8, 1, ImageRules(decode=False))
    assert folder.split("train").encoded_hash is not None
    assert folder.split("train").pixel_hash is None
    assert_of_its_images(folder)


def test_foreign_tars_tell_what_their_images_are(tmp_path):
    """An image as PNG, as another PNG and as raw pixels is one; one that cannot be decoded equals no other."""
    png = encode(IMAGES[0], "png")
    samples = {
        "a": {"png": png},
        "b": {"png": png + b"trailing bytes"},
        "c": {"image.npy": npy(IMAGES[0])},
        "d": {"png": encode(IMAGES[1], "png")},
        "broken": {"png": png[:200] + bytes(8) + png[208:]},
    }
    write_tar(tmp_path / "tars" / "train.tar", members_of(samples))
    identities = image_identities(ShardFolder(tmp_path / "tars"), "train")
    assert len(np.unique(identities.encoded, axis=0)) == 5
    assert first_copies(identities).tolist() == [0, 0, 0, 3, 4]


def test_the_same_bytes_or_the_same_pixels_make_a_copy():
    def hashes(*numbers: int) -> np.ndarray:
        return np.array([[number] * 16 for number in numbers], np.uint8)

    identities = ImageIdentities(encoded=hashes(1, 2, 3, 2, 4), pixels=hashes(1, 2, 1, 3, 3))
    assert first_copies(identities).tolist() == [0, 1, 0, 1, 1]


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=30))
def test_groups_merge_as_a_search_would(labels):
    """Against the plain definition: whoever can be reached through common labels is in the group."""
    groups = merged_groups(*np.array(labels).T)
    for start in range(len(labels)):
        reached, edge = {start}, [start]
        while edge:
            here = edge.pop()
            new = {k for k, other in enumerate(labels) if other[0] == labels[here][0] or other[1] == labels[here][1]}
            edge += new - reached
            reached |= new
        assert groups[start] == min(reached)
