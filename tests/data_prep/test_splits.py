"""New splits: which stimuli are held out, what the manifest records, which warnings appear."""

import numpy as np
import pytest
from helpers import assert_refused, run_here
from make_sources import make_folder, make_it_h5

from data_prep.common.errors import BadInput
from data_prep.shards.folder import ShardFolder
from data_prep.shards.packing import pack
from data_prep.shards.summary import summary
from data_prep.sources.folder import Folder
from data_prep.sources.it_h5 import ItH5
from data_prep.sources.simulated import Simulated
from data_prep.split_options import SplitOptions
from data_prep.splits import OrderedDeal, folds, straddling

N = 60


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source")
    make_folder(path, n=N, n_objects=6, splits=True)
    return Folder(source=path)


def divided(source, **options):
    return SplitOptions(**options).open_recording(source)


def held_out(recording, split="val"):
    return [i for i, name in enumerate(recording.splits) if name == split]


def test_by_default_the_splits_of_the_source_are_kept(source):
    assert divided(source).splits == source.open().splits


def test_at_random(source):
    recording = divided(source, split="random", split_fractions=(0.2, 0.3), split_seed=4)
    order = np.random.default_rng(4).permutation(N)
    assert held_out(recording) == sorted(order[:12])
    assert held_out(recording, "test") == sorted(order[12:30])


def test_the_first_half_fits_and_the_second_tests(source):
    recording = divided(source, split="ordered", split_fractions=(0.0, 0.5))
    assert recording.splits == ["train"] * (N // 2) + ["test"] * (N // 2)
    assert recording.provenance["split"] == {"method": "ordered", "split_fractions": (0.0, 0.5)}
    recording = divided(source, split="ordered", split_fractions=(0.2, 0.3))
    assert recording.splits == ["train"] * 30 + ["val"] * 12 + ["test"] * 18


def test_in_order_a_copy_goes_where_its_image_comes_first():
    copies = np.array([0, 1, 2, 1, 4, 5, 0, 7, 4, 7])
    splits = OrderedDeal({"train": 0.5, "val": 0.2, "test": 0.3})(copies)
    assert splits == ["train"] * 5 + ["val", "train", "test", "train", "test"]


def test_whole_groups(source):
    recording = divided(source, split="grouped", split_by="object", split_fractions=(0.3, 0.2))
    splits_of = {}
    for name, split in zip(recording.objects, recording.splits, strict=True):
        splits_of.setdefault(name, set()).add(split)
    assert all(len(splits) == 1 for splits in splits_of.values())
    assert {"train", "val", "test"} == set(recording.splits)
    assert recording.group_by == "object"


def test_one_category_left_out(source):
    recording = divided(source, split="leave-out", split_by="category", hold_out=("being",))
    assert {recording.meta[i]["category"] for i in held_out(recording)} == {"being"}
    assert {
        facts["category"] for facts, split in zip(recording.meta, recording.splits, strict=True) if split == "train"
    } == {"thing"}


@pytest.mark.parametrize("split_by", [None, "object"])
def test_the_folds_cover_every_stimulus_once(source, split_by):
    folds = [held_out(divided(source, split="k-fold", folds=5, fold=k, split_by=split_by)) for k in range(1, 6)]
    assert sorted(i for fold in folds for i in fold) == list(range(N))
    if split_by:
        objects = [{source.open().objects[i] for i in fold} for fold in folds]
        assert sum(map(len, objects)) == 6


def test_the_shards_hold_the_new_splits(source, tmp_path):
    recording = divided(source, split="grouped", split_by="object", split_fractions=(0.3, 0.2))
    folder = pack(recording, tmp_path / "out", stimuli_per_shard=7, workers=1)
    original = {stimulus.id: stimulus for stimulus in source.open().read(range(N))}
    for split in map(folder.split, folder.manifest.splits):
        for k, name in enumerate(split.stimulus_ids):
            np.testing.assert_array_equal(split.array(k, "rates.npy"), original[name].rates)
            assert bytes(split.image(k)[0]) == original[name].image
    manifest = folder.manifest
    rule = {"method": "grouped", "split_by": "object", "split_fractions": [0.3, 0.2], "split_seed": 0}
    assert ShardFolder(folder.folder).manifest.provenance["split"] == rule
    assert manifest.group_by == "object"
    assert "straddling" not in manifest.provenance
    assert "split  grouped, split_by object" in summary(folder)


def test_the_simulated_recording_knows_its_categories():
    source = Simulated(stimuli=64, sites=2, image_size=32)
    recording = divided(source, split="leave-out", split_by="category", hold_out=("face", "car"))
    assert len(held_out(recording)) == 16


def test_stimuli_without_responses_are_left_out(tmp_path):
    make_it_h5(tmp_path / "IT_data.h5", n_train=24, n_val=8, n_test=8)
    recording = divided(ItH5(source=tmp_path / "IT_data.h5"), split="random", split_fractions=(0.25, 0.0))
    assert len(recording.stimulus_ids) == 32
    assert all(stimulus.rates is not None for stimulus in recording.read(range(32)))
    assert "8 stimuli without responses" in recording.provenance["warnings"][0]


# ---- warnings ------------------------------------------------------------------------------------------------------


def test_objects_in_train_and_held_out_are_warned_of(source, tmp_path):
    folder = pack(divided(source, split="random"), tmp_path / "out", stimuli_per_shard=50, workers=1)
    assert folder.manifest.provenance["straddling"]["object"]["of"] == 6
    text = run_here("data_prep/show.py", tmp_path / "out").stdout
    assert "warning:" in text
    assert "not for a new object" in text


def test_a_declared_group_that_straddles_is_warned_of(tmp_path):
    make_folder(tmp_path / "src", n=N, splits=True)
    recording = Folder(source=tmp_path / "src", group_by="category").open()
    folder = pack(recording, tmp_path / "out", stimuli_per_shard=50, workers=1)
    assert "although the stimuli were split by it" in summary(folder)


def test_groups_that_only_held_out_splits_share_do_not_straddle():
    groups = {"train": [{"object": {"a"}}, {"object": {"b"}}], "val": [{"object": {"c"}}], "test": [{"object": {"c"}}]}
    assert straddling(groups) == {}
    groups["test"].append({"object": {"b"}})
    assert straddling(groups) == {"object": {"groups": 1, "of": 3}}


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "random", "split_by": "object"}, "--split-by would be ignored"),
        ({"split": "ordered", "split_seed": 1}, "--split-seed would be ignored"),
        ({"split": "ordered", "split_fractions": (0.5, 0.5)}, "leave none of 60 stimuli to train on"),
        ({"hold_out": ("face",)}, "--hold-out would be ignored"),
        ({"split": "grouped"}, "needs --split-by"),
        ({"split": "grouped", "split_by": "background"}, "background.*category"),
        ({"split": "leave-out", "split_by": "category"}, "needs --hold-out"),
        ({"split": "leave-out", "split_by": "category", "hold_out": ("fruit",)}, "fruit.*being, thing"),
        ({"split": "leave-out", "split_by": "category", "hold_out": ("being", "thing")}, "leave some to train on"),
        ({"split": "k-fold", "fold": 11}, "must be 1 to 10"),
        ({"split": "k-fold", "split_by": "object"}, "only 6 groups"),
        ({"split": "random", "split_fractions": (0.7, 0.7)}, "add up to 1"),
    ],
)
def test_impossible_splits_are_refused(source, options, words):
    with pytest.raises(BadInput, match=words):
        divided(source, **options)


def test_an_option_of_the_source_that_would_be_ignored_is_refused(source, tmp_path):
    command = ["data_prep/pack.py", "folder", source.source, "--out", tmp_path / "x", "--split", "random"]
    assert_refused(run_here(*command, "--val-fraction", "0.2"), "--val-fraction", "--split-fractions")


def test_folds_keep_groups_together_or_deal_them_out():
    groups = np.repeat(np.arange(12), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12])
    together = folds(groups, 3, seed=1)
    assert sorted(np.concatenate(together)) == list(range(len(groups)))
    owners = [set(groups[part]) for part in together]
    assert sum(map(len, owners)) == 12
    assert max(map(len, together)) - min(map(len, together)) <= 12
    dealt = folds(groups, 3, seed=1, stratified=True)
    for group in range(12):
        counts = [(groups[part] == group).sum() for part in dealt]
        assert max(counts) - min(counts) <= 1
