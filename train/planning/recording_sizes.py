"""The numbers of a recording that a plan needs: stimuli to fit, to select by and to score, and the size of images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.common.errors import BadInput
from data_prep.remote.url import FolderUrl, parse_location
from data_prep.shards.folder import ShardFolder
from data_prep.shards.manifest import Manifest
from data_prep.shards.storage import open_files
from train.data.recordings import Recordings, combined_manifest
from train.planning.options import Plan, ProbePlan
from train.planning.probe_costs import ProbeSizes
from train.planning.step_cost import paper_manifest
from train.run.recipe import ProbeRecipe, Recipe

SITES, CLASSES, SIDE = 168, 64, 224  # where no recording is given
SCORED = 8  # stimuli to fit for each that is scored, where no recording is given
SAMPLED = 64  # images whose encoded size is read


@dataclass(frozen=True)
class Images:
    """The images of a recording; `bytes` of an encoded one, None if it is not known."""

    side: int
    bytes: float | None = None


@dataclass(frozen=True)
class TrainingStimuli:
    """Numbers of stimuli that are trained on and that select the best epoch, and their images; `name` None on paper."""

    fit: int
    selection: int
    images: Images
    name: str | None


def manifest_of(options: Plan | ProbePlan) -> Manifest:
    """The recording of --data, or a made-up one."""
    locations = locations_of(options)
    if locations:
        return combined_manifest([open_files(location).manifest() for location in locations])
    classes = options.classes if isinstance(options, Plan) else None
    return paper_manifest(options.sites or SITES, classes or CLASSES, SIDE)


def locations_of(options: Plan | ProbePlan) -> list[str]:
    """The shard folders of --data."""
    if options.data is None:
        return []
    return options.data if isinstance(options.data, list) else [options.data]


def training_stimuli(options: Plan, recipe: Recipe, manifest: Manifest) -> TrainingStimuli:
    """The stimuli of a planned training.

    Shard folders on this machine are opened and divided as a run would; of others only the manifests are read.

    Raises:
        BadInput: neither a recording nor a number of stimuli is given.
    """
    side = recipe.images.size or manifest.image.side
    if options.data is None:
        if options.stimuli is None:
            raise BadInput("rates: how long a run takes depends on its stimuli; give --data DIR or --stimuli N")
        return TrainingStimuli(*_divided(options.stimuli, recipe), Images(side), None)
    names = " + ".join(open_files(location).manifest().name for location in options.data)
    if any(isinstance(parse_location(location), FolderUrl) for location in options.data):
        return TrainingStimuli(*_divided(manifest.splits["train"].stimuli, recipe), Images(side), names)
    recordings = Recordings([ShardFolder(location) for location in options.data])
    recordings.check(recipe)
    divided = recordings.divide(recipe)
    fit, selection = (sum(len(getattr(part, name)) for part in divided) for name in ("fit", "selection"))
    return TrainingStimuli(fit, selection, Images(side, _encoded_bytes(recordings.folders)), names)


def _divided(stimuli: int, recipe: Recipe) -> tuple[int, int]:
    used = min(stimuli, recipe.subset or stimuli)
    if recipe.early_stopping.split == "val":
        return used, max(used // SCORED, 1)
    folds, fraction = recipe.early_stopping.folds, recipe.early_stopping.inner_fraction
    inner = max(used // folds if folds else round(used * fraction), 1)
    return max(used - inner, 1), inner


def _encoded_bytes(folders: Sequence[ShardFolder]) -> float:
    sizes = [
        len(split.image(position)[0])
        for split in (folder.split("train") for folder in folders)
        for position in range(min(len(split), SAMPLED))
    ]
    return sum(sizes) / len(sizes)


@dataclass(frozen=True)
class ProbedStimuli:
    """The sizes of a planned probe, and its images; `name` None on paper."""

    sizes: ProbeSizes
    images: Images
    name: str | None


def probed_stimuli(options: ProbePlan, recipe: ProbeRecipe, manifest: Manifest) -> ProbedStimuli:
    """The stimuli of a planned probe.

    Raises:
        BadInput: neither a recording nor a number of stimuli is given, or the recording lacks the split to score.
    """
    side = recipe.images.size or manifest.image.side
    if options.data is None:
        if options.stimuli is None:
            raise BadInput("stimuli: what a probe needs depends on its stimuli; give --data DIR or --stimuli N")
        train, scored = options.stimuli, options.scored or max(options.stimuli // SCORED, 1)
        return ProbedStimuli(_partitions(options, recipe, train, scored, len(manifest.sites)), Images(side), None)
    counts = {name: split.stimuli for name, split in manifest.splits.items() if split.responses}
    if options.split == "cv":
        train, scored = sum(counts.values()), 0
    else:
        if not {"train", options.split} <= counts.keys():
            raise BadInput(f"split: {options.data} has no responses to {options.split}; it has {', '.join(counts)}")
        train, scored = counts["train"], counts[options.split]
    images = Images(side)
    location = parse_location(options.data)
    if isinstance(location, Path):
        images = Images(side, _encoded_bytes([ShardFolder(location)]))
    return ProbedStimuli(_partitions(options, recipe, train, scored, len(manifest.sites)), images, manifest.name)


def _partitions(options: ProbePlan, recipe: ProbeRecipe, train: int, scored: int, sites: int) -> ProbeSizes:
    train = min(train, recipe.subset or train)
    if options.split == "cv":
        stimuli, folds = train + scored, recipe.cross_validation.folds
        held_out = [stimuli // folds + (fold < stimuli % folds) for fold in range(folds)]
    else:
        stimuli, held_out = train + scored, [scored]
    fit = [stimuli - count for count in held_out]
    return ProbeSizes(fit, held_out, stimuli, sites, options.gpus, options.machines)
