"""Weights & Biases as a tracker of a run, through accelerate's. A run continues without it if it cannot be reached.

Everything is recorded in RUN/wandb as well. Project, entity and mode are W&B's own environment variables
(WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE); docs/trackers.md.
"""

import io
import netrc
import os
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from data_prep.common.terminal import printable

PROJECT = "spiketune"
STEP = "step"  # optimizer steps: the axis of all curves
FOLDER = "wandb"  # W&B's own name for it
SECONDS_TO_SEND = 120.0  # at the end of a run; what is left can be sent with `wandb sync`
_RUN = re.compile(r"(offline-)?run-\d+_\d+-(?P<id>[\w-]+)")


def is_installed() -> bool:
    """Whether this Python has the package."""
    try:
        metadata.version("wandb")  # a folder of this name, which W&B makes, can be imported too
    except metadata.PackageNotFoundError:
        return False
    return True


class WeightsAndBiases:
    """The curves and figures of a run; see `train.run.trackers.Tracker`.

    Args:
        run: folder of the run. Where it was recorded before, W&B continues the same run.
        log: receives a line on where the run is recorded, and a warning if it cannot be.
    """

    def __init__(self, run: Path, log: Callable[[str], object]):
        self._run, self._log = run, log
        self._tracker: Any = None  # accelerate's WandBTracker, which has no types
        if not is_installed():
            log("warning: wandb is not installed here; continuing without Weights & Biases")
            return
        try:
            self._tracker = self._open()
        except Exception as error:
            self._give_up(error)

    def _open(self) -> Any:
        import wandb
        from accelerate.tracking import WandBTracker

        offline = "WANDB_MODE" not in os.environ and not _has_login()
        tracker = WandBTracker(
            os.environ.get("WANDB_PROJECT", PROJECT),
            name=self._run.absolute().name,
            dir=str(self._run),
            id=_id_of(self._run),
            resume="allow",
            mode="offline" if offline else None,
            settings=wandb.Settings(console="off", silent=True, symlink=False, finish_timeout=SECONDS_TO_SEND),
        )
        tracker.start()
        # W&B's own steps cannot go back, as those of a resumed run do, and those of an epoch that is scored later.
        tracker.tracker.define_metric("*", step_metric=STEP)
        if tracker.tracker.url:
            self._log(f"Weights & Biases: {tracker.tracker.url}")
        else:
            why = " (there is no login on this machine)" if offline else ""
            self._log(f"Weights & Biases: recorded offline{why}; to send it: wandb sync {self._run / FOLDER}/offline-*")
        return tracker

    def settings(self, shown: Mapping[str, str | float], everything: Mapping[str, Any], scores: Sequence[str]) -> None:
        """Write all settings as the run's configuration."""
        self._write(lambda tracker: tracker.store_init_configuration(dict(everything)))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add points to curves."""
        self._write(lambda tracker: tracker.log({**values, STEP: step}))

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """Add the distribution of the values."""

        def add(tracker: Any) -> None:
            import wandb

            tracker.log({name: wandb.Histogram(values), STEP: step})

        self._write(add)

    def figure(self, name: str, png: bytes, step: int) -> None:
        """Add a figure."""

        def add(tracker: Any) -> None:
            import wandb

            tracker.log({name: wandb.Image(Image.open(io.BytesIO(png)).convert("RGB")), STEP: step})

        self._write(add)

    def arrange(self, pages: object) -> None:
        """Do nothing: W&B shows a panel for each curve, which people arrange there."""

    def rewind(self, step: int) -> None:
        """Do nothing: what was sent stays, and a resumed run sends the same points again."""

    def close(self) -> None:
        """Send what is left."""
        self._write(lambda tracker: tracker.finish())
        self._tracker = None

    def _write(self, write: Callable[[Any], object]) -> None:
        if self._tracker is None:
            return
        try:
            write(self._tracker)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Warn, and do nothing from now on.

        W&B fails with errors of its own, of its service process and of the network; none of them may end a training.
        """
        self._tracker = None
        reason = printable(str(error)) or type(error).__name__
        self._log(f"warning: Weights & Biases cannot be written ({reason}); continuing without it")


def _id_of(run: Path) -> str | None:
    """The id under which W&B knows a run, from the newest of its folders; None if it does not know it yet."""
    matches = [match for path in (run / FOLDER).glob("*run-*") if (match := _RUN.fullmatch(path.name))]
    newest = max(matches, key=lambda match: match[0].removeprefix("offline-"), default=None)
    return newest["id"] if newest else None


def _has_login() -> bool:
    """Whether W&B would find a key; without one it would ask, and the other processes would wait for the answer."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
