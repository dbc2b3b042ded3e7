"""Predicts images with any predictor, over all ranks, each image once."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from data_prep.common.errors import BadInput
from data_prep.common.progress import Progress
from train.data.loader import evaluation_loader, rank_positions, workers_per_rank
from train.data.stimuli import StimulusSet
from train.data.worker_limits import workers_within_limits
from train.distributed.launch_environment import cores_of_rank, this_process
from train.distributed.runtime import Runtime
from train.evaluation.options import Evaluate
from train.evaluation.predicting.image_predictor import ImagePredictor

BATCH_SIZE = 64  # images in a forward pass


@dataclass(frozen=True)
class Predicted:
    """What is predicted for images, in their order; the same on every rank.

    Attributes:
        rates: float32 (images, sites), in the recording's units; None for a classifier.
        classes: likeliest class, int64 (images,); None for a network without.
    """

    rates: np.ndarray | None
    classes: np.ndarray | None


@torch.no_grad()
def predict_images(
    predictor: ImagePredictor, stimuli: Mapping[int, StimulusSet], runtime: Runtime, options: Evaluate, label: str
) -> Predicted:
    """Predict every image once, over all ranks.

    Args:
        predictor: of the responses.
        stimuli: by size of the images that its networks take: the same stimuli.
        runtime: this process.
        options: give the size of a batch and the decoding processes.
        label: of the progress bar.

    Raises:
        Stopped: a process was asked to stop.
        RuntimeError: the ranks together did not see every image once.
    """
    predictor.network.to(runtime.device)
    batch_size = options.batch_size or BATCH_SIZE
    wanted = workers_per_rank(options.workers, cores_of_rank(this_process()))
    share = _Share(predictor, len(next(iter(stimuli.values()))), runtime)
    for size, of_size in stimuli.items():
        loader = evaluation_loader(
            of_size,
            size=batch_size,
            rank=runtime.rank,
            ranks=runtime.ranks,
            workers=workers_within_limits(wanted, batch_size, size),
            pin=runtime.on_gpu,
        )
        share.start()
        with Progress(len(of_size), label, silent=not runtime.is_main) as progress:
            for batch in loader:
                runtime.beat()
                count = int(batch.weight.sum())
                share.add(size, batch.to(runtime.device).images, count)
                progress.advance(min(count * runtime.ranks, len(of_size) - progress.done))
        share.check_complete()
    return share.over_ranks()


class _Share:
    """The predictions of this rank's share of the images."""

    def __init__(self, predictor: ImagePredictor, images: int, runtime: Runtime):
        self._predictor, self._images, self._runtime = predictor, images, runtime
        rows = len(rank_positions(images, runtime.rank, runtime.ranks))
        kind = torch.float32 if not predictor.network.combines else torch.float64
        self._rates = torch.zeros(rows, len(predictor.site_ids or []), dtype=kind, device=runtime.device)
        self._classes = torch.empty(rows, dtype=torch.int64, device=runtime.device)
        self._seen = 0

    def start(self) -> None:
        """Begin with the first image."""
        self._seen = 0

    def add(self, size: int, images: torch.Tensor, count: int) -> None:
        """Add a batch of a size; images after the first `count` are padding."""
        rows = slice(self._seen, self._seen + count)
        self._seen += count
        if self._predictor.network.combines:
            self._rates[rows] += self._predictor.network.rates_of_size(size, images)[:count]
            return
        outputs = self._predictor.network([images])
        if self._predictor.site_ids is not None:
            self._rates[rows] = outputs["rates"][:count]
        if self._predictor.classes is not None:
            self._classes[rows] = outputs["classes"][:count].argmax(1)

    def check_complete(self) -> None:
        """Compare the number of images that all ranks have seen since `start` with that of all images.

        Raises:
            RuntimeError: they differ.
        """
        total = int(self._runtime.sum(torch.tensor(self._seen, device=self._runtime.device)))
        if total != self._images:
            raise RuntimeError(f"the ranks predicted {total} images, but there are {self._images}")

    def over_ranks(self) -> Predicted:
        """The predictions of all ranks."""
        rates, predictor = self._rates, self._predictor
        if predictor.network.combines:
            rates = predictor.network.complete(rates)
        return Predicted(
            rates=None if predictor.site_ids is None else self._runtime.gather_rows(rates),
            classes=None if predictor.classes is None else self._runtime.gather_rows(self._classes),
        )


def check_enough_images(images: int, where: str) -> None:
    """Refuse more processes than images.

    Raises:
        BadInput: there are more.
    """
    ranks = this_process().world_size
    if images < ranks:
        raise BadInput(f"{ranks} processes cannot share the {images} images of {where}; start fewer processes")
