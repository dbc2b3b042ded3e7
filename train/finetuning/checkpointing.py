"""Saving a checkpoint under any strategy; `resume.py` loads it again, `train/run/checkpoint.py` has the format."""

from pathlib import Path

import torch
from safetensors import SafetensorError

from data_prep.common.errors import RunFailed
from train.distributed.engine import Engine
from train.distributed.runtime import Runtime
from train.finetuning.ema import RunningAverage
from train.models.batch_norm import batch_norm_statistics
from train.models.network import Network
from train.run.checkpoint import save_checkpoint
from train.run.progress import Progress


class CheckpointWriter:
    """Saves network, optimizer and progress.

    Args:
        folder: RUN/checkpoints.
        keep: how many of the last checkpoints to keep, beside the best.
        engine: holds the trained weights and the optimizer.
        network: that is trained.
        average: of its weights, or None.
        runtime: this process.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        engine: Engine,
        network: Network,
        average: RunningAverage | None,
        runtime: Runtime,
    ):
        self._folder, self._keep, self._runtime = folder, keep, runtime
        self._engine, self._network, self._average = engine, network, average

    def save(self, progress: Progress) -> None:
        """Save a checkpoint. Every rank must take part; all return once it is complete, or all raise.

        Raises:
            RunFailed: it cannot be written.
        """
        tensors = self._tensors()
        if progress.losses:
            tensors["statistics"] = self._average_statistics(tensors)
        error_message = None
        if self._runtime.is_main:
            try:
                save_checkpoint(self._folder, tensors, progress, self._keep)
            except (OSError, SafetensorError) as error:
                error_message = f"checkpoint step_{progress.step} cannot be saved ({error}); earlier ones are kept"
        error_message = self._runtime.gather_objects(error_message)[0]
        if error_message is not None:
            raise RunFailed(error_message)

    def _tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """What is saved, by file and name."""
        optimizer, trained = self._engine.optimizer_tensors(), self._engine.network_tensors()
        if self._average is None:
            return {"optimizer": optimizer, "network": trained}
        self._average.gather()
        return {"optimizer": optimizer, "network": self._average.network.state_dict(), "training": trained}

    def _average_statistics(self, tensors: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Put the ranks' mean of BatchNorm's statistics into `tensors`; returns those of each rank.

        Mid-epoch they differ between ranks, and a run that resumes on as many ranks needs those of each rank.
        """
        networks = {"network": self._network}
        if self._average is not None:
            networks = {"network": self._average.network, "training": self._network}
        of_ranks: dict[str, torch.Tensor] = {}
        if self._runtime.ranks == 1:
            return of_ranks
        for file, network in networks.items():
            for name, statistic in batch_norm_statistics(network):
                of_ranks[f"{file}|{name}"] = self._runtime.all_gather(statistic)
                tensors[file][name] = self._runtime.mean(statistic).to(statistic)
        return of_ranks
