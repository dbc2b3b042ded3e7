"""Probes several recordings, makes a population of their sites, and reads new recordings with it.

RUNS/foundation.json              of which recordings, by which recipe
RUNS/sites/NAME/                  a probe of each recording
RUNS/others/NAME/                 with two rounds: the population of all the other recordings
RUNS/again/NAME/                  and a probe of each recording together with that
RUNS/population/                  what the sites read in the last round (train/models/population.py)
RUNS/new/NAME/                    a probe of each new recording, with the population
RUNS/alone/NAME/                  the same without it, to compare
RUNS/table.md                     scores of the new recordings
RUNS/foundation.beat              touched while a command runs, see train/sweeping/supervised_process.py

Of several networks each has a folder RUNS/NETWORK/ of these, and the probes of a new recording are stacked in
RUNS/new/NAME/ and RUNS/alone/NAME/. What a command printed is in NAME.log, beside its folder.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_prep.common.atomic_writes import write_bytes, write_json
from data_prep.common.errors import BadInput
from data_prep.common.markdown import markdown_table
from data_prep.common.safe_reading import parse_json, read_regular_file
from data_prep.remote.url import move_secrets_to_environment, parse_location
from data_prep.shards.folder import ShardFolder
from data_prep.shards.image_identity import ImageIdentities
from train.data.seen import images_of_split, is_among, joined
from train.evaluation.metrics_file import metrics_content
from train.evaluation.seen_stimuli import mark_of, seen_in
from train.run.folder import check_writable
from train.run.layer_names import JOIN
from train.run.recipe import ProbeRecipe, load_recipe
from train.sweeping.foundation_commands import BEAT_FILE, FoundationCommands
from train.sweeping.queue_worker import StopRequest

FACTS_FILE, TABLE = "foundation.json", "table.md"
NEW, ALONE = "new", "alone"  # folders of the new recordings' probes
TITLES = {ALONE: "without", NEW: "with the population"}


class FoundationFacts(BaseModel):
    """What a folder was made of; the content of foundation.json.

    Attributes:
        recordings: fingerprint of each, by name.
        recipe: settings of the probes.
        networks: that are read.
        rounds: 1 or 2.
        new: fingerprints of the recordings that are read with their sites.
    """

    model_config = ConfigDict(extra="forbid")

    recordings: dict[str, str]
    recipe: dict[str, Any]
    networks: list[str] = Field(min_length=1)
    rounds: int = Field(ge=1, le=2)
    new: dict[str, str] = {}


@dataclass(frozen=True)
class FoundationOptions:
    """What is to be done.

    Attributes:
        data: shard folders of the recordings whose sites are a population, or their URLs.
        new: those of the recordings that are read with it.
        out: folder.
        recipe: of the probes.
        networks: to read instead of the recipe's.
        rounds: 1 or 2; in the second each recording is read with the sites of the others.
        split: that is scored.
        compare: whether new recordings are also read without the population.
        licence: of the recordings, for the population's card.
        processes: per probe; by default one per GPU, or one.
    """

    data: Sequence[str]
    new: Sequence[str]
    out: Path
    recipe: Path
    networks: Sequence[str]
    rounds: int
    split: str
    compare: bool
    licence: str | None
    processes: int | None


class Foundation:
    """The work on a folder, which goes on where it was stopped.

    Args:
        options: what is to be done.
        stop: whether this command was asked to end.

    Raises:
        BadInput: a recording cannot be read, two have the same name, or the folder is that of others.
    """

    def __init__(self, options: FoundationOptions, stop: StopRequest):
        self._options = options
        self._commands = FoundationCommands(options.split, options.licence, options.processes, stop)
        self._data, self._new = _by_name(options.data, options.new)
        recipe = load_recipe(options.recipe, ProbeRecipe)
        if recipe.population is not None:
            raise BadInput(f"{options.recipe}: this command sets population itself; leave it out")
        shards = {name: ShardFolder(location) for name, location in (self._data | self._new).items()}
        networks = list(options.networks) or [recipe.backbone.name]
        self._joined = words_of_population(recipe)
        self._folders = _folders_of(networks, options.out)
        self._facts = FoundationFacts(
            recordings={name: shards[name].manifest.fingerprint for name in self._data},
            recipe=recipe.model_dump(mode="json"),
            networks=networks,
            rounds=options.rounds,
            new={name: shards[name].manifest.fingerprint for name in self._new},
        )
        _known(options.out, self._facts)
        check_writable(options.out)
        options.out.mkdir(parents=True, exist_ok=True)
        self._apart = _without_common_images({name: shards[name] for name in self._data}) if options.rounds == 2 else {}

    def run(self) -> str:
        """Do what is missing, once no other command works on the folder.

        Returns:
            The table of the new recordings, in Markdown.
        """
        out = self._options.out
        with self._commands.alone_in(out):
            facts = self._facts.model_copy(update={"new": _known(out, self._facts) | self._facts.new})
            write_json(out / FACTS_FILE, facts.model_dump())
            return self._run()

    def _run(self) -> str:
        populations = [self._read(network, folder) for network, folder in self._folders.items()]
        if not self._new:
            named = ", ".join(map(str, populations))
            return f"{named} is made; read a new recording with train/probe.py ... --population {populations[0]}"
        if len(self._folders) > 1:
            self._stack()
        table = self._table()
        write_bytes(self._options.out / TABLE, table.encode())
        return table

    @property
    def _kinds(self) -> list[str]:
        return [ALONE, NEW] if self._options.compare else [NEW]

    def _read(self, network: str, folder: Path) -> Path:
        """Read all recordings from a network; returns the population."""
        probes = {
            name: self._probe(folder / "sites" / name, network, data, *self._joined)
            for name, data in self._data.items()
        }
        if self._options.rounds == 2:
            probes = {name: self._read_again(name, network, folder, probes) for name in self._data}
        population = self._commands.population(folder / "population", list(probes.values()))
        for name, data in self._new.items():
            if self._options.compare:
                self._probe(folder / ALONE / name, network, data)
            self._probe(folder / NEW / name, network, data, "--population", population)
        return population

    def _read_again(self, name: str, network: str, folder: Path, probes: Mapping[str, Path]) -> Path:
        """Probe a recording with the sites of those that share no image with it, if there are any.

        A third round would read it with sites that have read its own, whose responses would then tell of themselves.

        Args:
            name: of the recording.
            network: that is read.
            folder: of the network.
            probes: of the first round, by recording.

        Returns:
            The folder of its last probe.
        """
        others = [probes[other] for other in self._apart[name]]
        if not others:
            return probes[name]
        population = self._commands.population(folder / "others" / name, others)
        words = ("--population", population, *self._joined)
        return self._probe(folder / "again" / name, network, self._data[name], *words)

    def _probe(self, folder: Path, network: str, data: str, *words: object) -> Path:
        words = (self._options.recipe, "--data", move_secrets_to_environment(data), *words)
        return self._commands.probe(folder, *words, *(("--backbone.name", network) if self._options.networks else ()))

    def _stack(self) -> None:
        """Stack what was read from each network."""
        for kind in self._kinds:
            for name in self._new:
                members = [folder / kind / name for folder in self._folders.values()]
                self._commands.stack(self._options.out / kind / name, members)

    def _table(self) -> str:
        several = len(self._folders) > 1
        header = ["recording", *(["network"] if several else []), "sites", "fitted on"]
        header += [f"{score} {TITLES[kind]}" for score in ("R2", "median r²") for kind in self._kinds]
        systems = self._folders | ({"stack": self._options.out} if several else {})
        rows = []
        for name in self._new:
            fitted = self._metrics(next(iter(self._folders.values())), NEW, name)["training_stimuli"]
            for network, folder in systems.items():
                found = {kind: self._metrics(folder, kind, name) for kind in self._kinds}
                simulated = " (SIMULATED)" if found[NEW].get("simulated") else ""
                cells = [f"{name}{simulated}", *([network] if several else [])]
                cells += [str(len(found[NEW]["regression"]["r2"]["per_site"])), f"{fitted:,}"]
                cells += [_number(found[kind]["regression"]["r2"]["mean"]) for kind in self._kinds]
                cells += [_number(found[kind]["regression"]["squared_pearson_r"]["median"]) for kind in self._kinds]
                rows.append([*cells, mark_of(seen_in(found[NEW]))])
        scored = f"R2 (mean over sites) and r² on {self._options.split}."
        return f"{markdown_table([*header, 'seen'], rows)}\n\n{scored}\n"

    def _metrics(self, folder: Path, kind: str, name: str) -> Mapping[str, Any]:
        path = self._commands.metrics_of(folder / kind / name)
        return metrics_content(path, "remove its folder and run the same command again")


def words_of_population(recipe: ProbeRecipe) -> list[str]:
    """Settings of the probes that a population is made of, other than those of the recipe.

    Where modules count by their channels, a probe predicts a little worse, but its sites are worth more to others.
    """
    return ["--joined", "by_channels"] if any(JOIN in layer for layer in recipe.layers) else []


def images_of(shards: ShardFolder) -> ImageIdentities:
    """All images of a recording."""
    return joined([images_of_split(shards, split) for split in shards.manifest.splits])


def _without_common_images(shards: Mapping[str, ShardFolder]) -> dict[str, list[str]]:
    """For each recording the others that share no image with it."""
    images = {name: images_of(folder) for name, folder in shards.items()}
    return {
        name: [other for other in images if other != name and not is_among(images[other], images[name]).any()]
        for name in images
    }


def _folders_of(networks: Sequence[str], out: Path) -> dict[str, Path]:
    """Where the probes of each network are.

    Raises:
        BadInput: a network is named twice.
    """
    if len(networks) == 1:
        return {networks[0]: out}
    folders = {network: out / re.sub(r"[^\w.-]+", "-", network) for network in networks}
    if len(set(folders.values())) < len(networks):
        raise BadInput(f"--networks {' '.join(networks)}: name each network once")
    return folders


def _known(out: Path, facts: FoundationFacts) -> dict[str, str]:
    """Fingerprints of the new recordings that a folder has read already.

    Raises:
        BadInput: the folder is that of other work, or of something else.
    """
    path = out / FACTS_FILE
    if not path.is_file():
        if out.exists() and (not out.is_dir() or any(file.name != BEAT_FILE for file in out.iterdir())):
            raise BadInput(f"{out} exists and is not an empty folder; choose another --out")
        return {}
    try:
        known = FoundationFacts.model_validate(parse_json(read_regular_file(path)))
    except (OSError, ValueError, ValidationError):
        raise BadInput(f"{path} is damaged; choose another --out") from None
    _check_same(out, known, facts)
    return known.new


def _check_same(out: Path, known: FoundationFacts, now: FoundationFacts) -> None:
    if known.recordings != now.recordings:
        raise BadInput(f"{out} was begun on other recordings ({', '.join(known.recordings)}); choose another --out")
    if known.recipe != now.recipe:
        raise BadInput(f"{out} was begun with another recipe; choose another --out")
    if known.networks != now.networks:
        raise BadInput(f"{out} was begun with --networks {' '.join(known.networks)}; choose another --out")
    if known.rounds != now.rounds:
        raise BadInput(f"{out} was begun with --rounds {known.rounds}; choose another --out")
    for name, fingerprint in now.new.items():
        if known.new.get(name, fingerprint) != fingerprint:
            raise BadInput(f"{out} has read other data called {name}; rename the new folder, or choose another --out")


def _by_name(data: Sequence[str], new: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Recordings by the names of their folders."""
    known: dict[str, str] = {}
    for location in (*data, *new):
        name = Path(str(parse_location(location))).name
        if name in known:
            raise BadInput(f"{known[name]} and {location} have the same name, {name}; rename one of the folders")
        known[name] = location
    named = list(known.items())
    return dict(named[: len(data)]), dict(named[len(data) :])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
