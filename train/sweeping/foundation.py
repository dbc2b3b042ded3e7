"""Probes several recordings, makes a population of their sites, and reads new recordings with it.

RUNS/foundation.json              of which recordings, by which recipe
RUNS/sites/NAME/  NAME.log        a probe of each recording, and its output
RUNS/population/                  what their sites read (train/models/population.py)
RUNS/new/NAME/  NAME.log          a probe of each new recording, with the population
RUNS/alone/NAME/  NAME.log        the same without it, to compare
RUNS/table.md                     scores of the new recordings
"""

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from data_prep.common.atomic_writes import write_bytes, write_json
from data_prep.common.errors import BadInput, RunFailed
from data_prep.common.markdown import markdown_table
from data_prep.common.safe_reading import parse_json, read_regular_file
from data_prep.shards.folder import ShardFolder
from train.evaluation.predictions_file import METRICS_FILE
from train.evaluation.seen_stimuli import mark_of, seen_in
from train.models.population import POPULATION_FILE
from train.probing.population_making import make_population
from train.run.folder import RunFolder, check_writable
from train.run.recipe import ProbeRecipe, load_recipe
from train.sweeping.queue_worker import print_line
from train.sweeping.study.worker import LAUNCHER
from train.sweeping.trial import COMMANDS, Launcher, outcome

FACTS_FILE, TABLE = "foundation.json", "table.md"
Kind = Literal["sites", "new", "alone"]


class FoundationFacts(BaseModel):
    """What a folder was made of; the content of foundation.json.

    Attributes:
        recordings: fingerprint of each, by name.
        recipe: settings of the probes.
    """

    model_config = ConfigDict(extra="forbid")

    recordings: dict[str, str]
    recipe: dict[str, Any]


@dataclass(frozen=True)
class FoundationOptions:
    """What is to be done.

    Attributes:
        data: shard folders of the recordings whose sites are a population, or their URLs.
        new: those of the recordings that are read with it.
        out: folder.
        recipe: of the probes.
        split: that is scored.
        compare: whether new recordings are also read without the population.
        licence: of the recordings, for the population's card.
        processes: per probe; by default one per GPU, or one.
    """

    data: Sequence[str]
    new: Sequence[str]
    out: Path
    recipe: Path
    split: str
    compare: bool
    licence: str | None
    processes: int | None


class Foundation:
    """The work on a folder, which goes on where it was stopped.

    Args:
        options: what is to be done.

    Raises:
        BadInput: a recording cannot be read, two have the same name, or the folder is that of others.
    """

    def __init__(self, options: FoundationOptions):
        self._options, self._launcher = options, Launcher(options.processes)
        self._data, self._new = _by_name(options.data, options.new)
        recipe = load_recipe(options.recipe, ProbeRecipe)
        if recipe.population is not None:
            raise BadInput(f"{options.recipe}: this command sets population itself; leave it out")
        recordings = {name: ShardFolder(location).manifest.fingerprint for name, location in self._data.items()}
        for location in self._new.values():
            ShardFolder(location)
        self._begin(FoundationFacts(recordings=recordings, recipe=recipe.model_dump(mode="json")))

    def run(self) -> str:
        """Do what is missing; returns the table of the new recordings, in Markdown."""
        for name, location in self._data.items():
            self._probe("sites", name, location)
        population = self._options.out / "population"
        if not (population / POPULATION_FILE).is_file():
            facts = make_population(
                [self._folder("sites", name) for name in self._data], population, self._options.licence
            )
            print_line(f"population of {facts.sites:,} sites -> {population}")
        for name, location in self._new.items():
            if self._options.compare:
                self._probe("alone", name, location)
            self._probe("new", name, location, "--population", population)
        if not self._new:
            return f"{population} is made; read a new recording with train/probe.py ... --population {population}"
        table = self._table()
        write_bytes(self._options.out / TABLE, table.encode())
        return table

    def _begin(self, facts: FoundationFacts) -> None:
        out, path = self._options.out, self._options.out / FACTS_FILE
        if path.is_file():
            try:
                known = FoundationFacts.model_validate(parse_json(read_regular_file(path)))
            except (OSError, ValueError, ValidationError):
                raise BadInput(f"{path} is damaged; choose another --out") from None
            if known.recordings != facts.recordings:
                raise BadInput(
                    f"{out} was begun on other recordings ({', '.join(known.recordings)}); choose another --out"
                )
            if known.recipe != facts.recipe:
                raise BadInput(f"{out} was begun with another recipe; choose another --out")
            return
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise BadInput(f"{out} exists and is not an empty folder; choose another --out")
        check_writable(out)
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, facts.model_dump())

    def _folder(self, kind: Kind, name: str) -> Path:
        return self._options.out / kind / name

    def _metrics(self, kind: Kind, name: str) -> Path:
        return RunFolder(self._folder(kind, name)).evaluation(self._options.split) / METRICS_FILE

    def _probe(self, kind: Kind, name: str, location: str, *words: object) -> None:
        """Probe a recording, unless that is done.

        Raises:
            BadInput, RunFailed: the probe ended with an error.
        """
        folder = self._folder(kind, name)
        if self._metrics(kind, name).is_file():
            return
        resume = ["--resume"] if RunFolder(folder).recipe.is_file() else []
        if not resume:  # an attempt was killed before the probe had claimed its folder
            shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(exist_ok=True)
        options = self._options
        words = (options.recipe, "--data", location, "--out", folder, "--split", options.split, *words, *resume)
        log = folder.with_name(f"{name}.log")
        print_line(f"probing {name} -> {log}")
        code, printed = self._run(words, log)
        ended = outcome(code, printed, log)
        if ended.kind == "done":
            return
        if ended.kind == "bad input":
            raise BadInput(ended.reason)
        raise RunFailed(f"the probe of {name} ended: {ended.reason}; run the same command again to go on")

    def _run(self, words: Sequence[object], log: Path) -> tuple[int, str]:
        """Run train/probe.py; returns its exit code and what it printed."""
        processes = self._launcher.processes
        launch: list[object] = [LAUNCHER, "local", "-n", processes] if processes > 1 else []
        command = [sys.executable, *map(str, [*launch, COMMANDS / "probe.py", *words])]
        start = log.stat().st_size if log.exists() else 0
        code = run_logged(command, log, self._launcher.environment())
        return code, read_regular_file(log)[start:].decode(errors="replace")

    def _table(self) -> str:
        kinds: list[Kind] = ["alone", "new"] if self._options.compare else ["new"]
        titles = {"alone": "without", "new": "with the population"}
        header = ["recording", "sites", "fitted on", *(f"R2 {titles[kind]}" for kind in kinds)]
        header += [*(f"median r² {titles[kind]}" for kind in kinds), "seen"]
        rows = []
        for name in self._new:
            found = {kind: _read_metrics(self._metrics(kind, name)) for kind in kinds}
            metrics = found["new"]
            cells = [name, str(len(metrics["regression"]["r2"]["per_site"])), f"{metrics['training_stimuli']:,}"]
            cells += [_number(found[kind]["regression"]["r2"]["mean"]) for kind in kinds]
            cells += [_number(found[kind]["regression"]["squared_pearson_r"]["median"]) for kind in kinds]
            rows.append([*cells, mark_of(seen_in(metrics))])
        return markdown_table(header, rows) + "\n"


def run_logged(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
    """Run a command whose output is added to a file; returns its exit code."""
    with log.open("ab") as file:
        return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode


def _by_name(data: Sequence[str], new: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Recordings by the names of their folders."""
    known: dict[str, str] = {}
    for location in (*data, *new):
        name = Path(location.rstrip("/")).name
        if name in known:
            raise BadInput(f"{known[name]} and {location} have the same name, {name}; rename one of the folders")
        known[name] = location
    named = list(known.items())
    return dict(named[: len(data)]), dict(named[len(data) :])


def _read_metrics(path: Path) -> Mapping[str, Any]:
    try:
        metrics: Mapping[str, Any] = parse_json(read_regular_file(path))
    except (OSError, ValueError):
        raise BadInput(f"{path} is damaged; remove its folder and run the same command again") from None
    return metrics


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
