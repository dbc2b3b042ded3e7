"""Runs a probe: activations, regressions, scores, results."""

import hashlib
import json
import time
from pathlib import Path

import numpy as np

from data_prep.common.markdown import tables_as_columns
from train.distributed.runtime import Runtime
from train.probing.layer_regressions import LayerRegressions
from train.probing.layer_results import ResultFiles
from train.probing.preparation import ProbeJob
from train.probing.product_store import ProductStore
from train.probing.results import layer_table, score_layers, write_results
from train.probing.saved_predictor import save_predictor
from train.probing.stored_layers import StoredLayers
from train.run.monitor import Monitor

UNRELATED = {"memory", "data", "timeout", "loader", "trackers"}  # settings that results do not depend on


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
    stored = StoredLayers(job.recipe, job.splits, job.images, job.extractor, scratch, runtime, job.workers)
    stored.clear_if_settings_changed()
    products = ProductStore(job.recipe, stored, runtime, monitor)
    files = ResultFiles(stored.folder / f"results-{_digest(job)}")
    regressions = LayerRegressions(job.recipe, job.layers, job.partitions, job.rates, products, files, runtime, monitor)
    results = regressions.run()
    monitor.log("scores ...")
    scores = score_layers(job, results, runtime.ranks) if runtime.is_main else None
    chosen = [] if scores is None else scores.chosen_by_fold
    forms = [regressions.dual_form(layer, partition) for partition, layer in enumerate(chosen)]
    save_predictor(job, forms, stored, runtime, monitor)
    if scores is not None:
        write_results(job, scores, monitor)
        monitor.add_epoch({"seconds": time.monotonic() - started})
        monitor.log(tables_as_columns(layer_table(scores.metrics)))
        monitor.log(f"written to {job.folder.evaluation(job.split)}")
    runtime.barrier()
    stored.clear()


def _digest(job: ProbeJob) -> str:
    """Of what regressions depend on, beside what they read."""
    settings = job.recipe.model_dump(mode="json", exclude=UNRELATED)
    depends_on = [job.split, settings, job.extractor.population]
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(job.rates).data)
    for partition in job.partitions:
        for positions in (partition.fit, partition.held_out, partition.copies, *partition.inner_folds):
            digest.update(repr(None if positions is None else positions.tolist()).encode())
    return digest.hexdigest()[:12]
