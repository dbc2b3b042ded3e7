"""What people watch: the log, the progress of an epoch, and TensorBoard."""

import io
import json
import logging
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from data_prep.common.atomic_writes import write_bytes
from data_prep.common.errors import RunFailed
from train.run.folder import RunFolder, epoch_of


def layout(responses: bool, classes: bool, recordings: Sequence[str] = ()) -> dict[str, dict[str, list[Any]]]:
    """What TensorBoard's page "Custom Scalars" shows of a training, the most telling charts first.

    Args:
        responses, classes: what is predicted.
        recordings: the names of several; each has charts of its own.
    """
    splits = ("train", "inner", "val")
    metrics = {"R2": "r2", "Pearson r": "pearson_r"} if responses else {}
    metrics |= {"top-1": "top1"} if classes else {}
    charts = {"loss": ["train/loss"]}
    charts |= _scores(metrics, splits)
    charts |= {"learning rate": ["rate/backbone", "rate/readout"], "images per second": ["speed/images_per_second"]}
    parts = ("data_wait", "forward", "backward", "optimizer", "communication")
    times = {"seconds of a step": [f"speed/{part}_seconds" for part in parts]}
    own = {name: _scores(metrics, [f"{split}/{name}" for split in splits]) for name in recordings}
    return {
        page: {title: ["Multiline", tags] for title, tags in of.items()}
        for page, of in {"first look": charts, **own, "where the time goes": times}.items()
    }


def _scores(metrics: Mapping[str, str], splits: Sequence[str]) -> dict[str, list[str]]:
    """A chart for each metric, with a line for each split."""
    return {f"{title}: train, held out": [f"{split}/{key}" for split in splits] for title, key in metrics.items()}


class _LogFile(logging.FileHandler):
    """log.txt, which a run can do without: when it cannot be written, that is said once."""

    failed = False

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            self.handleError(None)

    def close(self) -> None:
        try:
            super().close()
        except OSError:  # what could not be written before is tried again
            self.handleError(None)

    def handleError(self, record: logging.LogRecord | None) -> None:
        if not self.failed:
            self.failed = True
            print(f"warning: {self.baseFilename} cannot be written ({sys.exception()})", file=sys.stderr, flush=True)


class Board:
    """TensorBoard's file of a run. A run can do without: when it cannot be written, that is said once.

    The horizontal axis of every chart is the number of optimizer steps done.

    Args:
        folder: for the file.
        say: what says so.
    """

    def __init__(self, folder: Path, say: Callable[[str], Any]):
        self._folder, self._say = folder, say
        self._writer: SummaryWriter | None = None
        self._open()

    def _open(self, void_from: int | None = None) -> None:
        self._try(lambda: setattr(self, "_writer", SummaryWriter(str(self._folder), purge_step=void_from)))

    def rewind(self, step: int) -> None:
        """Everything that was written of later steps is void from here on."""
        self.close()
        if self._writer is not None:
            self._open(void_from=step + 1)

    def _try(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except OSError as error:
            self._writer = None
            self._say(f"warning: {self._folder} cannot be written ({error.strerror}); going on without charts")

    def _chart(self, write: Callable[[SummaryWriter], Any]) -> None:
        if self._writer is not None:
            self._try(lambda: write(self._writer))

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Points in charts."""
        self._chart(lambda board: [board.add_scalar(name, value, step) for name, value in values.items()])

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """How values are spread."""
        self._chart(lambda board: board.add_histogram(name, values, step))

    def figure(self, name: str, png: bytes, step: int) -> None:
        """A figure."""
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        self._chart(lambda board: board.add_image(name, pixels, step, dataformats="HWC"))

    def lay_out(self, pages: dict[str, dict[str, list[Any]]]) -> None:
        """Arrange the page "Custom Scalars"."""
        self._chart(lambda board: board.add_custom_scalars(pages))

    def close(self) -> None:
        """Write out what is still in memory."""
        self._chart(SummaryWriter.close)


class Monitor:
    """Writes log.txt, history.jsonl and TensorBoard; silent on every rank but the first.

    Attributes:
        board: TensorBoard's file; None on every rank but the first.

    Args:
        folder: of the run; it must exist on the leading rank.
        leads: whether this rank writes.
    """

    def __init__(self, folder: RunFolder, leads: bool):
        self._folder, self._leads = folder, leads
        self._log = logging.getLogger("spiketune")
        self._log.handlers.clear()
        self._log.propagate = False
        self._log.setLevel(logging.INFO if leads else logging.CRITICAL)
        self.board: Board | None = None
        if leads:
            self._add_handler(logging.StreamHandler(sys.stdout), "%(message)s")
            self._add_handler(_LogFile(folder.log), "%(asctime)s %(message)s")
            threading.excepthook = _hear
            self.board = Board(folder.tensorboard, self.say)

    def _add_handler(self, handler: logging.Handler, layout: str) -> None:
        handler.setFormatter(logging.Formatter(layout, datefmt="%Y-%m-%d %H:%M:%S"))
        self._log.addHandler(handler)

    def say(self, message: str) -> None:
        """A line for the terminal and the log."""
        self._log.info(message)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Points in TensorBoard's charts."""
        if self.board is not None:
            self.board.scalars(values, step)

    def epoch(self, facts: dict[str, Any]) -> None:
        """A line of history.jsonl.

        Raises:
            RunFailed: it cannot be written.
        """
        if not self._leads:
            return
        try:
            with self._folder.history.open("a", encoding="utf-8") as file:
                file.write(json.dumps(facts) + "\n")
        except OSError as error:
            raise RunFailed(f"{self._folder.history} cannot be written ({error.strerror})") from None

    def rewind(self, epoch: int, step: int) -> None:
        """Drop what was written after `epoch` and `step`: a resumed run writes it again."""
        if not self._leads:
            return
        self.board.rewind(step)
        if self._folder.history.exists():
            kept = [line for line in self._folder.epochs() if epoch_of(line, self._folder.history) <= epoch]
            write_bytes(self._folder.history, "".join(kept).encode())

    def close(self) -> None:
        """Write out what is still in memory."""
        if self.board is not None:
            self.board.close()
        for handler in self._log.handlers:
            handler.close()


def _hear(failure: threading.ExceptHookArgs) -> None:
    """Print what ended a thread, but for TensorBoard's own, which hands it on to who writes next: `Board` says it."""
    if type(failure.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(failure)
