"""A worker of the study: takes rows, runs their commands one after the other, and goes on where one was stopped."""

import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_prep.common import locks
from data_prep.common.atomic_writes import write_bytes
from data_prep.common.errors import BadInput
from data_prep.remote.url import move_secrets_to_environment
from data_prep.shards.manifest import Manifest
from data_prep.shards.storage import open_files
from train.evaluation.metrics_file import METRICS_FILE
from train.models.timm_networks import missing_weights
from train.run.folder import RunFolder
from train.run.recipe import load_recipe
from train.sweeping.publishing import REPORTED_SPLIT
from train.sweeping.queue import Claim, Queue, QueueContents, open_queue
from train.sweeping.queue_worker import StopRequest, print_line, record_failure, seconds_between_heartbeats, take_trials
from train.sweeping.study.folder import RowState, SelectsOn, StudyFacts, StudyFolder
from train.sweeping.study.rows import ROWS, SMALL_GRID, Row, Step
from train.sweeping.supervised_process import Heartbeat, hold_lock
from train.sweeping.sweep_settings import SweepSettings
from train.sweeping.trial import COMMANDS, Launcher, Outcome, resuming

STALE_SECONDS = 120.0


@dataclass(frozen=True)
class StudyOptions:
    """What a study is run on, and how.

    Attributes:
        data: shard folder, or its URL.
        out: the study's folder.
        rows: those that must be done.
        small: whether they run at reduced size.
        selects_on: the split that selects the epoch of what is trained.
        processes: per command; by default one per GPU, or one.
        retries_failed: whether rows that have failed are run again; of the search, its failed trials.
    """

    data: str
    out: Path
    rows: Sequence[Row]
    small: bool
    selects_on: SelectsOn
    processes: int | None
    retries_failed: bool = False


@dataclass
class StudyWorker:
    """One of the processes that work on a study.

    Attributes:
        data: shard folder, or its URL without secrets.
        training_stimuli: in its train split.
        rows: that must be done.
        folder: of the study.
        facts: what all rows have in common.
        queue: of the rows.
        left_out: why rows are, by name.
        launcher: starts the processes of a command.
        stop: whether this worker was asked to end.
        retries_failed: see `StudyOptions`.
    """

    data: str
    training_stimuli: int
    rows: Sequence[Row]
    folder: StudyFolder
    facts: StudyFacts
    queue: Queue
    left_out: dict[str, str]
    launcher: Launcher
    stop: StopRequest
    retries_failed: bool

    def describe(self) -> str:
        """What is going to be run, for the terminal."""
        sentences = [f"{len(self.rows)} rows on {self.facts.data}; {self.launcher.describe()} each"]
        if self.facts.small:
            sentences.append("Reduced size (--small): these scores say that everything runs, and nothing of the study.")
        if self.facts.random_weights:
            networks = ", ".join(self.facts.random_weights)
            sentences.append(f"RANDOM weights instead of pretrained ones, which cannot be had: {networks}")
        sentences += [f"{name} is left out: {reason}" for name, reason in self.left_out.items()]
        return "\n".join(sentences)

    def work(self, publish: Callable[[], object], at_most: int | None = None) -> list[str]:
        """Run rows until those that were asked for have ended, whoever ran them.

        Args:
            publish: called after each row.
            at_most: rows to run; then those of other workers are not waited for.

        Returns:
            The rows that have failed: of those asked for, or with `at_most` of those that this worker ran.
        """

        def run(claim: Claim) -> None:
            self.write_states()
            try:
                self.run_row(claim)
            finally:
                self.write_states()
            publish()

        self.write_states()
        asked = [row.name for row in self.rows]
        ran = take_trials(self.queue, self.stop, run, asked, at_most)
        failed = {trial.run for trial in self.queue.trials() if trial.state == "failed"}
        return [name for name in (asked if at_most is None else ran) if name in failed]

    def run_row(self, claim: Claim) -> None:
        """Run the commands of a row and record how they ended."""
        print_line(f"{claim.run} started -> {self.folder.log(claim.run)}")
        started = time.monotonic()
        try:
            outcome = self._run_steps(claim)
        except BaseException:  # asked to end, or its folder cannot be written: another worker may do better
            self.queue.release(claim, failed=False)
            raise
        if not self.queue.owns(claim):
            print_line(f"{claim.run} sent no heartbeat for too long and was taken over by another worker")
        elif outcome.kind == "done":
            seconds = round(time.monotonic() - started, 1)
            self.queue.succeed(claim, 0.0, {"seconds": seconds})
            print_line(f"{claim.run} done in {seconds:.0f} s")
        else:
            record_failure(self.queue, claim, outcome)

    def _run_steps(self, claim: Claim) -> Outcome:
        heartbeat = Heartbeat(self.folder.heartbeat(claim.run), claim.token, seconds_between_heartbeats(STALE_SECONDS))
        with hold_lock(heartbeat.path, self.stop.check) as lock:
            row = ROWS[claim.run]
            for step in row.steps:
                for command in self._commands(row, step):
                    outcome = self.launcher.run(command, heartbeat, lock, self.folder.log(claim.run), self.stop.check)
                    if outcome.kind != "done":
                        return outcome
        return Outcome("done")

    def _commands(self, row: Row, step: Step) -> list[list[str]]:
        """The commands that a step still needs."""
        run, launched = RunFolder(self._run_of(row, step)), self.launcher.local_command
        data: list[object] = ["--data", self.data]
        if step.script == "sweep.py":  # it goes on by itself, and launches its trials itself
            words = [*data, "--out", run.path, "--processes", self.launcher.processes]
            words += ["--retry-failed"] if self.retries_failed else []
            return [[sys.executable, *map(str, [COMMANDS / "sweep.py", self._search_file(row, step), *words])]]
        if (run.evaluation(REPORTED_SPLIT) / METRICS_FILE).is_file():
            return []
        words = [*data, "--out", run.path, *resuming(run), *as_flags(self._changed(row, step))]
        commands = [launched(step.script, step.path, *words)]
        if step.script == "finetune.py":  # a probe scores its layers itself
            commands.append(launched("evaluate.py", run.path, *data, "--split", REPORTED_SPLIT))
        return commands

    def _run_of(self, row: Row, step: Step) -> Path:
        return self.folder.run_of(row, step, self.facts)

    def _changed(self, row: Row, step: Step) -> dict[str, Any]:
        """The settings in which a step differs from its recipe."""
        facts = self.facts
        settings = step.changed(facts.small, facts.random_weights, facts.selects_on, self.training_stimuli)
        if step.reads_network:
            settings["backbone.weights"] = str(self._run_of(row, row.steps[0]))
        return settings

    def _search_file(self, row: Row, step: Step) -> Path:
        """The search of a step as a file of its own, with what this study changes."""
        search = load_recipe(step.path, SweepSettings)
        content = search.model_dump(exclude_unset=True)
        content["recipe"] = str((step.path.parent / search.recipe).resolve())
        content["set"] = search.set | self._changed(row, step)
        if self.facts.small:
            content["grid"] = SMALL_GRID
        path = self.folder.trials / f"{step.run}.sweep.yaml"
        write_bytes(path, yaml.safe_dump(content, sort_keys=False).encode())
        return path

    def write_states(self) -> None:
        """Write how far each row is."""
        with locks.exclusive(self.folder.results_lock):
            before = self.folder.read_states()  # of workers that were asked for other rows
            states = {name: state for name, state in before.items() if state.state == "left out"}
            states |= {trial.run: RowState(trial.state, trial.reason) for trial in self.queue.trials()}
            states |= {name: RowState("left out", reason) for name, reason in self.left_out.items()}
            self.folder.write_states({name: states[name] for name in ROWS if name in states})


def as_flags(settings: dict[str, Any]) -> list[str]:
    """Settings as words of a command line."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def open_study(options: StudyOptions, stop: StopRequest) -> StudyWorker:
    """Check what a study needs, and begin or join it.

    Raises:
        BadInput: something cannot be used; nothing has been written then.
    """
    manifest, folder = open_files(options.data).manifest(), StudyFolder(options.out)
    _check_scored(manifest)
    launcher = Launcher(options.processes)
    folder.check(manifest, options.small, options.selects_on)
    left_out = _left_out(options.rows, manifest)
    rows = [row for row in options.rows if row.name not in left_out]
    random_weights = _random_weights(rows, folder, options.small)
    queue = open_queue(
        folder,
        QueueContents.of_rows(list(ROWS), STALE_SECONDS),
        [row.name for row in rows],
        check=lambda: folder.check(manifest, options.small, options.selects_on),
        begin=lambda name: folder.begin(name, manifest, options.small, options.selects_on, random_weights),
        again=options.retries_failed,
    )
    folder.trials.mkdir(exist_ok=True)
    data, stimuli = move_secrets_to_environment(options.data), manifest.splits["train"].stimuli
    return StudyWorker(
        data=data,
        training_stimuli=stimuli,
        rows=rows,
        folder=folder,
        facts=folder.known(),
        queue=queue,
        left_out=left_out,
        launcher=launcher,
        stop=stop,
        retries_failed=options.retries_failed,
    )


def _check_scored(manifest: Manifest) -> None:
    scored = manifest.splits.get(REPORTED_SPLIT)
    if scored is None or not scored.responses:
        raise BadInput(
            f"data: {manifest.name} has no responses in its {REPORTED_SPLIT} split, on which the study scores models"
        )


def _left_out(rows: Sequence[Row], manifest: Manifest) -> dict[str, str]:
    """Why rows cannot be run on a recording, by name."""
    if manifest.classes is not None:
        return {}
    reason = "it learns to name objects, and the recording names none (add a column `object` and pack it again)"
    return {row.name: reason for row in rows if row.needs_classes}


def _random_weights(rows: Sequence[Row], folder: StudyFolder, small: bool) -> list[str]:
    """The networks that have to begin with random weights.

    Raises:
        BadInput: weights cannot be had, and the study runs at its full size.
    """
    if small and folder.study.is_file():
        return folder.known().random_weights
    done = {name for name, state in folder.read_states().items() if state.state == "done"}
    networks = dict.fromkeys(name for row in rows if row.name not in done for name in row.networks)
    if small:
        networks = dict.fromkeys(name for row in ROWS.values() for name in row.networks)
    with ThreadPoolExecutor() as pool:  # each may wait some seconds for a hub that cannot be reached
        reasons = zip(networks, pool.map(missing_weights, networks), strict=True)
        missing = {name: reason for name, reason in reasons if reason is not None}
    if missing and not small:
        raise BadInput(
            f"the study needs pretrained weights that cannot be had ({', '.join(missing)}); --small begins with random "
            f"weights instead. Of the first: {next(iter(missing.values()))}"
        )
    return list(missing)
