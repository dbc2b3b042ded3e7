"""What a training writes to its log before the first step: the data, the network, the processes, the readouts."""

from collections.abc import Mapping
from dataclasses import dataclass

from train.distributed.runtime import Runtime
from train.finetuning.setup.preparation import PreparedRun
from train.models.network import Network, parameter_count
from train.run.monitor import Monitor

MIXES = {
    "proportional": "every stimulus once an epoch; the loss is the mean over all recorded responses",
    "equal": "equally many stimuli of each recording in a step; the loss is the mean over recordings",
}


@dataclass(frozen=True)
class NetworkSize:
    """Parameters of a network: all of them, and those that are trained."""

    all: int
    trained: int

    @classmethod
    def of(cls, network: Network) -> "NetworkSize":
        """Count a network's parameters, before a strategy partitions them."""
        return cls(parameter_count(network), parameter_count(network, trainable_only=True))


def introduce(
    run: PreparedRun,
    network: Network,
    size: NetworkSize,
    ridge_scores: Mapping[str, float],
    runtime: Runtime,
    monitor: Monitor,
) -> None:
    """Log what is trained, on what, and how.

    Args:
        run: that is about to start.
        network: to be trained.
        size: of the network.
        ridge_scores: leave-one-out score of each readout that starts from a ridge.
        runtime: this process.
        monitor: has the log.
    """
    lines = [
        *_about_data(run),
        *_about_network(run, network, size),
        _about_steps(run, runtime),
        *_about_readouts(run, network, ridge_scores),
        *run.data.notes,
        *run.targets.notes,
        *_cautions(run),
    ]
    for line in lines:
        monitor.log(line)


def _about_data(run: PreparedRun) -> list[str]:
    manifest, fit, selection = run.targets.manifest, run.data.fit, run.data.selection
    name = f"{manifest.name} (SIMULATED)" if manifest.simulated else manifest.name
    split = run.recipe.early_stopping.split
    selected_on = "training stimuli held back" if split == "inner" else f"stimuli of {split}"
    lines = [
        f"{name}: {len(fit):,} stimuli to train on, {len(selection):,} {selected_on} to choose the epoch, "
        f"{len(manifest.sites)} sites, images of {fit.size} px"
    ]
    if run.recording_names:
        for part, selecting in zip(fit.recordings, selection.recordings, strict=True):
            sites = len(part.split.manifest.sites)
            lines.append(f"  {part.name}: {len(part):,} to train on, {len(selecting):,} to choose, {sites} sites")
        lines.append(f"mix {run.recipe.mix}: {MIXES[run.recipe.mix]}; the epoch is chosen by the mean over recordings")
    if run.recipe.loader.engine == "webdataset":
        tars = sum(len(part.split.shards) for part in fit.recordings)
        lines.append(
            f"loader.engine webdataset: images stream from {tars} tars drawn with replacement, so an epoch is a number "
            "of steps, and some stimuli come twice or not at all"
        )
    return lines


def _about_network(run: PreparedRun, network: Network, size: NetworkSize) -> list[str]:
    backbone = run.recipe.backbone
    cut = f" cut after {backbone.cut}" if backbone.cut else ""
    return [
        f"{backbone.name}{cut}, weights: {network.backbone.weights_from}; {size.trained:,} of {size.all:,} parameters "
        "are trained"
    ]


def _about_steps(run: PreparedRun, runtime: Runtime) -> str:
    loader = run.loader
    micro_batches = "1 micro-batch" if loader.accumulation_steps == 1 else f"{loader.accumulation_steps} micro-batches"
    return (
        f"{runtime.describe()}, {run.recipe.precision}; {loader.steps} steps an epoch of {loader.global_size} stimuli, "
        f"in {micro_batches} per process"
    )


def _about_readouts(run: PreparedRun, network: Network, ridge_scores: Mapping[str, float]) -> list[str]:
    lines = []
    for name, readout in network.heads.items():
        kind = f"{run.recipe.readout.kind} readout to the sites" if name == "rates" else "linear readout to the classes"
        start = f", from a ridge (leave-one-out: {ridge_scores[name]:.4f})" if name in ridge_scores else ""
        lines.append(f"{kind}: {parameter_count(readout):,} parameters{start}")
    if ridge_scores and network.backbone.normalises_by_batch:
        lines.append(
            "note: the ridge saw features under BatchNorm's running statistics, but training normalises by the batch; "
            "backbone.batch_norm frozen keeps the features that the ridge saw"
        )
    return lines


def _cautions(run: PreparedRun) -> list[str]:
    lines = []
    if run.recipe.task.shuffle_responses:
        lines.append("CONTROL: the training responses are shuffled over stimuli; the scores must be at chance")
    if run.data.selection.labels is not None and run.data.fit.labels is not None:
        unseen = set(run.data.selection.labels.tolist()) - set(run.data.fit.labels.tolist())
        if unseen:
            split = run.recipe.early_stopping.split
            lines.append(
                f"warning: {len(unseen)} of the classes in {split} have no training stimulus, so they "
                "cannot be learned (is the split grouped by object?)"
            )
    return lines
