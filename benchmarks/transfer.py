"""Make the table of docs/foundation.md: what the sites of other sessions are worth to a new one.

    python benchmarks/transfer.py SESSION [SESSION ...] --out OUT [--others SESSION ...] [--left-out {session,animal}]
                                  [--rounds 2] [--sizes 50 100 200 400 all]

A SESSION is a folder as `pack.py folder` takes it. Each in turn is the new one: 50, 100, 200, 400 and all stimuli of
its first half, in the order of its table, fit train/recipes/probes/best.yaml, and the second half is scored; alone, and
with a population of all others (`--others` adds sessions that are never new). Sessions that share an image with the
new one are left out of its population, with `--left-out animal` also all of its animal. With two rounds, each session
of a population has been read together with the sites of the others. Everything is done by the real commands; what is
done is not done again, so the command goes on where it was stopped, and several of it share the work of one OUT.

OUT/table.md  transfer.png  results.json     the scores, and the minutes of each probe
OUT/shards/  sites/  populations/  new/      what the commands made
"""

import argparse
import fcntl
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness import ROOT, run_checked, table
from matplotlib.figure import Figure

sys.path.insert(0, str(ROOT))

from data_prep.shards.folder import ShardFolder
from data_prep.shards.image_identity import ImageIdentities
from train.data.seen import is_among
from train.run.recipe import ProbeRecipe, load_recipe
from train.sweeping.foundation import images_of, words_of_population

RECIPE = ROOT / "train/recipes/probes/best.yaml"
SIZES = ("50", "100", "200", "400", "all")
# Animals of the sessions of shared/data, by the beginning of their names; other sessions are animals of their own.
ANIMALS = {"v4_we_": "WE", "v4_pe_": "PE", "v4_hvm640": "PE", "v4_natural800": "PE", "v4_ra_": "RA"}
HALVES = ("--split", "ordered", "--split-fractions", "0", "0.5")
MOST = ("--split", "random", "--split-fractions", "0.05", "0")  # val has to have some stimuli
ALONE, JOINED = "alone", "with the population"


@dataclass(frozen=True)
class Result:
    """A probe of a new session.

    Attributes:
        session: its name.
        system: alone, or with the population.
        size: number of stimuli that were asked for.
        fitted, scored: numbers of stimuli.
        sites: of other sessions, 0 without a population.
        r2: mean over sites.
        median_r2: median over sites of the squared correlation.
        minutes: of the probe.
    """

    session: str
    system: str
    size: str
    fitted: int
    scored: int
    sites: int
    r2: float
    median_r2: float
    minutes: float


def animal_of(session: str) -> str:
    """The animal of a session."""
    return next((animal for start, animal in ANIMALS.items() if session.startswith(start)), session)


def short_name(sessions: Sequence[str], rounds: int) -> str:
    """A name for the folder of a population."""
    digest = hashlib.sha256(" ".join(sorted(sessions)).encode()).hexdigest()[:8]
    return f"{len(sessions)}_sessions_{digest}_round_{rounds}"


class Transfer:
    """The commands, and what they have made.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace):
        self._options, self._out = options, options.out.resolve()
        folders = [Path(folder).resolve() for folder in (*options.sessions, *options.others)]
        self._folders = {folder.name: folder for folder in folders}
        self._recipe = load_recipe(options.recipe, ProbeRecipe)

    def _command(self, out: Path, *words: object) -> float:
        """Run a command that makes a folder, unless it has; returns the minutes that it took."""
        seconds = out.with_name(f"{out.name}.seconds.json")
        with out.with_name(f"{out.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not seconds.exists():
                print(f"{time.strftime('%H:%M:%S')} {out.relative_to(self._out)}", file=sys.stderr, flush=True)
                resume = ["--resume"] if (out / "recipe.yaml").exists() else []
                started = time.monotonic()
                run_checked([sys.executable, *words, "--out", out, *resume], PYTHONPATH=str(ROOT))
                seconds.write_text(json.dumps(time.monotonic() - started))
        return float(json.loads(seconds.read_text())) / 60

    def shards(self, session: str, kind: str) -> Path:
        """A session, packed into halves, or with nearly all of it to fit."""
        out = self._out / "shards" / f"{session}_{kind}"
        words = HALVES if kind == "halves" else MOST
        out.parent.mkdir(parents=True, exist_ok=True)
        self._command(out, "data_prep/pack.py", "folder", self._folders[session], *words)
        return out

    def images(self, session: str) -> ImageIdentities:
        """All images of a session."""
        return images_of(ShardFolder(self.shards(session, "halves")))

    def apart(self, session: str, sessions: Iterable[str]) -> list[str]:
        """The other sessions that share no image with one."""
        images = self.images(session)
        return [other for other in sessions if other != session and not is_among(self.images(other), images).any()]

    def others(self, session: str) -> list[str]:
        """The sessions whose sites a new one is read with."""
        others = self.apart(session, self._folders)
        if self._options.left_out == "animal":
            others = [other for other in others if animal_of(other) != animal_of(session)]
        if not others:
            raise SystemExit(f"no other session can be read with {session}: name more, or --left-out session")
        return others

    def site_probe(self, session: str, others: Sequence[str]) -> Path:
        """A probe of a whole session, together with the sites of others if there are any."""
        words: list[object] = ["--data", self.shards(session, "most"), *words_of_population(self._recipe)]
        out = self._out / "sites" / session
        if others:
            words += ["--population", self.population_of(others, 1)]
            out = out.with_name(f"{session}_with_{short_name(others, 1)}")
        out.parent.mkdir(exist_ok=True)
        self._command(out, "train/probe.py", self._options.recipe, *words)
        return out

    def population_of(self, sessions: Sequence[str], rounds: int) -> Path:
        """The population of some sessions."""
        read_with = {session: self.apart(session, sessions) if rounds == 2 else [] for session in sessions}
        probes = [self.site_probe(session, others) for session, others in read_with.items()]
        out = self._out / "populations" / short_name(sessions, rounds)
        out.parent.mkdir(exist_ok=True)
        self._command(out, "train/population.py", *probes)
        return out

    def result(self, session: str, system: str, size: str) -> Result:
        """Probe a new session."""
        out = self._out / "new" / session / f"alone_{size}"
        words: list[object] = ["--data", self.shards(session, "halves"), "--split", "test"]
        words += [] if size == "all" else ["--subset", size]
        sites = 0
        if system == JOINED:
            others, rounds = self.others(session), self._options.rounds
            out = out.with_name(f"{short_name(others, rounds)}_{size}")
            population = self.population_of(others, rounds)
            words += ["--population", population]
            sites = json.loads((population / "card.json").read_text())["sites"]
        out.parent.mkdir(parents=True, exist_ok=True)
        minutes = self._command(out, "train/probe.py", self._options.recipe, *words)
        metrics = json.loads((out / "eval" / "test" / "metrics.json").read_text())
        regression = metrics["regression"]
        return Result(
            session=session,
            system=system,
            size=size,
            fitted=metrics["training_stimuli"],
            scored=metrics["stimuli"],
            sites=sites,
            r2=regression["r2"]["mean"],
            median_r2=regression["squared_pearson_r"]["median"],
            minutes=minutes,
        )

    def sizes(self, session: str) -> list[str]:
        """The sizes that the first half of a session has."""
        count = len(ShardFolder(self.shards(session, "halves")).split("train"))
        return [size for size in self._options.sizes if size == "all" or int(size) < count]


def tables(results: Sequence[Result], left_out: str) -> str:
    """The scores as Markdown, with the means over the sessions that have all of a size."""
    scores = [f"{score}, {system}" for score in ("R2", "median r²") for system in (ALONE, JOINED)]
    rows = [["session", "stimuli", *scores, "sites", "minutes"]]
    by_key = {(result.session, result.size, result.system): result for result in results}
    for session, size in dict.fromkeys((result.session, result.size) for result in results):
        both = [by_key.get((session, size, system)) for system in (ALONE, JOINED)]
        if None in both:
            continue
        pair = [result for result in both if result is not None]
        rows.append([
            session, str(pair[0].fitted),
            *(f"{result.r2:.3f}" for result in pair), *(f"{result.median_r2:.3f}" for result in pair),
            str(pair[1].sites), " and ".join(f"{result.minutes:.1f}" for result in pair),
        ])  # fmt: skip
    means = [["stimuli", "sessions", f"R2, {ALONE}", f"R2, {JOINED}"]]
    for size in dict.fromkeys(result.size for result in results):
        found = {system: [r.r2 for r in results if (r.size, r.system) == (size, system)] for system in (ALONE, JOINED)}
        if len(found[ALONE]) == len(found[JOINED]):
            of_size = [f"{statistics.mean(found[system]):.3f}" for system in (ALONE, JOINED)]
            means.append([size, str(len(found[ALONE])), *of_size])
    return f"Left out of the population: the new {left_out}\n\n{table(rows)}\n\n{table(means)}\n"


def figure(results: Sequence[Result], path: Path) -> None:
    """R2 over the number of stimuli, a panel for each session."""
    sessions = list(dict.fromkeys(result.session for result in results))
    drawn = Figure(figsize=(3.2 * len(sessions), 3), layout="constrained")
    for axes, session in zip(drawn.subplots(1, len(sessions), squeeze=False)[0], sessions, strict=True):
        for system, style in ((ALONE, "o--"), (JOINED, "o-")):
            points = [(r.fitted, r.r2) for r in results if (r.session, r.system) == (session, system)]
            axes.plot([fitted for fitted, _ in points], [r2 for _, r2 in points], style, label=system)
        axes.set(title=session, xlabel="stimuli", xscale="log", ylabel="R2, second half")
    drawn.axes[0].legend(frameon=False, fontsize=8)
    drawn.savefig(path, dpi=130)


def main() -> None:
    """Run what is missing, and write the table after every probe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sessions", nargs="+", help="which are the new one, in turn")
    parser.add_argument("--others", nargs="*", default=[], help="which are only read for the populations")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--left-out", choices=("session", "animal"), default="session")
    parser.add_argument(
        "--rounds", type=int, choices=(1, 2), default=2, help="how often the sessions of a population are read"
    )
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), help="stimuli to fit; `all` is the first half")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="of all probes")
    options = parser.parse_args()
    transfer, results = Transfer(options), []
    for folder in options.sessions:
        session = Path(folder).resolve().name
        for size in transfer.sizes(session):
            for system in (ALONE, JOINED):
                results.append(transfer.result(session, system, size))
                content: list[dict[str, Any]] = [asdict(result) for result in results]
                (options.out / "results.json").write_text(json.dumps(content, indent=1))
                (options.out / "table.md").write_text(tables(results, options.left_out))
                figure(results, options.out / "transfer.png")
    print((options.out / "table.md").read_text())


if __name__ == "__main__":
    main()
