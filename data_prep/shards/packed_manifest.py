"""The manifest of a packed recording, from notes taken while its shards were written."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from data_prep.ceiling import estimate_ceiling
from data_prep.common.errors import BadInput
from data_prep.common.progress import Progress
from data_prep.recording import Recording, Stimulus
from data_prep.shards.copies import copy_facts
from data_prep.shards.folder import ShardFolder, ShardSplit
from data_prep.shards.image_hashes import pixel_hash
from data_prep.shards.image_rules import ImageRules
from data_prep.shards.index import SplitIndex
from data_prep.shards.manifest import Ceiling, Image, Manifest, Rates, Shard, Split
from data_prep.shards.missing_codes import Ends, code_warnings, ends_of, merged_ends
from data_prep.shards.shown_images import as_shown
from data_prep.splits import straddling

CEILING_BYTES = 64 * 2**20  # of trials to estimate ceilings from at once, which takes about four times the memory
RESAMPLED = 0.1  # grey levels; a larger rounding error is not float16 noise: the image was resampled


class StimulusNotes:
    """Notes for the manifest about the stimuli of one shard, taken while it is written.

    Args:
        sites: number of sites of the recording.
        facts: the facts whose values are noted.
        rules: for the images.

    Attributes:
        groups: the values of each fact.
        image_sizes: widths, heights and modes of the images.
        image_notes: how many images each of `data_prep.shards.shown_images.NOTES` is about.
        rounding_error: the largest error from rounding an image to uint8, in grey levels; None if none was rounded.
        trial_ends: the ends of the single trials.
    """

    def __init__(self, sites: int, facts: Iterable[str], rules: ImageRules):
        self.groups: dict[str, set[str]] = {fact: set() for fact in facts}
        self.image_sizes: set[tuple[int, int, str]] = set()
        self.rounding_error: float | None = None
        self.image_notes: Counter[str] = Counter()
        self.trial_ends: Ends = Counter()
        self._sites, self._rules = sites, rules
        self._pixel_hashes: list[np.ndarray] = []
        self._rates: list[np.ndarray | None] = []

    def add(self, stimulus: Stimulus) -> Stimulus:
        """Check a stimulus and note its facts; returns it as it goes into the shard.

        Raises:
            BadInput: its arrays do not fit the recording's sites or hold infinite values, or its image is damaged.
        """
        self._check(stimulus.id, "rates", stimulus.rates, dimensions=1)
        self._check(stimulus.id, "trials", stimulus.trials, dimensions=2)
        shown = self._shown(stimulus)
        self._rates.append(stimulus.rates)
        if stimulus.trials is not None:
            self.trial_ends = merged_ends([self.trial_ends, ends_of(stimulus.trials)])
        for fact, values in self.groups.items():
            if fact in stimulus.meta:
                values.add(str(stimulus.meta[fact]))
        error = stimulus.meta.get("uint8_rounding_error")
        if error is not None:
            self.rounding_error = max(error, self.rounding_error or 0.0)
        return shown

    def _shown(self, stimulus: Stimulus) -> Stimulus:
        try:
            image = as_shown(stimulus.image, stimulus.encoding, self._rules)
        except ValueError as error:
            raise BadInput(f"{stimulus.location or stimulus.id}: the image cannot be read ({error})") from None
        self.image_sizes.add((image.width, image.height, image.mode))
        self.image_notes.update(image.notes)
        if image.pixels is not None:
            self._pixel_hashes.append(pixel_hash(image.pixels))
        converted = {} if image.converted_from is None else {"converted_from": image.converted_from}
        return replace(stimulus, image=image.data, encoding=image.encoding, meta=stimulus.meta | converted)

    def pixel_hashes(self) -> np.ndarray | None:
        """The hashes of the images, uint8 (stimuli, 16); None if they were not decoded."""
        return np.stack(self._pixel_hashes) if self._rules.decode else None

    def _check(self, stimulus_id: str, name: str, array: np.ndarray | None, dimensions: int) -> None:
        if array is None:
            return
        if array.ndim != dimensions or array.shape[-1] != self._sites:
            raise BadInput(f"{stimulus_id}: {name} of shape {array.shape} do not fit {self._sites} sites")
        if np.isinf(array).any():
            raise BadInput(f"{stimulus_id}: {name} contain an infinite value; use NaN for missing responses")

    def rates(self) -> np.ndarray | None:
        """float32 (stimuli, sites), or None if no stimulus of the shard has responses."""
        recorded = [rates for rates in self._rates if rates is not None]
        if not recorded:
            return None
        if len(recorded) < len(self._rates):
            raise BadInput("some stimuli of a split have responses and others have none; use NaN for missing responses")
        return np.stack(recorded)


@dataclass(frozen=True)
class PackedShard:
    """A packed shard; the last five are described in `StimulusNotes`."""

    shard: Shard
    index: SplitIndex
    rates: np.ndarray | None
    image_sizes: set[tuple[int, int, str]]
    image_notes: Counter[str]
    rounding_error: float | None
    trial_ends: Ends
    groups: dict[str, set[str]]


@dataclass(frozen=True)
class PackedShards:
    """All packed shards, by split."""

    of_split: dict[str, list[PackedShard]] = field(default_factory=dict)

    def all(self) -> list[PackedShard]:
        """The shards of all splits."""
        return [packed for shards in self.of_split.values() for packed in shards]

    def split_indexes(self) -> dict[str, SplitIndex]:
        """The index of each split."""
        return {
            split: SplitIndex.joined([packed.index for packed in shards]) for split, shards in self.of_split.items()
        }


def manifest_of(recording: Recording, packed: PackedShards, rules: ImageRules) -> Manifest:
    """The manifest of a packed recording, without its ceiling.

    Raises:
        BadInput: there is nothing to fit a model on.
    """
    return Manifest(
        name=recording.name,
        simulated=recording.simulated,
        provenance=_provenance(recording, packed, rules),
        splits={split: _split(shards) for split, shards in packed.of_split.items()},
        sites=recording.sites,
        classes=sorted(set(recording.objects)) if recording.objects else None,
        image=Image.of(set().union(*(shard.image_sizes for shard in packed.all()))),
        rates=_rates(recording, packed),
        response_window_ms=recording.response_window_ms,
        group_by=recording.group_by,
        truth=recording.truth,
    )


def _split(shards: list[PackedShard]) -> Split:
    return Split(
        stimuli=sum(packed.shard.stimuli for packed in shards),
        responses=all(packed.rates is not None for packed in shards),
        shards=[packed.shard for packed in shards],
    )


def _rates(recording: Recording, packed: PackedShards) -> Rates:
    shards = packed.of_split["train"]
    rates = [shard.rates for shard in shards if shard.rates is not None]
    if len(rates) < len(shards):
        raise BadInput(f"{recording.name}: the split 'train' has no responses to fit a model on")
    train = np.concatenate(rates)
    if np.isnan(train).all():
        raise BadInput(f"{recording.name}: every train rate is NaN; there is nothing to fit a model on")
    return Rates.of(train, recording.units)


def _provenance(recording: Recording, packed: PackedShards, rules: ImageRules) -> dict[str, Any]:
    """The recording's provenance, with the facts and warnings from packing."""
    provenance = {"split": {"method": "source"}} | recording.provenance
    warnings = list(provenance.get("warnings", []))
    shared = straddling({split: [shard.groups for shard in shards] for split, shards in packed.of_split.items()})
    if shared:
        provenance["straddling"] = shared
    provenance["images"] = {
        **rules.model_dump(exclude={"copies"}),
        **sum((shard.image_notes for shard in packed.all()), Counter()),
    }
    copies = copy_facts(packed.split_indexes())
    if copies is not None:
        provenance["copies"] = copies
    if "val" not in packed.of_split:
        warnings.append(
            f"none of the {len(recording.stimulus_ids)} stimuli is in val, which evaluate and probe score by default"
        )
    of_rates = merged_ends(ends_of(shard.rates) for shard in packed.all() if shard.rates is not None)
    of_trials = merged_ends(shard.trial_ends for shard in packed.all())
    warnings += [*code_warnings("rates", of_rates), *code_warnings("trials", of_trials)]
    errors = [shard.rounding_error for shard in packed.all() if shard.rounding_error is not None]
    if errors:
        provenance["largest_uint8_rounding_error"] = max(errors)
        if max(errors) > RESAMPLED and not any("uint8" in warning for warning in warnings):
            warnings.append(
                f"rounding to uint8 moved a pixel by {max(errors):.3f} of a grey level: "
                "the source's images were not uint8 (they were resampled after decoding)"
            )
    if warnings:
        provenance["warnings"] = warnings
    return provenance


# -------------------------------------------------------------------------------------------------------- ceiling


def ceiling_of(folder: ShardFolder) -> Ceiling | None:
    """The ceiling of each site over all stimuli that have single trials, whatever their split; None without trials."""
    splits = [folder.split(name) for name in folder.manifest.splits]
    sites, size = len(folder.manifest.sites), sum(split.trials_bytes for split in splits)
    if not size:
        return None
    width = max(1, sites * CEILING_BYTES // size)
    with Progress(sites, "noise ceilings", "sites") as progress:
        estimate = estimate_ceiling(_blocks_of_sites(splits, sites, width, progress))
    return None if estimate is None else Ceiling.from_estimate(estimate)


def _blocks_of_sites(splits: Sequence[ShardSplit], sites: int, width: int, progress: Progress) -> Iterator[np.ndarray]:
    for first in range(0, sites, width):
        yield _trials(splits, slice(first, first + width))
        progress.advance(min(width, sites - first))


def _trials(splits: Sequence[ShardSplit], sites: slice) -> np.ndarray:
    """The trials of all splits: float32 (stimuli, repetitions, sites), padded with NaN."""
    of_splits = [trials for trials in (split.trials(sites) for split in splits) if trials is not None]
    repetitions = max(trials.shape[1] for trials in of_splits)
    padding = [((0, 0), (0, repetitions - trials.shape[1]), (0, 0)) for trials in of_splits]
    return np.concatenate(
        [np.pad(trials, pad, constant_values=np.nan) for trials, pad in zip(of_splits, padding, strict=True)]
    )
