"""The recordings that a run is trained on: checked against each other, combined, and divided for early stopping.

A stimulus that one recording holds out is not trained on in another: see `Recordings.divide`.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any

import numpy as np

from data_prep.common.errors import BadInput
from data_prep.shards.folder import ShardFolder, ShardSplit
from data_prep.shards.image_identity import first_copies
from data_prep.shards.manifest import Manifest, Rates, Split
from data_prep.splits import folds, with_copies
from train.data.bad_samples import BadSamples
from train.data.order import InnerSplit, StimulusGroups, inner_splits, nested_subset
from train.data.seen import images_of_split
from train.run.folder import is_folder_name
from train.run.recipe import LEAST_CORRELATED, EarlyStopping, Recipe

FOLD_SEED = 0  # of early_stopping.folds: runs with different seeds leave out the same stimuli
Images = set[bytes]  # by both names of each, see ImageIdentities


@dataclass
class FitAndSelection:
    """The stimuli of a recording that are fitted, and those that select the epoch.

    Attributes:
        train: the split that is trained on.
        fit: positions in it to fit.
        selection_split: the split of the stimuli that select.
        selection: positions in it.
        left_out: number of train stimuli in neither, because another recording holds them out.
    """

    train: ShardSplit
    fit: np.ndarray
    selection_split: ShardSplit
    selection: np.ndarray
    left_out: int = 0


class Recordings:
    """Opened shard folders, in the order in which their sites follow each other in the readout.

    Args:
        folders: one or more.

    Raises:
        BadInput: two have the same name, or one has a name that no folder can have.
    """

    def __init__(self, folders: Sequence[ShardFolder]):
        self.folders = list(folders)
        self.names = [folder.manifest.name for folder in folders]
        if len(folders) > 1:
            self._check_names()

    def _check_names(self) -> None:
        for number, (folder, name) in enumerate(zip(self.folders, self.names, strict=True)):
            if name in self.names[:number]:
                other = self.folders[self.names.index(name)].folder
                raise BadInput(
                    f"data: {other} and {folder.folder} are both called {name!r}; give one of the recordings "
                    "another name (`name` in manifest.json; a folder of tars has its own name)"
                )
            if not is_folder_name(name):
                raise BadInput(
                    f"data: {folder.folder} is called {name!r}, but its scores need a folder of that name; give it "
                    "another name (`name` in manifest.json)"
                )

    def __len__(self) -> int:
        return len(self.folders)

    @property
    def manifests(self) -> list[Manifest]:
        """The manifest of each recording."""
        return [folder.manifest for folder in self.folders]

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest of all recordings as one, whose sites are those of one after the other."""
        return combined_manifest(self.manifests)

    @property
    def sites(self) -> dict[str, int]:
        """The number of sites of each recording, by name."""
        return {manifest.name: len(manifest.sites) for manifest in self.manifests}

    @property
    def columns(self) -> list[slice]:
        """The columns of each recording's sites in a network's outputs."""
        ends = np.cumsum(list(self.sites.values())).tolist()
        return [slice(end - sites, end) for end, sites in zip(ends, self.sites.values(), strict=True)]

    def check(self, recipe: Recipe) -> None:
        """Refuse settings that make no sense for these recordings.

        Raises:
            BadInput: naming the setting.
        """
        if len(self) == 1:
            if recipe.mix != "proportional":
                raise BadInput(f"mix ({recipe.mix}) needs several recordings; leave it at proportional")
            return
        if recipe.loader.engine != "indexed":
            raise BadInput(f"loader.engine: {recipe.loader.engine} streams one recording; leave it at indexed")
        if recipe.mix == "equal" and recipe.batch.global_size < len(self):
            raise BadInput(
                f"batch.global_size ({recipe.batch.global_size}) must be at least {len(self)} for mix equal, so that "
                "each recording is in every step"
            )
        if recipe.loss.responses == "correlation" and recipe.batch.global_size < LEAST_CORRELATED * len(self):
            raise BadInput(
                f"batch.global_size ({recipe.batch.global_size}) must be at least {LEAST_CORRELATED * len(self)} for "
                f"loss.responses correlation on {len(self)} recordings"
            )
        if recipe.task.predicts_classes:
            self._check_alike("classes", f"task.kind {recipe.task.kind} has one readout to them")
        if recipe.task.predicts_responses and recipe.loss.responses == "poisson":
            self._check_alike("rates.units", "loss.responses poisson depends on them; use mse")

    def _check_alike(self, field: str, why: str) -> None:
        values = [attrgetter(field)(manifest) for manifest in self.manifests]
        for folder, value in zip(self.folders, values, strict=True):
            if value != values[0]:
                raise BadInput(f"data: {self.folders[0].folder} and {folder.folder} differ in their {field}, and {why}")

    def image_size(self, recipe: Recipe) -> int:
        """Side in pixels of the images that the network sees."""
        return recipe.images.size or self.manifest.image.side

    def divide(self, recipe: Recipe, screening: BadSamples | None = None) -> list[FitAndSelection]:
        """Each recording's stimuli to fit and those that select, as `early_stopping.split` says.

        Each is divided as it would be alone, except for shared stimuli: a stimulus that is inner in one recording is
        inner in all (but not under `early_stopping.folds`, which divides each by itself), and one that is held out in
        one (val, test or inner) is fitted in none. Stimuli that cannot be read are divided like the others and then
        left out, so that they do not change the division.

        Args:
            recipe: of the run.
            screening: finds the stimuli that cannot be read; by default a new one.

        Raises:
            BadInput: nothing is left of a recording, or it has fewer stimuli than `subset` or groups than folds.
        """
        screening = screening or BadSamples(recipe.loader, name_recordings=len(self) > 1)
        trains = [self._train_stimuli(folder, recipe, screening) for folder in self.folders]
        divisions = []
        if recipe.early_stopping.split == "val":
            for folder, train in zip(self.folders, trains, strict=True):
                val = folder.split("val")
                fit = np.intersect1d(train.used, train.readable)
                divisions.append(FitAndSelection(train.split, fit, val, self._readable(val, recipe, screening)))
        else:
            splits = _inner_splits([_groups(train) for train in trains], recipe.early_stopping, recipe.seed)
            for train, split in zip(trains, splits, strict=True):
                fit = np.intersect1d(train.used[split.fit], train.readable)
                inner = np.intersect1d(train.used[split.inner], train.readable)
                divisions.append(FitAndSelection(train.split, fit, train.split, inner))
        self._hold_out(divisions)
        return divisions

    def _train_stimuli(self, folder: ShardFolder, recipe: Recipe, screening: BadSamples) -> "_TrainStimuli":
        split = folder.split("train")
        return _TrainStimuli(folder, split, subset_positions(split, recipe), self._readable(split, recipe, screening))

    def _readable(self, split: ShardSplit, recipe: Recipe, screening: BadSamples) -> np.ndarray:
        return screening.usable_positions(
            split,
            self.image_size(recipe),
            responses=recipe.task.predicts_responses,
            classes=recipe.task.predicts_classes,
        )

    def _hold_out(self, divisions: list[FitAndSelection]) -> None:
        """Leave out of each recording's train split the stimuli that other recordings hold out."""
        if len(self) == 1:
            return
        reported = [self._reported(folder) for folder in self.folders]
        selecting = [
            _images(folder, division.selection_split.name, division.selection)
            for folder, division in zip(self.folders, divisions, strict=True)
        ]
        for number, division in enumerate(divisions):
            before = len(division.fit) + len(division.selection)
            held_out = set().union(*(images for k, images in enumerate(reported) if k != number))
            if division.selection_split is division.train:
                division.selection = _without(self.folders[number], division.selection, held_out)
            held_out = held_out.union(*(images for k, images in enumerate(selecting) if k != number))
            division.fit = _without(self.folders[number], division.fit, held_out)
            division.left_out = before - len(division.fit) - len(division.selection)
            if division.left_out and not (len(division.fit) and len(division.selection)):
                raise BadInput(
                    f"data: nothing is left of the train split of {self.folders[number].folder}, because the other "
                    "recordings hold out what it trains on or selects by; pack them with the same split"
                )

    def _reported(self, folder: ShardFolder) -> Images:
        names = [name for name in folder.manifest.splits if name != "train"]
        return set().union(*(_images(folder, name) for name in names))


def _images(folder: ShardFolder, split: str, positions: np.ndarray | None = None) -> Images:
    identities = images_of_split(folder, split)
    return set().union(*(identities if positions is None else identities.at(positions)).names())


def _without(folder: ShardFolder, positions: np.ndarray, held_out: Images) -> np.ndarray:
    """The positions in train whose images are not held out."""
    if not held_out:
        return positions
    names = images_of_split(folder, "train").at(positions).names()
    return positions[np.array([held_out.isdisjoint(of_image) for of_image in names], bool)]


def subset_positions(train: ShardSplit, recipe: Recipe) -> np.ndarray:
    """Positions of the training stimuli that a recipe uses, to fit or to select; ascending.

    Raises:
        BadInput: there are fewer than `subset`.
    """
    return np.arange(len(train)) if recipe.subset is None else nested_subset(len(train), recipe.subset, recipe.seed)


@dataclass(frozen=True)
class _TrainStimuli:
    """The stimuli of a train split.

    Attributes:
        folder: of the shards.
        split: theirs.
        used: positions of those that the recipe uses.
        readable: positions of those that can be read.
    """

    folder: ShardFolder
    split: ShardSplit
    used: np.ndarray
    readable: np.ndarray


def _groups(train: _TrainStimuli) -> StimulusGroups:
    """The groups of the stimuli that are used, copies of an image together; one that cannot be read has its own."""
    split, identities = train.split, images_of_split(train.folder, "train")
    labels = list(split.stimulus_ids)
    keys: list[Hashable] = [pixels.tobytes() for pixels in identities.pixels]
    group_by = split.manifest.group_by
    if group_by is not None:
        for position in np.intersect1d(train.used, train.readable).tolist():
            labels[position] = str(split.meta(position).get(group_by))
            keys[position] = (group_by, labels[position])
    copies = first_copies(identities.at(train.used))
    groups = with_copies(np.array(labels)[train.used], copies)
    return StimulusGroups(np.asarray(groups), [keys[position] for position in train.used])


def _inner_splits(recordings: Sequence[StimulusGroups], settings: EarlyStopping, seed: int) -> list[InnerSplit]:
    """The stimuli of each recording to fit and the inner ones, counted among those that are used."""
    if settings.folds is None:
        return inner_splits(recordings, settings.inner_fraction, seed)
    divided = []
    for groups in recordings:
        count = len(np.unique(groups.labels))
        if count < settings.folds:
            raise BadInput(f"early_stopping.folds: {count} groups of train stimuli cannot fill {settings.folds} folds")
        inner = folds(groups.labels, settings.folds, FOLD_SEED)[settings.fold - 1]
        divided.append(InnerSplit(np.delete(np.arange(len(groups.labels)), inner), inner))
    return divided


def combined_manifest(manifests: Sequence[Manifest]) -> Manifest:
    """The manifest of several recordings as one: their sites one after the other, each with its own scale.

    Site ids are kept, so an id may appear twice. A single manifest is returned unchanged.
    """
    if len(manifests) == 1:
        return manifests[0]
    splits: dict[str, list[Split]] = {}
    for manifest in manifests:
        for name, split in manifest.splits.items():
            splits.setdefault(name, []).append(split)
    return Manifest(
        name=" + ".join(manifest.name for manifest in manifests),
        simulated=any(manifest.simulated for manifest in manifests),
        provenance={},
        splits={name: _combined_split(same_split) for name, same_split in splits.items()},
        sites=[site for manifest in manifests for site in manifest.sites],
        classes=_common([manifest.classes for manifest in manifests]),
        image=max((manifest.image for manifest in manifests), key=attrgetter("side")),
        rates=Rates(
            units=_common([manifest.rates.units for manifest in manifests]) or "differ between the recordings",
            mean=[mean for manifest in manifests for mean in manifest.rates.mean],
            std=[std for manifest in manifests for std in manifest.rates.std],
        ),
        response_window_ms=_common([manifest.response_window_ms for manifest in manifests]),
    )


def _combined_split(splits: list[Split]) -> Split:
    return Split(
        stimuli=sum(split.stimuli for split in splits),
        responses=all(split.responses for split in splits),
        shards=[shard for split in splits for shard in split.shards],
    )


def _common(values: list[Any]) -> Any:
    """The value that all have in common, else None."""
    return values[0] if all(value == values[0] for value in values) else None
