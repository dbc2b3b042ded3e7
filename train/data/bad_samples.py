"""`loader.on_bad_sample: skip`: all stimuli are checked before the first step, and bad ones are left out.

Checking first lets the order of the others, the batch sizes and the count of an evaluation follow from the readable
stimuli, which every process finds alike.
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
from train.distributed.launch_environment import this_process
from train.run.recipe import Loader

SHOWN = 8  # stimuli that a warning names


@dataclass
class BadSamples:
    """The stimuli that cannot be read, and what is wrong with them.

    Attributes:
        setting: the recipe's `loader`.
        name_recordings: call splits `recording/split`, where there are several recordings.
        left_out: by split, {stimulus: reason}; empty unless bad stimuli are skipped.
        checked: by split, the number of stimuli checked.
    """

    setting: Loader
    name_recordings: bool = False
    left_out: dict[str, dict[str, str]] = field(default_factory=dict)
    checked: dict[str, int] = field(default_factory=dict)

    @property
    def skips(self) -> bool:
        """Whether bad stimuli are left out."""
        return self.setting.on_bad_sample == "skip"

    def usable_positions(self, split: ShardSplit, size: int | None, *, responses: bool, classes: bool) -> np.ndarray:
        """The positions in a split that can be used, ascending; all of them unless bad stimuli are skipped.

        Args:
            split: to check.
            size: side in pixels that images are decoded to; None where they are not needed.
            responses, classes: whether these are needed too.

        Raises:
            BadInput: no stimulus is left.
        """
        if not self.skips:
            return np.arange(len(split))

        def fault(position: int) -> str | None:
            return _fault(split, position, size, responses, classes)

        name = f"{split.manifest.name}/{split.name}" if self.name_recordings else split.name
        process = this_process()
        threads = max((os.cpu_count() or 1) // process.ranks_on_machine, 1)
        with (
            Progress(len(split), f"checking {name}", silent=process.rank != 0) as progress,
            ThreadPoolExecutor(threads) as pool,
        ):
            faults = []
            for message in pool.map(fault, range(len(split))):
                faults.append(message)
                progress.advance()
        bad = {split.stimulus_ids[i]: message for i, message in enumerate(faults) if message is not None}
        self.checked[name] = len(split)
        if bad:
            self.left_out[name] = self.left_out.get(name, {}) | bad
        if len(bad) == len(split):
            raise BadInput(f"no stimulus of {name} can be read: {next(iter(bad.values()))}")
        return np.array([i for i, message in enumerate(faults) if message is None])

    def warnings(self) -> list[str]:
        """A warning for each split in which stimuli are left out."""
        return [
            f"WARNING: {len(bad)} of {self.checked[split]} stimuli of {split} cannot be read and are LEFT OUT "
            f"(loader.on_bad_sample skip): {_named(bad)}"
            for split, bad in self.left_out.items()
        ]

    def facts(self, splits: Iterable[str] | None = None) -> dict[str, Any]:
        """The entry of JSON files: {"left_out": {split: {"count": .., "of": .., "stimuli": {id: reason}}}}, or nothing.

        Args:
            splits: that the file is about; by default all.
        """
        left_out = {
            split: {"count": len(bad), "of": self.checked[split], "stimuli": bad}
            for split, bad in self.left_out.items()
            if splits is None or split in splits
        }
        return {"left_out": left_out} if left_out else {}


def _named(bad: dict[str, str]) -> str:
    more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    return "; ".join(list(bad.values())[:SHOWN]) + more


def _fault(split: ShardSplit, position: int, size: int | None, responses: bool, classes: bool) -> str | None:
    """What is wrong with a stimulus, naming it; None if nothing is."""
    only = np.array([position])
    readers: list[Callable[[], Any]] = [lambda: split.meta(position)]
    if size is not None:
        readers.append(lambda: decode_at(split, position, np.empty((size, size, 3), np.uint8)))
    if responses:
        readers += [lambda: split.rates(only), lambda: split.array(position, "trials.npy")]
    if classes:
        readers.append(lambda: split.labels(only))
    try:
        for read in readers:
            read()
    except BadInput as fault:
        return str(fault)
    return None
