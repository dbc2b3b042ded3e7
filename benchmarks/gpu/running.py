"""Runs entries one by one, each in a process of its own, within limits of time.

An entry's process is forked from a server that has imported torch and the project, but has not touched the GPU: it
starts at once, with settings, memory statistics and process group of its own, and a crash or a hang costs one entry.
"""

import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path

from harness import last_line

from gpu.entries import Entry, Part, Place
from gpu.results import FAILED, OUT_OF_TIME, SKIPPED, OutOfTime, Result, ResultsFile, Skipped

# What entries and the commands that they start import; none of it may touch a GPU.
PRELOADED = ["gpu.speed", "gpu.probe", "gpu.resume", "gpu.faults", "train.probing.layer_regressions"]
LEAST_SECONDS = 1.0  # with less left, an entry is not started
SECONDS_TO_END = 10.0  # that a process may take to end once it has answered
FORKED_TOO_LATE = "in forked subprocess"  # in torch's message if the server had touched the GPU after all
Runner = Callable[[Part, Entry, Place, float], Result]
"""Runs an entry of a part in a place for at most some seconds."""


def make_part(made_by: str, place: Place) -> Part:
    """Call the function MODULE:FUNCTION that makes a part."""
    module, function = made_by.split(":")
    return getattr(importlib.import_module(module), function)(place.form)


def run_part(part: Part, place: Place, runner: Runner, results: ResultsFile, deadline: float) -> None:
    """Run all entries of a part; those that `deadline` (of time.monotonic) leaves no time for are out of time."""

    def run(entry: Entry) -> None:
        left = deadline - time.monotonic()
        if left < LEAST_SECONDS:
            result = Result(part.name, entry.name, OUT_OF_TIME, "not started")
        else:
            result = runner(part, entry, place, min(left, entry.seconds))
        if result.outcome == OUT_OF_TIME:
            place.mark_out_of_time(entry.name)
        results.add(result)

    for stage in part.stages:
        with ThreadPoolExecutor(part.together) as pool:
            for _ in pool.map(run, stage):
                pass


def run_here(part: Part, entry: Entry, place: Place, seconds: float) -> Result:
    """Run an entry in this process, however long it takes."""
    started = time.monotonic()
    try:
        return Result.of(part.name, entry.name, entry.work(place), time.monotonic() - started)
    except Skipped as reason:
        return Result(part.name, entry.name, SKIPPED, str(reason), seconds=round(time.monotonic() - started, 2))
    except OutOfTime as reason:
        return Result(part.name, entry.name, OUT_OF_TIME, str(reason), seconds=round(time.monotonic() - started, 2))
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
        return Result(part.name, entry.name, FAILED, message, seconds=round(time.monotonic() - started, 2))


class OwnProcess:
    """A runner that starts a process for each entry.

    Args:
        log: file to which the output of each entry is appended.
    """

    def __init__(self, log: Path):
        self._log, self._lock = log, threading.Lock()
        log.write_text("")
        # Counts GPUs without starting CUDA, after which a process must not be forked.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        self._context: ForkServerContext | SpawnContext = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)

    def __call__(self, part: Part, entry: Entry, place: Place, seconds: float) -> Result:
        """Run an entry; it and all that it started are killed when its time is up."""
        result = self._run(part, entry, place, seconds)
        if isinstance(self._context, ForkServerContext) and FORKED_TOO_LATE in result.message:
            self._context = multiprocessing.get_context("spawn")  # seconds slower for each entry
            result = self._run(part, entry, place, seconds)
        return result

    def _run(self, part: Part, entry: Entry, place: Place, seconds: float) -> Result:
        name = "".join(letter if letter.isalnum() else "_" for letter in f"{part.name} {entry.name}")
        answer, log = place.folder / f"{name}.answer", place.folder / f"{name}.log"
        answer.unlink(missing_ok=True)
        log.write_text("")
        process = self._context.Process(
            target=answer_in_file, args=(part.made_by or f"gpu.{part.name}:part", entry.name, place, answer, log)
        )
        started = time.monotonic()
        process.start()
        assert process.pid is not None
        deadline = started + seconds
        while process.is_alive() and (left := deadline - time.monotonic()) > 0:
            process.join(min(left, 0.1))
            if answer.exists():
                deadline = min(deadline, answer.stat().st_mtime - time.time() + time.monotonic() + SECONDS_TO_END)
        took = round(time.monotonic() - started, 2)
        still_runs = process.is_alive()
        with suppress(ProcessLookupError, PermissionError):  # what it started belongs to its process group
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
        self._keep(f"{part.name}: {entry.name}", log)
        if answer.exists():
            result = replace(Result(**json.loads(answer.read_text())), seconds=took)
            return (
                replace(result, outcome=FAILED, message="done, but its process does not end") if still_runs else result
            )
        if still_runs:
            return Result(part.name, entry.name, OUT_OF_TIME, f"stopped after {seconds:.0f} s", seconds=took)
        last_words = last_line(log.read_text(errors="replace"))[:300] or "no output"
        message = f"its process ended with exit code {process.exitcode}: {last_words}"
        return Result(part.name, entry.name, FAILED, message, seconds=took)

    def _keep(self, title: str, log: Path) -> None:
        with self._lock, self._log.open("a") as file:
            file.write(f"======== {title}\n{log.read_text(errors='replace')}\n")


def answer_in_file(made_by: str, entry_name: str, place: Place, answer: Path, log: Path) -> None:
    """In an entry's process: run it and write its result to a file; all that it prints goes to its log."""
    os.setpgid(0, 0)
    threading.Thread(target=end_with_parent, daemon=True).start()
    with log.open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    part = make_part(made_by, place)
    result = run_here(part, part.entry(entry_name), place, 0)
    used = os.times()
    print(
        f"CPU seconds: {used.user + used.system:.1f}, and {used.children_user + used.children_system:.1f} of children"
    )
    sys.stdout.flush()
    partial = answer.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(result)))
    partial.rename(answer)


def end_with_parent() -> None:
    """End this entry and all that it started when the check itself is gone, which can no longer stop them."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "an entry is started by multiprocessing"
    multiprocessing.connection.wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)
