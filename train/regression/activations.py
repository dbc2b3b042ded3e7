"""Runs a feature extractor over this rank's share of the stimuli."""

from collections.abc import Callable, Iterator

import torch

from data_prep.common.progress import Progress
from train.data.loader import evaluation_loader, rank_positions
from train.data.stimuli import StimulusSet
from train.distributed.runtime import Runtime
from train.regression.host_copies import copied_to_host

FeatureExtractor = Callable[[torch.Tensor], dict[str, torch.Tensor]]
"""Images (b, 3, size, size) -> features by name, each (b, ...)."""


def activation_batches(
    extractor: FeatureExtractor,
    stimuli: StimulusSet,
    runtime: Runtime,
    *,
    batch_size: int,
    workers: int,
    label: str,
    skip: int = 0,
) -> Iterator[dict[str, torch.Tensor]]:
    """Features of this rank's share of the stimuli, in the order of `train.data.loader.rank_positions`.

    Args:
        extractor: maps images to features.
        stimuli: the stimuli of all ranks.
        runtime: this process.
        batch_size: stimuli per forward pass.
        workers: decoding processes.
        label: shown beside the progress bar.
        skip: number of leading batches to leave out.

    Yields:
        Batch after batch, features by name on the CPU, each (b, ...); on a GPU valid until the next is asked for.
    """
    loader = evaluation_loader(
        stimuli, size=batch_size, rank=runtime.rank, ranks=runtime.ranks, workers=workers, pin=runtime.on_gpu, skip=skip
    )

    def computed() -> Iterator[dict[str, torch.Tensor]]:
        for batch in loader:
            count = int(batch.weight.sum())  # without padding
            with torch.no_grad():
                features = extractor(batch.to(runtime.device).images)
            yield {name: rows[:count] for name, rows in features.items()}
            progress.advance(min(count * runtime.ranks, len(stimuli) - progress.done))

    with Progress(len(stimuli), label, silent=not runtime.is_main) as progress:
        progress.advance(min(skip * batch_size * runtime.ranks, len(stimuli)))
        yield from copied_to_host(computed(), runtime.device)


def activations_of_share(
    extractor: FeatureExtractor,
    stimuli: StimulusSet,
    runtime: Runtime,
    *,
    batch_size: int,
    workers: int,
    label: str,
) -> dict[str, torch.Tensor]:
    """Everything that `activation_batches` yields, in memory: by name (stimuli of this rank, ...)."""
    rows = len(rank_positions(len(stimuli), runtime.rank, runtime.ranks))
    share: dict[str, torch.Tensor] = {}
    done = 0
    for batch in activation_batches(extractor, stimuli, runtime, batch_size=batch_size, workers=workers, label=label):
        for name, features in batch.items():
            if name not in share:
                share[name] = features.new_empty(rows, *features.shape[1:])
            share[name][done : done + len(features)] = features
        done += len(next(iter(batch.values())))
    return share
