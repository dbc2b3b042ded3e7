"""Before the first step, all ranks compare what they are about to do, and that each stimulus belongs to one of them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.common.errors import BadInput
from train.data.stimuli import StimulusSet
from train.distributed.runtime import Runtime
from train.finetuning.setup.preparation import PreparedRun
from train.run.progress import Progress
from train.run.recipe import flat_settings


@dataclass(frozen=True)
class Tally:
    """A set of stimuli in a few bytes: tallies of disjoint sets add up to that of their union.

    Attributes:
        count: of the stimuli.
        digest: the sum of 64-bit hashes of their positions, modulo 2^64.
    """

    count: int = 0
    digest: int = 0

    @classmethod
    def of(cls, positions: np.ndarray) -> "Tally":
        """The tally of these positions, int64."""
        # The finaliser of splitmix64 (Steele, Lea and Flood 2014): a position's hash tells nothing of its neighbours'.
        hashes = (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        hashes ^= hashes >> np.uint64(31)
        return cls(len(positions), int(hashes.sum(dtype=np.uint64)))

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.count + other.count, (self.digest + other.digest) % 2**64)


def check_agreement(run: PreparedRun, progress: Progress, runtime: Runtime) -> None:
    """Compare recipe, data and starting point of all ranks, and their shares of the epoch; every rank must take part.

    Raises:
        BadInput: they differ, or a stimulus of the epoch belongs to no rank or to several.
    """
    loader = run.loader
    if (loader.rank, loader.ranks) != (runtime.rank, runtime.ranks):
        raise RuntimeError(
            f"the loader reads for rank {loader.rank} of {loader.ranks}, but this is {runtime.rank} of {runtime.ranks}"
        )
    runtime.check_agreement(plan_of(run, progress))
    if run.recipe.loader.engine == "indexed":  # a stream draws with replacement, each rank for itself
        whole, own = loader.stimuli_of_epoch(progress.epoch), loader.own_stimuli(progress.epoch)
        check_owners(Tally.of(whole), runtime.gather_objects(Tally.of(own)))


def check_owners(epoch: Tally, shares: Sequence[Tally]) -> None:
    """Refuse shares that do not add up to the epoch.

    Args:
        epoch: the stimuli of an epoch, each once.
        shares: of the ranks.

    Raises:
        BadInput: a stimulus belongs to no rank or to several.
    """
    if sum(shares, Tally()) != epoch:
        counts = " + ".join(str(share.count) for share in shares)
        raise BadInput(
            f"the shares of the {len(shares)} processes ({counts} stimuli) are not the {epoch.count} stimuli of an "
            "epoch, each once: the processes disagree on who they are; start with launch/local.sh or torchrun"
        )


def plan_of(run: PreparedRun, progress: Progress) -> dict[str, str]:
    """What a rank is about to do, in words or as a hash, by what it is called in a message."""
    loader = run.loader
    return {
        **flat_settings(run.recipe),
        "the stimuli and responses to train on": fingerprint(run.data.fit),
        "the stimuli that select": fingerprint(run.data.selection),
        "the steps of an epoch": f"{loader.steps} of {loader.global_size} in {loader.accumulation_steps} parts",
        "the step to start after": str(progress.step),
    }


def fingerprint(stimuli: StimulusSet) -> str:
    """A short hash of the stimuli of all recordings: ids, responses and labels."""
    digest = hashlib.sha256()
    for recording in stimuli.recordings:
        digest.update(recording.fingerprint().encode())
        if recording.labels is not None:
            digest.update(recording.labels.tobytes())
    return digest.hexdigest()[:12]
