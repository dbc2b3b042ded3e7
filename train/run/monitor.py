"""What a run writes as it proceeds: log.txt and the terminal, history.jsonl, its trackers."""

import json
import logging
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from data_prep.common.atomic_writes import write_bytes
from data_prep.common.errors import CannotWrite
from train.run.folder import RunFolder, epoch_of
from train.run.settings import Tracking
from train.run.trackers import Trackers, compared_settings, open_trackers


class Monitor:
    """Writes the log, history.jsonl and what the trackers show on the first rank; does nothing on the others.

    Args:
        folder: of the run; it must exist on the first rank.
        is_main: whether this is the first rank.
        trackers: that receive the curves.

    Attributes:
        trackers: None on the other ranks.
    """

    def __init__(self, folder: RunFolder, is_main: bool, trackers: Sequence[Tracking]):
        self._folder, self._is_main = folder, is_main
        self._logger = logging.getLogger("spiketune")
        self._logger.handlers.clear()
        self._logger.propagate = False
        self._logger.setLevel(logging.INFO if is_main else logging.CRITICAL)
        self.trackers: Trackers | None = None
        if is_main:
            self._add_handler(logging.StreamHandler(sys.stdout), "%(message)s")
            self._add_handler(_LogFile(folder.log), "%(asctime)s %(message)s")
            threading.excepthook = _print_failure_of_thread
            self.trackers = open_trackers(trackers, folder.path, folder.tensorboard, self.log)

    def _add_handler(self, handler: logging.Handler, layout: str) -> None:
        handler.setFormatter(logging.Formatter(layout, datefmt="%Y-%m-%d %H:%M:%S"))
        self._logger.addHandler(handler)

    def log(self, message: str) -> None:
        """Write a line to the terminal and to log.txt."""
        self._logger.info(message)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add points to the trackers' charts."""
        if self.trackers is not None:
            self.trackers.scalars(values, step)

    def describe(self, recipe: BaseModel, recording: str, splits: Sequence[str], metric: str) -> None:
        """Tell the trackers how the run differs from others.

        Args:
            recipe: with all its settings.
            recording: name of the recording.
            splits: whose scores the trackers compare runs by.
            metric: by which they do so.
        """
        if self.trackers is None:
            return
        recipe = recipe.model_copy(update={"data": None})  # whose URL may hold a secret
        shown = {"recording": recording, **compared_settings(recipe)}
        everything = {"recording": recording, **recipe.model_dump(mode="json")}
        self.trackers.settings(shown, everything, [f"{split}/{metric}" for split in splits])

    def add_epoch(self, facts: Mapping[str, Any]) -> None:
        """Append a line to history.jsonl.

        Raises:
            CannotWrite: for example on a full disk or a read-only folder.
        """
        if not self._is_main:
            return
        try:
            with self._folder.history.open("a", encoding="utf-8") as file:
                file.write(json.dumps(facts) + "\n")
        except OSError as error:
            raise CannotWrite(self._folder.history, error) from None

    def rewind(self, epoch: int, step: int) -> None:
        """Remove what was written after an epoch and a step: the resumed run writes it again."""
        if self.trackers is None:
            return
        self.trackers.rewind(step)
        if self._folder.history.exists():
            lines = [line for line in self._folder.epochs() if epoch_of(line, self._folder.history) <= epoch]
            write_bytes(self._folder.history, "".join(lines).encode())

    def close(self) -> None:
        """Write what is still in memory."""
        if self.trackers is not None:
            self.trackers.close()
        for handler in self._logger.handlers:
            handler.close()


class _LogFile(logging.FileHandler):
    """log.txt. If it cannot be written, the run continues after a single warning."""

    failed = False

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            self.handleError(None)

    def close(self) -> None:
        try:
            super().close()
        except OSError:  # closing tries once more to write what failed before
            self.handleError(None)

    def handleError(self, record: logging.LogRecord | None) -> None:
        if not self.failed:
            self.failed = True
            print(f"warning: {self.baseFilename} cannot be written ({sys.exception()})", file=sys.stderr, flush=True)


def _print_failure_of_thread(failure: threading.ExceptHookArgs) -> None:
    """Print the error that ended a thread, except TensorBoard's: the next write raises it again, and handles it."""
    if type(failure.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(failure)
