"""Write run folders like those of train/finetune.py, train/probe.py and train/sweep.py without training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.common.atomic_writes import write_json, write_npz
from train.evaluation.classification import ClassCounts, classification_report
from train.evaluation.metrics_report import regression_report
from train.evaluation.moments import SiteMoments
from train.run.recipe import ProbeRecipe, Recipe, save_recipe

STIMULI, SITES = 80, 12
UNSEEN = {"fitted": 0, "taught": 0, "selected": 0, "dropped": 0}  # `seen` of a clean score


def responses(seed: int = 0, stimuli: int = STIMULI) -> np.ndarray:
    """Random responses float32 (stimuli, SITES)."""
    return np.random.default_rng(seed).normal(5, 1, (stimuli, SITES)).astype(np.float32)


def guess(target: np.ndarray, noise: float, seed: int = 1) -> np.ndarray:
    """Predictions: the target plus noise of this standard deviation."""
    return (target + np.random.default_rng(seed).normal(0, noise, target.shape)).astype(np.float32)


def make_run(path: Path, target: np.ndarray | None = None, prediction: np.ndarray | None = None, **more: Any) -> Path:
    """Write a run folder, scored on val if there are predictions.

    Args:
        path: of its folder.
        target, prediction: (stimuli, sites).
        more: `recipe`, `recording`, `history` (lines), `command`, `reliability` (sites,), `layers` (predictions by name
            of a probe), and further keys of metrics.json.
    """
    path.mkdir(parents=True)
    recipe = more.pop("recipe", Recipe(epochs=3))
    save_recipe(recipe, path / "recipe.yaml")
    history = more.pop("history", [epoch_line(1, 0.1), epoch_line(2, 0.2)])
    (path / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
    command = more.pop("command", ["finetune.py", "--data", "data/mine", "--out", str(path)])
    env = {"command": command, "python": "3.11", "versions": {"torch": "2.15"}, "git_commit": "abc", "world_size": 2}
    write_json(
        path / "env.json", env | {"devices": ["GPU X", "GPU X"], "parameters": {"all": 25_600_000, "trained": 100}}
    )
    if prediction is not None:
        _score(path, target, prediction, more)
    return path


def epoch_line(epoch: int, r2: float, best: bool = True) -> dict[str, Any]:
    """A line of history.jsonl."""
    speeds = {"train_seconds": 40.0, "score_seconds": 5.0}
    return {"epoch": epoch, "step": 10 * epoch, "loss": 1 / epoch, "inner": {"r2": r2}, "best": best, **speeds}


def make_probe(path: Path, target: np.ndarray, layers: dict[str, np.ndarray], chosen: str, **more: Any) -> Path:
    """Write a probe of several layers, of which `chosen` is chosen."""
    recipe = more.pop("recipe", ProbeRecipe(layers=list(layers)))
    return make_run(path, target, layers[chosen], recipe=recipe, layers=layers, chosen=chosen, history=[], **more)


def make_classifier(path: Path, shown: np.ndarray, named: np.ndarray, classes: list[str], **more: Any) -> Path:
    """Write the run of a classifier, scored on val."""
    make_run(path, recipe=Recipe.model_validate({"task": {"kind": "classification"}}), **more)
    counts = ClassCounts.zeros(len(classes))
    logits = torch.nn.functional.one_hot(torch.from_numpy(named), len(classes)).float()
    counts.add(logits, torch.from_numpy(shown), torch.ones(len(shown)))
    head = {"split": "val", "stimuli": len(shown), "recording": "made_up", "selected_on": ["inner"]}
    head["seen"] = UNSEEN
    write_json(path / "eval/val/metrics.json", head | {"classification": classification_report(counts, classes)})
    ids = np.array([f"s{k}" for k in range(len(shown))])
    arrays = {"class_id": np.array(classes), "class": shown, "predicted_class": named}
    write_npz(path / "eval/val/predictions.npz", {"stimulus_id": ids, **arrays})
    return path


def _score(path: Path, target: np.ndarray, prediction: np.ndarray, more: dict[str, Any]) -> None:
    reliability, layers = more.pop("reliability", None), more.pop("layers", {})
    metrics = {"split": "val", "stimuli": len(target), "world_size": 1, "recording": "made_up", "fingerprint": "f"}
    metrics |= {"selected_on": ["inner"], "seen": UNSEEN, "regression": _block(target, prediction, reliability)}
    metrics |= (
        {"layers": {n: {"features": 10, "regression": _block(target, p, None)} for n, p in layers.items()}}
        if layers
        else {}
    )
    write_json(path / "eval/val/metrics.json", metrics | more)
    ids, sites = np.array([f"s{k:04}" for k in range(len(target))]), np.array([f"n{k}" for k in range(target.shape[1])])
    arrays = {"stimulus_id": ids, "site_id": sites, "prediction": prediction, "target": target}
    write_npz(path / "eval/val/predictions.npz", arrays)


def _block(target: np.ndarray, prediction: np.ndarray, reliability: np.ndarray | None) -> dict[str, Any]:
    moments = SiteMoments.of(torch.from_numpy(prediction), torch.from_numpy(target))
    sites = [f"n{k}" for k in range(target.shape[1])]
    block = regression_report(moments, prediction, target, sites, reliability, split_half=reliability)
    if reliability is not None:
        block["ceiling"]["method"] = "made up"
    return block
