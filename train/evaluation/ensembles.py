"""Several runs and probes joined into one predictor: what they predicted is averaged, or stacked per site.

OUT/ensemble.json                      members, and how they are joined
OUT/eval/<split>/...                   as of a run; and of `left_out`, so that it can teach, or be stacked again

Of runs on several recordings the predictions of each recording are joined by themselves, as if there were no other.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.common.atomic_writes import write_json, write_npz
from data_prep.common.errors import BadInput
from data_prep.common.safe_reading import npz_arrays, parse_json, read_regular
from data_prep.remote.url import recorded
from data_prep.shards.folder import ShardFolder
from data_prep.shards.manifest import Manifest
from train.data.bad_samples import BadSamples
from train.data.stimuli import RecordingStimuli
from train.evaluation.metrics_report import regression_block, report_head
from train.evaluation.moments import SiteMoments
from train.evaluation.options import Combine
from train.regression.stacking import MIN_STIMULI, stack
from train.run.folder import LEFT_OUT, RunFolder, is_probe
from train.run.recipe import Recipe

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


def data_of(run: Path) -> list[str]:
    """The shard folders of a run, a probe or an ensemble, or their URLs.

    Raises:
        BadInput: it does not tell.
    """
    note = run / NOTE
    return _facts_in(note)["data"] if note.is_file() else RunFolder(run).data_folders()


def _facts_in(note: Path) -> dict[str, Any]:
    try:
        facts = parse_json(read_regular(note))
        data = facts["data"] if isinstance(facts["data"], list) else [facts["data"]]
        return {"data": list(map(str, data)), "who": _who(facts)}
    except (OSError, ValueError, KeyError, TypeError):
        raise BadInput(f"{note} is damaged; make the ensemble again in another folder") from None


@dataclass(frozen=True)
class Predictions:
    """What predictions.npz holds: float32 (stimuli, sites), and the ids of both."""

    stimulus_ids: list[str]
    site_ids: list[str]
    rates: np.ndarray

    @classmethod
    def of(cls, run: Path, split: str, recording: str) -> "Predictions":
        """A run's predictions of a recording's split.

        Raises:
            BadInput: there are none, or the file is damaged.
        """
        path = RunFolder(run).scored(split, recording) / "predictions.npz"
        try:
            arrays = npz_arrays(path)
            stimuli, sites, rates = (arrays[name] for name in ("stimulus_id", "site_id", "prediction"))
        except FileNotFoundError:
            raise BadInput(f"{path} is missing; {_how_to_get(split)}") from None
        except KeyError as error:
            raise BadInput(f"{path} has no {error.args[0]}; it must tell what was predicted for the sites") from None
        except (OSError, ValueError) as error:
            raise BadInput(f"{path} is damaged ({error}); make it again") from None
        if rates.dtype.kind != "f" or stimuli.ndim != 1 or sites.ndim != 1 or rates.shape != (len(stimuli), len(sites)):
            raise BadInput(f"{path} is damaged: its predictions are not stimuli x sites; make it again")
        return cls(stimuli.tolist(), sites.tolist(), rates)

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
    """Runs that differ in their seed or fold alone, which count as one predictor; or a single probe or ensemble.

    Attributes:
        runs: folders.
        recording: whose sites they predict here.
    """

    runs: tuple[Path, ...]
    recording: str

    def predict(self, split: str, stimulus_ids: Sequence[str]) -> np.ndarray:
        """The mean over its runs, (stimuli, sites)."""
        found = [Predictions.of(run, split, self.recording).rows(stimulus_ids) for run in self.runs]
        return np.mean(found, axis=0)

    @property
    def has_left_out(self) -> bool:
        """Whether all of its runs tell what they predict of training stimuli that they were not fitted on."""
        folders = [RunFolder(run).scored(LEFT_OUT, self.recording) for run in self.runs]
        return all((folder / "predictions.npz").exists() for folder in folders)

    @cached_property
    def left_out(self) -> dict[str, np.ndarray]:
        """By stimulus of train, the mean prediction, (sites,), of those of its runs that were not fitted on it."""
        found: dict[str, list[np.ndarray]] = {}
        for run in self.runs:
            predicted = Predictions.of(run, LEFT_OUT, self.recording)
            for name, rates in zip(predicted.stimulus_ids, predicted.rates, strict=True):
                found.setdefault(name, []).append(rates)
        return {name: np.mean(rates, axis=0) for name, rates in found.items()}


def members_of(runs: Sequence[Path], recipes: Sequence[Recipe | None], recording: str) -> list[Member]:
    """Runs as members, in order.

    Args:
        runs: folders.
        recipes: of fine-tuned runs; None for a probe or an ensemble.
        recording: whose sites they are to predict.
    """
    together: dict[str, list[Path]] = {}
    for run, recipe in zip(runs, recipes, strict=True):
        key = str(run)
        if recipe is not None:
            settings = recipe.model_dump(mode="json", exclude={"seed": True, "early_stopping": {"fold"}})
            key = json.dumps(settings, sort_keys=True)
        together.setdefault(key, []).append(run)
    return [Member(tuple(group), recording) for group in together.values()]


class Ensemble:
    """Members and how they are joined, to predict a recording.

    Args:
        members: at least one.
        combine: the mean over all runs; or weights per site and member, learned on stimuli left out (`stacking.py`).
        shards: whose stimuli are predicted.
        screening: tells which of these can be read.
    """

    def __init__(self, members: Sequence[Member], combine: Combine, shards: ShardFolder, screening: BadSamples):
        self.members, self._combine, self._shards, self.screening = list(members), combine, shards, screening
        self._stimuli: dict[str, RecordingStimuli] = {}
        self.weights: np.ndarray | None = None  # (members, sites), once they are learned

    @property
    def manifest(self) -> Manifest:
        """Of what is predicted."""
        return self._shards.manifest

    @property
    def recording(self) -> str:
        """Its name."""
        return self.manifest.name

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
            self._check_sites(run, split)
            if self._combine == "stack":
                Predictions.of(run, LEFT_OUT, self.recording)

    def _check_sites(self, run: Path, split: str) -> None:
        if Predictions.of(run, split, self.recording).site_ids != self.manifest.site_ids:
            raise BadInput(f"{run} predicts other sites than {self._shards.folder} has")

    def stimuli_of(self, split: str) -> RecordingStimuli:
        """The stimuli of a split that can be read, with their responses where it has some."""
        if split not in self._stimuli:
            of_split, size = self._shards.split(split), self.manifest.image.side
            responses = of_split.has_responses
            usable = self.screening.usable_positions(of_split, size, responses=responses, classes=False)
            self._stimuli[split] = RecordingStimuli(of_split, size, usable, responses)
        return self._stimuli[split]

    def predict(self, split: str) -> np.ndarray:
        """Predictions of a split's stimuli in order, float32 (stimuli, sites); stacked ones learn their weights first.

        Raises:
            BadInput: a member predicts other sites, or not all stimuli; or too few were left out to learn from.
        """
        for run in self.runs:
            self._check_sites(run, split)
        names = self.stimuli_of(split).stimulus_ids
        predictions = [member.predict(split, names) for member in self.members]
        for member, predicted in zip(self.members, predictions, strict=True):
            if lacking := int(np.isnan(predicted).all(axis=1).sum()):
                raise BadInput(
                    f"{member.runs[0]} lacks predictions of {lacking} of the {len(names)} stimuli of {split}"
                )
        if self._combine == "mean":
            return np.average(predictions, axis=0, weights=self._shares).astype(np.float32)
        names, left_out = self._common()
        if len(names) < MIN_STIMULI:
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
        return Predictions(names, self.manifest.site_ids, rates) if names else None

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
        return train.rates(np.array([place[name] for name in names], np.int64))

    def facts(self) -> dict[str, Any]:
        """Who is in it; with the mean weight over sites where weights were learned."""
        weights = [None] * len(self.members) if self.weights is None else self.weights.mean(axis=1).tolist()
        members = [
            {"runs": [str(run) for run in member.runs]} | ({} if weight is None else {"mean_weight": weight})
            for member, weight in zip(self.members, weights, strict=True)
        ]
        return {"combine": self._combine, "members": members, "data": recorded(self._shards.folder)}


def check_place(out: Path, ensembles: Sequence[Ensemble]) -> None:
    """Refuse a folder that holds something else than this ensemble, or than these of several recordings.

    Raises:
        BadInput: it does.
    """
    note = out / NOTE
    if not note.is_file():
        RunFolder(out).check_free()
        return
    if _facts_in(note)["who"] != _who(_note(ensembles)):
        raise BadInput(f"{out} holds another ensemble already; choose another --out")


def _who(facts: dict[str, Any]) -> list[Any]:
    recordings = len(facts["data"]) if isinstance(facts["data"], list) else 1
    return [facts["combine"], recordings, *(member["runs"] for member in facts["members"])]


def write_ensembles(out: Path, ensembles: Sequence[Ensemble], split: str, ranks: int) -> list[dict[str, Any]]:
    """Join, score and write, the ensemble of each recording: ensemble.json, and the predictions; returns metrics.

    Raises:
        BadInput: one cannot be joined; then nothing is written.
    """
    joined = [(ensemble.predict(split), ensemble.left_out()) for ensemble in ensembles]
    write_json(out / NOTE, _note(ensembles))
    several = len(ensembles) > 1
    return [
        _write(RunFolder(out), ensemble, split, *found, ranks, ensemble.recording if several else None)
        for ensemble, found in zip(ensembles, joined, strict=True)
    ]


def _note(ensembles: Sequence[Ensemble]) -> dict[str, Any]:
    """Who is in it; what each is worth is told where there is one recording, else in the metrics of each."""
    first, *others = [ensemble.facts() for ensemble in ensembles]
    if not others:
        return first
    members = [{"runs": member["runs"]} for member in first["members"]]
    return first | {"members": members, "data": [facts["data"] for facts in (first, *others)]}


def _write(
    folder: RunFolder,
    ensemble: Ensemble,
    split: str,
    prediction: np.ndarray,
    left_out: Predictions | None,
    ranks: int,
    recording: str | None,
) -> dict[str, Any]:
    stimuli, manifest = ensemble.stimuli_of(split), ensemble.manifest
    target, place = stimuli.rates, folder.evaluation(split, recording=recording)
    arrays = {} if target is None else {"target": target}
    found = Predictions(stimuli.stimulus_ids, manifest.site_ids, prediction)
    write_npz(place / "predictions.npz", found.arrays() | arrays)
    if left_out is not None:
        write_npz(folder.evaluation(LEFT_OUT, recording=recording) / "predictions.npz", left_out.arrays())
    if target is None:
        return {}
    moments = SiteMoments.of(torch.from_numpy(prediction), torch.from_numpy(target))
    metrics = report_head(found.stimulus_ids, target, manifest, split, ranks)
    metrics["regression"] = regression_block(moments, prediction, target, manifest, stimuli.noise_of_rates())
    metrics |= _common_facts([_metrics_of(run, split, ensemble.recording) for run in ensemble.runs])
    metrics |= {"ensemble": ensemble.facts()} | ensemble.screening.facts()
    if ensemble.weights is not None:
        metrics["selected_on"].append("train, left out")
    write_json(place / "metrics.json", metrics)
    return metrics


def _metrics_of(run: Path, split: str, recording: str) -> dict[str, Any]:
    path = RunFolder(run).scored(split, recording) / "metrics.json"
    try:
        metrics = parse_json(read_regular(path))
        if not isinstance(metrics, dict) or not isinstance(metrics.get("selected_on"), list):
            raise ValueError("it does not tell `selected_on`")
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} is missing or damaged ({error}); score the run again") from None
    return metrics


def _common_facts(metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the runs' metrics tell of how they came about: all that any was selected on; and what all agree in."""
    found: dict[str, Any] = {"selected_on": list(dict.fromkeys(on for own in metrics for on in own["selected_on"]))}
    if controls := {own["control"] for own in metrics if "control" in own}:
        found["control"] = " and ".join(sorted(controls))
    sizes = {own.get("training_stimuli") for own in metrics}
    return found | ({"training_stimuli": sizes.pop()} if len(sizes) == 1 and None not in sizes else {})
