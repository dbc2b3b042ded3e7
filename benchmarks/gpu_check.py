"""Run the checks that need a GPU, in under 8 minutes and offline.

    bash benchmarks/gpu_check.sh [OUT]

- strategies: train/finetune.py trains a small network under every strategy, in float32 and bf16 (and fp16 under DDP);
  the losses of both epochs are compared with those of the same recipe under DDP on the CPU (for fp16: in float32).
- host: no call in a training step makes the host wait for the GPU (benchmarks/host_sync.py).
- speed: images a second of four networks, in bf16 with fused AdamW, fed by the loader against a batch that stays on the
  GPU, and one of them compiled (benchmarks/throughput.py).
- memory: their measured peak against the estimate of train/planning/memory.py.

OUT/gpu_check.json and OUT/gpu_check.md (by default in runs/gpu_check) get a line for each check, as it comes; the logs
of what failed lie beside them. Exits with 1 if a check failed. Without a GPU (or with ACCELERATE_USE_CPU=true) all
strategies are compared with DDP on the CPU and one small network is timed, in under 4 minutes; the rest is skipped.
"""

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from harness import ROOT, CommandFailed, read_results, run_alone, table
from synthetic import GIB, STRATEGIES, pack_jpegs, pack_simulated, setting_of

from train.distributed.launch_environment import uses_gpu
from train.planning.memory import HEADROOM

LIMITS = {True: 450.0, False: 225.0}  # s for everything, with and without a GPU
STRATEGY_SECONDS = {True: 170.0, False: 150.0}
HOST_SECONDS, SPEED_SECONDS, COMPILE_SECONDS = 60.0, 80.0, 120.0  # the latter two for each network
# A network without batch statistics, whose losses a small difference does not drive apart.
SMALL = [
    *("--backbone.name", "test_convnext", "--backbone.weights", "random", "--optimizer.lr", "1e-3", "--epochs", "2"),
    *("--batch.global-size", "32", "--batch.per-device", "16", "--optimizer.clip-norm", "0.5", "--loader.workers", "0"),
]
# The largest relative difference of an epoch's loss. On one device strategies differ by float32 sums in another order;
# a GPU has other kernels, and rounds bf16 and fp16 elsewhere.
TOLERANCE = {(False, "fp32"): 1e-5, (True, "fp32"): 1e-3, (True, "bf16"): 2e-2, (True, "fp16"): 5e-2}
LEAST_FED = 0.97  # of the images a second with a batch that stays on the GPU
MEMORY = (0.7, 1 / (1 - HEADROOM))  # measured peak as a part of the estimate; what is above it the headroom must hold
ON_GPU = (("resnet50", 224, 128), ("resnet152", 224, 64), ("densenet169", 224, 64), ("tf_efficientnet_b6", 528, 16))
ON_CPU = (("test_resnet", 64, 16),)  # network, px, stimuli
COMPILED = "resnet50"


@dataclass
class Line:
    """The outcome of a check.

    Attributes:
        part, check: what was checked.
        measured, required: in words.
        result: PASS, FAIL or SKIP.
    """

    part: str
    check: str
    measured: str
    required: str
    result: str


class Report:
    """The lines so far, printed and written to files with each new line.

    Args:
        out: folder of the files.
        on_gpu: whether there is a GPU.
    """

    def __init__(self, out: Path, on_gpu: bool):
        self.out, self.on_gpu = out, on_gpu
        self.lines: list[Line] = []
        self._started = time.monotonic()
        self._device = torch.cuda.get_device_name(0) if on_gpu else f"no GPU; CPU, {os.cpu_count()} cores"
        out.mkdir(parents=True, exist_ok=True)

    def left(self, most: float) -> float:
        """Seconds left for a part, at most `most`."""
        return min(most, LIMITS[self.on_gpu] - (time.monotonic() - self._started))

    def add(self, part: str, check: str, measured: str, required: str, passed: bool | None) -> None:
        """Add the outcome of a check; `passed` is None if it was skipped."""
        result = {True: "PASS", False: "FAIL", None: "SKIP"}[passed]
        self.lines.append(Line(part, check, measured, required, result))
        print(f"{result}  {part}: {check}: {measured} (required: {required})", flush=True)
        self._write()

    def log(self, name: str, output: str) -> None:
        """Write the output of a command that failed."""
        (self.out / f"{name.replace(' ', '_')}.log").write_text(output)

    @property
    def failed(self) -> bool:
        """Whether a check failed."""
        return any(line.result == "FAIL" for line in self.lines)

    def _write(self) -> None:
        seconds = round(time.monotonic() - self._started)
        facts = {"device": self._device, "torch": torch.__version__, "python": platform.python_version()}
        facts |= {"seconds": seconds, "lines": [asdict(line) for line in self.lines]}
        (self.out / "gpu_check.json").write_text(json.dumps(facts, indent=1))
        rows = [
            ["part", "check", "measured", "required", "result"],
            *(list(asdict(line).values()) for line in self.lines),
        ]
        text = f"{self._device}; torch {torch.__version__}; {seconds} s\n\n{table(rows)}\n"
        (self.out / "gpu_check.md").write_text(text)


def last_words(code: int | None, output: str) -> str:
    """How a command ended: its exit code and last line."""
    words = output.strip().splitlines()[-1:] or [""]
    return f"{'out of time' if code is None else f'exit code {code}'}: {words[0][:120]}"


@dataclass(frozen=True)
class Small:
    """A run of the small network."""

    strategy: str
    precision: str
    on_gpu: bool

    @property
    def name(self) -> str:
        """Name in tables and files."""
        return f"{self.strategy} {self.precision} {'GPU' if self.on_gpu else 'CPU'}"


def small_runs(on_gpu: bool) -> list[Small]:
    """The runs to train, references on the CPU first."""
    precisions = ("fp32", "bf16") if on_gpu else ("fp32",)
    runs = [Small("ddp", precision, False) for precision in precisions]
    runs += [Small(strategy, precision, on_gpu) for precision in precisions for strategy in STRATEGIES]
    return list(dict.fromkeys([*runs, *([Small("ddp", "fp16", True)] if on_gpu else [])]))


def train_small(run: Small, data: Path, threads: int, report: Report, deadline: float) -> list[float] | str:
    """Train; returns the loss of each epoch, or how the run ended if it failed."""
    out = data.parent / run.name.replace(" ", "_")
    words = [sys.executable, "train/finetune.py", "--data", data, "--out", out, *SMALL]
    words += ["--precision", run.precision, "--strategy", setting_of(run.strategy)]
    environment = {"OMP_NUM_THREADS": str(threads), "ACCELERATE_USE_CPU": str(not run.on_gpu).lower()}
    code, output = run_alone(words, deadline - time.monotonic(), **environment)
    if code != 0:
        report.log(run.name, output)
        return last_words(code, output)
    return [json.loads(line)["loss"] for line in (out / "history.jsonl").read_text().splitlines()]


def check_strategies(report: Report, data: Path) -> None:
    """Every strategy trains the model that DDP trains on the CPU."""
    runs, cores = small_runs(report.on_gpu), os.cpu_count() or 1
    together = min(max(cores // 2, 2), 4)  # starting takes longest, and a GPU has room for some
    deadline = time.monotonic() + report.left(STRATEGY_SECONDS[report.on_gpu])
    losses_of: dict[Small, list[float] | str] = {}
    with ThreadPoolExecutor(together) as pool:
        ends = pool.map(lambda run: train_small(run, data, max(cores // together, 1), report, deadline), runs)
        for run, losses in zip(runs, ends, strict=True):
            losses_of[run] = losses
            add_losses(report, run, losses, losses_of[reference_of(run)])


def reference_of(run: Small) -> Small:
    """The run on the CPU to compare a run with; for fp16, which CPUs lack, it is float32."""
    return Small("ddp", "fp32" if run.precision == "fp16" else run.precision, False)


def add_losses(report: Report, run: Small, losses: list[float] | str, reference: list[float] | str) -> None:
    """The outcome of a run of the small network."""
    if run == reference_of(run) or isinstance(losses, str):
        measured = losses if isinstance(losses, str) else ", ".join(f"{loss:.4f}" for loss in losses)
        report.add("strategies", run.name, measured, "it trains", not isinstance(losses, str))
        return
    most = TOLERANCE[run.on_gpu, run.precision]
    required = f"losses within {most:.0e} of {reference_of(run).name}"
    if isinstance(reference, str):
        report.add("strategies", run.name, "no reference to compare with", required, False)
        return
    difference = max(abs(a / b - 1) for a, b in zip(losses, reference, strict=True))
    report.add("strategies", run.name, f"{difference:.1e}", required, difference <= most)


def check_host(report: Report, data: Path) -> None:
    """No step makes the host wait for the GPU."""
    result, required = data.parent / "host.json", "no call that waits for the GPU"
    if not report.on_gpu:
        report.add("host", "training step", "no GPU", required, None)
        return
    words = [sys.executable, "benchmarks/host_sync.py", "--data", data, "--json", result]
    code, output = run_alone(words, report.left(HOST_SECONDS))
    faults = read_results(result)
    if faults is None:
        report.log("host", output)
        report.add("host", "training step", last_words(code, output), required, False)
        return
    for recipe, fault in faults.items():
        report.add("host", recipe, fault or "none", required, fault is None)


def time_network(
    report: Report, data: Path, case: tuple[str, int, int], compiled: bool = False
) -> dict[str, float] | None:
    """Measure a network in its own process; returns None if it failed, which is reported."""
    network, side, batch = case
    name = f"{network}{' compiled' * compiled}"
    result = data.parent / f"{name}.json"
    words = [sys.executable, "benchmarks/throughput.py", "--data", data, "--network", network, "--side", side]
    words += ["--batch", batch, "--seconds", 5 if report.on_gpu else 2, "--json", result, *["--compile"] * compiled]
    most = COMPILE_SECONDS if compiled else SPEED_SECONDS
    code, output = run_alone(words, report.left(most), OMP_NUM_THREADS="1")
    measured = read_results(result)
    if measured is None:
        report.log(name, output)
        report.add("speed", name, last_words(code, output), "it trains", False)
    return measured


def check_network(report: Report, data: Path, case: tuple[str, int, int]) -> dict[str, float] | None:
    """Check the speed and memory of a network; returns the measurements."""
    timed = time_network(report, data, case)
    if timed is None:
        return None
    name, synthetic, fed = f"{case[0]}, {case[1]} px, batch {timed['batch']}", timed["synthetic"], timed["fed"]
    finite = math.isfinite(timed["loss"])
    report.add("speed", f"{name}, one batch", f"{synthetic:,.1f} images/s", "the loss is finite", finite)
    # Without a GPU decoding and training share the cores.
    fast = fed >= LEAST_FED * synthetic if report.on_gpu else fed > 0
    required = f"{LEAST_FED} of one batch" if report.on_gpu else "it trains"
    measured = f"{fed:,.1f} images/s, {fed / synthetic:.3f}; the loader alone {timed['loader']:,.0f}"
    report.add("speed", f"{name}, fed", measured, required, fast)
    check_memory(report, name, timed)
    return timed


def check_memory(report: Report, name: str, timed: dict[str, float]) -> None:
    """Compare the measured peak with the estimate; on a CPU the peak includes more than tensors."""
    part, (least, most) = timed["peak"] / timed["estimate"], MEMORY
    measured = f"{timed['peak'] / GIB:.2f} GiB ({timed['peak_trying'] / GIB:.2f} while kernels are tried)"
    measured += f", estimated {timed['estimate'] / GIB:.2f}: {part:.2f}"
    passed = least <= part <= most if report.on_gpu else None
    report.add("memory", name, measured, f"{least:.2f} to {most:.2f} of the estimate", passed)


def check_compiled(report: Report, data: Path, case: tuple[str, int, int], eager: dict[str, float]) -> None:
    """The compiled network is no slower."""
    timed = time_network(report, data, (*case[:2], eager["batch"]), compiled=True)
    if timed is not None:
        gain = timed["synthetic"] / eager["synthetic"]
        measured = f"{timed['synthetic']:,.1f} images/s, {gain:.2f}x"
        report.add("speed", f"{case[0]} compiled, one batch", measured, "no slower than not compiled", gain >= 1)


def check_speed(report: Report, simulated: Path) -> None:
    """Check all networks, one after the other."""
    data, cases = simulated, ON_CPU
    if report.on_gpu:
        data, cases = pack_jpegs(simulated.with_name("jpegs"), images=256, stimuli=20480), ON_GPU
    timed = {case: check_network(report, data, case) for case in cases}
    for case, eager in timed.items():
        if case[0] == COMPILED and eager is not None:
            check_compiled(report, data, case, eager)


def check(report: Report, folder: Path) -> None:
    """Run every part, even if another fails."""
    data = pack_simulated(folder / "data", 64)
    parts = {
        "strategies": lambda: check_strategies(report, data),
        "host": lambda: check_host(report, data),
        "speed": lambda: check_speed(report, data),
    }
    for name, part in parts.items():
        try:
            part()
        except (Exception, CommandFailed) as error:
            report.add(name, "the check itself", f"{type(error).__name__}: {error}", "it runs", False)


def main() -> None:
    """Check everything and print where the results are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "runs" / "gpu_check")
    report = Report(parser.parse_args().out.resolve(), uses_gpu())
    if not report.on_gpu:
        print(
            "There is NO GPU here (or ACCELERATE_USE_CPU is set): checking what can be checked on the CPU", flush=True
        )
    with tempfile.TemporaryDirectory() as folder:
        check(report, Path(folder))
    print(f"\n{(report.out / 'gpu_check.md').read_text()}\nwritten to {report.out}")
    sys.exit(1 if report.failed else 0)


if __name__ == "__main__":
    main()
