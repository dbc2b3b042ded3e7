"""Before the first step, the ranks' shares are shown to add up to the epoch."""

from types import SimpleNamespace

import numpy as np
import pytest

from data_prep.common.errors import BadInput
from data_prep.shards.folder import ShardFolder
from train.data.loader import TrainLoader
from train.data.stimuli import RecordingStimuli
from train.finetuning.setup.agreement import Tally, check_agreement, check_owners, fingerprint
from train.run.recipe import Recipe, flat_settings


def loaders(recording, ranks: int, believed: list[int] | None = None, **changed) -> list[TrainLoader]:
    """The loaders of all ranks; `believed` are the ranks that they think they are."""
    stimuli = RecordingStimuli(ShardFolder(recording).split("train"), 32)
    settings = {"seed": 0, "global_size": 32, "per_device": 5, "workers": 0, "pin": False} | changed
    return [TrainLoader(stimuli, rank=rank, ranks=ranks, **settings) for rank in believed or range(ranks)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("epoch", [0, 5])
def test_every_stimulus_of_an_epoch_has_one_owner(recording, ranks, epoch):
    shares = [loader.own_stimuli(epoch) for loader in loaders(recording, ranks)]
    whole = loaders(recording, ranks)[0].stimuli_of_epoch(epoch)
    assert sorted(np.concatenate(shares).tolist()) == sorted(whole.tolist())
    assert len(set(whole.tolist())) == len(whole)
    check_owners(Tally.of(whole), [Tally.of(share) for share in shares])


@pytest.mark.parametrize("believed", [[0, 0], [1, 1], [0]])
def test_a_stimulus_without_an_owner_or_with_two_is_refused(recording, believed):
    shares = [loader.own_stimuli(0) for loader in loaders(recording, 2, believed)]
    whole = loaders(recording, 2)[0].stimuli_of_epoch(0)
    with pytest.raises(BadInput, match=r"the shares of the \d processes .* are not the \d+ stimuli of an epoch"):
        check_owners(Tally.of(whole), [Tally.of(share) for share in shares])


def test_another_order_on_one_rank_is_refused(recording):
    shares = [loaders(recording, 2)[0].own_stimuli(0), loaders(recording, 2, seed=1)[1].own_stimuli(0)]
    whole = loaders(recording, 2)[0].stimuli_of_epoch(0)
    with pytest.raises(BadInput, match="each once"):
        check_owners(Tally.of(whole), [Tally.of(share) for share in shares])


def test_tallies_tell_sets_of_the_same_size_and_sum_apart():
    assert Tally.of(np.array([0, 3])) != Tally.of(np.array([1, 2]))
    assert Tally.of(np.array([5, 1])) == Tally.of(np.array([1, 5]))
    assert Tally.of(np.array([1])) + Tally.of(np.array([5])) == Tally.of(np.array([1, 5]))
    assert Tally.of(np.array([], np.int64)) == Tally()


def test_a_loader_for_another_rank_than_the_joined_one_is_refused(recording):
    (loader,) = loaders(recording, 2, [1])
    with pytest.raises(RuntimeError, match="reads for rank 1 of 2, but this is 0 of 2"):
        check_agreement(SimpleNamespace(loader=loader), None, SimpleNamespace(rank=0, ranks=2))


def test_what_is_compared_shows_every_setting_and_every_response(recording):
    settings = flat_settings(Recipe(optimizer={"lr": 0.5}))
    assert settings["optimizer.lr"] == "0.5"
    assert "data" not in settings
    assert "loader.engine" in settings
    assert "loader.shard_cache" not in settings  # may lie elsewhere on each machine
    assert len(settings) > 60
    split = ShardFolder(recording).split("train")
    one, other = RecordingStimuli(split, 32), RecordingStimuli(split, 32)
    assert fingerprint(one) == fingerprint(other)
    other.shuffle_responses(0)
    assert fingerprint(one) != fingerprint(other)
