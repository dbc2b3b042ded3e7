"""Stimuli that show the same image under different ids: dealt together, counted, and warned of where they are apart."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import run_here, succeed_here
from hostile import edit, sealed
from hypothesis import given
from hypothesis import strategies as st
from make_sources import encode, make_folder, make_images, write_csv
from make_tars import members_of, npy, write_tar
from PIL import Image

from data_prep.common.errors import BadInput
from data_prep.shards.folder import ShardFolder
from data_prep.shards.image_rules import ImageRules
from data_prep.shards.packing import pack
from data_prep.shards.summary import summary
from data_prep.sources.folder import Folder
from data_prep.sources.joined import Joined
from data_prep.split_options import SplitOptions
from data_prep.splits import Dealt, FoldDeal, RandomDeal, assign_splits, with_copies

FRACTIONS = {"train": 0.6, "val": 0.2, "test": 0.2}
N = 40
COPIES = {"s030": "s001", "s031": "s002", "s032": "s003", "s033": "s003"}  # copy: original


def numbered(number: int) -> str:
    return f"s{number:03d}"


def write_source(path: Path, splits: list[str] | None = None) -> Path:
    """40 stimuli, four of them copies: by path, by bytes, and two by pixels (another PNG encoder)."""
    written = make_folder(path, n=N, splits=splits is not None)
    images = [f"images/{name}.png" for name in written.ids]
    images[30] = images[1]
    shutil.copy(path / images[2], path / images[31])
    for copy in (32, 33):
        Image.open(path / images[3]).save(path / images[copy], compress_level=copy - 30)
    columns = {"stimulus_id": [numbered(k) for k in range(N)], "image": images}
    write_csv(path / "stimuli.csv", columns if splits is None else columns | {"split": splits})
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_source(tmp_path_factory.mktemp("copies") / "src")


def split_of_ids(folder: ShardFolder) -> dict[str, str]:
    return {stimulus: name for name in folder.manifest.splits for stimulus in folder.split(name).stimulus_ids}


def separated(folder: ShardFolder) -> list[str]:
    split_of = split_of_ids(folder)
    return [copy for copy, original in COPIES.items() if split_of[copy] != split_of[original]]


# ---- dealing -------------------------------------------------------------------------------------------------------

labels = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)), min_size=12, max_size=60)


def copies_of(images: np.ndarray) -> np.ndarray:
    return np.array([np.flatnonzero(images == image)[0] for image in images])


@given(labels, st.integers(0, 2**32), st.booleans())
def test_copies_and_groups_stay_together_in_every_deal(drawn, seed, grouped):
    images, objects = np.array(drawn).T
    groups = [str(name) for name in objects] if grouped else None
    for deal in (RandomDeal(FRACTIONS, seed, groups), FoldDeal(2, 1, seed, groups, "recording")):
        try:
            splits = deal(copies_of(images))
        except BadInput:  # everything hangs together, so nothing is left to train on, or there are too few folds
            continue
        for names in (images, objects) if grouped else (images,):
            for name in np.unique(names):
                assert len({split for split, own in zip(splits, names, strict=True) if own == name}) == 1


@given(st.integers(12, 60), st.integers(0, 2**32), st.booleans())
def test_without_copies_nothing_changes(n, seed, grouped):
    groups = [str(k % 5) for k in range(n)] if grouped else None
    assert RandomDeal(FRACTIONS, seed, groups)(np.arange(n)) == assign_splits(n, FRACTIONS, seed, groups)
    assert with_copies(groups, np.arange(n)) is groups


def test_copies_within_a_group_change_nothing():
    groups = [str(k % 5) for k in range(20)]
    copies = np.arange(20)
    copies[15] = 5  # both of group 0
    assert RandomDeal(FRACTIONS, 3, groups)(copies) == assign_splits(20, FRACTIONS, 3, groups)


@given(labels, st.integers(0, 2**32))
def test_the_folds_of_copies_cover_every_stimulus_once(drawn, seed):
    copies = copies_of(np.array(drawn)[:, 0])
    count = min(4, len(np.unique(copies)))
    if count < 2:
        return
    held_out = [FoldDeal(count, fold, seed, None, "recording")(copies) for fold in range(1, count + 1)]
    assert (np.sum(np.array(held_out) == "val", axis=0) == 1).all()


def test_a_source_that_deals_only_some_stimuli_keeps_the_others():
    in_file = ["train"] * 8 + ["test"] * 2
    deal = RandomDeal({"train": 0.5, "val": 0.5}, 0)
    dealt = Dealt(deal(np.arange(8)), {}, deal).within(in_file, range(8))
    assert dealt.deal is not None
    copies = np.array([0, 1, 2, 3, 0, 1, 2, 3, 8, 8])
    splits = dealt.deal(copies)
    assert splits[:4] == splits[4:8]
    assert splits[8:] == ["test", "test"]
    assert dealt.deal(np.arange(10)) == dealt.splits


# ---- packing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"split": "random", "split_seed": 3},
        {"split": "ordered", "split_fractions": (0.25, 0.25)},
        {"split": "k-fold", "folds": 5},
    ],
)
def test_a_deal_keeps_copies_together(source, tmp_path, options):
    """The responses and images are those of the ids, although the recording was dealt again."""
    recording = SplitOptions(**options).open_recording(Folder(source=source))
    folder = pack(recording, tmp_path / "out", 7, 1)
    assert separated(folder) == []
    facts = folder.manifest.provenance["copies"]
    assert facts == {"stimuli": N, "images": N - 4, "compared": "pixels"}
    rates, images = np.load(source / "rates.npy"), list(csv.DictReader((source / "stimuli.csv").open()))
    for split in map(folder.split, folder.manifest.splits):
        for position, stimulus in enumerate(split.stimulus_ids):
            number = int(stimulus[1:])
            np.testing.assert_array_equal(split.array(position, "rates.npy"), rates[number])
            assert bytes(split.image(position)[0]) == (source / images[number]["image"]).read_bytes()
    assert f"{N} stimuli show {N - 4} different images" in summary(folder)
    assert "copies together" in summary(folder)
    assert "warning" not in summary(folder)


def test_some_seeds_would_have_separated_them(source):
    """The tests above are not vacuous: the deal of stimuli with an image of their own is another."""
    for seed in (0, 3):
        recording = SplitOptions(split="random", split_seed=seed).open_recording(Folder(source=source))
        split_of = dict(zip(recording.stimulus_ids, recording.splits, strict=True))
        assert any(split_of[copy] != split_of[original] for copy, original in COPIES.items())


def test_copies_may_be_dealt_apart_on_request(source, tmp_path):
    recording = SplitOptions(split="random").open_recording(Folder(source=source))
    folder = pack(recording, tmp_path / "out", 50, 1, ImageRules(copies="as-dealt"))
    assert split_of_ids(folder) == dict(zip(recording.stimulus_ids, recording.splits, strict=True))
    assert folder.manifest.provenance["copies"]["in_several_splits"] == len(
        {COPIES[copy] for copy in separated(folder)}
    )


def test_a_split_column_that_separates_copies_is_kept_marked_and_warned_of(tmp_path):
    splits = ["train"] * 30 + ["val"] * 5 + ["test"] * 5
    splits[33], splits[32] = "test", "val"
    source = write_source(tmp_path / "src", splits)
    folder = pack(Folder(source=source).open(), tmp_path / "out", 50, 1)
    assert split_of_ids(folder) == {numbered(k): split for k, split in enumerate(splits)}
    facts = ShardFolder(tmp_path / "out").manifest.provenance["copies"]
    assert (facts["in_several_splits"], facts["in_train_and_held_out"]) == (3, 3)
    assert {"s001": "train", "s030": "val"} in facts["examples"]
    assert {"s003": "train", "s032": "val", "s033": "test"} in facts["examples"]
    shown = succeed_here("data_prep/show.py", tmp_path / "out").stdout
    assert (
        "warning: images in more than one split under different ids: 3, of these both in train and held out: 3 (such as"
        in shown
    )


def test_images_that_were_not_decoded_are_compared_by_their_bytes(source, tmp_path):
    recording = Folder(source=source).open()
    folder = pack(recording, tmp_path / "out", 50, 1, ImageRules(decode=False))
    assert folder.manifest.provenance["copies"] == {"stimuli": N, "images": N - 2, "compared": "bytes"}


def test_foreign_tars_that_hold_the_same_image_under_other_keys_are_warned_of(tmp_path):
    images, _ = make_images(4, size=24)
    for split, numbers in (("train", (0, 1, 2)), ("val", (3, 1))):
        samples = {f"{split}{k}": {"png": encode(images[k], "png"), "rates.npy": npy(np.ones(2))} for k in numbers}
        write_tar(tmp_path / "tars" / f"{split}.tar", members_of(samples))
    text = succeed_here("data_prep/show.py", tmp_path / "tars").stdout
    assert "images in more than one split under different ids: 1, of these both in train and held out: 1" in text
    assert "train1 in train, val1 in val" in text


def test_joined_recordings_are_compared_under_all_their_ids(tmp_path):
    """`b` holds an image of `a` under another id, held out; a new split keeps the two together."""
    places = []
    for name, splits in (("a", ["train"] * 10 + ["val"] * 2), ("b", ["train"] * 10 + ["val"] * 2)):
        written = make_folder(tmp_path / name, n=12, splits=True, seed=ord(name))
        ids = [f"{name}{k:02d}" for k in range(12)]
        files = [f"images/{stimulus}.png" for stimulus in written.ids]
        write_csv(tmp_path / name / "stimuli.csv", {"stimulus_id": ids, "image": files, "split": splits})
        if name == "b":
            shutil.copy(tmp_path / "a" / files[0], tmp_path / "b" / files[11])
        places.append(pack(Folder(source=tmp_path / name).open(), tmp_path / f"{name}_shards", 50, 1).folder)
    packed = pack(Joined(source=tuple(places)).open(), tmp_path / "packed", 50, 1)
    assert packed.manifest.provenance["copies"]["examples"] == [{"a00": "train", "b11": "val"}]
    for seed in range(3):
        dealt = Joined(source=tuple(places), new_split=True, val_fraction=0.4, seed=seed).open()
        folder = pack(dealt, tmp_path / f"new{seed}", 50, 1)
        assert split_of_ids(folder)["a00"] == split_of_ids(folder)["b11"]


@pytest.mark.parametrize("spoiled", [3, {}, {"stimuli": 2, "images": "x", "compared": "pixels"}])
def test_facts_of_another_form_are_refused(tmp_path, spoiled):
    make_folder(tmp_path / "src", n=12, splits=True)
    pack(Folder(source=tmp_path / "src").open(), tmp_path / "out", 50, 1)
    sealed(tmp_path / "out")
    edit(tmp_path / "out" / "manifest.json", lambda content: content["provenance"].update(copies=spoiled))
    result = run_here("data_prep/show.py", tmp_path / "out")
    assert result.returncode == 2
    assert "copies" in result.stderr
