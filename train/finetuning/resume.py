"""Where a run begins: at the start, or at the newest whole checkpoint, under whatever strategy wrote it."""

from dataclasses import dataclass
from pathlib import Path

from data_prep.common.errors import BadInput
from train.distributed.engine import Engine, batch_norm_statistics
from train.distributed.runtime import Runtime
from train.finetuning.ema import RunningAverage
from train.finetuning.preparation import Job
from train.models.network import Network
from train.run.checkpoint import (
    Progress,
    checked_tensors,
    forget_newer,
    load_progress,
    load_tensors,
    newest_whole,
)
from train.run.monitor import Monitor


@dataclass
class StartingPoint:
    """Where a run begins.

    Attributes:
        checkpoint: the newest whole one, if there is one.
        progress: of the run.
        faults: what is wrong with newer checkpoints, a sentence each.
    """

    checkpoint: Path | None
    progress: Progress
    faults: list[str]

    @property
    def begins(self) -> bool:
        """Whether no step is done: a start that was saved is made again."""
        return not self.progress.step

    def load_network(self, network: Network, average: RunningAverage | None, runtime: Runtime) -> None:
        """Give network and average the checkpoint's tensors, before a strategy wraps the network.

        Raises:
            BadInput: the checkpoint is of another network.
        """
        trained = {"network": network} if average is None else {"training": network, "network": average.network}
        for file, target in trained.items():
            target.load_state_dict(checked_tensors(target, self.checkpoint, file))
            if self.progress.losses and len(self.progress.losses) == runtime.ranks > 1:
                _load_own_statistics(target, self.checkpoint, file, runtime.rank)
        network.backbone.weights_from = "the run's checkpoint"

    def load_optimizer(self, engine: Engine) -> None:
        """Give the optimizer the checkpoint's state."""
        engine.load_optimizer(load_tensors(self.checkpoint, "optimizer"))


def _load_own_statistics(network: Network, checkpoint: Path, file: str, rank: int) -> None:
    """Give BatchNorm the statistics that this rank had in mid-epoch, in place of their mean."""
    own = list(batch_norm_statistics(network))
    tensors = load_tensors(checkpoint, "statistics") if own else {}
    for name, statistic in own:
        statistic.copy_(tensors[f"{file}|{name}"][rank])


def starting_point(job: Job, runtime: Runtime) -> StartingPoint:
    """Where this run begins; every rank must take part, and all find the same.

    Raises:
        BadInput: no checkpoint is whole, or they are of a run on other data, or on other sites.
    """
    fresh = Progress(
        recording=job.manifest.fingerprint,
        selection_metric=job.recipe.selection_metric,
        selection_split=job.recipe.early_stopping.split,
        site_ids=job.manifest.site_ids,
        recordings=job.recordings.sites,
        classes=job.manifest.classes if job.recipe.task.predicts_classes else None,
        image_size=job.loader.stimuli.size,
    )
    found = newest_whole(job.folder.checkpoints) if job.resume and runtime.is_main else (None, [])
    checkpoint, faults = runtime.gather_objects(found)[0]
    if checkpoint is None:
        if faults:
            raise BadInput(f"{job.folder.path} has no whole checkpoint to go on from: {faults[0]}")
        return StartingPoint(None, fresh, [])
    progress = load_progress(checkpoint)
    if progress.recording != fresh.recording:
        order = ", in the same order" * progress.is_of_several
        raise BadInput(f"{job.folder.path} was trained on other shards; resume it with the --data it began with{order}")
    progress.check_fits(job.manifest, " and ".join(map(str, job.data)))
    return StartingPoint(checkpoint, progress if progress.step else fresh, faults)


def rewind_to(start: StartingPoint, job: Job, monitor: Monitor, runtime: Runtime) -> None:
    """Drop what was written after the starting point, and say where the run continues."""
    for fault in start.faults:
        monitor.log(f"warning: {fault}; using the checkpoint before it")
    if start.checkpoint is not None and runtime.is_main:
        forget_newer(job.folder.checkpoints, start.progress)
    if start.begins:
        monitor.rewind(-1, -1)
        monitor.log("no step was saved: starting from the beginning")
        return
    epoch, step = start.progress.epoch, start.progress.step
    monitor.rewind(epoch, step)
    steps_into_epoch = step - epoch * job.loader.steps
    mid_epoch = f", step {steps_into_epoch} of the next" if steps_into_epoch else ""
    monitor.log(f"resumed after epoch {epoch}{mid_epoch} (step {step})")
