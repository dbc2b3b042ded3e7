"""The recordings that a run is trained on, one or several: checked against each other, as one, and divided.

A stimulus that one recording holds out is not trained on in another: see `Recordings.divide`.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from data_prep.common.errors import BadInput
from data_prep.shards.folder import ShardFolder, ShardSplit
from data_prep.shards.manifest import Image, Manifest, Rates, Split
from data_prep.splits import folds
from train.data.bad_samples import BadSamples
from train.data.order import inner_splits, nested_subset
from train.run.folder import is_folder_name
from train.run.recipe import LEAST_CORRELATED, EarlyStopping, Recipe

SEED_OF_FOLDS = 0  # of early_stopping.folds: runs of several seeds leave out the same stimuli
Images = set[tuple[str, int]]  # told by the stimulus's id and the bytes of the file


@dataclass
class FitAndSelection:
    """What of a recording is trained on, and what selects.

    Attributes:
        train: the split that is trained on.
        fit: positions in it.
        selection_split: the split that holds the stimuli that select.
        selection: positions in it.
        left_out: train stimuli that are in neither, because another recording holds them out.
    """

    train: ShardSplit
    fit: np.ndarray
    selection_split: ShardSplit
    selection: np.ndarray
    left_out: int = 0


class Recordings:
    """Opened shard folders, in the order in which their sites follow each other in the readout.

    Args:
        folders: one or several.

    Raises:
        BadInput: two have one name, or one has a name that no folder can have.
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
                    f"data: {other} and {folder.folder} are both called {name!r}, and recordings are told apart by "
                    "name; give one another (`name` in manifest.json; a folder of tars has its own name)"
                )
            if not is_folder_name(name):
                raise BadInput(
                    f"data: {folder.folder} is called {name!r}, but its scores go into a folder of that name; give it "
                    "another (`name` in manifest.json)"
                )

    def __len__(self) -> int:
        return len(self.folders)

    @property
    def manifests(self) -> list[Manifest]:
        """Of each recording."""
        return [folder.manifest for folder in self.folders]

    @cached_property
    def manifest(self) -> Manifest:
        """Of all of them as one recording, whose sites are those of one after the other."""
        return combined_manifest(self.manifests)

    @property
    def sites(self) -> dict[str, int]:
        """The number of sites of each, by name."""
        return {manifest.name: len(manifest.sites) for manifest in self.manifests}

    @property
    def columns(self) -> list[slice]:
        """Where the sites of each are in the outputs."""
        ends = np.cumsum(list(self.sites.values())).tolist()
        return [slice(end - sites, end) for end, sites in zip(ends, self.sites.values(), strict=True)]

    def check(self, recipe: Recipe) -> None:
        """Refuse settings that have no meaning for these recordings.

        Raises:
            BadInput: naming the setting.
        """
        if len(self) == 1:
            if recipe.mix != (default := Recipe.model_fields["mix"].default):
                raise BadInput(f"mix ({recipe.mix}) has an effect with several recordings only; leave it at {default}")
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
            self._check_alike("rates.units", "loss.responses poisson is in these; take mse")

    def _check_alike(self, field: str, why: str) -> None:
        values = [_get(manifest, field) for manifest in self.manifests]
        for folder, value in zip(self.folders, values, strict=True):
            if value != values[0]:
                raise BadInput(f"data: {self.folders[0].folder} and {folder.folder} differ in their {field}, and {why}")

    def image_size(self, recipe: Recipe) -> int:
        """Side in pixels of the images that the network sees."""
        return recipe.images.size or self.manifest.image.side

    def divide(self, recipe: Recipe, screening: BadSamples | None = None) -> list[FitAndSelection]:
        """Each recording's stimuli to fit and those that select, as `early_stopping.split` says.

        Alone each would be divided in the same way, but for what they share: a stimulus that is inner in one is inner
        in all (but not under `early_stopping.folds`, where each is dealt out by itself), and one that is held out in
        one (val, test or inner) is fitted in none. Stimuli that cannot be read leave their place in the division empty,
        so that it is the one of all stimuli.

        Args:
            recipe: of the run.
            screening: finds those that cannot be read; by default one of its own.

        Raises:
            BadInput: nothing is left of one, or it has fewer stimuli than the subset, or fewer groups than folds.
        """
        found, screening = [], screening or BadSamples(recipe.loader, name_recordings=len(self) > 1)
        trains = [folder.split("train") for folder in self.folders]
        used = [subset_positions(train, recipe) for train in trains]
        usable = [self._usable(train, recipe, screening) for train in trains]
        if recipe.early_stopping.split == "val":
            for folder, train, own, readable in zip(self.folders, trains, used, usable, strict=True):
                val = folder.split("val")
                fit = np.intersect1d(own, readable)
                found.append(FitAndSelection(train, fit, val, self._usable(val, recipe, screening)))
        else:
            groups = [_groups(*each) for each in zip(trains, used, usable, strict=True)]
            divided = _inner_parts(groups, recipe.early_stopping, recipe.seed)
            for train, own, parts, readable in zip(trains, used, divided, usable, strict=True):
                fit, inner = (np.intersect1d(own[part], readable) for part in parts)
                found.append(FitAndSelection(train, fit, train, inner))
        self._hold_out(found)
        return found

    def _usable(self, split: ShardSplit, recipe: Recipe, screening: BadSamples) -> np.ndarray:
        task = recipe.task
        needed = {"responses": task.predicts_responses, "classes": task.predicts_classes}
        return screening.usable_positions(split, self.image_size(recipe), **needed)

    def _hold_out(self, divided: list[FitAndSelection]) -> None:
        """Leave out of each recording's train split what others hold out."""
        reported = [self._reported(folder) for folder in self.folders]
        selecting = [_images(part.selection_split, part.selection) for part in divided]
        for number, part in enumerate(divided):
            before = len(part.fit) + len(part.selection)
            of_others = set().union(*(held for k, held in enumerate(reported) if k != number))
            if part.selection_split is part.train:
                part.selection = _without(part.train, part.selection, of_others)
            of_others = of_others.union(*(held for k, held in enumerate(selecting) if k != number))
            part.fit = _without(part.train, part.fit, of_others)
            part.left_out = before - len(part.fit) - len(part.selection)
            if part.left_out and not (len(part.fit) and len(part.selection)):
                raise BadInput(
                    f"data: nothing is left of the train split of {self.folders[number].folder}, because the other "
                    "recordings hold out what it trains on or selects by; pack them with the same split"
                )

    def _reported(self, folder: ShardFolder) -> Images:
        names = [name for name in folder.manifest.splits if name != "train"] if len(self) > 1 else []
        return set().union(*(_images(folder.split(name)) for name in names))


def _images(split: ShardSplit, positions: np.ndarray | None = None) -> Images:
    told = list(zip(split.stimulus_ids, split.image_sizes.tolist(), strict=True))
    return set(told if positions is None else [told[position] for position in positions])


def _without(split: ShardSplit, positions: np.ndarray, held: Images) -> np.ndarray:
    """Those positions whose images are not held out."""
    if not held:
        return positions
    sizes = split.image_sizes
    return positions[np.array([(split.stimulus_ids[k], int(sizes[k])) not in held for k in positions], bool)]


def subset_positions(train: ShardSplit, recipe: Recipe) -> np.ndarray:
    """Positions of the training stimuli that a recipe uses, to fit and to select; ascending.

    Raises:
        BadInput: there are fewer than `subset`.
    """
    return np.arange(len(train)) if recipe.subset is None else nested_subset(len(train), recipe.subset, recipe.seed)


def _groups(train: ShardSplit, used: np.ndarray, usable: np.ndarray) -> tuple[np.ndarray, Sequence[Hashable]]:
    """The groups of the used stimuli that must not be torn apart, and what tells these in other recordings.

    A stimulus that cannot be read is a group of its own.
    """
    key, groups = train.manifest.group_by, list(train.stimulus_ids)
    told: list[Hashable] = list(zip(train.stimulus_ids, train.image_sizes.tolist(), strict=True))
    for position in np.intersect1d(used, usable).tolist() if key else ():
        groups[position] = str(train.meta(position).get(key))
        told[position] = (key, groups[position])
    return np.array(groups)[used], [told[position] for position in used]


def _inner_parts(
    recordings: Sequence[tuple[np.ndarray, Sequence[Hashable]]], settings: EarlyStopping, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each recording, as of `_groups`, the stimuli to fit and the inner ones, counted among those that are used."""
    if settings.folds is None:
        return inner_splits(recordings, settings.inner_fraction, seed)
    found = []
    for groups, _ in recordings:
        if (count := len(np.unique(groups))) < settings.folds:
            raise BadInput(f"early_stopping.folds: {count} groups of train cannot fill {settings.folds} folds")
        inner = folds(groups, settings.folds, SEED_OF_FOLDS)[settings.fold - 1]
        found.append((np.delete(np.arange(len(groups)), inner), inner))
    return found


def combined_manifest(manifests: Sequence[Manifest]) -> Manifest:
    """What several recordings are as one: their sites one after the other, each with its own scale.

    Site ids are as they were, so they may come twice. One manifest is returned as it is.
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
        splits={name: _one_split(parts) for name, parts in splits.items()},
        sites=[site for manifest in manifests for site in manifest.sites],
        classes=_common([manifest.classes for manifest in manifests]),
        image=_largest([manifest.image for manifest in manifests]),
        rates=Rates(
            units=_common([manifest.rates.units for manifest in manifests]) or "differ between the recordings",
            mean=[mean for manifest in manifests for mean in manifest.rates.mean],
            std=[std for manifest in manifests for std in manifest.rates.std],
        ),
        response_window_ms=_common([manifest.response_window_ms for manifest in manifests]),
    )


def _one_split(parts: list[Split]) -> Split:
    return Split(
        stimuli=sum(part.stimuli for part in parts),
        responses=all(part.responses for part in parts),
        shards=[shard for part in parts for shard in part.shards],
    )


def _largest(images: list[Image]) -> Image:
    return max(images, key=lambda image: image.side)


def _common(values: list[Any]) -> Any:
    """The value that all have, else None."""
    return values[0] if all(value == values[0] for value in values) else None


def _get(manifest: Manifest, field: str) -> Any:
    for name in field.split("."):
        manifest = getattr(manifest, name)
    return manifest
