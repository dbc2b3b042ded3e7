"""Where a run begins: at the start, or at its newest intact checkpoint, under whatever strategy wrote that."""

from dataclasses import dataclass
from pathlib import Path

from data_prep.common.errors import BadInput
from train.distributed.engine import Engine
from train.distributed.runtime import Runtime
from train.finetuning.ema import RunningAverage
from train.finetuning.setup.preparation import PreparedRun
from train.models.batch_norm import batch_norm_statistics
from train.models.network import Network
from train.run.checkpoint import (
    load_matching_tensors,
    load_progress,
    load_tensors,
    newest_intact,
    remove_newer,
    restore_checkpoints,
)
from train.run.monitor import Monitor
from train.run.progress import Progress


@dataclass(frozen=True)
class StartingPoint:
    """Where a run begins.

    Attributes:
        checkpoint: the newest intact one, or None.
        progress: of the run.
        faults: what is wrong with newer checkpoints, one sentence each.
    """

    checkpoint: Path | None
    progress: Progress
    faults: list[str]

    @property
    def is_fresh(self) -> bool:
        """Whether the run begins at its first step; a checkpoint of a start in closed form is then computed again."""
        return self.progress.step == 0

    def load_network(self, network: Network, average: RunningAverage | None, runtime: Runtime) -> None:
        """Load the checkpoint's weights, if there is one, before a strategy wraps the network.

        Raises:
            BadInput: the checkpoint is of another network.
        """
        if self.is_fresh or self.checkpoint is None:
            return
        networks = {"network": network} if average is None else {"training": network, "network": average.network}
        saved_by_as_many_ranks = len(self.progress.losses) == runtime.ranks > 1
        for file, target in networks.items():
            target.load_state_dict(load_matching_tensors(target, self.checkpoint, file))
            if saved_by_as_many_ranks:
                _load_statistics_of_rank(target, self.checkpoint, file, runtime.rank)
        network.backbone.weights_from = "the run's checkpoint"

    def load_optimizer(self, engine: Engine) -> None:
        """Load the checkpoint's optimizer state, if there is one."""
        if not self.is_fresh and self.checkpoint is not None:
            engine.load_optimizer(load_tensors(self.checkpoint, "optimizer"))


def _load_statistics_of_rank(network: Network, checkpoint: Path, file: str, rank: int) -> None:
    """Give BatchNorm the statistics that this rank had in mid-epoch, in place of the ranks' mean."""
    statistics = list(batch_norm_statistics(network))
    if not statistics:
        return
    tensors = load_tensors(checkpoint, "statistics")
    for name, statistic in statistics:
        statistic.copy_(tensors[f"{file}|{name}"][rank])


def starting_point(run: PreparedRun, runtime: Runtime) -> StartingPoint:
    """Where this run begins; every rank must take part, and all find the same.

    Raises:
        BadInput: no checkpoint is intact, or the run was trained on other data or other sites.
    """
    manifest, recordings = run.targets.manifest, run.data.recordings
    fresh = Progress(
        recording=manifest.fingerprint,
        selection_metric=run.recipe.selection_metric,
        selection_split=run.recipe.early_stopping.split,
        site_ids=manifest.site_ids,
        recordings=recordings.sites,
        units={manifest.name: manifest.rates.units for manifest in recordings.manifests},
        classes=manifest.classes if run.recipe.task.predicts_classes else None,
        image_size=run.data.fit.size,
    )
    checkpoint: Path | None = None
    faults: list[str] = []
    if run.resume and runtime.is_main:
        restore_checkpoints(run.folder.checkpoints)
        checkpoint, faults = newest_intact(run.folder.checkpoints)
    checkpoint, faults = runtime.gather_objects((checkpoint, faults))[0]
    if checkpoint is None:
        if faults:
            raise BadInput(f"{run.folder.path} has no intact checkpoint to resume from: {faults[0]}")
        return StartingPoint(None, fresh, [])
    progress = load_progress(checkpoint)
    if progress.recording != fresh.recording:
        order = ", in the same order" if progress.has_several_recordings else ""
        raise BadInput(f"{run.folder.path} was trained on other shards; resume it with the --data it began with{order}")
    progress.check_fits(manifest, " and ".join(map(str, run.locations)))
    return StartingPoint(checkpoint, progress if progress.step else fresh, faults)


def rewind_to(start: StartingPoint, run: PreparedRun, monitor: Monitor, runtime: Runtime) -> None:
    """Drop what was written after the starting point, and log where the run continues."""
    for fault in start.faults:
        monitor.log(f"warning: {fault}; using the checkpoint before it")
    if start.checkpoint is not None and runtime.is_main:
        remove_newer(run.folder.checkpoints, start.progress)
    if start.is_fresh:
        monitor.rewind(-1, -1)
        monitor.log("no step was saved: starting from the beginning")
        return
    epoch, step = start.progress.epoch, start.progress.step
    monitor.rewind(epoch, step)
    steps_into_epoch = step - epoch * run.loader.steps
    mid_epoch = f", step {steps_into_epoch} of the next" if steps_into_epoch else ""
    monitor.log(f"resumed after epoch {epoch}{mid_epoch} (step {step})")
