"""Check and measure on one GPU what cannot be known without one, within a limit of time and offline.

    bash benchmarks/gpu_check.sh [--parts P,P,...] [--only WORD,...] [--seconds 400] [--device cuda|cpu] [--out DIR]

The parts, in this order: `strategies` (losses of every strategy, precision and optimizer against the CPU's; calls that
make the host wait), `speed` (images a second fed and from one batch, use of the GPU, memory against the plan, decoding,
checkpoints), `probe` (products, decomposition, features on their way to the host), `resume` (bit for bit after SIGTERM
and SIGKILL), `faults` (runs that must fail). docs/gpu.md says what each tells.

Each result is appended to OUT/results.jsonl as soon as it is there, and what an entry printed to OUT/log.txt;
OUT/table.md is made at the end, or by `--table` of the results of a check that was killed. What the limit left no time
for is "out of time", which is not a failure. Exits with 1 if an entry failed.
Without a GPU (or with --device cpu) the same entries run on the CPU at a small size, in under 3 minutes.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from gpu.entries import Part, Place
from gpu.forms import form_of, usable_device
from gpu.results import ResultsFile, read_results
from gpu.running import OwnProcess, Runner, make_part, run_part
from gpu.table import page
from harness import ROOT

from data_prep.common.worker_processes import usable_cores

# Of the time that is left, in this order.
SHARES = {"strategies": 4, "speed": 8, "probe": 3, "resume": 2, "faults": 1}


def load_part(name: str, place: Place) -> Part:
    """A part by its name."""
    in_background = name in ("recordings", "plans")
    return make_part(f"gpu.preparation:{name}" if in_background else f"gpu.{name}:part", place)


@dataclass(frozen=True)
class Check:
    """How the entries are run.

    Attributes:
        place: of all entries.
        runner: of each.
        results: where they are written.
        only: parts of the names of the entries to run; None for all.
    """

    place: Place
    runner: Runner
    results: ResultsFile
    only: list[str] | None = None

    def run(self, parts: Sequence[str], seconds: float) -> None:
        """Run the parts; what one leaves of its time goes to those after it."""
        end = time.monotonic() + seconds
        with ThreadPoolExecutor(2) as background:
            recordings, plans = (background.submit(self.run_part, name, end) for name in ("recordings", "plans"))
            self.run_part("device", end)
            recordings.result()
            for index, name in enumerate(parts):
                if name != "strategies":
                    plans.result()
                share = SHARES[name] / sum(SHARES[other] for other in parts[index:])
                self.run_part(name, time.monotonic() + share * (end - time.monotonic()))

    def run_part(self, name: str, deadline: float) -> None:
        """Run the entries of a part that are asked for."""
        part = load_part(name, self.place)
        if self.only is not None:
            part = part.only(self.only)
        run_part(part, self.place, self.runner, self.results, deadline)


def chosen(text: str) -> list[str]:
    """The parts named in a command line, in their order."""
    names = text.split(",")
    if unknown := set(names) - set(SHARES):
        raise argparse.ArgumentTypeError(f"no part {min(unknown)!r}; the parts are {', '.join(SHARES)}")
    return [name for name in SHARES if name in names]


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=chosen, default=list(SHARES), help="separated by commas; by default all")
    parser.add_argument("--only", type=lambda text: text.split(","), help="words of the names of the entries to run")
    parser.add_argument("--seconds", type=float, default=400.0, help="limit for everything")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="by default a GPU if there is one")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu_check", help="folder for results and logs")
    parser.add_argument("--table", type=Path, help="only print the table of this results.jsonl")
    return parser.parse_args()


def main() -> None:
    """Check everything and print where the results are."""
    given = options()
    if given.table is not None:
        print(page(read_results(given.table)))
        return
    device, out = usable_device(given.device), given.out.resolve()
    if device == "cpu":
        print("on the CPU: the same entries at a small size; their speed says nothing about a GPU", flush=True)
    results = ResultsFile(out / "results.jsonl")
    with tempfile.TemporaryDirectory() as folder:
        place = Place(form_of(device, usable_cores()), Path(folder))
        Check(place, OwnProcess(out / "log.txt"), results, given.only).run(given.parts, given.seconds)
    (out / "table.md").write_text(page(results.results))
    print(f"\n{page(results.results)}\nwritten to {out}")
    sys.exit(1 if results.failed else 0)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        os._exit(130)  # at once: the entries that run end with this process
