"""Trials as a queue that workers on several machines share. The only file that knows Optuna.

Every trial waits in an Optuna study; those of a sampled search get their settings when a worker claims them. A trial
that is run again is a new Optuna trial with the same run folder, of which the last one counts.
"""

import os
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import OptunaError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from data_prep.common import locks
from data_prep.common.errors import BadInput
from data_prep.shards.manifest import Manifest
from train.evaluation.metrics import LOWER_IS_BETTER
from train.sweeping.plan import Plan, as_choice
from train.sweeping.queue_folder import QueueFolder
from train.sweeping.supervised_process import seconds_since
from train.sweeping.sweep_folder import SweepFolder
from train.sweeping.sweep_settings import Range

SECONDS_FOR_SQLITE_LOCK = 60
State = Literal["waiting", "running", "done", "failed"]
STATES: dict[TrialState, State] = {
    TrialState.WAITING: "waiting",
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "done",
    TrialState.PRUNED: "failed",
    TrialState.FAIL: "failed",
}


@dataclass(frozen=True)
class QueueContents:
    """What a queue holds.

    Attributes:
        runs: the names of all trials that it may hold, in order.
        stale_seconds: without a heartbeat, after which another worker takes over a trial.
        points: the settings of each; None where they are sampled when a trial is claimed.
        keys: the settings that vary, in the order in which they are sampled.
        choices, ranges: of these settings.
        lower_is_better: the direction of the value that a trial ends with.
        seed: of the sampler.
        storage: database of the queue; by default a journal in its folder.
    """

    runs: list[str]
    stale_seconds: float
    points: Mapping[str, dict[str, Any]] | None = None
    keys: Collection[str] = ()
    choices: Mapping[str, list[Any]] = field(default_factory=dict)
    ranges: Mapping[str, Range] = field(default_factory=dict)
    lower_is_better: bool = False
    seed: int = 0
    storage: str | None = None

    @classmethod
    def of_search(cls, plan: Plan) -> "QueueContents":
        """The trials of a search."""
        return cls(
            runs=plan.runs,
            stale_seconds=plan.sweep.stale_seconds,
            points=None if plan.points is None else dict(zip(plan.runs, plan.points, strict=True)),
            keys=plan.keys,
            choices=plan.choices,
            ranges=plan.ranges,
            lower_is_better=plan.metric in LOWER_IS_BETTER,
            seed=plan.sweep.seed,
            storage=plan.sweep.storage,
        )

    @classmethod
    def of_rows(cls, names: list[str], stale_seconds: float) -> "QueueContents":
        """Trials that have a name and no settings."""
        return cls(names, stale_seconds, points={name: {} for name in names})

    def fixed_settings(self, run: str) -> dict[str, Any]:
        """The settings of a run that are known before it is claimed: all of a grid's, none of a space's."""
        return {} if self.points is None else {key: as_choice(value) for key, value in self.points[run].items()}

    def settings(self, run: str, params: dict[str, Any]) -> dict[str, Any]:
        """The settings of a run from those that Optuna has kept."""
        if self.points is not None:
            return self.points[run]
        originals = {key: {as_choice(value): value for value in values} for key, values in self.choices.items()}
        return {key: originals[key][value] if key in originals else value for key, value in params.items()}

    def distributions(self) -> dict[str, BaseDistribution]:
        """The settings that vary, as Optuna's distributions."""
        choices = {key: CategoricalDistribution(list(map(as_choice, values))) for key, values in self.choices.items()}
        intervals = {key: _interval(interval) for key, interval in self.ranges.items()}
        return {key: choices[key] if key in choices else intervals[key] for key in self.keys}


@dataclass(frozen=True)
class TrialStatus:
    """A trial as it stands.

    Attributes:
        run: name of its run.
        settings: named with dots; empty for a trial that has not been sampled yet.
        state: waiting, running, done or failed.
        value: best value of the selection metric, where it is done.
        facts: best_epoch, epochs and seconds of a run that is done.
        reason: why it failed.
    """

    run: str
    settings: dict[str, Any]
    state: State
    value: float | None = None
    facts: dict[str, float] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class Claim:
    """A trial that this worker has claimed.

    Attributes:
        run, settings: as in `TrialStatus`.
        failures: how often it has failed before, other than by its worker's death.
        token: of this attempt; the run's heartbeat file holds it.
        trial: Optuna's.
    """

    run: str
    settings: dict[str, Any]
    failures: int
    token: str
    trial: optuna.Trial


class Queue:
    """The trials that wait, run, and have ended.

    Args:
        folder: of the queue.
        contents: what it holds.
        study: Optuna's.
    """

    def __init__(self, folder: QueueFolder, contents: QueueContents, study: optuna.Study):
        self._folder, self._contents, self._study = folder, contents, study
        self._distributions = contents.distributions()
        self.stale_seconds = contents.stale_seconds

    def claim(self, runs: Collection[str] | None = None) -> Claim | None:
        """Claim the next waiting trial, after queueing those again whose workers are gone; None where none waits.

        Args:
            runs: to choose from; by default all.
        """
        with locks.exclusive(self._folder.lock):
            self._requeue_stale()
            trials = self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
            waiting = [trial.user_attrs["run"] for trial in trials]
            position = next((number for number, run in enumerate(waiting) if runs is None or run in runs), None)
            if position is None:
                return None
            self._folder.trials.mkdir(exist_ok=True)
            for _ in range(position):  # Optuna gives the first that waits: those before move to the end
                passed = self._study.ask(self._distributions)
                self._requeue(passed, passed.user_attrs["failures"])
            self._study.sampler = self._sampler(waiting[position])
            trial = self._study.ask(self._distributions)
            run = trial.user_attrs["run"]
            claim = Claim(
                run=run,
                settings=self._contents.settings(run, trial.params),
                failures=trial.user_attrs["failures"],
                token=f"{trial.number} {uuid.uuid4().hex}",
                trial=trial,
            )
            self._folder.heartbeat(run).write_text(claim.token)
            return claim

    def _sampler(self, run: str) -> optuna.samplers.BaseSampler:
        """A sampler for each trial: workers with the same seed would all sample the same settings."""
        number = self._contents.runs.index(run)
        seed = int(np.random.SeedSequence([self._contents.seed, number]).generate_state(1)[0])
        return optuna.samplers.TPESampler(seed=seed)

    def _requeue_stale(self) -> None:
        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        silence = seconds_since([self._folder.heartbeat(trial.user_attrs["run"]) for trial in running])
        for trial, seconds in zip(running, silence, strict=True):
            if seconds > self.stale_seconds:
                self._requeue(trial, trial.user_attrs["failures"])

    def _requeue(self, trial: FrozenTrial | optuna.Trial, failures: int) -> None:
        """End an attempt and queue its trial again; queued first, so that a crash in between loses nothing.

        Its heartbeat file is emptied, not removed: a worker that still runs it notices, and holds a lock on that file.
        """
        run = trial.user_attrs["run"]
        self._folder.heartbeat(run).write_text("")
        if self._latest()[run].number == trial.number:
            params = self._contents.fixed_settings(run) or trial.params
            self._study.enqueue_trial(params, user_attrs={"run": run, "failures": failures})
        self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def owns(self, claim: Claim) -> bool:
        """Whether the trial still belongs to this worker: one that seemed dead for too long has lost it."""
        try:
            return self._folder.heartbeat(claim.run).read_text() == claim.token
        except FileNotFoundError:
            return False

    def release(self, claim: Claim, failed: bool) -> None:
        """Queue a trial again, counting a failure, or none where it was only interrupted."""
        with locks.exclusive(self._folder.lock):
            if self.owns(claim):
                self._requeue(claim.trial, claim.failures + failed)

    def succeed(self, claim: Claim, value: float, facts: dict[str, float]) -> None:
        """Record a run that is done."""
        self._end(claim, {"facts": facts}, TrialState.COMPLETE, value)

    def fail(self, claim: Claim, reason: str, diverged: bool) -> None:
        """Record a run that failed for good; one that diverged is pruned in Optuna, whose sampler learns from that."""
        self._end(claim, {"reason": reason}, TrialState.PRUNED if diverged else TrialState.FAIL)

    def _end(self, claim: Claim, attributes: dict[str, Any], state: TrialState, value: float | None = None) -> None:
        with locks.exclusive(self._folder.lock):
            if self.owns(claim):
                for name, content in attributes.items():
                    claim.trial.set_user_attr(name, content)
                self._study.tell(claim.trial, value, state)
                self._folder.heartbeat(claim.run).unlink()

    def add(self, runs: Collection[str], again: bool) -> None:
        """Queue trials that the queue does not hold yet; the caller holds the folder's lock.

        Args:
            runs: their names.
            again: queue those again, too, that have failed.
        """
        latest = self._latest()
        for run in runs:
            has_failed = run in latest and STATES[latest[run].state] == "failed"
            if run not in latest or (again and has_failed):
                params = self._contents.fixed_settings(run)
                self._study.enqueue_trial(params, user_attrs={"run": run, "failures": 0})

    def settled(self, runs: Collection[str] | None = None) -> bool:
        """Whether no trial, or none of these, waits or runs."""
        return all(trial.state.is_finished() for run, trial in self._latest().items() if runs is None or run in runs)

    def trials(self) -> list[TrialStatus]:
        """All trials as they stand, by name."""
        return [self._status(trial) for _, trial in sorted(self._latest().items())]

    def _latest(self) -> dict[str, FrozenTrial]:
        return {trial.user_attrs["run"]: trial for trial in self._study.get_trials(deepcopy=False)}

    def _status(self, trial: FrozenTrial) -> TrialStatus:
        run = trial.user_attrs["run"]
        return TrialStatus(
            run=run,
            settings=self._contents.settings(run, trial.params),
            state=STATES[trial.state],
            value=trial.value if trial.state == TrialState.COMPLETE else None,
            facts=trial.user_attrs.get("facts", {}),
            reason=trial.user_attrs.get("reason", ""),
        )


def open_study(folder: SweepFolder, plan: Plan, manifest: Manifest, again: bool = False) -> Queue:
    """Begin a search in a folder, or join the one that is in progress; its trials are queued once.

    Args:
        folder: of the search.
        plan: what is searched.
        manifest: of the data.
        again: queue those again that have failed.

    Raises:
        BadInput: the folder holds something else, or the storage cannot be used.
    """
    return open_queue(
        folder,
        QueueContents.of_search(plan),
        plan.runs,
        check=lambda: folder.check(plan, manifest),
        begin=lambda name: folder.begin(plan, manifest, name),
        again=again,
    )


def open_queue(
    folder: QueueFolder,
    contents: QueueContents,
    runs: Collection[str],
    check: Callable[[], None],
    begin: Callable[[str], None],
    again: bool = False,
) -> Queue:
    """Begin a queue in a folder, or join the one that is there.

    Args:
        folder: of the queue.
        contents: what it may hold.
        runs: the trials to queue, unless they have been before.
        check: refuses a folder that holds something else.
        begin: writes what the queue is for and, last, study.json with the name of Optuna's study.
        again: queue those again that have failed.

    Raises:
        BadInput: from `check`, or the storage cannot be used.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    check()
    is_new = not folder.path.exists()
    folder.path.mkdir(parents=True, exist_ok=True)
    with locks.exclusive(folder.lock):
        check()  # again: another worker may have begun in the meantime
        joined = folder.study.is_file()
        try:
            storage = _storage(folder, contents.storage)
        except BadInput:
            if is_new and not joined:
                folder.lock.unlink()
                folder.path.rmdir()
            raise
        study = _join(folder, storage) if joined else _begin(folder, contents, storage, begin)
        queue = Queue(folder, contents, study)
        queue.add(runs, again)  # also after a worker that was killed right here
        return queue


class _Journal(JournalFileBackend):
    """Optuna's journal, in which a full disk leaves no half line: it would make all others unreadable.

    All writers hold the folder's lock.
    """

    def __init__(self, path: Path):
        super().__init__(str(path))
        self._path = path

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        before = self._path.stat().st_size
        try:
            super().append_logs(logs)
        except OSError:
            os.truncate(self._path, before)
            raise


def _storage(folder: QueueFolder, url: str | None) -> BaseStorage:
    if url is None:
        # Absolute, because its lock is a link to it: a dangling one of a killed worker would be waited for forever.
        return JournalStorage(_Journal(folder.journal.resolve()))
    waits = {"connect_args": {"timeout": SECONDS_FOR_SQLITE_LOCK}} if url.startswith("sqlite") else {}
    try:
        return RDBStorage(url, engine_kwargs=waits)
    except (ImportError, SQLAlchemyError, OptunaError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadInput(f"storage: {url.partition('@')[2] or url} cannot be used ({reason})") from None


def _begin(
    folder: QueueFolder, contents: QueueContents, storage: BaseStorage, begin: Callable[[str], None]
) -> optuna.Study:
    name = f"{folder.path.resolve().name}-{uuid.uuid4().hex[:8]}"  # a database may hold many
    direction = StudyDirection.MINIMIZE if contents.lower_is_better else StudyDirection.MAXIMIZE
    study = optuna.create_study(storage=storage, study_name=name, direction=direction)
    begin(name)
    return study


def _join(folder: QueueFolder, storage: BaseStorage) -> optuna.Study:
    name = folder.facts()["study"]
    try:
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        raise BadInput(
            f"{folder.path} belongs to study {name}, which is not in the storage; give the storage it was started with"
        ) from None


def _interval(interval: Range) -> BaseDistribution:
    low, high, step = interval.low, interval.high, interval.step
    if isinstance(low, int):
        return IntDistribution(low, int(high), log=interval.log, step=int(step or 1))
    return FloatDistribution(low, high, log=interval.log, step=step)
