"""What a probe writes: metrics.json, predictions.npz, a table, and a figure of explained variance by layer."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.common.atomic_writes import write_bytes, write_json
from data_prep.common.markdown import markdown_table
from data_prep.shards.manifest import to_json_list
from train.evaluation.comparison import compared_models
from train.evaluation.confidence_intervals import ResampledScores
from train.evaluation.figures.layer_figure import layer_figure, layer_label
from train.evaluation.metrics_file import METRICS_FILE
from train.evaluation.metrics_report import SHUFFLED_CONTROL, regression_block, report_head, resampled_scores
from train.evaluation.moments import SiteMoments
from train.evaluation.predictions_file import Predictions
from train.evaluation.seen_stimuli import mark_of, seen_in, selected_on
from train.probing.layer_results import LayerResult
from train.probing.preparation import ProbeJob
from train.run.folder import LEFT_OUT
from train.run.monitor import Monitor

CHARTED = ("r2", "explained_variance", "mse", "pearson_r")
CEILED_COLUMNS = {"ceiled EV": "ceiled_explained_variance", "FEVE": "feve"}
MEDIAN_COLUMNS = {"median r²": "squared_pearson_r", "median r²_ER": "r2_er"}  # as other papers report them


@dataclass(frozen=True)
class ProbeScores:
    """The results of a probe.

    Attributes:
        metrics: the content of metrics.json.
        chosen_by_fold: the layer that each partition's inner folds chose.
        prediction: of the scored stimuli, each by the layer that its partition's inner folds chose: float32
            (stimuli, sites).
        left_out: predictions of the training stimuli by the chosen layer, each from the others: float32
            (stimuli, sites); None except for a ridge that was fitted on train.
    """

    metrics: dict[str, Any]
    chosen_by_fold: list[str]
    prediction: np.ndarray
    left_out: np.ndarray | None


def score_layers(job: ProbeJob, results: Mapping[str, LayerResult], ranks: int) -> ProbeScores:
    """Score every layer, and choose one by the inner folds."""
    chosen_by_fold = [_best_layer(results, fold) for fold in range(len(job.partitions))]
    chosen = max(results, key=chosen_by_fold.count)
    prediction = np.full((len(job.scored), job.rates.shape[1]), np.nan, np.float32)
    for layer, partition in zip(chosen_by_fold, job.partitions, strict=True):
        rows = np.searchsorted(job.scored, partition.held_out)
        prediction[rows] = results[layer].prediction[rows]
    scored_ids = [job.stimulus_ids[position] for position in job.scored]
    metrics = report_head(scored_ids, job.rates[job.scored], job.manifest, job.split, ranks)
    resampled = {layer: _resampled(job, result.prediction) for layer, result in results.items()}
    layers = {layer: _layer_block(job, result, resampled[layer]) for layer, result in results.items()}
    _add_standings(layers, resampled, len(job.scored))
    of_all = resampled[chosen] if len(job.partitions) == 1 else _resampled(job, prediction)
    metrics |= {
        "regression": _regression_block(job, prediction, of_all),
        "layers": layers,
        "chosen": chosen,
        "selected_on": selected_on([_selected_on(job)], job.split, job.seen),
        "seen": job.seen.content(),
    }
    metrics |= job.bad_samples.facts()
    left_out = None
    if len(job.partitions) > 1:
        metrics["chosen_by_fold"] = chosen_by_fold
    else:
        metrics["training_stimuli"] = len(job.partitions[0].fit)
        if results[chosen].left_out:
            left_out = np.ascontiguousarray(results[chosen].left_out[0][:].T)
    if job.recipe.shuffle_responses:
        metrics["control"] = SHUFFLED_CONTROL
    return ProbeScores(metrics, chosen_by_fold, prediction, left_out)


def _best_layer(results: Mapping[str, LayerResult], fold: int) -> str:
    return max(results, key=lambda layer: np.nan_to_num(results[layer].inner_r2[fold], nan=-np.inf))


def _selected_on(job: ProbeJob) -> str:
    inner = "leave-one-out" if job.recipe.readout == "ridge" else f"{job.recipe.inner_folds} folds"
    return f"the other folds, {inner}" if job.split == "cv" else f"train, {inner}"


def _resampled(job: ProbeJob, prediction: np.ndarray) -> ResampledScores:
    return resampled_scores(prediction, job.rates[job.scored], job.manifest, job.noise)


def _regression_block(job: ProbeJob, prediction: np.ndarray, resampled: ResampledScores) -> dict[str, Any]:
    rates = job.rates[job.scored]
    moments = SiteMoments.of(torch.from_numpy(prediction), torch.from_numpy(rates))
    return regression_block(moments, prediction, rates, job.manifest, job.noise, resampled)


def _add_standings(layers: dict[str, dict[str, Any]], resampled: Mapping[str, ResampledScores], stimuli: int) -> None:
    """Add to each layer how it stands among all by R2: what holds for one of many chosen by chance does not count."""
    scores = {layer: block["regression"]["r2"]["mean"] for layer, block in layers.items()}
    known = [layer for layer, score in scores.items() if score is not None and "r2" in resampled[layer].means]
    values = {number: resampled[layer].means["r2"] for number, layer in enumerate(known)}
    models = compared_models({number: scores[layer] for number, layer in enumerate(known)}, values, stimuli)
    if models is None:
        return
    for layer, standing in zip(known, models.standings(), strict=True):
        layers[layer]["standing"] = standing.content()


def _layer_block(job: ProbeJob, result: LayerResult, resampled: ResampledScores) -> dict[str, Any]:
    block = {
        "features": result.features,
        "regression": _regression_block(job, result.prediction, resampled),
        "inner_r2": to_json_list([float(np.mean(result.inner_r2))])[0],
    }
    if result.penalty:
        block["penalty"] = [to_json_list(penalty) for penalty in result.penalty]
    if result.window_centre:
        block["field_centre"] = [[to_json_list(axis) for axis in centre] for centre in result.window_centre]
    if result.components:
        block["components"] = asdict(result.components)
    for name, value in (("rsa", result.similarity.rsa), ("cka", result.similarity.cka)):
        if np.isfinite(value):
            block[name] = value
    return block


def layer_table(metrics: Mapping[str, Any]) -> str:
    """The layers' scores as a Markdown table."""
    ceiled = {title: name for title, name in CEILED_COLUMNS.items() if name in metrics["regression"]}
    medians = {title: name for title, name in MEDIAN_COLUMNS.items() if name in metrics["regression"]}
    titles = ["layer", "features", "R2", "EV", "Pearson r", *ceiled, *medians, "inner R2", "RSA", "CKA"]
    rows = []
    for layer, block in metrics["layers"].items():
        regression = block["regression"]
        low, high = regression["r2"]["ci95"] or (None, None)
        scores = [regression[name]["mean"] for name in ("explained_variance", "pearson_r", *ceiled.values())]
        scores += [regression[name]["median"] for name in medians.values()]
        scores += [block["inner_r2"], block.get("rsa"), block.get("cka")]
        mark = " (chosen)" if layer == metrics["chosen"] else ""
        cells = [
            f"{layer_label(layer)}{mark}",
            f"{block['features']:,}",
            f"{_number(regression['r2']['mean'])} [{_number(low)}, {_number(high)}]",
            *map(_number, scores),
        ]
        rows.append(cells)
    lines = [markdown_table(titles, rows), ""]
    lines += [f"seen before, of the stimuli that are scored: {mark_of(seen_in(metrics))}"]
    if ceiled:
        ceilings = {f"{title}: relative to {metrics['regression'][name]['ceiling']}" for title, name in ceiled.items()}
        lines += sorted(ceilings)
    if "brain_score" in metrics["regression"]:
        brain_score = metrics["regression"]["brain_score"]
        low, high = brain_score["ci95"] or (None, None)
        lines.append(
            f"Brain-Score of the chosen layer: {_number(brain_score['score'])} [{_number(low)}, {_number(high)}] "
            f"(as before January 2026: {_number(brain_score['before_2026_01']['score'])})"
        )
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def write_results(job: ProbeJob, scores: ProbeScores, monitor: Monitor) -> None:
    """Write metrics.json, predictions.npz, the table and the figure of explained variance by layer.

    Ridge on train also predicts its own training stimuli, each from the others; these predictions are written as those
    of the split `left_out`, except for stimuli that the network itself was fitted on.
    """
    folder = job.folder.evaluation(job.split)
    digest = _write_predictions(job, folder, job.scored, scores.prediction)
    if scores.left_out is not None:
        fit = job.partitions[0].fit
        left_out = ~job.network_fitted[fit]
        if left_out.any():
            _write_predictions(job, job.folder.evaluation(LEFT_OUT), fit[left_out], scores.left_out[left_out])
    figure = layer_figure(scores.metrics)
    write_bytes(folder / "layers.png", figure)
    if monitor.trackers is not None:
        monitor.trackers.figure("explained variance by layer", figure, step=0)
    monitor.describe(job.recipe, job.manifest.name, [job.split], "r2")
    regression = scores.metrics["regression"]
    means = {f"{job.split}/{name}": regression[name]["mean"] for name in CHARTED}
    monitor.scalars({name: mean for name, mean in means.items() if mean is not None}, step=0)
    write_bytes(folder / "table.md", (layer_table(scores.metrics) + "\n").encode())
    # Last: its presence means that everything is written.
    write_json(folder / METRICS_FILE, scores.metrics | {"predictions": digest})


def _write_predictions(job: ProbeJob, folder: Path, positions: np.ndarray, prediction: np.ndarray) -> str:
    stimulus_ids = [job.stimulus_ids[position] for position in positions]
    return Predictions(stimulus_ids, job.manifest.site_ids, prediction, job.rates[positions]).write(folder)
