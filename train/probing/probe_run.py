"""Probe the layers, write the scores."""

import hashlib
import time
from pathlib import Path

from train.distributed.runtime import Runtime
from train.probing.layers import Probing
from train.probing.preparation import Job
from train.probing.products import Products
from train.probing.results import results, table, write_results
from train.run.monitor import Monitor


def scratch_folder(scratch: Path | None, out: Path) -> Path:
    """Where activations go; a folder that several probes are given holds one for each."""
    if scratch is None:
        return out / "scratch"
    out = out.resolve()
    return scratch / f"{out.name}-{hashlib.sha256(str(out).encode()).hexdigest()[:8]}"


def run(job: Job, scratch: Path, runtime: Runtime, monitor: Monitor) -> None:
    """Probe and write."""
    begun = time.monotonic()
    job.look.to(runtime.device)
    monitor.say(job.describe())
    products = Products(job.recipe, job.splits, job.look, scratch, runtime, job.workers, monitor)
    found = Probing(job.recipe, job.layers, job.partitions, job.rates, products, runtime).run()
    if runtime.is_main:
        metrics, prediction = results(job, found, runtime.ranks)
        write_results(job, found, metrics, prediction, monitor)
        monitor.epoch({"seconds": time.monotonic() - begun})
        monitor.say(table(metrics))
        monitor.say(f"written to {job.folder.evaluation(job.split)}")
    runtime.barrier()
    products.clear()
