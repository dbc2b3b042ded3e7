"""Check this machine, or several together, before a long run; launch/check.sh starts it on every process.

Each process runs one stage after the other, each as a process of its own that joins its peers again: a stage that
crashes or hangs costs only itself. The first one prints a line for each thing checked, and what to do where it fails.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any

import psutil

STARTED = time.time()  # before the other imports, which take a moment
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from checking.measured_recipe import parse_measured  # noqa: E402
from checking.verdicts import BEGAN, ENDED, FAILED, OK, RECIPE_FILE, Verdict, listing, read_verdicts  # noqa: E402
from harness import last_line  # noqa: E402

from data_prep.common.atomic_writes import write_bytes, write_json  # noqa: E402
from data_prep.common.errors import BadInput  # noqa: E402
from data_prep.common.process_identity import (  # noqa: E402
    ADDRESS_VARIABLES,
    RANK_VARIABLES,
    Contradiction,
    ProcessIdentity,
    own_identity,
)
from train.planning.rates import FORMAT, VERSION, Place  # noqa: E402

if TYPE_CHECKING:
    from checking.stages import Stage

LAUNCHED = "CHECK_LAUNCHED"  # when launch/check.sh began
CLOCK_ERROR = 60.0  # s between the times that files and processes are said to begin
ENDING = "end of processes"
PACKED = "packed"  # this file says that the recordings are complete, and which process has packed them
PACKING_SECONDS = 180
LAUNCHERS = ("TORCHELASTIC", "SLURM_", "OMPI_", "MV2_", "PMI", "MPI_")  # what the variables that they set begin with
FIRST_PORT, PORTS = 1024, 2**16 - 1024  # those that a user may open


def folder_of(identity: ProcessIdentity) -> Path:
    """The folder that the processes of this machine share, and no others, even if machines share a file system."""
    job = os.environ.get("MASTER_PORT", "") if identity.world_size > 1 else str(os.getpid())
    first_rank = identity.rank - identity.local_rank
    return Path(tempfile.gettempdir()) / f"spiketune_check_{os.getuid()}_{job}_{first_rank}"


def run_stage(name: str, seconds: float, folder: Path, environment: Mapping[str, str]) -> Verdict | None:
    """Run a stage as a process of its own; returns what is wrong if it does not end well."""
    environment = {**environment, BEGAN: str(time.time())}
    log = folder / f"{name}.log"
    words = [sys.executable, __file__, "--stage", name, "--folder", str(folder)]
    with log.open("a") as output:
        try:
            code = subprocess.run(words, env=environment, stdout=output, stderr=output, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            return Verdict(name, FAILED, f"no end after {seconds:.0f} s", f"the last line was: {last_words(log)}")
    if code == 0:
        return None
    return Verdict(name, FAILED, f"ended with exit code {code}", last_words(log))


def last_words(log: Path) -> str:
    """The last error message in a log; without one, its last line."""
    said = log.read_text(errors="replace")
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    return last_line(errors[-1] if errors else said)[:400] or "nothing was printed"


def without_peers() -> dict[str, str]:
    """The environment of a process that runs alone: without a trace of the launcher that started this one."""
    variables = (*RANK_VARIABLES, *ADDRESS_VARIABLES)
    return {
        name: value for name, value in os.environ.items() if name not in variables and not name.startswith(LAUNCHERS)
    }


def with_peers(stage: int) -> dict[str, str]:
    """The environment of a stage: its processes meet at a port of their own."""
    environment = dict(os.environ)
    if "MASTER_PORT" in environment:
        place = int(environment["MASTER_PORT"]) - FIRST_PORT + 1 + stage
        environment["MASTER_PORT"] = str(FIRST_PORT + place % PORTS)
    return environment


def prepare(identity: ProcessIdentity, folder: Path, stages: "Iterable[Stage]", recipe: Sequence[str]) -> list[Verdict]:
    """Make the recordings, once on each machine, and on the first what the others are compared with."""
    faults = []
    if identity.local_rank == 0:
        rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if recipe:
            write_json(folder / RECIPE_FILE, list(recipe))
        for stage in stages:
            if identity.rank == 0 or stage.name == "recordings":
                faults.append(run_stage(stage.name, stage.seconds, folder, without_peers()))
        write_bytes(folder / PACKED, str(os.getpid()).encode())
    deadline = time.monotonic() + PACKING_SECONDS
    while not is_packed(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [fault for fault in faults if fault is not None]


def is_packed(folder: Path) -> bool:
    """Whether the recordings are complete; those of a check that was killed, under the same port, do not count."""
    path = folder / PACKED
    try:
        packed_by = psutil.Process(int(path.read_text()))
        # Else the number is another process's by now; the system's count of its start may be off by a little.
        return packed_by.create_time() <= path.stat().st_mtime + CLOCK_ERROR
    except (OSError, psutil.NoSuchProcess):
        return False


def check(identity: ProcessIdentity, folder: Path, recipe: Sequence[str], *, rates_only: bool = False) -> list[Verdict]:
    """Run all stages; the first process prints each verdict as soon as it is there, and returns all of them.

    Args:
        identity: of this process.
        folder: that the processes of this machine share.
        recipe: the words of the recipe whose speed is to be measured; none if there is none.
        rates_only: leave out the stages that only check.
    """
    from checking.stages import OF_RATES, PREPARATIONS, RECIPE, STAGES, gradients_against_network

    stages = [*STAGES, RECIPE] if recipe else list(STAGES)
    preparations = list(PREPARATIONS)
    if rates_only:
        stages = [stage for stage in stages if stage.name in OF_RATES]
        preparations = [stage for stage in preparations if stage.name in OF_RATES]
    verdicts = prepare(identity, folder, preparations, recipe)
    report(identity, verdicts)
    ending: list[float] = []
    for number, stage in enumerate(stages):
        known = len(read_verdicts(folder))
        fault = run_stage(stage.name, stage.seconds, folder, with_peers(number))
        if identity.rank == 0:
            ending += seconds_to_end(folder)
            found = read_verdicts(folder)[known:] + ([] if fault is None else [fault])
            report(identity, found)
            verdicts += found
    gradients = gradients_against_network(verdicts)
    report(identity, gradients)
    if ending:
        verdicts.append(Verdict(ENDING, OK, "", values={"seconds": statistics.median(ending)}))
    return verdicts + gradients


def launch_seconds() -> float | None:
    """Seconds from the start of the launcher, which launch/check.sh notes, to that of this process."""
    try:
        return max(STARTED - float(os.environ[LAUNCHED]), 0.0)
    except (KeyError, ValueError):  # not every system's `date` knows fractions of a second
        return None


def rates_of(verdicts: Sequence[Verdict], launched: float | None) -> dict[str, Any]:
    """The content of the file for train/plan.py: what was measured, as far as its stages ended well.

    Args:
        verdicts: of all stages.
        launched: seconds that the launcher took.
    """
    values = {verdict.subject: verdict.values for verdict in verdicts if verdict.outcome != FAILED}
    content: dict[str, Any] = {"format": FORMAT, "version": VERSION, "place": None, "machine": None}
    if {"versions", "devices", "rates", ENDING} <= values.keys():
        devices, rates = values["devices"], values["rates"]
        content["place"] = Place(
            when=time.strftime("%Y-%m-%d %H:%M"),
            hosts=devices["hosts"],
            device=devices["device"],
            device_bytes=devices["device bytes"],
            host_bytes=rates["host GiB"] * 2**30,
            processes=devices["processes"],
            machines=devices["machines"],
            cores=max(min(devices["cores"]) * devices["machines"] // devices["processes"], 1),
            versions=values["versions"],
            launch_seconds=launched,
            end_seconds=values[ENDING]["seconds"],
        ).model_dump()
        content["machine"] = rates["machine"]
    for name in ("training", "features"):
        content[name] = [of_stage[name] for of_stage in values.values() if name in of_stage]
    return content | {"verdicts": [asdict(verdict) for verdict in verdicts if verdict.finding]}


def seconds_to_end(folder: Path) -> list[float]:
    """Seconds that the process of the last stage has taken to end once its work was done; none if it was not done."""
    ended = folder / ENDED
    if not ended.exists():
        return []
    done = float(ended.read_text())
    ended.unlink()
    return [max(time.time() - done, 0.0)]


def report(identity: ProcessIdentity, verdicts: Sequence[Verdict]) -> None:
    """Print them, if this is the first process."""
    if identity.rank == 0 and verdicts:
        print(listing(verdicts), flush=True)


def main() -> int:
    """Check, and exit with 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write what was measured to this file, for train/plan.py --rates")
    parser.add_argument("--rates-only", action="store_true", help="measure rates, and check nothing")
    parser.add_argument(
        "--recipe",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="RECIPE.yaml [--data DIR] [--section.key value ...]",
        help="also measure this recipe, with all that follows; the last option",
    )
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        from checking.stages import run_stage as work

        work(options.stage, options.folder)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the stage as well
    try:
        identity = own_identity()
    except Contradiction as contradiction:
        print(f"error: {contradiction}", file=sys.stderr)
        return 2
    try:
        if options.recipe:
            parse_measured(options.recipe)
    except BadInput as error:
        if identity.local_rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    launched = launch_seconds()
    folder = folder_of(identity)
    try:
        verdicts = check(identity, folder, options.recipe, rates_only=options.rates_only)
    finally:
        if identity.local_rank == 0:
            rmtree(folder, ignore_errors=True)
    if identity.rank > 0:
        return 0
    failed = [verdict.subject for verdict in verdicts if verdict.outcome == FAILED]
    print(f"\nfailed: {'; '.join(failed)}" if failed else "\nthis setup is ready")
    if options.json:
        write_json(options.json, rates_of(verdicts, launched))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
