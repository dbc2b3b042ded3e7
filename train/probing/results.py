"""What a probe leaves: scores and predictions, a table, and the figure of explained variance by layer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.common.atomic_writes import write_bytes, write_json, write_npz
from data_prep.shards.manifest import to_json_list
from train.evaluation.layer_figure import layer_figure, layer_label
from train.evaluation.metrics_report import regression_block, report_head
from train.evaluation.moments import SiteMoments
from train.probing.layers import Layer
from train.probing.preparation import Job
from train.run.folder import LEFT_OUT
from train.run.monitor import Monitor

SHUFFLED = "shuffled responses"
CEILED = {"ceiled EV": "ceiled_explained_variance", "FEVE": "feve"}


def results(job: Job, found: Mapping[str, Layer], ranks: int) -> tuple[dict[str, Any], np.ndarray]:
    """The content of metrics.json, and the predictions of the layer that each partition's inner folds chose."""
    chosen = [
        max(found, key=lambda layer: np.nan_to_num(found[layer].inner_r2[index], nan=-np.inf))
        for index in range(len(job.partitions))
    ]
    best = np.full(job.rates.shape, np.nan, np.float32)
    for layer, partition in zip(chosen, job.partitions, strict=True):
        best[partition.held_out] = found[layer].prediction[partition.held_out]
    ids, rates = job.stimulus_ids, job.rates[job.scored]
    head = report_head([ids[i] for i in job.scored], rates, job.manifest, job.split, ranks)
    layers = {layer: _layer_report(job, of) for layer, of in found.items()}
    metrics = head | {
        "regression": _block(job, best[job.scored]),
        "layers": layers,
        "chosen": max(found, key=chosen.count),
        "selected_on": [_selected_on(job)],
    }
    metrics |= job.screening.facts()
    if len(chosen) > 1:
        metrics["chosen_by_fold"] = chosen
    else:
        metrics["training_stimuli"] = len(job.partitions[0].fit)
    if job.recipe.shuffle_responses:
        metrics["control"] = SHUFFLED
    return metrics, best[job.scored]


def _selected_on(job: Job) -> str:
    inner = "leave-one-out" if job.recipe.readout == "ridge" else f"{job.recipe.inner_folds} folds"
    return f"train, {inner}" if job.split != "cv" else f"the other folds, {inner}"


def _block(job: Job, prediction: np.ndarray) -> dict[str, Any]:
    rates = job.rates[job.scored]
    moments = SiteMoments.of(torch.from_numpy(prediction), torch.from_numpy(rates))
    return regression_block(moments, prediction, rates, job.manifest, job.noise)


def _layer_report(job: Job, layer: Layer) -> dict[str, Any]:
    block = {
        "features": layer.features,
        "regression": _block(job, layer.prediction[job.scored]),
        "inner_r2": to_json_list([float(np.mean(layer.inner_r2))])[0],
    }
    if layer.penalty:
        block["penalty"] = [to_json_list(penalty) for penalty in layer.penalty]
    if layer.centre:
        block["field_centre"] = [[to_json_list(axis) for axis in centre] for centre in layer.centre]
    likeness = {"rsa": layer.rsa, "cka": layer.cka}
    return block | {name: value for name, value in likeness.items() if np.isfinite(value)}


def table(metrics: Mapping[str, Any]) -> str:
    """The layers' scores as a Markdown table."""
    ceiled = [(name, key) for name, key in CEILED.items() if key in metrics["regression"]]
    titles = ["layer", "features", "R2", "EV", "r", *(name for name, _ in ceiled), "inner R2", "RSA", "CKA"]
    lines = [f"| {' | '.join(titles)} |", "|" + " --- |" * len(titles)]
    for layer, block in metrics["layers"].items():
        regression = block["regression"]
        low, high = regression["r2"]["ci95"] or (None, None)
        shown = ["explained_variance", "pearson_r", *(key for _, key in ceiled)]
        scores = [regression[name]["mean"] for name in shown]
        scores += [block["inner_r2"], block.get("rsa"), block.get("cka")]
        cells = [f"{_number(regression['r2']['mean'])} [{_number(low)}, {_number(high)}]", *map(_number, scores)]
        mark = " (chosen)" if layer == metrics["chosen"] else ""
        lines.append(f"| {layer_label(layer)}{mark} | {block['features']:,} | {' | '.join(cells)} |")
    named = {f"{name}: relative to {metrics['regression'][key]['ceiling']}" for name, key in ceiled}
    return "\n".join([*lines, *(["", *sorted(named)] if named else [])])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def write_results(
    job: Job, found: Mapping[str, Layer], metrics: dict[str, Any], prediction: np.ndarray, monitor: Monitor
) -> None:
    """Write metrics.json, predictions.npz, the table and the figure of explained variance by layer.

    Ridge on train also has predictions of its own training stimuli, each from the others; they lie beside, as those of
    the split `left_out`.
    """
    target = job.folder.evaluation(job.split)
    _write_predictions(job, target, job.scored, prediction)
    left_out = found[metrics["chosen"]].left_out
    if len(job.partitions) == 1 and left_out:
        _write_predictions(job, job.folder.evaluation(LEFT_OUT), job.partitions[0].fit, left_out[0])
    figure = layer_figure(metrics)
    write_bytes(target / "layers.png", figure)
    monitor.board.figure("explained variance by layer", figure, step=0)
    write_bytes(target / "table.md", (table(metrics) + "\n").encode())
    write_json(target / "metrics.json", metrics)  # last: it says that all is there


def _write_predictions(job: Job, folder: Path, positions: np.ndarray, prediction: np.ndarray) -> None:
    ids = job.stimulus_ids
    write_npz(
        folder / "predictions.npz",
        {
            "stimulus_id": np.array([ids[i] for i in positions]),
            "site_id": np.array(job.manifest.site_ids),
            "prediction": prediction,
            "target": job.rates[positions],
        },
    )
