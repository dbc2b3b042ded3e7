"""Several recordings as one set of stimuli: the batches, the held-out stimuli, the loss, and refused settings."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from helpers import assert_refused, run_here
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import SMALL
from make_recordings import pack_recording, pack_two
from web_server import serve

from data_prep.common.errors import BadInput
from data_prep.remote.cache import GIB, FetchSettings
from data_prep.shards.folder import ShardFolder
from data_prep.shards.manifest import load_manifest
from data_prep.shards.packing import pack
from data_prep.sources.folder import Folder
from train.data.combined_stimuli import CombinedStimuli
from train.data.loader import TrainLoader, evaluation_loader
from train.data.order import Blocks, StimulusGroups, Turns, epoch_order, inner_splits, stimuli_of_epoch
from train.data.recordings import Recordings
from train.data.stimuli import RecordingStimuli
from train.finetuning.setup.data_notes import notes_on_left_out
from train.finetuning.setup.preparation import training_stimuli
from train.models.losses import Objective
from train.run.recipe import Recipe

settings.register_profile("unhurried", deadline=None)  # the machine may be busy
settings.load_profile("unhurried")

seeds, epochs = st.integers(0, 2**32 - 1), st.integers(0, 1000)
sizes_ = st.lists(st.integers(1, 60), min_size=2, max_size=5).map(tuple)
SITES, SIZE = (5, 7), 24


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return pack_two(tmp_path_factory.mktemp("two"))


def parts_of(places, **options) -> list[RecordingStimuli]:
    recordings = Recordings([ShardFolder(shard_folder) for shard_folder in places])
    return [
        RecordingStimuli(folder.split("train"), SIZE, columns=columns, classes=True, **options)
        for folder, columns in zip(recordings.folders, recordings.columns, strict=True)
    ]


def loader_of(stimuli, rank=0, ranks=1, workers=0, **options) -> TrainLoader:
    options = {"seed": 3, "global_size": 7, "per_device": 2} | options
    return TrainLoader(stimuli, rank=rank, ranks=ranks, workers=workers, pin=False, **options)


def counted(batches) -> list[int]:
    return [int(position) for batch in batches for position in batch.positions[batch.weight > 0]]


def recipe_of(**sections) -> Recipe:
    return Recipe.model_validate(sections)


# ---- the order -----------------------------------------------------------------------------------------------------


@given(seeds, epochs, sizes_, st.integers(1, 100), st.data())
def test_recordings_that_take_turns_have_equal_parts_of_every_step(seed, epoch, sizes, size, data):
    turns, stimuli = Turns(sizes, (None,) * len(sizes)), sum(sizes)
    order = epoch_order(seed, epoch, stimuli, turns)
    assert len(order) == stimuli_of_epoch(stimuli, turns) == len(sizes) * min(sizes)
    assert len(set(order.tolist())) == len(order)
    assert np.array_equal(order, epoch_order.__wrapped__(seed, epoch, stimuli, turns))  # not the cached one
    first = data.draw(st.integers(0, len(order) - 1))
    recording = np.searchsorted(np.cumsum(sizes), order[first : first + size], side="right")
    taken = np.bincount(recording, minlength=len(sizes))
    assert taken.max() - taken.min() <= 1


def test_every_stimulus_of_a_larger_recording_has_its_turn():
    turns = Turns((4, 12), (None, None))
    seen = set(itertools.chain(*(epoch_order(0, epoch, 16, turns).tolist() for epoch in range(20))))
    assert seen == set(range(16))
    assert len({tuple(epoch_order(0, epoch, 16, turns)) for epoch in range(20)}) == 20


def test_turns_go_through_a_few_shards_at_a_time():
    blocks = Blocks((10,) * 6, 2)
    order = epoch_order(5, 2, 120, Turns((60, 60), (blocks, blocks)))
    shard = order // 10
    for recording in (0, 1):
        within_recording = shard[shard // 6 == recording]
        begun = [set(within_recording[:k]) & set(within_recording[k:]) for k in range(len(within_recording))]
        assert max(map(len, begun)) <= 2


# ---- what is inner -------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(2, 60), min_size=1, max_size=4), st.floats(0.05, 0.6), seeds)
def test_recordings_that_share_nothing_are_divided_as_alone(sizes, fraction, seed):
    recordings = [
        StimulusGroups(np.array([f"{k}_{i:02d}" for i in range(size)]), [(k, i) for i in range(size)])
        for k, size in enumerate(sizes)
    ]
    for recording, split in zip(recordings, inner_splits(recordings, fraction, seed), strict=True):
        (alone,) = inner_splits([recording], fraction, seed)
        assert (split.fit.tolist(), split.inner.tolist()) == (alone.fit.tolist(), alone.inner.tolist())


@given(st.lists(st.sets(st.integers(0, 80), min_size=2), min_size=2, max_size=4), st.floats(0.05, 0.5), seeds)
def test_shared_stimuli_are_on_one_side_and_every_recording_has_both(members, fraction, seed):
    recordings = [StimulusGroups(np.array(sorted(ids)), sorted(ids)) for ids in members]
    divided = inner_splits(recordings, fraction, seed)
    side = {}
    for recording, split in zip(recordings, divided, strict=True):
        groups, fit, inner = recording.labels, split.fit, split.inner
        assert sorted([*fit, *inner]) == list(range(len(groups)))
        assert len(inner)
        decided = [name in side for name in groups[inner]]
        if not all(name in side and not side[name] for name in groups):  # or it has to take of what others fit
            assert all(side[name] for name, known in zip(groups[inner], decided, strict=True) if known)
            assert not any(side.get(name) for name in groups[fit])
        side |= dict.fromkeys(groups[inner], True) | dict.fromkeys(groups[fit], False)


# ---- what is in a batch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", ["proportional", "equal"])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_stimulus_comes_with_its_own_image_and_sites(two, mix, workers):
    parts = parts_of(two)
    both, first = CombinedStimuli(parts, mix), len(parts[0])
    alone = [
        next(iter(evaluation_loader(part, size=len(part), rank=0, ranks=1, workers=0, pin=False))) for part in parts
    ]
    mixed = 0
    for batch in itertools.chain(*loader_of(both, workers=workers, global_size=12, per_device=None).epoch(1)):
        mixed += len({int(position) < first for position in batch.positions}) == 2
        for row, position in enumerate(batch.positions.tolist()):
            k, local_position = (0, position) if position < first else (1, position - first)
            assert torch.equal(batch.images[row], alone[k].images[local_position])
            assert batch.labels[row] == alone[k].labels[local_position]
            sites = batch.rates[row].split(SITES)
            assert torch.equal(sites[k].nan_to_num(-1), alone[k].rates[local_position].nan_to_num(-1))
            assert torch.isnan(sites[1 - k]).all()
            assert both.stimulus_ids[position] == f"{parts[k].name}/{parts[k].stimulus_ids[local_position]}"
    assert mixed > 2


@pytest.mark.parametrize("mix", ["proportional", "equal"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_the_ranks_together_see_the_same_step(two, mix, ranks):
    both = CombinedStimuli(parts_of(two), mix)
    steps, layout, observed = {"proportional": 13, "equal": 10}[mix], both.layout(None), []
    everyone = [list(loader_of(both, rank, ranks).epoch(4)) for rank in range(ranks)]
    assert {len(found) for found in everyone} == {steps}
    shown = []
    for step in range(steps):
        batches = [batch for found in everyone for batch in found[step]]
        assert len({len(found[step]) for found in everyone}) == 1
        expected = epoch_order(3, 4, len(both), layout)[7 * step : 7 * step + 7]
        assert sorted(counted(batches)) == sorted(expected.tolist())
        shown += counted(batches)
        rates = both.rates_of(expected)
        (means,) = {batch.means for batch in batches}
        recorded = [int((~torch.isnan(part)).sum()) for part in rates.split(SITES, dim=1)]
        assert [group.sites for group in means] == {"proportional": [12], "equal": [5, 7]}[mix]
        assert [group.observed for group in means] == (recorded if mix == "equal" else [sum(recorded)])
        observed.append(recorded)
    assert len(shown) == len(set(shown)) == 7 * steps
    assert len(set(map(tuple, observed))) > 1


def test_a_run_can_go_on_with_another_number_of_ranks(two):
    both = CombinedStimuli(parts_of(two), "equal")
    before = [batch for rank in range(3) for step in list(loader_of(both, rank, 3).epoch(0))[:4] for batch in step]
    after = [batch for rank in range(2) for step in loader_of(both, rank, 2).epoch(0, 4) for batch in step]
    undivided = [batch for step in loader_of(both).epoch(0) for batch in step]
    assert sorted(counted(before) + counted(after)) == sorted(counted(undivided))


def test_shuffled_responses_stay_within_their_recording(two):
    both, plain = CombinedStimuli(parts_of(two), "proportional"), CombinedStimuli(parts_of(two), "proportional")
    both.shuffle_responses(0)
    everyone = np.arange(len(both))
    before, after = (stimuli.rates_of(everyone).numpy() for stimuli in (plain, both))
    assert not np.array_equal(before, after, equal_nan=True)
    assert sorted(map(str, after)) == sorted(map(str, before))
    assert np.array_equal(np.isnan(after[:, :5]).all(1), np.isnan(before[:, :5]).all(1))


def test_remote_recordings_are_fetched_ahead_into_one_cache(two, tmp_path):
    """Next to one of this machine; never more than is allowed is kept, and each shard is fetched once an epoch."""
    with serve(two[0]) as one, serve(two[1]) as other:
        size = max(path.stat().st_size for place in two for path in place.glob("train-*.tar"))
        fetch = FetchSettings(tmp_path / "cache", 6.5 * size / GIB, 5.0)
        recordings = Recordings([ShardFolder(place, fetch) for place in (one.url, other.url)])
        far = [
            RecordingStimuli(folder.split("train"), SIZE, columns=columns, classes=True)
            for folder, columns in zip(recordings.folders, recordings.columns, strict=True)
        ]
        near = parts_of(two)
        for parts in (far, [near[0], far[1]]):
            remote, expected = (CombinedStimuli(parts_list, "proportional") for parts_list in (parts, near))
            for epoch in range(2):
                batches, others = (
                    loader_of(parts_list, block_shards=3).epoch(epoch) for parts_list in (remote, expected)
                )
                for step, local in zip(batches, others, strict=True):
                    for batch, known in zip(step, local, strict=True):
                        assert torch.equal(batch.images, known.images)
                        assert torch.equal(batch.positions, known.positions)
        shards = [len(part.split.shards) for part in far]
        assert sum(one.times().values()) <= 2 * shards[0]
        assert sum(other.times().values()) <= 4 * shards[1]


# ---- the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["mse", "poisson"])
@pytest.mark.parametrize("mix", ["proportional", "equal"])
def test_the_loss_is_the_mean_that_the_mix_says(two, mix, loss):
    """The parts of all ranks add up to it, and a recording's own readout gets a gradient from its own stimuli alone."""
    recordings, both = Recordings([ShardFolder(folder) for folder in two]), CombinedStimuli(parts_of(two), mix)
    objective = Objective(recipe_of(loss={"responses": loss}), recordings.manifest)
    weight = torch.randn(16, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def outputs(batch) -> torch.Tensor:
        return batch.images.float()[:, :, :4, :4].mean(1).flatten(1) / 255 @ weight

    def part(batch) -> torch.Tensor:
        return objective.losses({"rates": outputs(batch)}, batch, lambda own: own)["loss"]

    (whole,) = next(iter(loader_of(both, per_device=None).epoch(0)))
    micro_batches = [batch for rank in range(3) for batch in next(iter(loader_of(both, rank, 3).epoch(0)))]
    assert any(torch.isnan(batch.rates[:, :5]).all() for batch in micro_batches)  # a piece without the first recording
    total = sum(part(batch) for batch in micro_batches)
    (gradient,) = torch.autograd.grad(total, weight)
    one = part(whole)
    assert total.item() == pytest.approx(one.item(), rel=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(one, weight)[0], rtol=1e-4, atol=1e-5)
    responses = objective.responses
    if loss == "mse":
        errors = (outputs(whole) - responses.target(whole.rates)) ** 2
    else:
        rate = responses.to_rates(outputs(whole))
        errors = rate - whole.rates * rate.log()
    of_each = [error[~torch.isnan(error)] for error in errors.split(SITES, dim=1)]
    expected = torch.cat(of_each).mean() if mix == "proportional" else sum(each.mean() for each in of_each) / 2
    assert one.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("mix", ["proportional", "equal"])
def test_a_correlation_is_averaged_over_sites_or_over_recordings(two, mix):
    recordings, both = Recordings([ShardFolder(folder) for folder in two]), CombinedStimuli(parts_of(two), mix)
    objective = Objective(recipe_of(loss={"responses": "correlation"}), recordings.manifest)
    (batch,) = next(iter(loader_of(both, global_size=40, per_device=None).epoch(0)))
    outputs = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    value = objective.losses({"rates": outputs}, batch, lambda own: own)["loss"].item()
    wrong = []
    for site in range(12):
        recorded = ~torch.isnan(batch.rates[:, site])
        wrong.append(1 - np.corrcoef(batch.rates[recorded, site], outputs[recorded, site])[0, 1])
    expected = np.mean(wrong) if mix == "proportional" else (np.mean(wrong[:5]) + np.mean(wrong[5:])) / 2
    assert value == pytest.approx(expected, rel=1e-3)


# ---- who is held out -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharing(tmp_path_factory):
    """`a` and `b` show the same 40 images and divide them otherwise; `c` has their ids and other images.

    `d` is divided as `a` and lacks a part of its images.
    """
    path = tmp_path_factory.mktemp("sharing")
    ids = [f"s{number:02d}" for number in range(40)]
    rotated = [("val", "train", "test", "train", "train")[number % 5] for number in range(40)]
    a, _ = pack_recording(path, "a", ids, n=40, sites=3, seed=4)
    b, _ = pack_recording(path, "b", ids, rotated, n=40, sites=3, seed=4)
    c, _ = pack_recording(path, "c", ids, n=40, size=48, sites=3, seed=5)
    d, _ = pack_recording(path, "d", ids[:30], n=30, sites=3, seed=4)
    for number in range(30):
        name = f"stim{number:04d}.png"
        shutil.copy(path / "a_source" / "images" / name, path / "d_source" / "images" / name)
    shutil.rmtree(d)
    d = pack(Folder(source=path / "d_source", name="d").open(), d, 8, 1).folder
    return a, b, c, d


def divided(places, **early_stopping):
    recipe = recipe_of(early_stopping=early_stopping, images={"size": 32})
    recordings = Recordings([ShardFolder(folder) for folder in places])
    parts = recordings.divide(recipe)
    fit, selection = training_stimuli(recordings, parts, recipe)
    return (
        [set(part.stimulus_ids) for part in fit.recordings],
        [set(part.stimulus_ids) for part in selection.recordings],
        notes_on_left_out(recordings, parts),
    )


def held_out(folder) -> set[str]:
    shards = ShardFolder(folder)
    return {name for split in ("val", "test") for name in shards.split(split).stimulus_ids}


@pytest.mark.parametrize("split", ["inner", "val"])
def test_stimuli_held_out_in_one_recording_are_trained_on_in_none(sharing, split):
    a, b, *_ = sharing
    fit, selection, notes = divided([a, b], split=split)
    everywhere = held_out(a) | held_out(b) | selection[0] | selection[1]
    assert not (fit[0] | fit[1]) & everywhere
    assert all(fit)
    assert all(selection)
    if split == "inner":
        assert not (selection[0] | selection[1]) & (held_out(a) | held_out(b))
    assert len(notes) == 2
    assert "of the 24 train stimuli of a are left out" in notes[0]


@pytest.mark.parametrize("split", ["inner", "val"])
def test_recordings_with_the_same_splits_lose_no_stimulus(sharing, split):
    a, _, _, d = sharing
    fit, selection, notes = divided([a, d], split=split)
    assert notes == []
    assert (fit[0] | selection[0]) >= set(ShardFolder(a).split("train").stimulus_ids)
    assert (fit[1] | selection[1]) >= set(ShardFolder(d).split("train").stimulus_ids)
    assert selection[1] <= selection[0]
    assert selection[1]


def test_an_id_with_another_image_is_another_stimulus(sharing):
    a, _, c, _ = sharing
    fit, selection, notes = divided([a, c])
    for folder, ours, inner in zip((a, c), fit, selection, strict=True):
        (alone,), (alone_inner,), _ = divided([folder])
        assert (ours, inner) == (alone, alone_inner)
    assert notes == []


def test_a_recording_of_which_nothing_is_left_is_refused(tmp_path):
    ids = [f"s{number:02d}" for number in range(20)]
    a, _ = pack_recording(tmp_path, "a", ids, ["train"] * 10 + ["val"] * 10, n=20, sites=3)
    b, _ = pack_recording(tmp_path, "b", ids, ["val"] * 10 + ["train"] * 10, n=20, sites=3)
    with pytest.raises(BadInput, match=f"nothing is left of the train split of {a}.*the same split"):
        divided([a, b])


# ---- refusals ------------------------------------------------------------------------------------------------------


def changed(folder, out, **fields):
    """A copy of a shard folder whose manifest says something else."""
    shutil.copytree(folder, out)
    content = json.loads((out / "manifest.json").read_text())
    del content["checksum"]  # it was edited by hand
    for name, value in fields.items():
        content[name] = {**content[name], **value} if isinstance(value, dict) else value
    (out / "manifest.json").write_text(json.dumps(content))
    return out


@pytest.mark.parametrize("name", ["../up", ".hidden", "a/b"])
def test_names_must_differ_and_be_those_of_folders(two, tmp_path, name):
    twin = changed(two[1], tmp_path / "twin", name="one")
    with pytest.raises(BadInput, match=rf"{two[0]} and {twin} are both called 'one'.*name"):
        Recordings([ShardFolder(two[0]), ShardFolder(twin)])
    odd = changed(two[1], tmp_path / "odd", name=name)
    with pytest.raises(BadInput, match="its scores need a folder of that name"):
        Recordings([ShardFolder(two[0]), ShardFolder(odd)])
    assert Recordings([ShardFolder(odd)]).manifest == load_manifest(odd)


@pytest.mark.parametrize(
    ("settings", "fields", "words"),
    [
        ({"task": {"kind": "classification"}}, {"classes": ["x"]}, "differ in their classes.*task.kind classification"),
        ({"task": {"kind": "hybrid"}}, {"classes": ["x"]}, "differ in their classes.*task.kind hybrid"),
        ({"loss": {"responses": "poisson"}}, {"rates": {"units": "spikes/s"}}, "differ in their rates.units.*use mse"),
        (
            {"loss": {"responses": "correlation"}, "batch": {"global_size": 5}},
            {},
            r"global_size \(5\) must be at least 6 for loss.responses correlation on 2 recordings",
        ),
        ({"loader": {"engine": "webdataset"}}, {}, "loader.engine: webdataset streams one recording"),
        (
            {"mix": "equal", "batch": {"global_size": 1}},
            {},
            r"global_size \(1\) must be at least 2 for mix equal",
        ),
    ],
)
def test_settings_without_meaning_for_several_recordings_are_refused(two, tmp_path, settings, fields, words):
    other = changed(two[1], tmp_path / "other", **fields)
    with pytest.raises(BadInput, match=words):
        Recordings([ShardFolder(two[0]), ShardFolder(other)]).check(recipe_of(**settings))
    Recordings([ShardFolder(folder) for folder in two]).check(recipe_of(mix="equal"))


def test_the_command_line_refuses_in_a_sentence(two, tmp_path):
    run = ["--out", tmp_path / "run", *SMALL]
    assert_refused(run_here("train/finetune.py", "--data", two[0], two[0], *run), "both called 'one'", two[0])
    assert_refused(run_here("train/finetune.py", "--data", two[0], *run, "--mix", "equal"), "mix (equal)", "several")
    assert_refused(run_here("train/finetune.py", "--data", *two, *run, "--mix", "even"), "mix")
    assert_refused(run_here("train/finetune.py", "--data", two[0], tmp_path / "no", *run), tmp_path / "no")
    assert not (tmp_path / "run").exists()


def test_a_plan_counts_the_sites_of_all(two, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data: [{two[0]}, {two[1]}]\nbackbone: {{name: test_convnext, weights: random}}\n")
    words = ["--gpus", "1", "--memory", "24"]
    named = run_here("train/plan.py", recipe, *words)
    given_ = run_here("train/plan.py", "--data", *two, "--backbone.name", "test_convnext", *words)
    for done in (named, given_):
        assert done.returncode == 0, done.stderr
        assert f"--data {two[0]} {two[1]} --out RUN" in done.stdout
    one = run_here("train/plan.py", "--data", two[0], "--backbone.name", "test_convnext", *words)
    assert one.stdout.split("million")[0] <= given_.stdout.split("million")[0]
