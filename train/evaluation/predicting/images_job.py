"""evaluate.py PREDICTOR --images FOLDER: predicts image files, or the images of a shard folder, without scoring.

OUT/predictions.npz     stimulus_id, site_id, prediction; predicted_class, class_id; recording, units
OUT/predictions.nc      with --format netcdf, as train/export.py writes it
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.common.atomic_writes import write_bytes, write_npz
from data_prep.common.errors import BadInput
from data_prep.remote.url import is_url
from data_prep.shards.folder import ShardFolder
from train.data.bad_samples import BadSamples
from train.data.image_files import FileImages, find_images
from train.data.stimuli import RecordingStimuli, StimulusSet, fingerprint
from train.distributed.runtime import Runtime
from train.evaluation.exporting.prediction_export import Assembly, assemble, netcdf_bytes
from train.evaluation.options import Evaluate
from train.evaluation.predicting.image_prediction import Predicted, check_enough_images, predict_images
from train.evaluation.predicting.image_predictor import ImagePredictor
from train.evaluation.predicting.opening import open_predictor
from train.evaluation.predictions_file import PREDICTIONS_FILE, Predictions
from train.run.folder import LEFT_OUT, RunFolder
from train.run.recipe import Loader


@dataclass(frozen=True)
class ImagesJob:
    """Images to predict, checked as far as possible before the process group starts.

    Attributes:
        options: of the command line.
        predictor: opened.
        stimuli: by size of the images that its networks take.
        shards: the images are in; None for files.
        bad_samples: records which stimuli of the shards are left out; None for files.
    """

    options: Evaluate
    predictor: ImagePredictor
    stimuli: Mapping[int, StimulusSet]
    shards: ShardFolder | None
    bad_samples: BadSamples | None

    @property
    def stimulus_ids(self) -> list[str]:
        """Of all images, in order."""
        return next(iter(self.stimuli.values())).stimulus_ids

    def run(self, runtime: Runtime) -> None:
        """Predict over all ranks; on the leading one, write the predictions and print where they are."""
        runtime.check_agreement(
            {
                "the images to predict": fingerprint(self.stimulus_ids, None)[:12],
                f"the checkpoint of {self.predictor.path} (is it still training?)": self.predictor.checkpoint,
            }
        )
        predicted = predict_images(self.predictor, self.stimuli, runtime, self.options, "predicting")
        if not runtime.is_main:
            return
        path = self._write(predicted)
        outputs = f"{len(self.predictor.site_ids or self.predictor.classes or []):,}"
        kind = "sites" if self.predictor.site_ids else "classes"
        print(f"{len(self.stimulus_ids):,} images, {outputs} {kind}: written to {path}", flush=True)

    def _write(self, predicted: Predicted) -> Path:
        assert self.options.out is not None
        if self.options.format == "netcdf":
            assert predicted.rates is not None
            predictions = Predictions(self.stimulus_ids, list(self.predictor.site_ids or []), predicted.rates)
            # Only facts about the stimuli: the sites, units and window of their recording are not those predicted.
            stimuli = assemble(predictions, self.shards, self.options.split).stimuli
            facts = {"recording": self.predictor.recording, "units": self.predictor.units}
            sites = {"neuroid_id": predictions.site_ids}
            assembly = Assembly({"prediction": predictions.rates}, stimuli, sites, facts)
            path = self.options.out / "predictions.nc"
            write_bytes(path, netcdf_bytes(assembly))
            return path
        path = self.options.out / PREDICTIONS_FILE
        write_npz(path, self._arrays(predicted))
        return path

    def _arrays(self, predicted: Predicted) -> dict[str, np.ndarray]:
        arrays = {"stimulus_id": np.array(self.stimulus_ids), "recording": np.array(self.predictor.recording)}
        if predicted.rates is not None:
            arrays |= {"site_id": np.array(self.predictor.site_ids), "prediction": predicted.rates}
            arrays["units"] = np.array(self.predictor.units)
        if predicted.classes is not None:
            arrays |= {"class_id": np.array(self.predictor.classes), "predicted_class": predicted.classes}
        return arrays


def prepare_images(options: Evaluate) -> ImagesJob:
    """Open predictor and images, and check that they fit together.

    Raises:
        BadInput: they do not, or options that do not go together.
    """
    assert options.images is not None
    assert options.out is not None
    RunFolder(options.out).check_free()
    predictor = open_predictor(options.runs[0], options.recording, options.checkpoint)
    if options.format == "netcdf" and predictor.site_ids is None:
        raise BadInput(f"--format netcdf: {options.runs[0]} predicts classes only; write npz")
    if not is_url(options.images) and _holds_files(Path(options.images)):
        stimuli: Mapping[int, StimulusSet] = _files(options, Path(options.images), predictor.network.image_sizes)
        shards, bad_samples = None, None
    else:
        loader = Loader(on_bad_sample=options.on_bad_sample or "stop", shard_cache=options.shard_cache)
        shards, bad_samples = ShardFolder(options.images, loader.fetch), BadSamples(loader)
        stimuli = _of_shards(options, shards, bad_samples, predictor.network.image_sizes)
    check_enough_images(len(next(iter(stimuli.values()))), options.images)
    return ImagesJob(options, predictor, stimuli, shards, bad_samples)


def _holds_files(folder: Path) -> bool:
    """Whether a folder holds image files, rather than shards.

    Raises:
        BadInput: there is no such folder.
    """
    if not folder.is_dir():
        raise BadInput(f"--images: {folder} is not a folder; give a folder of images, or a shard folder")
    return not (folder / "manifest.json").exists() and not any(folder.glob("*.tar"))


def _files(options: Evaluate, folder: Path, sizes: list[int]) -> dict[int, FileImages]:
    if options.on_bad_sample == "skip":
        raise BadInput("--on-bad-sample: images in files are not skipped; take out those that cannot be read")
    if options.split != "val":
        raise BadInput(f"--split: {folder} holds image files, which have no splits")
    names = find_images(folder)
    return {size: FileImages(folder, names, size) for size in sizes}


def _of_shards(
    options: Evaluate, shards: ShardFolder, bad_samples: BadSamples, sizes: list[int]
) -> dict[int, RecordingStimuli]:
    if options.split == LEFT_OUT:
        raise BadInput("--split: with --images, train, val or test of a shard folder; left_out belongs to a run")
    split = shards.split(options.split)
    usable = bad_samples.usable_positions(split, max(sizes), responses=False, classes=False)
    return {size: RecordingStimuli(split, size, usable, responses=False) for size in sizes}
