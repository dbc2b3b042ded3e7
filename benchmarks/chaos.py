"""Kill and stop processes of runs at random moments: each run must end as if undisturbed.

    python benchmarks/chaos.py [--runs 50] [--processes 2] [--seed 0] [--epochs 12] [--timeout 10] [--json FILE]

Each run is one job, `launch/local.sh -n P --max-restarts 5 train/finetune.py ...` and then train/evaluate.py, started
again whenever it ends with exit code 75 (told to stop) or by a signal. While it runs, one to three faults strike: a
SIGKILL, SIGTERM or SIGSTOP each, to a random process of it at a random moment of its usual length, or as soon as it has
one; of its last process that runs, SIGSTOP waits for another, since nobody would be left to notice. Faults for which
the job is over before are not counted. At the end weights, losses and scores are compared, bit by bit, with those of a
run that nothing disturbed. A machine so busy that one process lets another wait for longer than the time-out needs a
longer one.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
from harness import ROOT, options_of, write_json
from safetensors.torch import load_file
from synthetic import pack_simulated

FAULTS = (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)
STOPPED = 75
STARTS = 12  # maximum per job
NETWORK = [
    *("--backbone.name", "test_convnext", "--backbone.weights", "random", "--precision", "fp32"),
    *("--batch.global-size", "16", "--images.size", "32", "--checkpoint.every-steps", "7"),
    *("--faults.start-timeout", "60"),
]


class Job:
    """A job: commands that are restarted until they succeed.

    Attributes:
        run: its folder.
        struck: descriptions of the faults that hit a process.
    """

    def __init__(self, folder: Path, name: str, data: Path, options: argparse.Namespace):
        self.run = folder / name
        self.struck: list[str] = []
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", "SPIKETUNE_JOB": name, "PYTHON": sys.executable}
        launcher = ["bash", "launch/local.sh", "-n", str(options.processes), "--max-restarts", "5"]
        finetune = ["train/finetune.py", "--data", data, "--out", self.run, *NETWORK]
        finetune += ["--epochs", options.epochs, "--faults.timeout", options.timeout]
        self._commands = [[*launcher, *finetune], [*launcher, "train/evaluate.py", self.run]]
        self._log = folder / f"{name}.txt"

    def finish(self, faults: list[tuple[float, signal.Signals]], draw: random.Random) -> str | None:
        """Run to the end while faults (seconds after the start, signal) strike; returns the failure, or None."""
        began, faults, starts = time.monotonic(), sorted(faults), 0
        for command in self._commands:
            while True:
                starts += 1
                if starts > STARTS:
                    return f"not done after {STARTS} starts"
                code = self._run(command, began, faults, draw)
                if code == 0:
                    break
                if 0 < code < 128 and code != STOPPED:  # a signal to the launcher itself is below 0
                    return f"{command[6]} ended with exit code {code}"
        return None

    def _run(self, command: list, began: float, faults: list, draw: random.Random) -> int:
        with self._log.open("a") as log:
            process = subprocess.Popen(
                [*map(str, command)], cwd=ROOT, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )
        while process.poll() is None:
            now = time.monotonic() - began
            if faults and now > faults[0][0] and self._strike(faults[0][1], draw):
                self.struck.append(f"{faults.pop(0)[1].name} at {now:.0f} s")
            time.sleep(0.05)
        return process.returncode

    def _strike(self, fault: signal.Signals, draw: random.Random) -> bool:
        """Send a signal to one of the job's processes; returns whether there was one."""
        running = [
            process
            for process in psutil.process_iter(["cmdline", "status"])
            if str(self.run) in (process.info["cmdline"] or [])
            and "processes.py" not in process.info["cmdline"][1]
            and process.info["status"] != psutil.STATUS_STOPPED
        ]
        if fault == signal.SIGSTOP and len(running) < 2:
            return False  # no process would be left to notice
        with suppress(psutil.Error, IndexError):
            draw.choice(running).send_signal(fault)
            return True
        return False

    def result(self) -> tuple:
        """Losses, weights and scores, which must be the same in every job."""
        history = [json.loads(line)["loss"] for line in (self.run / "history.jsonl").read_text().splitlines()]
        tensors = load_file(self.run / "checkpoints" / "last" / "network.safetensors")
        metrics = json.loads((self.run / "eval" / "val" / "metrics.json").read_text())
        return history, {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}, metrics["regression"]


def main() -> int:
    """Compare disturbed runs with an undisturbed one."""
    parser = options_of(__doc__)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--timeout", type=float, default=10, help="seconds until a process that hangs is given up")
    options = parser.parse_args()
    draw, outcomes = random.Random(options.seed), []
    struck: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = pack_simulated(folder / "data", 48)
        began = time.monotonic()
        undisturbed = Job(folder, "undisturbed", data, options)
        assert undisturbed.finish([], draw) is None, (folder / "undisturbed.txt").read_text()
        length, expected = time.monotonic() - began, undisturbed.result()
        for number in range(options.runs):
            job = Job(folder, f"run_{number}", data, options)
            faults = [(draw.uniform(2, length), draw.choice(FAULTS)) for _ in range(draw.randint(1, 3))]
            wrong = job.finish(faults, draw)
            if wrong is None and job.result() != expected:
                wrong = "another result"
            struck.update(fault.split()[0] for fault in job.struck)
            outcomes.append(wrong)
            faults_hit = ", ".join(job.struck) or "no fault hit"
            print(f"{number + 1}/{options.runs}: {wrong or 'as undisturbed'} ({faults_hit})", flush=True)
            if wrong:
                print((folder / f"run_{number}.txt").read_text()[-3000:], flush=True)
    good = outcomes.count(None)
    print(f"{good} of {options.runs} runs ended as if undisturbed; faults: {dict(struck)}")
    write_json(options, {"runs": options.runs, "as undisturbed": good, "faults": struck})
    return int(good < options.runs)


if __name__ == "__main__":
    sys.exit(main())
