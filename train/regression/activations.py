"""Runs a feature extractor over this rank's share of the stimuli."""

from collections.abc import Callable, Iterator

import torch

from data_prep.common.progress import Progress
from train.data.loader import evaluation_loader
from train.data.stimuli import StimulusSet
from train.distributed.runtime import Runtime

FeatureExtractor = Callable[[torch.Tensor], dict[str, torch.Tensor]]
"""Images (b, 3, size, size) -> features by name, each (b, ...)."""


@torch.no_grad()
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
        Batch after batch, features by name on the CPU, each (b, ...).
    """
    loader = evaluation_loader(
        stimuli, size=batch_size, rank=runtime.rank, ranks=runtime.ranks, workers=workers, pin=runtime.on_gpu, skip=skip
    )
    with Progress(len(stimuli), label, silent=not runtime.is_main) as progress:
        progress.advance(min(skip * batch_size * runtime.ranks, len(stimuli)))
        for batch in loader:
            count = int(batch.weight.sum())  # without padding
            features = extractor(batch.to(runtime.device).images)
            yield {name: rows[:count].cpu() for name, rows in features.items()}
            progress.advance(min(count * runtime.ranks, len(stimuli) - progress.done))


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
    batches = list(activation_batches(extractor, stimuli, runtime, batch_size=batch_size, workers=workers, label=label))
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
