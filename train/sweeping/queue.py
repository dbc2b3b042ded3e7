"""The points of a search as a queue that many workers on many machines share: the only file that knows Optuna.

Every point is an Optuna trial that waits in the study, also for a sampled search, whose points get their values when
they are taken. A point that is tried again is a new Optuna trial with the same run folder: the last one counts.
"""

import uuid
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import OptunaError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from data_prep.common import locks
from data_prep.common.errors import BadInput
from data_prep.shards.manifest import Manifest
from train.evaluation.metrics import LOWER_IS_BETTER
from train.sweeping.search import Plan, Range, SweepFolder, as_choice
from train.sweeping.supervised_process import seconds_since

SECONDS_FOR_SQLITE_LOCK = 60
STATES: dict[TrialState, Literal["waiting", "running", "done", "failed"]] = {
    TrialState.WAITING: "waiting",
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "done",
    TrialState.PRUNED: "failed",
    TrialState.FAIL: "failed",
}


@dataclass(frozen=True)
class Entry:
    """A point of the search as it stands.

    Attributes:
        run: name of its run.
        settings: by dotted key; empty for a point that has not been sampled yet.
        state: waiting, running, done or failed.
        value: best value of the selection metric, where it is done.
        facts: what else is known of a run that is done: best_epoch, epochs, seconds.
        reason: why it failed.
    """

    run: str
    settings: dict[str, Any]
    state: Literal["waiting", "running", "done", "failed"]
    value: float | None = None
    facts: dict[str, float] | None = None
    reason: str = ""


@dataclass(frozen=True)
class Claim:
    """A point that this worker has taken.

    Attributes:
        run, settings: as in `Entry`.
        failures: how often it has failed already, other than by its worker's death.
        token: of this attempt; the run's beat file holds it.
        trial: Optuna's.
    """

    run: str
    settings: dict[str, Any]
    failures: int
    token: str
    trial: optuna.Trial


class Study:
    """The queue of a search's points.

    Args:
        folder: of the sweep.
        plan: what is searched.
        study: Optuna's.
    """

    def __init__(self, folder: SweepFolder, plan: Plan, study: optuna.Study):
        self._folder, self._plan, self._study = folder, plan, study
        self._distributions = distributions(plan)

    def claim(self) -> Claim | None:
        """Take the next point that waits, after putting back those whose workers are gone; None where none waits."""
        with locks.exclusive(self._folder.lock):
            self._put_back_stale()
            waiting = self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
            if not waiting:
                return None
            self._study.sampler = self._sampler(waiting[0].user_attrs["run"])
            trial = self._study.ask(self._distributions)
            run = trial.user_attrs["run"]
            claim = Claim(
                run=run,
                settings=self._settings(run, trial.params),
                failures=trial.user_attrs["failures"],
                token=f"{trial.number} {uuid.uuid4().hex}",
                trial=trial,
            )
            self._folder.trials.mkdir(exist_ok=True)
            self._folder.beat(run).write_text(claim.token)
            return claim

    def _sampler(self, run: str) -> optuna.samplers.BaseSampler:
        """A sampler of its own for each point: workers with one seed would all sample the same."""
        seed = int(np.random.SeedSequence([self._plan.sweep.seed, int(run)]).generate_state(1)[0])
        return optuna.samplers.TPESampler(seed=seed)

    def _put_back_stale(self) -> None:
        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        silence = seconds_since([self._folder.beat(trial.user_attrs["run"]) for trial in running])
        for trial, seconds in zip(running, silence, strict=True):
            if seconds > self._plan.sweep.stale_seconds:
                self._put_back(trial, trial.user_attrs["failures"])

    def _put_back(self, trial: FrozenTrial | optuna.Trial, failures: int) -> None:
        """End an attempt and queue its point again; queued first, so that a crash in between loses nothing.

        Its beat file is emptied, not removed: whoever still runs it sees that, and holds a lock on that very file.
        """
        run = trial.user_attrs["run"]
        self._folder.beat(run).write_text("")
        if self._latest()[run].number == trial.number:
            params = fixed_settings(self._plan, run) or trial.params
            self._study.enqueue_trial(params, user_attrs={"run": run, "failures": failures})
        self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def holds(self, claim: Claim) -> bool:
        """Whether the point is still this worker's: one that seemed dead for too long has lost it."""
        try:
            return self._folder.beat(claim.run).read_text() == claim.token
        except FileNotFoundError:
            return False

    def give_back(self, claim: Claim, failed: bool) -> None:
        """Queue a point again, as one that failed once more or as one that was only interrupted."""
        with locks.exclusive(self._folder.lock):
            if self.holds(claim):
                self._put_back(claim.trial, claim.failures + failed)

    def succeed(self, claim: Claim, value: float, facts: dict[str, float]) -> None:
        """Record a run that is done."""
        self._end(claim, {"facts": facts}, TrialState.COMPLETE, value)

    def fail(self, claim: Claim, reason: str, diverged: bool) -> None:
        """Record a run that failed for good. Optuna calls one that diverged pruned: its sampler learns from that."""
        self._end(claim, {"reason": reason}, TrialState.PRUNED if diverged else TrialState.FAIL)

    def _end(self, claim: Claim, attributes: dict[str, Any], state: TrialState, value: float | None = None) -> None:
        with locks.exclusive(self._folder.lock):
            if self.holds(claim):
                for name, content in attributes.items():
                    claim.trial.set_user_attr(name, content)
                self._study.tell(claim.trial, value, state)
                self._folder.beat(claim.run).unlink()

    def settled(self) -> bool:
        """Whether no point waits or runs."""
        return all(trial.state.is_finished() for trial in self._latest().values())

    def entries(self) -> list[Entry]:
        """All points as they stand, by name."""
        return [self._entry(trial) for _, trial in sorted(self._latest().items())]

    def _latest(self) -> dict[str, FrozenTrial]:
        return {trial.user_attrs["run"]: trial for trial in self._study.get_trials(deepcopy=False)}

    def _entry(self, trial: FrozenTrial) -> Entry:
        run = trial.user_attrs["run"]
        return Entry(
            run=run,
            settings=self._settings(run, trial.params),
            state=STATES[trial.state],
            value=trial.value if trial.state == TrialState.COMPLETE else None,
            facts=trial.user_attrs.get("facts"),
            reason=trial.user_attrs.get("reason", ""),
        )

    def _settings(self, run: str, params: dict[str, Any]) -> dict[str, Any]:
        if self._plan.points is not None:
            return self._plan.points[int(run)]
        named = {key: {as_choice(value): value for value in values} for key, values in self._plan.choices.items()}
        return {key: named[key][value] if key in named else value for key, value in params.items()}


def open_study(folder: SweepFolder, plan: Plan, manifest: Manifest) -> Study:
    """Begin a search in a folder, or join the one that is there; its points are queued once.

    Raises:
        BadInput: the folder holds something else, or the storage cannot be used.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.check(plan, manifest)
    made = not folder.path.exists()
    folder.path.mkdir(parents=True, exist_ok=True)
    with locks.exclusive(folder.lock):
        folder.check(plan, manifest)  # again: another worker may have begun in the meantime
        joined = folder.study.is_file()
        try:
            storage = _storage(folder, plan.sweep.storage)
        except BadInput:
            if made and not joined:
                folder.lock.unlink()
                folder.path.rmdir()
            raise
        return Study(folder, plan, (_join if joined else _begin)(folder, plan, manifest, storage))


def _storage(folder: SweepFolder, url: str | None) -> BaseStorage:
    if url is None:
        # Absolute, because its lock is a link to it: a killed worker's would dangle, and be waited for without end.
        return JournalStorage(JournalFileBackend(str(folder.journal.resolve())))
    waits = {"connect_args": {"timeout": SECONDS_FOR_SQLITE_LOCK}} if url.startswith("sqlite") else {}
    try:
        return RDBStorage(url, engine_kwargs=waits)
    except (ImportError, SQLAlchemyError, OptunaError, RuntimeError) as error:
        said = str(error).strip().splitlines()[0]
        raise BadInput(f"storage: {url.partition('@')[2] or url} cannot be used ({said})") from None


def _begin(folder: SweepFolder, plan: Plan, manifest: Manifest, storage: BaseStorage) -> optuna.Study:
    name = f"{folder.path.resolve().name}-{uuid.uuid4().hex[:8]}"  # a database may hold many sweeps
    lower = plan.metric in LOWER_IS_BETTER
    study = optuna.create_study(storage=storage, study_name=name, direction="minimize" if lower else "maximize")
    for run in plan.runs:
        study.enqueue_trial(fixed_settings(plan, run), user_attrs={"run": run, "failures": 0})
    folder.begin(plan, manifest, name)
    return study


def _join(folder: SweepFolder, plan: Plan, manifest: Manifest, storage: BaseStorage) -> optuna.Study:
    name = folder.facts()["study"]
    try:
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        raise BadInput(
            f"{folder.path} belongs to study {name}, which is not in the storage; name the one it began with"
        ) from None


def fixed_settings(plan: Plan, run: str) -> dict[str, Any]:
    """What is known of a run's settings before it is taken: all of a grid's, none of those that are sampled."""
    return {} if plan.points is None else {key: as_choice(value) for key, value in plan.points[int(run)].items()}


def distributions(plan: Plan) -> dict[str, BaseDistribution]:
    """The settings that vary, as Optuna's distributions."""
    found: dict[str, BaseDistribution] = {}
    for key in plan.keys:
        choices = plan.choices.get(key)
        found[key] = (
            _interval(plan.ranges[key]) if choices is None else CategoricalDistribution([*map(as_choice, choices)])
        )
    return found


def _interval(given: Range) -> BaseDistribution:
    if isinstance(given.low, int):
        return IntDistribution(given.low, given.high, log=given.log, step=given.step or 1)
    return FloatDistribution(given.low, given.high, log=given.log, step=given.step)
