"""`loader.on_bad_sample: skip`: all stimuli are looked at before the first step, and those that are bad are left out.

Before, and not when they come up: the order of the others, the sizes of batches and the count of an evaluation then
follow from what is really there, on any number of processes, since each finds the same.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_prep.common.errors import BadInput
from data_prep.common.progress import Progress
from data_prep.shards.folder import ShardSplit
from train.data.decoding import decode_at
from train.distributed.launch_environment import rank, ranks_on_machine
from train.run.recipe import Loader

SHOWN = 8  # stimuli that a sentence names


@dataclass
class BadSamples:
    """Which stimuli can be read, and what is wrong with the others.

    Attributes:
        setting: of the recipe.
        name_recordings: call splits `recording/split`, where there are several recordings.
        left_out: by split, {stimulus: what is wrong with it}; nothing unless it is to skip.
        looked_at: by split, the number of stimuli.
    """

    setting: Loader
    name_recordings: bool = False
    left_out: dict[str, dict[str, str]] = field(default_factory=dict)
    looked_at: dict[str, int] = field(default_factory=dict)

    @property
    def skips(self) -> bool:
        """Whether bad stimuli are left out."""
        return self.setting.on_bad_sample == "skip"

    def usable_positions(self, split: ShardSplit, size: int | None, *, responses: bool, classes: bool) -> np.ndarray:
        """The positions in a split that can be used, ascending; all where a bad one is to stop the run.

        Args:
            split: to look at.
            size: side in pixels that images are decoded to; None where they are not needed.
            responses, classes: what else is needed of a stimulus.

        Raises:
            BadInput: no stimulus is left.
        """
        if not self.skips:
            return np.arange(len(split))

        def fault(position: int) -> str | None:
            return _fault(split, position, size, responses, classes)

        name = f"{split.manifest.name}/{split.name}" if self.name_recordings else split.name
        silent, threads = rank() != 0, max((os.cpu_count() or 1) // ranks_on_machine(), 1)
        with (
            Progress(len(split), f"looking at {name}", silent=silent) as shown,
            ThreadPoolExecutor(threads) as pool,
        ):
            faults = []
            for found in pool.map(fault, range(len(split))):
                faults.append(found)
                shown.advance()
        bad = {split.stimulus_ids[i]: said for i, said in enumerate(faults) if said is not None}
        self.looked_at[name] = len(split)
        if bad:
            self.left_out[name] = self.left_out.get(name, {}) | bad
        if len(bad) == len(split):
            raise BadInput(f"no stimulus of {name} can be read: {next(iter(bad.values()))}")
        return np.array([i for i, said in enumerate(faults) if said is None])

    def warnings(self) -> list[str]:
        """A sentence for each split that lacks stimuli."""
        return [
            f"WARNING: {len(bad)} of {self.looked_at[split]} stimuli of {split} cannot be read and are LEFT OUT "
            f"(loader.on_bad_sample skip): {_named(bad)}"
            for split, bad in self.left_out.items()
        ]

    def facts(self, splits: Iterable[str] | None = None) -> dict[str, Any]:
        """What files say of them: {"left_out": {split: {"of": .., "stimuli": {id: reason}}}}, or nothing.

        Args:
            splits: those that the file is about; by default all.
        """
        found = {
            split: {"count": len(bad), "of": self.looked_at[split], "stimuli": bad}
            for split, bad in self.left_out.items()
            if splits is None or split in splits
        }
        return {"left_out": found} if found else {}


def _named(bad: dict[str, str]) -> str:
    more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    return "; ".join(list(bad.values())[:SHOWN]) + more


def _fault(split: ShardSplit, position: int, size: int | None, responses: bool, classes: bool) -> str | None:
    """What is wrong with a stimulus, naming it; None where nothing is."""
    only = np.array([position])
    looks: list[Callable[[], Any]] = [lambda: split.meta(position)]
    if size is not None:
        looks.append(lambda: decode_at(split, position, np.empty((size, size, 3), np.uint8)))
    if responses:
        looks += [lambda: split.rates(only), lambda: split.array(position, "trials.npy")]
    if classes:
        looks.append(lambda: split.labels(only))
    try:
        for look in looks:
            look()
    except BadInput as fault:
        return str(fault)
    return None
