"""A worker of a search: claims trials, trains them, and scores the best."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.common.errors import BadInput, RunFailed
from data_prep.common.safe_reading import parse_json_lines, read_regular_file
from data_prep.remote.url import move_secrets_to_environment
from data_prep.shards.manifest import Manifest
from data_prep.shards.storage import open_files
from train.evaluation.metrics import TITLES
from train.evaluation.metrics_file import METRICS_FILE
from train.models.timm_networks import check_network_name
from train.run.checkpoint import load_progress, resolve_checkpoint
from train.run.folder import RunFolder
from train.run.recipe import save_recipe
from train.sweeping.plan import Plan, load_plan
from train.sweeping.publishing import REPORTED_SPLIT, publish
from train.sweeping.queue import Claim, Queue, open_study
from train.sweeping.queue_worker import StopRequest, print_line, record_failure, seconds_between_heartbeats, take_trials
from train.sweeping.standings import Standings
from train.sweeping.supervised_process import Heartbeat, hold_lock
from train.sweeping.sweep_folder import SweepFolder
from train.sweeping.trial import Launcher, Outcome, resuming


@dataclass
class Worker:
    """One of the processes that work on a search.

    Attributes:
        data: shard folder, or its URL without secrets.
        plan: what is searched.
        manifest: of the data.
        folder: of the search.
        study: the queue of trials.
        launcher: starts trials.
        stop: whether this worker was asked to end.
    """

    data: str
    plan: Plan
    manifest: Manifest
    folder: SweepFolder
    study: Queue
    launcher: Launcher
    stop: StopRequest

    def work(self) -> None:
        """Run trials until none is left, including those of workers that die meanwhile.

        Raises:
            BadInput: a trial was given input that cannot be used.
        """
        take_trials(self.study, self.stop, self._run_and_publish)

    def _run_and_publish(self, claim: Claim) -> None:
        self.run_trial(claim)
        print_line(self.publish().summary())

    def publish(self) -> Standings:
        """Write tables, figure and best recipe."""
        return publish(self.folder, self.plan, self.manifest, self.study)

    @property
    def _heartbeat_seconds(self) -> float:
        return seconds_between_heartbeats(self.plan.sweep.stale_seconds)

    def run_trial(self, claim: Claim) -> None:
        """Train a trial and record how it ended.

        Raises:
            BadInput: it was given input that cannot be used.
        """
        run = self.folder.run(claim.run)
        again = " again" if run.exists() else ""
        print_line(f"{claim.run} started{again}: {describe_settings(claim.settings)} -> {run}")
        try:
            outcome = self._finetune(claim)
        except BaseException:  # asked to end, or its folder cannot be written: another worker may do better
            self.study.release(claim, failed=False)
            raise
        if self.study.owns(claim):
            self._record(claim, outcome)
        else:
            print_line(f"{claim.run} sent no heartbeat for too long and was taken over by another worker")

    def _finetune(self, claim: Claim) -> Outcome:
        """Train a trial, from its last completed epoch where there is one."""
        heartbeat = Heartbeat(self.folder.heartbeat(claim.run), claim.token, self._heartbeat_seconds)
        recipe, run = self.folder.trial_recipe(claim.run), RunFolder(self.folder.run(claim.run))
        with hold_lock(heartbeat.path, self.stop.check) as lock:
            save_recipe(self.plan.recipe(claim.settings), recipe)
            arguments = [recipe, "--data", self.data, "--out", run.path, *resuming(run)]
            command = self.launcher.command(self.folder.launch(claim.run), "finetune.py", *arguments)
            return self.launcher.run(command, heartbeat, lock, self.folder.log(claim.run), self.stop.check)

    def _record(self, claim: Claim, outcome: Outcome) -> None:
        run, log = self.folder.run(claim.run), self.folder.log(claim.run)
        if outcome.kind == "done":
            value, facts = read_result(RunFolder(run))
            self.study.succeed(claim, value, facts)
            when = f"after epoch {facts['best_epoch']} of {facts['epochs']}, {facts['seconds']:.0f} s"
            print_line(f"{claim.run} done: {TITLES[self.plan.metric]} {value:.4f} on inner {when} -> {run}")
        elif outcome.kind == "bad input":
            self.study.release(claim, failed=False)
            raise BadInput(f"{outcome.reason} (trial {claim.run}, see {log}; fix it and start the sweep again)")
        else:
            record_failure(self.study, claim, outcome, str(log))

    def score_best(self, standings: Standings) -> Standings:
        """Score the best run on the reported split, once; of several workers the first does it.

        Raises:
            RunFailed: every trial failed, or the score cannot be computed.
        """
        if standings.best is None:
            raise RunFailed(f"every trial failed; see {self.folder.table}")
        if not self._can_score():
            return standings
        run, log = RunFolder(self.folder.run(standings.best.run)), self.folder.log(REPORTED_SPLIT)
        heartbeat = Heartbeat(self.folder.heartbeat(REPORTED_SPLIT), REPORTED_SPLIT, self._heartbeat_seconds)
        heartbeat.path.write_text(heartbeat.token)
        with hold_lock(heartbeat.path, self.stop.check) as lock:
            if not (run.evaluation(REPORTED_SPLIT) / METRICS_FILE).is_file():
                print_line(f"scoring {standings.best.run} on {REPORTED_SPLIT}")
                arguments = [run.path, "--split", REPORTED_SPLIT, "--data", self.data]
                command = self.launcher.command(self.folder.launch(REPORTED_SPLIT), "evaluate.py", *arguments)
                outcome = self.launcher.run(command, heartbeat, lock, log, self.stop.check)
                if outcome.kind != "done":
                    raise RunFailed(f"{run.path} could not be scored on {REPORTED_SPLIT}: {outcome.reason}; see {log}")
            heartbeat.path.unlink(missing_ok=True)
        return self.publish()

    def _can_score(self) -> bool:
        split = self.manifest.splits.get(REPORTED_SPLIT)
        return split is not None and (split.responses or self.plan.base.task.predicts_classes)


def read_result(run: RunFolder) -> tuple[float, dict[str, float]]:
    """The best value of a run's selection metric, and best_epoch, epochs and seconds (of training and scoring)."""
    epochs = [content for _, content in parse_json_lines(read_regular_file(run.history))]
    seconds = sum(epoch["train_seconds"] + epoch["score_seconds"] for epoch in epochs)
    progress = load_progress(resolve_checkpoint(run.checkpoints, "best"))
    assert progress.best is not None  # a run that is done has scored an epoch
    facts = {"best_epoch": progress.best_epoch, "epochs": epochs[-1]["epoch"], "seconds": round(seconds, 1)}
    return progress.best, facts


def describe_settings(settings: dict[str, Any]) -> str:
    """Settings for a line: `optimizer.lr 0.001, optimizer.name nadam`."""
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in settings.items()
    )


def check_networks(sweep: Path, plan: Plan) -> None:
    """Refuse networks that do not exist.

    Raises:
        BadInput: names the nearest.
    """
    for name in plan.values("backbone.name"):
        try:
            check_network_name(name)
        except BadInput as error:
            raise BadInput(f"{sweep}: {error}") from None


def open_worker(
    sweep: Path, data: str, out: Path, processes: int | None, stop: StopRequest, retries_failed: bool = False
) -> Worker:
    """Check a search and every recipe it may ask for, and begin or join it.

    Args:
        sweep: file of the search.
        data: shard folder, or its URL.
        out: folder of the search.
        processes: per trial; by default one per GPU, or one.
        stop: whether this worker was asked to end.
        retries_failed: whether trials that have failed are run again.

    Raises:
        BadInput: something cannot be used; nothing has been written then.
    """
    plan, manifest = load_plan(sweep), open_files(data).manifest()
    check_networks(sweep, plan)
    launcher, smallest = Launcher(processes), min(plan.values("batch.global_size"))
    if smallest < launcher.processes:
        raise BadInput(f"{launcher.processes} processes cannot share a global batch of {smallest} (batch.global_size)")
    folder = SweepFolder(out)
    study = open_study(folder, plan, manifest, again=retries_failed)
    return Worker(move_secrets_to_environment(data), plan, manifest, folder, study, launcher, stop)
