"""Stimuli that show the same image stay on one side when train is divided, and in no two recordings' two sides."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hostile import sealed
from hypothesis import given
from hypothesis import strategies as st
from make_recordings import pack_recording

from data_prep.common.atomic_writes import write_npz
from data_prep.common.safe_reading import read_npz
from data_prep.shards.folder import ShardFolder
from data_prep.shards.packing import pack
from data_prep.sources.folder import Folder
from data_prep.splits import with_copies
from train.data.order import StimulusGroups, inner_splits
from train.data.recordings import FitAndSelection, Recordings
from train.probing.preparation import held_out_folds
from train.run.recipe import ProbeRecipe, Recipe

PAIRS = 12  # stimuli k and k + PAIRS show the same image


def with_pairs(path: Path, name: str, splits: list[str], **options) -> Path:
    """A recording of 40 stimuli, 12 of them copies."""
    folder, _ = pack_recording(path, name, splits=splits, n=40, sites=3, **options)
    images = path / f"{name}_source" / "images"
    for number in range(PAIRS):
        shutil.copy(images / f"stim{number:04d}.png", images / f"stim{number + PAIRS:04d}.png")
    shutil.rmtree(folder)
    return pack(Folder(source=path / f"{name}_source", name=name).open(), folder, 8, 1).folder


@pytest.fixture(scope="module")
def paired(tmp_path_factory) -> Path:
    return with_pairs(tmp_path_factory.mktemp("paired"), "paired", ["train"] * 35 + ["val"] * 5, seed=8)


def divided(*folders: Path, **early_stopping) -> list[FitAndSelection]:
    recipe = Recipe.model_validate({"early_stopping": early_stopping, "images": {"size": 32}})
    return Recordings([ShardFolder(folder) for folder in folders]).divide(recipe)


def number_of_image(stimulus: int) -> int:
    return stimulus - PAIRS if PAIRS <= stimulus < 2 * PAIRS else stimulus


@pytest.mark.parametrize("early_stopping", [{"inner_fraction": 0.3}, {"folds": 4, "fold": 2}])
def test_copies_are_fitted_or_inner_together(paired, early_stopping):
    (division,) = divided(paired, **early_stopping)
    fit, inner = ({number_of_image(k) for k in part.tolist()} for part in (division.fit, division.selection))
    assert not fit & inner
    assert len(division.fit) + len(division.selection) == 35
    assert len(division.selection) > len(inner)  # a pair is among them


def test_a_folder_packed_earlier_is_divided_alike(paired, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(paired, tmp_path / "old")
    arrays = read_npz(tmp_path / "old" / "index.npz")
    write_npz(tmp_path / "old" / "index.npz", {name: array for name, array in arrays.items() if "_hash" not in name})
    sealed(tmp_path / "old")
    (new,), (old,) = divided(paired), divided(tmp_path / "old")
    assert (new.fit.tolist(), new.selection.tolist()) == (old.fit.tolist(), old.selection.tolist())


def test_an_image_that_another_recording_holds_out_under_another_id_is_not_fitted(paired, tmp_path):
    """`other` holds out images 0 to 4 of `paired` under other ids; their copies 12 to 16 are not fitted either."""
    other = with_pairs(tmp_path, "other", ["val"] * 5 + ["train"] * 35, seed=9)
    images = tmp_path / "other_source" / "images"
    for number in range(5):
        shutil.copy(paired.parent / "paired_source" / "images" / f"stim{number:04d}.png", images)
    shutil.rmtree(other)
    other = pack(Folder(source=tmp_path / "other_source", name="other").open(), other, 8, 1).folder
    ours, theirs = divided(paired, other)
    used = {number_of_image(k) for k in [*ours.fit.tolist(), *ours.selection.tolist()]}
    assert used.isdisjoint(range(5))
    assert len(used) == 35 - PAIRS - 5
    assert ours.left_out == 10
    assert theirs.left_out == 0


@given(st.lists(st.lists(st.integers(0, 40), min_size=4, max_size=40), min_size=1, max_size=3), st.integers(0, 99))
def test_images_are_on_one_side_within_every_recording(images_of, seed):
    """Whatever recordings share, and whoever decides, all stimuli of an image are fitted or all are inner."""
    recordings = []
    for images in map(np.array, images_of):
        copies = np.array([np.flatnonzero(images == image)[0] for image in images])
        labels = with_copies(np.array([f"s{k:02d}" for k in range(len(images))]), copies)
        recordings.append(StimulusGroups(np.asarray(labels), images.tolist()))
    for images, split in zip(map(np.array, images_of), inner_splits(recordings, 0.3, seed), strict=True):
        assert sorted([*split.fit, *split.inner]) == list(range(len(images)))
        assert not set(images[split.fit]) & set(images[split.inner])


@pytest.mark.parametrize("by", ["random", "grouped", "stratified"])
@pytest.mark.parametrize("with_pairs_in_it", [False, True])
def test_the_folds_of_a_probe_keep_copies_together(by, with_pairs_in_it):
    facts = [{"object": f"o{k % 7}"} for k in range(40)]
    copies = np.array([number_of_image(k) if with_pairs_in_it else k for k in range(40)])
    recipe = ProbeRecipe.model_validate({"cross_validation": {"by": by, "folds": 3, "key": "object"}})
    if by == "grouped" and with_pairs_in_it:  # 7 objects hang together through the pairs
        facts = [{"object": f"o{number_of_image(k) % 7}"} for k in range(40)]
    folds = held_out_folds(facts, copies, recipe)
    assert sorted(np.concatenate(folds).tolist()) == list(range(40))
    fold_of = {int(k): number for number, fold in enumerate(folds) for k in fold}
    assert all(fold_of[k] == fold_of[int(copies[k])] for k in range(40))
