"""A worker of a search: claims points, trains them, and scores the best."""

import json
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.common.errors import BadInput, RunFailed
from data_prep.remote.url import move_secrets_to_environment
from data_prep.shards.manifest import Manifest
from data_prep.shards.storage import open_files
from train.models.timm_networks import check_network_name
from train.run.checkpoint import current, load_progress
from train.run.folder import RunFolder
from train.run.recipe import Recipe, save_recipe
from train.sweeping.publishing import REPORTED, publish
from train.sweeping.queue import Claim, Study, open_study
from train.sweeping.search import Plan, SweepFolder, load_plan
from train.sweeping.standings import Standings
from train.sweeping.supervised_process import POLL_SECONDS, Beat, turn
from train.sweeping.trial import Launcher, Outcome

BEATS_UNTIL_STALE = 6
LONGEST_BEAT = 10.0
TRIES = 2


class Stop:
    """Remembers that this worker was asked to end until it is where it can; asked a second time, it ends at once."""

    def __init__(self):
        self._number = 0
        self._before = {}

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, self._remember) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _remember(self, number: int, _: Any) -> None:
        self._number = number
        self.__exit__()

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """End this worker if it was asked to.

        Raises:
            KeyboardInterrupt: by Ctrl-C.
            SystemExit: 143, by SIGTERM.
        """
        if self._number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._number:
            sys.exit(128 + self._number)


@dataclass
class Worker:
    """One of the processes that work on a search.

    Attributes:
        data: shard folder, or its URL without secrets.
        plan: what is searched.
        manifest: of the data.
        folder: of the search.
        study: the queue of its points.
        launcher: starts trials.
        stop: whether this worker was asked to end.
    """

    data: str
    plan: Plan
    manifest: Manifest
    folder: SweepFolder
    study: Study
    launcher: Launcher
    stop: Stop

    def work(self) -> None:
        """Run points until none is left, those of workers that die meanwhile as well.

        Raises:
            BadInput: a trial was given what cannot be used.
        """
        waits = False
        while not self.study.settled():
            self.stop.check()
            if claim := self.study.claim():
                waits = False
                self._trial(claim)
                say(self.publish().summary())
                continue
            if not waits:
                say("waiting for the trials of other workers")
            waits = True
            self._pause()

    def _pause(self) -> None:
        """As long as it makes sense to wait before looking for the signs of life of others again."""
        until = time.monotonic() + self._beat_seconds
        while time.monotonic() < until:
            self.stop.check()
            time.sleep(POLL_SECONDS)

    def publish(self) -> Standings:
        """Write table, images and best recipe."""
        return publish(self.folder, self.plan, self.manifest, self.study)

    @property
    def _beat_seconds(self) -> float:
        return min(self.plan.sweep.stale_seconds / BEATS_UNTIL_STALE, LONGEST_BEAT)

    def _trial(self, claim: Claim) -> None:
        again = " (again)" if self.folder.run(claim.run).exists() else ""
        say(f"{claim.run} started{again}: {described(claim.settings)} -> {self.folder.run(claim.run)}")
        try:
            outcome = self._finetune(claim)
        except BaseException:  # asked to end, or its folder cannot be written: another worker may do better
            self.study.give_back(claim, failed=False)
            raise
        if self.study.holds(claim):
            self._record(claim, outcome)
        else:
            say(f"{claim.run} gave no sign of life for too long and was taken over by another worker")

    def _finetune(self, claim: Claim) -> Outcome:
        """Train a point, from its last completed epoch where there is one."""
        beat, log = Beat(self.folder.beat(claim.run), claim.token, self._beat_seconds), self.folder.log(claim.run)
        recipe, run = self.folder.trial_recipe(claim.run), RunFolder(self.folder.run(claim.run))
        with turn(beat.path, self.stop.check) as lock:
            write_recipe(self.plan.recipe(claim.settings), recipe)
            resume = ["--resume"] if run.recipe.is_file() else []
            if not resume:  # killed before the run had claimed its folder
                shutil.rmtree(run.path, ignore_errors=True)
            words = [recipe, "--data", self.data, "--out", run.path, *resume]
            command = self.launcher.command(self.folder.launch(claim.run), "finetune.py", *words)
            return self.launcher.run(command, beat, lock, log, self.stop.check)

    def _record(self, claim: Claim, outcome: Outcome) -> None:
        log = self.folder.log(claim.run)
        if outcome.kind == "done":
            value, facts = found(RunFolder(self.folder.run(claim.run)))
            self.study.succeed(claim, value, facts)
            at = f"after epoch {facts['best_epoch']} of {facts['epochs']}, {facts['seconds']:.0f} s"
            say(f"{claim.run} done: {self.plan.metric} {value:.4f} on inner {at} -> {self.folder.run(claim.run)}")
        elif outcome.kind == "bad input":
            self.study.give_back(claim, failed=False)
            raise BadInput(
                f"{outcome.reason} (said by trial {claim.run}, see {log}; mend it and start the sweep again)"
            )
        elif outcome.kind == "failed" and claim.failures + 1 < TRIES:
            self.study.give_back(claim, failed=True)
            say(f"{claim.run} failed and will be tried again: {outcome.reason}")
        else:
            self.study.fail(claim, outcome.reason, diverged=outcome.kind == "diverged")
            say(f"{claim.run} failed: {outcome.reason} -> {log}")

    def report(self, standings: Standings) -> Standings:
        """Score the best run on the split that is reported, once; of several workers the first does it.

        Raises:
            RunFailed: no trial ended well, or the score cannot be computed.
        """
        if standings.best is None:
            raise RunFailed(f"no trial ended well; {self.folder.table} tells why")
        if not self._can_report():
            return standings
        run, log = RunFolder(self.folder.run(standings.best.run)), self.folder.log(REPORTED)
        beat = Beat(self.folder.beat(REPORTED), REPORTED, self._beat_seconds)
        beat.path.write_text(beat.token)
        with turn(beat.path, self.stop.check) as lock:
            if not (run.evaluation(REPORTED) / "metrics.json").is_file():
                say(f"scoring {standings.best.run} on {REPORTED}")
                words = [run.path, "--split", REPORTED, "--data", self.data]
                command = self.launcher.command(self.folder.launch(REPORTED), "evaluate.py", *words)
                outcome = self.launcher.run(command, beat, lock, log, self.stop.check)
                if outcome.kind != "done":
                    raise RunFailed(f"{run.path} could not be scored on {REPORTED}: {outcome.reason}; see {log}")
            beat.path.unlink(missing_ok=True)
        return self.publish()

    def _can_report(self) -> bool:
        split = self.manifest.splits.get(REPORTED)
        return split is not None and (split.responses or self.plan.base.task.predicts_classes)


def found(run: RunFolder) -> tuple[float, dict[str, float]]:
    """The best value of a run's selection metric, and best_epoch, epochs and seconds (of training and scoring)."""
    epochs = [json.loads(line) for line in run.history.read_text(encoding="utf-8").splitlines()]
    seconds = sum(epoch["train_seconds"] + epoch["score_seconds"] for epoch in epochs)
    best = load_progress(current(run.checkpoints, "best"))
    return best.best, {"best_epoch": best.best_epoch, "epochs": epochs[-1]["epoch"], "seconds": round(seconds, 1)}


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe in one go."""
    temporary = path.with_suffix(".tmp")
    save_recipe(recipe, temporary)
    temporary.replace(path)


def described(settings: dict[str, Any]) -> str:
    """Settings for a line: `optimizer.lr 0.001, optimizer.name nadam`."""
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in settings.items()
    )


def say(line: str) -> None:
    """A line for the terminal, also where standard output is a file."""
    print(line, flush=True)


def check_names(sweep: Path, plan: Plan) -> None:
    """Refuse networks that there are not.

    Raises:
        BadInput: naming the nearest.
    """
    for name in plan.values("backbone.name"):
        try:
            check_network_name(name)
        except BadInput as error:
            raise BadInput(f"{sweep}: {error}") from None


def prepare(sweep: Path, data: str, out: Path, processes: int | None, stop: Stop) -> Worker:
    """Check the search and everything it may ask for, and begin or join it.

    Raises:
        BadInput: something cannot be used; nothing has been written then.
    """
    plan, manifest = load_plan(sweep), open_files(data).manifest()
    check_names(sweep, plan)
    launcher, smallest = Launcher(processes), min(plan.values("batch.global_size"))
    if smallest < launcher.processes:
        raise BadInput(f"{launcher.processes} processes cannot share a global batch of {smallest} (batch.global_size)")
    folder = SweepFolder(out)
    study = open_study(folder, plan, manifest)
    return Worker(move_secrets_to_environment(data), plan, manifest, folder, study, launcher, stop)
