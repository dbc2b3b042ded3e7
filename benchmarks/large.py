"""A recording of TVSD's size, end to end: packed, probed layer by layer, reported; time and peak memory by part.

    python benchmarks/large.py [--stimuli 22248] [--held-out 1000] [--sites 1024] [--processes 2] [--memory 1]
                               [--layers ...] [--rivals 6000] [--limit 600] [--folder DIR] [--json FILE]

The recording is simulated (`data_prep/pack.py simulated`, 64 px). The network is an EfficientNet-Lite0 with random
weights; maps are kept whole, so that its layers have up to 98,304 features, of which ridge takes 1,000 principal
components and a penalty per site. Memory is the resident memory of each process, which this program looks at four times
a second: of the largest, and of all together. Activations of the layers above take 12 GB of disk at full size.

Then ours and the rivals, scikit-learn (`PCA` + `RidgeCV`) and himalaya (`KernelRidgeCV`, if it is installed), on
features of --rivals stimuli in turns (`benchmarks/probe.py`), because neither can do the whole: both start from all
features in memory, 9 GB for the largest layer, and copy them. A side is given up after --limit seconds. On a machine
with a GPU, `--gpu` gives himalaya its backend `torch_cuda`, and ours finds the GPU by itself (not measured yet).

    pip install --no-deps --target rivals himalaya && PYTHONPATH=rivals python benchmarks/large.py
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from harness import ROOT, CommandFailed, options_of, run_checked, table, write_json

LAYERS = ("blocks.1.0.bn1", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks.5")
NETWORK = ("--backbone.name", "tf_efficientnet_lite0", "--backbone.weights", "random", "--images.size", "64")
SECONDS_BETWEEN = 0.25
GIB = 2**30


@dataclass
class Part:
    """A part of a command.

    Attributes:
        name: as the command's log calls it.
        seconds: that it took.
        largest: the most resident memory of a process while it ran, bytes.
        together: of all its processes.
    """

    name: str
    seconds: float = 0.0
    largest: int = 0
    together: int = 0


@dataclass
class Watch:
    """Runs a command and looks at the memory of its processes, part by part.

    Attributes:
        parts: in the order in which they began; a part begins where the command's log has a line that ends in dots.
    """

    log: Path | None = None
    parts: list[Part] = field(default_factory=list)

    def run(self, name: str, words: list[str], **environment: str) -> None:
        """Run a command that must succeed.

        Raises:
            CommandFailed: it did not.
        """
        self.parts.append(Part(name))
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(words, cwd=ROOT, stdout=output, stderr=output, env=os.environ | environment)
            before = time.monotonic()
            while process.poll() is None:
                time.sleep(SECONDS_BETWEEN)
                self._look(process.pid, name)
                now = time.monotonic()
                self.parts[-1].seconds += now - before
                before = now
            if process.returncode:
                output.seek(0)
                raise CommandFailed(f"{' '.join(words)}\n{output.read()[-3000:]}")

    def _look(self, root: int, name: str) -> None:
        line = f"{name}: {current_part(self.log)}" if self.log is not None and self.log.exists() else name
        if line != self.parts[-1].name:
            self.parts.append(Part(line))
        sizes = resident_memory(root)
        self.parts[-1].largest = max([self.parts[-1].largest, *sizes])
        self.parts[-1].together = max(self.parts[-1].together, sum(sizes))

    def table(self) -> str:
        """Of the parts."""
        rows = [["", "seconds", "GiB of the largest process", "GiB of all"]]
        for part in self.parts:
            rows.append([part.name, f"{part.seconds:.1f}", f"{part.largest / GIB:.2f}", f"{part.together / GIB:.2f}"])
        rows.append(
            [
                "all",
                f"{sum(part.seconds for part in self.parts):.1f}",
                f"{max(part.largest for part in self.parts) / GIB:.2f}",
                f"{max(part.together for part in self.parts) / GIB:.2f}",
            ]
        )
        return table(rows)


def current_part(log: Path) -> str:
    """What a probe does now, by the last line that tells it."""
    lines = [line for line in log.read_text().splitlines() if line.endswith("...")]
    return re.sub(r"^\S+ \S+ ", "", lines[-1]).strip(" .") if lines else "start"  # without its date and time


def resident_memory(root: int) -> list[int]:
    """Bytes of a process and all processes below it that run Python."""
    parents, sizes = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                status = dict(
                    line.split(":", 1) for line in (folder / "status").read_text().splitlines() if ":" in line
                )
            except OSError:
                continue  # it has ended
            parents[int(folder.name)] = int(status["PPid"])
            sizes[int(folder.name)] = int(status.get("VmRSS", "0").split()[0]) * 1024
    family = [root]
    while found := [child for child, parent in parents.items() if parent in family and child not in family]:
        family += found
    return [sizes[process] for process in family if process in sizes]


def end_to_end(folder: Path, options: argparse.Namespace) -> Watch:
    """Pack, probe and report."""
    data, run = folder / "data", folder / "run"
    total = options.stimuli + options.held_out
    simulated = ["--stimuli", str(total), "--sites", str(options.sites), "--image-size", "64", "--repetitions", "4"]
    simulated += ["--val-fraction", str(options.held_out / total), "--test-fraction", "0", "--no-decode"]
    watch = Watch()
    watch.run("pack", [sys.executable, "data_prep/pack.py", "simulated", "--out", str(data), *simulated])
    watch.log = run / "log.txt"
    words = ["launch/local.sh", "-n", str(options.processes), "train/probe.py", "--data", str(data), "--out", str(run)]
    words += [*NETWORK, "--pool", "None", "--memory", str(options.memory), "--layers", *options.layers]
    watch.run("probe", words, PYTHON=sys.executable)
    watch.log = None
    watch.run("report", [sys.executable, "train/report.py", str(run), "--out", str(folder / "report")])
    return watch


def beside_rivals(options: argparse.Namespace) -> str:
    """The comparison of `benchmarks/probe.py`, at a size that the rivals can do."""
    words = [sys.executable, "benchmarks/probe.py", "--stimuli", str(options.rivals), "--held-out", "500"]
    words += ["--features", str(options.rival_features), "--sites", str(options.sites), "--repeats", "1"]
    words += ["--processes", str(options.processes), "--rival-threads", str(options.processes)]
    words += ["--himalaya", "--limit", str(options.limit), "--memory", str(options.memory)]
    return run_checked([*words, *(["--gpu"] if options.gpu else [])])


def main() -> None:
    """Measure and print the tables."""
    parser = options_of(__doc__)
    for name, value in (("stimuli", 22248), ("held-out", 1000), ("sites", 1024), ("processes", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--memory", type=float, default=1.0, help="GiB, as --memory of a probe")
    parser.add_argument("--layers", nargs="+", default=list(LAYERS))
    parser.add_argument("--rivals", type=int, default=6000, help="stimuli that ours and the rivals are compared on")
    parser.add_argument("--rival-features", type=int, default=50176)
    parser.add_argument("--limit", type=float, default=600, help="seconds after which a side is given up")
    parser.add_argument("--gpu", action="store_true", help="himalaya computes on the GPU")
    parser.add_argument("--folder", type=Path, help="for data and runs; a temporary one by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        watch = end_to_end(Path(folder), options)
    print(watch.table(), flush=True)
    print(beside_rivals(options) if options.rivals else "")
    write_json(options, [vars(part) for part in watch.parts])


if __name__ == "__main__":
    main()
