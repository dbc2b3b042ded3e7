"""TensorBoard's files of a run, through accelerate's tracker. A run continues if they cannot be written."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import TensorBoardTracker
from PIL import Image
from torch.utils.tensorboard.summary import hparams
from torch.utils.tensorboard.writer import SummaryWriter

Pages = dict[str, dict[str, list[Any]]]  # by page and chart, what SummaryWriter.add_custom_scalars takes
SPLITS = ("train", "inner", "val")
STEP_PARTS = ("data_wait", "forward", "backward", "optimizer", "communication")


class TensorBoard:
    """Charts and figures of a run; see `train.run.trackers.Tracker`.

    Args:
        folder: for the files.
        warn: called once, with a message, if they cannot be written.
    """

    def __init__(self, folder: Path, warn: Callable[[str], object]):
        self._folder, self._warn = folder, warn
        self._writer: SummaryWriter | None = None
        self._open(purge_step=None)

    def settings(self, shown: Mapping[str, str | float], everything: Mapping[str, Any], scores: Sequence[str]) -> None:
        """Make a line of the page "HParams", whose columns are settings and the last values of some charts."""
        experiment, run, _ = hparams(dict(shown), dict.fromkeys(scores, 0.0))

        def add(writer: SummaryWriter) -> None:
            files: Any = writer.file_writer  # declared as None, and open from the start
            for summary in (experiment, run):
                files.add_summary(summary)

        self._write(add)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add points to charts."""

        def add(writer: SummaryWriter) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        self._write(add)

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """Add the distribution of the values."""
        self._write(lambda writer: writer.add_histogram(name, values, step))

    def figure(self, name: str, png: bytes, step: int) -> None:
        """Add a figure."""
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        self._write(lambda writer: writer.add_image(name, pixels, step, dataformats="HWC"))

    def arrange(self, pages: Pages) -> None:
        """Set up the page "Custom Scalars"; see `training_pages`."""
        self._write(lambda writer: writer.add_custom_scalars(pages))

    def rewind(self, step: int) -> None:
        """Discard everything written after a step."""
        self.close()
        if self._writer is not None:
            self._open(purge_step=step + 1)

    def close(self) -> None:
        """Write what is still in memory."""
        self._write(lambda writer: writer.close())

    def _open(self, purge_step: int | None) -> None:
        # Its files lie in the folder itself: TensorBoard names a run by the folder of its files.
        tracker = TensorBoardTracker("", self._folder, purge_step=purge_step)
        tracker.main_process_only = False  # which is known here without asking accelerate
        try:
            tracker.start()
            # Not through its `log`, which waits for the disk each time.
            self._writer = tracker.tracker
        except OSError as error:
            self._give_up(error)

    def _write(self, write: Callable[[SummaryWriter], object]) -> None:
        if self._writer is None:
            return
        try:
            write(self._writer)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._writer = None
        self._warn(f"warning: {self._folder} cannot be written ({error.strerror}); continuing without charts")


def training_pages(responses: bool, classes: bool, recordings: Sequence[str] = ()) -> Pages:
    """The page "Custom Scalars" of a training: the most informative charts first.

    Args:
        responses, classes: whether the network predicts them.
        recordings: their names if there are several; each gets its own charts.
    """
    metrics: dict[str, str] = {}
    if responses:
        metrics |= {"R2": "r2", "Pearson r": "pearson_r"}
    if classes:
        metrics |= {"top-1": "top1"}
    pages = {
        "first look": {
            "loss": ["train/loss"],
            **_score_charts(metrics, SPLITS),
            "learning rate": ["rate/backbone", "rate/readout"],
            "images per second": ["speed/images_per_second"],
        }
    }
    for name in recordings:
        pages[name] = _score_charts(metrics, [f"{split}/{name}" for split in SPLITS])
    pages["where the time goes"] = {"seconds of a step": [f"speed/{part}_seconds" for part in STEP_PARTS]}
    return {page: {title: ["Multiline", tags] for title, tags in charts.items()} for page, charts in pages.items()}


def _score_charts(metrics: Mapping[str, str], splits: Sequence[str]) -> dict[str, list[str]]:
    """A chart for each metric, with a line for each split."""
    return {f"{title}: train, held out": [f"{split}/{key}" for split in splits] for title, key in metrics.items()}
