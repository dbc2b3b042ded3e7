"""What a training writes to its log before the first step: the data, the network, the processes."""

from train.distributed.runtime import Runtime
from train.finetuning.preparation import Job
from train.models.network import Network
from train.models.readouts import parameter_count
from train.run.monitor import Monitor


def introduce(job: Job, network: Network, size: dict[str, int], runtime: Runtime, monitor: Monitor) -> None:
    """Say what is trained, on what, and how."""
    manifest, loader, recipe = job.manifest, job.loader, job.recipe
    name = f"{manifest.name} (SIMULATED)" if manifest.simulated else manifest.name
    monitor.log(
        f"{name}: {len(loader.stimuli):,} stimuli to fit, {len(job.selection):,} of {recipe.early_stopping.split} "
        f"to select the epoch, {len(manifest.sites)} sites, images of {loader.stimuli.size} px"
    )
    introduce_recordings(job, monitor)
    if recipe.loader.engine == "webdataset":
        monitor.log(
            f"loader.engine webdataset: images stream from {len(loader.stimuli.split.shards)} tars that are drawn "
            "with replacement, so an epoch is a number of steps and not every stimulus once"
        )
    monitor.log(
        f"{recipe.backbone.name}{f' cut after {recipe.backbone.cut}' if recipe.backbone.cut else ''}, "
        f"weights: {network.backbone.weights_from}; "
        f"{size['trained']:,} of {size['all']:,} parameters are trained"
    )
    monitor.log(
        f"{runtime.describe()}, {recipe.precision}; {loader.steps} steps an epoch of {loader.global_size} stimuli, "
        f"in {loader.accumulation_steps} micro-batch{'es' * (loader.accumulation_steps > 1)} per process"
    )


def introduce_recordings(job: Job, monitor: Monitor) -> None:
    """Say what several recordings have of their own, and how a step mixes them."""
    if len(job.recordings) == 1:
        return
    for fit, selection in zip(job.loader.stimuli.recordings, job.selection.recordings, strict=True):
        sites = len(fit.split.manifest.sites)
        monitor.log(f"  {fit.name}: {len(fit):,} to fit, {len(selection):,} to select, {sites} sites")
    mixes = {
        "proportional": "every stimulus once an epoch; the loss is the mean over all recorded responses",
        "equal": "equally many stimuli of each in a step; the loss is the mean over recordings",
    }
    monitor.log(f"mix {job.recipe.mix}: {mixes[job.recipe.mix]}; the best epoch is that of the mean over recordings")


def introduce_readouts(job: Job, network: Network, monitor: Monitor, ridge_scores: dict[str, float]) -> None:
    """Say what the readouts are, where they begin, and what to beware of."""
    recipe = job.recipe
    for head, module in network.heads.items():
        kind = f"{recipe.readout.kind} readout to the sites" if head == "rates" else "linear readout to the classes"
        start = f", from a ridge (leave-one-out: {ridge_scores[head]:.4f})" if head in ridge_scores else ""
        monitor.log(f"{kind}: {parameter_count(module):,} parameters{start}")
    if ridge_scores and network.backbone.normalises_by_batch:
        monitor.log(
            "note: the ridge saw features under BatchNorm's own statistics, training normalises by the batch; "
            "backbone.batch_norm frozen keeps what the ridge saw"
        )
    for remark in job.remarks:
        monitor.log(remark)
    if recipe.task.shuffle_responses:
        monitor.log("CONTROL: the training responses are shuffled over stimuli; the scores must be at chance")
    if recipe.task.predicts_classes and (unseen := set(job.selection.labels) - set(job.loader.stimuli.labels)):
        monitor.log(
            f"warning: {len(unseen)} of the classes in {recipe.early_stopping.split} have no stimulus to fit: nothing "
            "can be learned of them (is the split grouped by object?)"
        )
