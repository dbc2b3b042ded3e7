"""Runs a probe: inner products, regressions, scores, results."""

import hashlib
import time
from pathlib import Path

from train.distributed.runtime import Runtime
from train.probing.layer_regressions import LayerRegressions
from train.probing.preparation import ProbeJob
from train.probing.product_store import ProductStore
from train.probing.results import layer_table, score_layers, write_results
from train.run.monitor import Monitor


def scratch_folder(scratch: Path | None, out: Path) -> Path:
    """The folder for activations; in a folder that several probes share, each has one of its own."""
    if scratch is None:
        return out / "scratch"
    out = out.resolve()
    return scratch / f"{out.name}-{hashlib.sha256(str(out).encode()).hexdigest()[:8]}"


def run(job: ProbeJob, scratch: Path, runtime: Runtime, monitor: Monitor) -> None:
    """Run a probe on all ranks; the leading one writes the results."""
    started = time.monotonic()
    runtime.check_agreement(job.plan())
    job.extractor.to(runtime.device)
    monitor.log(job.describe())
    products = ProductStore(job.recipe, job.splits, job.images, job.extractor, scratch, runtime, job.workers, monitor)
    results = LayerRegressions(job.recipe, job.layers, job.partitions, job.rates, products, runtime).run()
    if runtime.is_main:
        scores = score_layers(job, results, runtime.ranks)
        write_results(job, scores, monitor)
        monitor.add_epoch({"seconds": time.monotonic() - started})
        monitor.log(layer_table(scores.metrics))
        monitor.log(f"written to {job.folder.evaluation(job.split)}")
    runtime.barrier()
    products.clear()
