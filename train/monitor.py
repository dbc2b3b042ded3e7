"""What people watch: the log, the progress of an epoch, and TensorBoard."""

import io
import json
import logging
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from data_prep.errors import RunFailed
from train.run_folder import RunFolder, epoch_of, write_atomically

LAYOUT = {
    "first look": {
        "loss": ["Multiline", ["train/loss"]],
        "selection metric": ["Multiline", ["selection/value"]],
        "learning rate": ["Multiline", ["rate/backbone", "rate/readout"]],
        "images per second": ["Multiline", ["speed/images_per_second"]],
    }
}


class _LogFile(logging.FileHandler):
    """log.txt, which a run can do without: when it cannot be written, that is said once."""

    failed = False

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            self.handleError(None)

    def handleError(self, record: logging.LogRecord | None) -> None:
        if not self.failed:
            self.failed = True
            print(f"warning: {self.baseFilename} cannot be written ({sys.exception()})", file=sys.stderr, flush=True)


class Monitor:
    """Writes log.txt, history.jsonl and TensorBoard; silent on every rank but the first.

    Every chart's horizontal axis is the number of optimizer steps done.

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
        self._board: SummaryWriter | None = None
        if leads:
            self._add_handler(logging.StreamHandler(sys.stdout), "%(message)s")
            self._add_handler(_LogFile(folder.log), "%(asctime)s %(message)s")
            self._board = SummaryWriter(str(folder.tensorboard))
            self._board.add_custom_scalars(LAYOUT)

    def _add_handler(self, handler: logging.Handler, layout: str) -> None:
        handler.setFormatter(logging.Formatter(layout, datefmt="%Y-%m-%d %H:%M:%S"))
        self._log.addHandler(handler)

    def say(self, message: str) -> None:
        """A line for the terminal and the log."""
        self._log.info(message)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Points in TensorBoard's charts."""
        self._chart(lambda board: [board.add_scalar(name, value, step) for name, value in values.items()])

    def _chart(self, write: Callable[[SummaryWriter], Any]) -> None:
        """Write to TensorBoard, where there is one; a run can do without: when it fails, that is said once."""
        if self._board is None:
            return
        try:
            write(self._board)
        except OSError as error:
            self._board = None
            self.say(
                f"warning: {self._folder.tensorboard} cannot be written ({error.strerror}); going on without charts"
            )

    def picture(self, name: str, png: bytes) -> None:
        """A picture in TensorBoard."""
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        self._chart(lambda board: board.add_image(name, pixels, dataformats="HWC"))

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
        self._board.close()
        self._board = SummaryWriter(str(self._folder.tensorboard), purge_step=step + 1)
        if self._folder.history.exists():
            kept = [line for line in self._folder.epochs() if epoch_of(line, self._folder.history) <= epoch]
            write_atomically(self._folder.history, "".join(kept).encode())

    def close(self) -> None:
        """Write out what is still in memory."""
        self._chart(SummaryWriter.close)
        for handler in self._log.handlers:
            handler.close()
