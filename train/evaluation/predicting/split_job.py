"""Scores a probe or an ensemble on a split that it was not scored on when it was made."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.common.atomic_writes import write_json
from data_prep.common.errors import BadInput
from data_prep.shards.folder import ShardFolder
from train.data.bad_samples import BadSamples
from train.data.image_cache import ImageCaches
from train.data.recordings import Recordings
from train.data.seen import images_of_split, record_of
from train.data.stimuli import RecordingStimuli
from train.distributed.runtime import Runtime
from train.evaluation.ensemble_record import ENSEMBLE_FILE, shard_folders_of
from train.evaluation.evaluation_job import PARTS
from train.evaluation.metrics_file import METRICS_FILE, metrics_content
from train.evaluation.metrics_report import regression_block, report_head
from train.evaluation.moments import SiteMoments
from train.evaluation.options import Evaluate
from train.evaluation.predicting.image_prediction import check_enough_images, predict_images
from train.evaluation.predicting.image_predictor import ImagePredictor
from train.evaluation.predicting.opening import open_predictor
from train.evaluation.predictions_file import Predictions
from train.evaluation.run_evaluation import other_recording_warning, other_scale_warning, print_warnings, summary
from train.evaluation.seen_stimuli import Seen, SeenRule, selected_on
from train.evaluation.training_facts import OTHER_SCALE, ResponseScale, other_scale
from train.run.folder import LEFT_OUT, RunFolder, check_writable
from train.run.recipe import Loader

INHERITED = ("selected_on", "training_stimuli", "control", "ensemble", "chosen")  # in metrics.json, whatever the split


@dataclass(frozen=True)
class SplitJob:
    """A split of a recording to score, checked as far as possible before the process group starts.

    Attributes:
        options: of the command line.
        predictor: a probe or an ensemble, opened.
        recording: name of the recording if the predictor has several, else None.
        shards: of the recording.
        stimuli: by size of the images that its networks take.
        seen: which of them were seen.
        bad_samples: records which stimuli are left out.
    """

    options: Evaluate
    predictor: ImagePredictor
    recording: str | None
    shards: ShardFolder
    stimuli: Mapping[int, RecordingStimuli]
    seen: Seen
    bad_samples: BadSamples

    @property
    def _scored(self) -> RecordingStimuli:
        """The stimuli of the first size, which alone have the responses."""
        return next(iter(self.stimuli.values()))

    def run(self, runtime: Runtime) -> None:
        """Predict and score over all ranks; on the leading one, write the results and print a summary."""
        split = self.options.split
        runtime.check_agreement({"the stimuli to score": self._scored.fingerprint()[:12], "the split": split})
        label = f"evaluating {split}" if self.recording is None else f"evaluating {split} of {self.recording}"
        predicted = predict_images(self.predictor, self.stimuli, runtime, self.options, label)
        if not runtime.is_main:
            return
        assert predicted.rates is not None
        folder = RunFolder(self.predictor.path).evaluation(split, recording=self.recording)
        metrics = self._write(folder, predicted.rates, runtime.ranks)
        title = split if self.recording is None else f"{self.recording}, {split}"
        print(
            f"{self.predictor.path}, {title}: {len(self._scored):,} stimuli  {summary(metrics)}\nwritten to {folder}",
            flush=True,
        )
        self._warn()
        print_warnings(self.bad_samples)

    def _write(self, folder: Path, rates: np.ndarray, ranks: int) -> dict[str, Any]:
        stimuli, manifest = self._scored, self.shards.manifest
        digest = Predictions(stimuli.stimulus_ids, manifest.site_ids, rates, stimuli.rates).write(folder)
        if stimuli.rates is None:
            return {}
        moments = SiteMoments.of(torch.from_numpy(rates), torch.from_numpy(stimuli.rates))
        metrics = report_head(stimuli.stimulus_ids, stimuli.rates, manifest, self.options.split, ranks)
        metrics["regression"] = regression_block(moments, rates, stimuli.rates, manifest, stimuli.noise_of_rates())
        metrics |= _inherited(self.predictor.path, self.recording)
        metrics["selected_on"] = selected_on(metrics.get("selected_on", []), self.options.split, self.seen)
        metrics["seen"] = self.seen.content()
        metrics["predictions"] = digest
        if self._is_other_recording:
            metrics["trained_on"] = [self.predictor.recording]
        if self._other_scale:
            metrics[OTHER_SCALE] = True
        metrics |= self.bad_samples.facts()
        write_json(folder / METRICS_FILE, metrics)
        return metrics

    @property
    def _is_other_recording(self) -> bool:
        return self.predictor.recording not in ("", self.shards.manifest.name)

    @property
    def _other_scale(self) -> str:
        """How the responses differ in scale from those that the predictor was fitted on; "" if they do not."""
        fitted = self.predictor.scale
        if fitted is None or self._scored.rates is None:
            return ""
        return other_scale(fitted, ResponseScale.of(self.shards.manifest))

    def _warn(self) -> None:
        path, where = self.predictor.path, str(self.shards.folder)
        if self._is_other_recording:
            print(other_recording_warning(path, [self.predictor.recording], self.shards.manifest.name), file=sys.stderr)
        if self._other_scale:
            print(other_scale_warning(path, where, self._other_scale), file=sys.stderr)


def prepare_split(options: Evaluate, path: Path) -> list[SplitJob]:
    """Open a probe or an ensemble and the split, and check that they fit together.

    Returns:
        One job for each recording.

    Raises:
        BadInput: they do not, or stimuli were fitted that --seen does not allow.
    """
    if options.split == LEFT_OUT:
        raise BadInput(
            f"--split {LEFT_OUT} is for runs; a probe or an ensemble that can predict those stimuli has done so, in "
            f"{path / 'eval' / LEFT_OUT}"
        )
    if options.checkpoint != "best":
        raise BadInput(f"--checkpoint: {path} is a probe or an ensemble, which has no {options.checkpoint} checkpoint")
    check_writable(path)
    loader = Loader(on_bad_sample=options.on_bad_sample or "stop", shard_cache=options.shard_cache)
    folders = [ShardFolder(data, loader.fetch) for data in options.data or shard_folders_of(path)]
    has_several = (path / ENSEMBLE_FILE).is_file() and len(shard_folders_of(path)) > 1
    return [_job(options, path, shards, loader, has_several) for shards in Recordings(folders).folders]


def _job(options: Evaluate, path: Path, shards: ShardFolder, loader: Loader, has_several: bool) -> SplitJob:
    recording = shards.manifest.name if has_several else None
    _check_not_its_own(path, options.split, recording)
    predictor = open_predictor(path, recording)
    if predictor.site_ids != shards.manifest.site_ids:
        raise BadInput(
            f"{shards.folder} has other sites than those that {path} predicts; --images {shards.folder} --out DIR "
            "predicts its images alone"
        )
    bad_samples, split = BadSamples(loader), shards.split(options.split)
    size = max(predictor.network.image_sizes)
    usable = bad_samples.usable_positions(split, size, responses=split.has_responses, classes=False)
    images = images_of_split(shards, split.name).at(usable)
    rule = SeenRule(str(path), options.split, options.seen, PARTS.get(options.split))
    compared = rule.compare(record_of(path), images, [split.stimulus_ids[position] for position in usable.tolist()])
    positions = usable[compared.scored]
    check_enough_images(len(positions), options.split)
    caches, sizes = ImageCaches(loader, single_pass=True), predictor.network.image_sizes
    stimuli = {
        size: RecordingStimuli(
            split, size, positions, responses=split.has_responses and size == sizes[0], caches=caches
        )
        for size in sizes
    }
    return SplitJob(options, predictor, recording, shards, stimuli, compared.seen, bad_samples)


def _check_not_its_own(path: Path, split: str, recording: str | None) -> None:
    """Refuse to replace the scores that a probe has written itself, layer by layer.

    Raises:
        BadInput: the split has such scores.
    """
    folder = RunFolder(path).evaluation(split, recording=recording)
    if "layers" in _read(folder / METRICS_FILE):
        raise BadInput(
            f"{path} is a probe, already scored on {split} by train/probe.py; see {folder}, or score another --split"
        )


def _read(path: Path) -> dict[str, Any]:
    """A metrics.json; empty if there is none."""
    return metrics_content(path, "remove it, or score into another folder") if path.exists() else {}


def _inherited(path: Path, recording: str | None) -> dict[str, Any]:
    """What holds for every split, from the scores that were written when the predictor was made."""
    folders = (path / "eval").iterdir() if (path / "eval").is_dir() else iter(())
    for file in sorted(folder / (recording or "") / METRICS_FILE for folder in folders):
        metrics = _read(file)
        if isinstance(metrics.get("selected_on"), list):
            return {name: metrics[name] for name in INHERITED if name in metrics}
    return {}
