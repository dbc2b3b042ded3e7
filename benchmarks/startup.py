"""A run on a large recording: how long until its first step, and what an epoch and its scores cost, by part.

    python benchmarks/startup.py [--stimuli 22248] [--sites 1024] [--side 64] [--network test_resnet] [--batch 64]
                                 [--epochs 3] [--processes 1 2] [--data DIR] [--json FILE]

The default is the size of TVSD: that many JPEGs of noise, of which 2,000 are val, with responses at random. `--data`
uses a shard folder instead, and makes it if it does not exist. The run is the one of train/finetune.py, with one thread
and no decoding processes. Until the first step: the imports, opening and checking the data, starting the processes,
the network with the run's folder, the first batch, the first step. Seconds of the slowest process, by the clock, for
which each needs a core of its own, and of processor time. Then epochs, scores and a checkpoint, with the memory that
the operating system gives the first process; then train/evaluate.py, train/report.py and train/export.py as commands,
with their peak memory.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from harness import ROOT, number, options_of, read_results, run_checked, table, write_json

BEGAN = psutil.Process().create_time()
HELD_OUT = 2000 / 22248  # share of the stimuli
PORT = 29517
MIB = 2**20


class Parts:
    """What a process's parts take, one after the other, from its start on.

    Attributes:
        seconds: by the clock.
        cpu: seconds of processor time.
    """

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self._began, self._used = BEGAN, 0.0

    def end(self, part: str) -> None:
        """End a part that began with the end of the one before."""
        now, used = time.time(), time.process_time()
        self.seconds[part], self.cpu[part] = now - self._began, used - self._used
        self._began, self._used = now, used


def work(options: argparse.Namespace) -> None:
    """Start a run as one process, train an epoch, score and save; the first process writes what it took."""
    parts = Parts()
    parts.end("Python and this benchmark")
    import torch
    from synthetic import recipe_of

    from train.distributed.runtime import start_runtime
    from train.finetuning.setup.assembly import build
    from train.finetuning.setup.preparation import prepare
    from train.finetuning.setup.resume import starting_point

    torch.set_num_threads(1)
    parts.end("imports")
    recipe = recipe_of(options.network, options.side, options.batch, loader={"workers": 0})
    job = prepare(recipe, [options.data], options.run, resume=False)
    parts.end("data")
    with start_runtime(job.deepspeed, recipe.precision, recipe.deterministic) as runtime:
        parts.end("processes")
        training = build(job, starting_point(job, runtime), runtime)
        parts.end("network and folder")
        steps = training.loader.epoch(0)
        batch = next(steps)
        parts.end("first batch")
        training.network.train()
        training.step(batch, 0)
        parts.end("first step")
        memory = {"after the first step": own_memory()}
        del steps  # ends the reading of its epoch
        training.progress.step = 0
        epoch = training._train_epoch()
        parts.end("epoch")
        scores = training.scoring.scores()
        parts.end("scores")
        training._end_epoch(epoch, scores, 0.0)
        parts.end("log, charts, checkpoint")
        memory["after an epoch"] = own_memory()
        for count in range(2, options.epochs + 1):
            training._end_epoch(training._train_epoch(), training.scoring.scores(), 0.0)
            memory[f"after epoch {count}"] = own_memory()
        training.monitor.close()
        slowest, used = (highest(runtime.gather_objects(times)) for times in (parts.seconds, parts.cpu))
        if runtime.is_main:
            images = training.loader.steps * training.loader.global_size
            rate = images / slowest["epoch"]
            write_json(options, {"seconds": slowest, "cpu": used, "memory": memory, "images/s": rate})


def highest(of_ranks: list[dict[str, float]]) -> dict[str, float]:
    """The highest value of all processes, by part."""
    return {part: max(values[part] for values in of_ranks) for part in of_ranks[0]}


def own_memory() -> float:
    """MiB that this process holds for itself; what it shares, as the cache of images, is not counted."""
    memory = psutil.Process().memory_info()
    return (memory.rss - memory.shared) / MIB


def measured(processes: int, options: argparse.Namespace, folder: Path) -> dict:
    """The results of `work` on so many processes."""
    result, run = folder / f"{processes}.json", folder / f"run_{processes}"
    words = [sys.executable, __file__, "--data", options.data, "--run", run, "--json", result]
    for name in ("network", "side", "batch", "epochs"):
        words += [f"--{name}", getattr(options, name)]
    started = []
    for rank in range(processes):
        environment: dict[str, object] = {"RANK": rank, "LOCAL_RANK": rank}
        environment |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": PORT, "ACCELERATE_USE_CPU": "true"}
        environment |= {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1}
        texts = {name: str(value) for name, value in environment.items()}
        output = (folder / f"{processes}_{rank}.log").open("w")
        started.append(subprocess.Popen([*map(str, words)], env=os.environ | texts, stdout=output, stderr=output))
    codes = [process.wait() for process in started]
    if any(codes):
        sys.exit((folder / f"{processes}_0.log").read_text()[-3000:])
    return read_results(result)


@contextmanager
def timed_command(into: dict, name: str) -> Iterator[None]:
    """Measure the clock, the processor time and the peak memory of the commands run in the block."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    yield
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    into[name] = {"seconds": time.perf_counter() - began, "cpu": seconds}


def commands(run: Path, options: argparse.Namespace, folder: Path) -> dict:
    """Seconds of the commands that follow a training."""
    took: dict[str, dict] = {}
    for name, words in {
        "evaluate.py": ["train/evaluate.py", run, "--split", "val"],
        "report.py": ["train/report.py", run, "--out", folder / "report"],
        "export.py": ["train/export.py", run, "--out", folder / "export.nc", "--format", "netcdf"],
    }.items():
        with timed_command(took, name):
            run_checked([sys.executable, __file__, "--peak", folder / "peak", "--", *words])
        took[name]["peak"] = float((folder / "peak").read_text())
    pages = [path.stat().st_size for path in (folder / "report").glob("*.html")]
    took["report.py"]["page"] = sum(pages) / MIB
    return took


def with_peak(options: argparse.Namespace) -> None:
    """Run a command, and write the peak of its memory in MiB."""
    done = subprocess.run([sys.executable, *options.command], cwd=ROOT, check=False)
    options.peak.write_text(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024))
    sys.exit(done.returncode)


def pack(options: argparse.Namespace, folder: Path) -> float:
    """Make the recording; returns the seconds that packing took."""
    from synthetic import write_images

    write_images(folder / "source", options.stimuli, options.side, options.sites, HELD_OUT)
    began = time.perf_counter()
    run_checked([sys.executable, "data_prep/pack.py", "folder", folder / "source", "--out", options.data])
    return time.perf_counter() - began


def main() -> None:
    """Pack, measure, print."""
    parser = options_of(__doc__)
    parser.add_argument("--stimuli", type=int, default=22248)
    parser.add_argument("--sites", type=int, default=1024)
    parser.add_argument("--side", type=int, default=64, help="of the images, in pixels")
    parser.add_argument("--network", default="test_resnet")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=3, help="whose memory is looked at")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--peak", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("command", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        return with_peak(options)
    if options.run:
        return work(options)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        options.data = options.data or folder / "data"
        if not options.data.exists():
            print(f"packed in {pack(options, folder):.1f} s", flush=True)
        runs = {processes: measured(processes, options, folder) for processes in options.processes}
        print(f"load average {os.getloadavg()[0]:.1f}")
        print(table_of(runs))
        after = commands(folder / f"run_{options.processes[0]}", options, folder)
        print(json.dumps(after, indent=1))
        write_json(options, {"runs": runs, "commands": after})


def table_of(runs: dict[int, dict]) -> str:
    """Seconds of each part, images per second and memory, by number of processes."""
    counts = [f"{count} process{'es' if count > 1 else ''}" for count in runs]
    rows = [["", *(column for count in counts for column in (count, "processor time"))]]
    first = next(iter(runs.values()))
    for part in first["seconds"]:
        pairs = [(run["seconds"][part], run["cpu"][part]) for run in runs.values()]
        rows.append([f"{part} (s)", *(f"{value:.2f}" for pair in pairs for value in pair)])
    rows.append(["images/s", *(text for run in runs.values() for text in (number(run["images/s"]), ""))])
    for moment in first["memory"]:
        cells = [(f"{run['memory'][moment]:.0f}", "") for run in runs.values()]
        rows.append([f"memory {moment} (MiB)", *(text for pair in cells for text in pair)])
    return table(rows)


if __name__ == "__main__":
    main()
