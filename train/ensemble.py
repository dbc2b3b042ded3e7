"""Several runs and probes joined into one predictor: what they predicted is averaged, or stacked per site.

OUT/ensemble.json                      members, and how they are joined
OUT/eval/<split>/...                   as of a run; and of `left_out`, so that it can teach, or be stacked again
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from data_prep.errors import BadInput
from data_prep.shards import ShardFolder
from data_prep.url import recorded
from train.loader import Stimuli
from train.metrics import SiteMoments
from train.recipe import Recipe
from train.run_folder import LEFT_OUT, RunFolder, is_probe, write_json, write_npz
from train.scoring import regression_block, report_head
from train.stacking import LEAST_STIMULI, stack

Combine = Literal["mean", "stack"]
NOTE = "ensemble.json"


def is_fine_tuned(run: Path) -> bool:
    """Whether a folder is a run of train/finetune.py, which has to be scored, and no probe or ensemble.

    Raises:
        BadInput: it is nothing of these.
    """
    if (run / NOTE).is_file():
        return False
    if not RunFolder(run).recipe.is_file():
        raise BadInput(f"{run} is no folder of train/finetune.py, train/probe.py or an ensemble")
    return not is_probe(RunFolder(run))


def data_of(run: Path) -> str:
    """The shard folder of a run, a probe or an ensemble, or its URL.

    Raises:
        BadInput: it does not tell.
    """
    note = run / NOTE
    return str(_facts_in(note)["data"]) if note.is_file() else RunFolder(run).data_folder()


def _facts_in(note: Path) -> dict[str, Any]:
    try:
        facts = json.loads(note.read_text(encoding="utf-8"))
        return {"data": facts["data"], "who": _who(facts)}
    except (OSError, ValueError, KeyError, TypeError):
        raise BadInput(f"{note} is damaged; make the ensemble again in another folder") from None


@dataclass(frozen=True)
class Predictions:
    """What predictions.npz holds: float32 (stimuli, sites), and the ids of both."""

    stimulus_ids: list[str]
    site_ids: list[str]
    rates: np.ndarray

    @classmethod
    def of(cls, run: Path, split: str) -> "Predictions":
        """A run's predictions of a split.

        Raises:
            BadInput: there are none, or the file is damaged.
        """
        path = RunFolder(run).evaluation(split) / "predictions.npz"
        try:
            with np.load(path, allow_pickle=False) as arrays:
                names = (arrays["stimulus_id"].tolist(), arrays["site_id"].tolist())
                found = cls(*names, arrays["prediction"])
        except FileNotFoundError:
            raise BadInput(f"{path} is missing; {_how_to_get(split)}") from None
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise BadInput(f"{path} is damaged ({error}); make it again") from None
        if found.rates.shape != (len(found.stimulus_ids), len(found.site_ids)):
            raise BadInput(f"{path} is damaged: its predictions are not stimuli x sites; make it again")
        return found

    def rows(self, stimulus_ids: Sequence[str]) -> np.ndarray:
        """The predictions of these stimuli, in this order; NaN for those that it does not have."""
        place = {name: row for row, name in enumerate(self.stimulus_ids)}
        rows = np.array([place.get(name, -1) for name in stimulus_ids], np.int64)
        return np.where(rows[:, None] >= 0, self.rates[rows], np.nan)

    def arrays(self) -> dict[str, np.ndarray]:
        """As they are written."""
        names = {"stimulus_id": np.array(self.stimulus_ids), "site_id": np.array(self.site_ids)}
        return names | {"prediction": self.rates}


def _how_to_get(split: str) -> str:
    if split == LEFT_OUT:
        return "train/probe.py writes it with readout ridge and --split val, train/evaluate.py with --split left_out"
    return f"score the run first, on {split}"


@dataclass(frozen=True)
class Member:
    """Runs that differ in their seed or fold alone, which count as one predictor; or a single probe or ensemble."""

    runs: tuple[Path, ...]

    def predict(self, split: str, stimulus_ids: Sequence[str]) -> np.ndarray:
        """The mean over its runs, (stimuli, sites)."""
        return np.mean([Predictions.of(run, split).rows(stimulus_ids) for run in self.runs], axis=0)

    @property
    def has_left_out(self) -> bool:
        """Whether all of its runs tell what they predict of training stimuli that they were not fitted on."""
        return all((RunFolder(run).evaluation(LEFT_OUT) / "predictions.npz").exists() for run in self.runs)

    @cached_property
    def left_out(self) -> dict[str, np.ndarray]:
        """By stimulus of train, the mean prediction, (sites,), of those of its runs that were not fitted on it."""
        found: dict[str, list[np.ndarray]] = {}
        for run in self.runs:
            predicted = Predictions.of(run, LEFT_OUT)
            for name, rates in zip(predicted.stimulus_ids, predicted.rates, strict=True):
                found.setdefault(name, []).append(rates)
        return {name: np.mean(rates, axis=0) for name, rates in found.items()}


def members_of(runs: Sequence[Path], recipes: Sequence[Recipe | None]) -> list[Member]:
    """Runs as members, in order.

    Args:
        runs: folders.
        recipes: of fine-tuned runs; None for a probe or an ensemble.
    """
    together: dict[str, list[Path]] = {}
    for run, recipe in zip(runs, recipes, strict=True):
        key = str(run)
        if recipe is not None:
            settings = recipe.model_dump(mode="json", exclude={"seed": True, "early_stopping": {"fold"}})
            key = json.dumps(settings, sort_keys=True)
        together.setdefault(key, []).append(run)
    return [Member(tuple(group)) for group in together.values()]


class Ensemble:
    """Members and how they are joined.

    Args:
        members: at least one.
        combine: the mean over all runs; or weights per site and member, learned on stimuli left out (`stacking.py`).
        shards: whose stimuli are predicted.
    """

    def __init__(self, members: Sequence[Member], combine: Combine, shards: ShardFolder):
        self.members, self._combine, self._shards = list(members), combine, shards
        self.weights: np.ndarray | None = None  # (members, sites), once they are learned

    @property
    def runs(self) -> list[Path]:
        """Of all members."""
        return [run for member in self.members for run in member.runs]

    def check_complete(self, split: str) -> None:
        """Refuse probes and ensembles that have no predictions of a split, and stacking what was not left out.

        Raises:
            BadInput: naming the file.
        """
        for run in (run for run in self.runs if not is_fine_tuned(run)):
            Predictions.of(run, split)
            if self._combine == "stack":
                Predictions.of(run, LEFT_OUT)

    def predict(self, split: str) -> np.ndarray:
        """Predictions of a split's stimuli in order, float32 (stimuli, sites); stacked ones learn their weights first.

        Raises:
            BadInput: a member predicts other sites, or not all stimuli; or too few were left out to learn from.
        """
        sites = self._shards.manifest.site_ids
        for run in self.runs:
            if Predictions.of(run, split).site_ids != sites:
                raise BadInput(f"{run} predicts other sites than {self._shards.folder} has")
        names = self._shards.split(split).stimulus_ids
        predictions = [member.predict(split, names) for member in self.members]
        for member, predicted in zip(self.members, predictions, strict=True):
            if lacking := int(np.isnan(predicted).all(axis=1).sum()):
                raise BadInput(
                    f"{member.runs[0]} lacks predictions of {lacking} of the {len(names)} stimuli of {split}"
                )
        if self._combine == "mean":
            return np.average(predictions, axis=0, weights=self._shares).astype(np.float32)
        names, left_out = self._common()
        if len(names) < LEAST_STIMULI:
            raise BadInput(
                f"only {len(names)} training stimuli were left out by all members, too few to learn weights from; "
                "train folds (early_stopping.folds), or take --combine mean"
            )
        found = stack(left_out, self._rates(names), predictions)
        self.weights = found.weights
        return found.prediction

    def left_out(self) -> Predictions | None:
        """Predictions of the training stimuli that all members left out; None where a member tells of none."""
        if not all(member.has_left_out for member in self.members):
            return None
        names, left_out = self._common()
        if self._combine == "mean":
            rates = np.average(left_out, axis=0, weights=self._shares).astype(np.float32)
        else:
            rates = stack(left_out, self._rates(names), left_out).left_out
        return Predictions(names, self._shards.manifest.site_ids, rates) if names else None

    @property
    def _shares(self) -> list[int]:
        return [len(member.runs) for member in self.members]

    def _common(self) -> tuple[list[str], list[np.ndarray]]:
        """The training stimuli that all members left out, and each member's predictions of them."""
        everyones = [member.left_out for member in self.members]
        names = [name for name in self._shards.split("train").stimulus_ids if all(name in own for own in everyones)]
        return names, [np.array([own[name] for name in names]) for own in everyones]

    def _rates(self, names: list[str]) -> np.ndarray:
        train = self._shards.split("train")
        place = {name: row for row, name in enumerate(train.stimulus_ids)}
        return train.rates()[[place[name] for name in names]]

    def facts(self) -> dict[str, Any]:
        """Who is in it; with the mean weight over sites where weights were learned."""
        weights = [None] * len(self.members) if self.weights is None else self.weights.mean(axis=1).tolist()
        members = [
            {"runs": [str(run) for run in member.runs]} | ({} if weight is None else {"mean_weight": weight})
            for member, weight in zip(self.members, weights, strict=True)
        ]
        return {"combine": self._combine, "members": members, "data": recorded(self._shards.folder)}


def check_place(out: Path, ensemble: Ensemble) -> None:
    """Refuse a folder that holds something else than this ensemble.

    Raises:
        BadInput: it does.
    """
    note = out / NOTE
    if not note.is_file():
        RunFolder(out).check_free()
        return
    if _facts_in(note)["who"] != _who(ensemble.facts()):
        raise BadInput(f"{out} holds another ensemble already; choose another --out")


def _who(facts: dict[str, Any]) -> list[Any]:
    return [facts["combine"], *(member["runs"] for member in facts["members"])]


def write_ensemble(out: Path, ensemble: Ensemble, shards: ShardFolder, split: str, ranks: int) -> dict[str, Any]:
    """Join, score and write: ensemble.json, and of the split and what was left out the predictions; returns metrics."""
    prediction, left_out = ensemble.predict(split), ensemble.left_out()
    of_split = shards.split(split)
    target = of_split.rates() if of_split.has_responses else None
    folder = RunFolder(out)
    arrays = {} if target is None else {"target": target}
    found = Predictions(of_split.stimulus_ids, shards.manifest.site_ids, prediction)
    write_npz(folder.evaluation(split) / "predictions.npz", **found.arrays(), **arrays)
    if left_out is not None:
        write_npz(folder.evaluation(LEFT_OUT) / "predictions.npz", **left_out.arrays())
    write_json(out / NOTE, ensemble.facts())
    if target is None:
        return {}
    stimuli, moments = Stimuli(of_split, shards.manifest.image.side), SiteMoments(target.shape[1])
    moments.add(torch.from_numpy(prediction), torch.from_numpy(target))
    metrics = report_head(found.stimulus_ids, target, shards.manifest, split, ranks)
    noise = stimuli.noise_of_rates()
    metrics["regression"] = regression_block(moments.state, prediction, target, shards.manifest, noise)
    metrics |= _common_facts([_metrics_of(run, split) for run in ensemble.runs]) | {"ensemble": ensemble.facts()}
    if ensemble.weights is not None:
        metrics["selected_on"].append("train, left out")
    write_json(folder.evaluation(split) / "metrics.json", metrics)
    return metrics


def _metrics_of(run: Path, split: str) -> dict[str, Any]:
    path = RunFolder(run).evaluation(split) / "metrics.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} is missing or damaged ({error}); score the run again") from None


def _common_facts(metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the runs' metrics tell of how they came about: all that any was selected on; and what all agree in."""
    found: dict[str, Any] = {"selected_on": list(dict.fromkeys(on for own in metrics for on in own["selected_on"]))}
    if controls := {own["control"] for own in metrics if "control" in own}:
        found["control"] = " and ".join(sorted(controls))
    sizes = {own.get("training_stimuli") for own in metrics}
    return found | ({"training_stimuli": sizes.pop()} if len(sizes) == 1 and None not in sizes else {})
