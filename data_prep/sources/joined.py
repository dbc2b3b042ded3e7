"""Source `joined`: several packed recordings of different sites, joined into one recording.

Stimuli are matched by id; the images of a stimulus must be the same bytes in all recordings. If a recording lacks a
stimulus, the responses of its sites to it are NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import tyro

from data_prep.common.errors import BadInput
from data_prep.recording import SPLITS, Recording, Stimulus
from data_prep.sources.files.held_out import HeldOut
from data_prep.sources.files.ids import select_sites
from data_prep.sources.files.named_images_recording import objects_of
from data_prep.sources.files.presentations import pad_repetitions
from data_prep.splits import Dealt

if TYPE_CHECKING:
    from data_prep.shards.folder import ShardFolder, ShardSplit

Value = TypeVar("Value")


class Joined(HeldOut):
    """Several packed recordings of different sites, joined: stimuli are matched by id, sites are put side by side."""

    source: tyro.conf.Positional[tuple[Path, ...]]
    """Shard folders made by data_prep/pack.py."""
    new_split: bool = False
    """Make a new random split. By default the splits stay as packed, and must agree on shared stimuli."""
    subjects: tuple[str, ...] = ()
    """The subject of each folder's sites, one name per folder. Default: as in the folders."""
    regions: tuple[str, ...] = ()
    """The region of each folder's sites, one name per folder. Default: as in the folders."""
    region: tuple[str, ...] = ()
    """Only sites in these regions."""
    name: str | None = None
    """Name of the recording. Default: the names of the recordings, joined by +."""

    def open(self) -> Recording:
        """Match the stimuli, sites and splits of the folders; images are compared when stimuli are read.

        Raises:
            BadInput: folders that cannot be read or contradict each other.
        """
        from data_prep.shards.folder import ShardFolder  # slow to import

        if len(self.source) < 2:
            raise BadInput("joined: give at least two shard folders")
        folders = [ShardFolder(path) for path in self.source]
        folder_splits: list[dict[str, ShardSplit]] = [
            {name: folder.split(name) for name in folder.manifest.splits} for folder in folders
        ]
        occurrences = _occurrences(folder_splits)
        sites, keep = self._sites(folders)
        meta = [_merged_meta(stimulus, by_folder) for stimulus, by_folder in occurrences.items()]
        dealt = self._splits(occurrences, meta)
        split_has_responses = dict.fromkeys(dealt.splits, False)
        for split, by_folder in zip(dealt.splits, occurrences.values(), strict=True):
            split_has_responses[split] |= any(occurrence.split.has_responses for occurrence in by_folder.values())
        manifests = [folder.manifest for folder in folders]
        packed_group_by = _common_value([manifest.group_by for manifest in manifests])
        return JoinedRecording(
            name=self.name or "+".join(manifest.name for manifest in manifests),
            provenance={
                "source": "joined",
                "split": dealt.rule,
                "selected": {"region": self.region},
                "recordings": [
                    {
                        "path": str(path.resolve()),
                        "name": manifest.name,
                        "fingerprint": manifest.fingerprint,
                        "sites": len(manifest.sites),
                        "provenance": manifest.provenance,
                    }
                    for path, manifest in zip(self.source, manifests, strict=True)
                ],
            },
            simulated=any(manifest.simulated for manifest in manifests),
            sites=list(compress(sites, keep)),
            response_window_ms=_common_value([manifest.response_window_ms for manifest in manifests]),
            units=_common_value([manifest.rates.units for manifest in manifests]) or "differ between the recordings",
            stimulus_ids=list(occurrences),
            splits=dealt.splits,
            deal=dealt.deal,
            objects=objects_of(meta),
            group_by=self.group_by if self.new_split else packed_group_by,
            occurrences=list(occurrences.values()),
            meta=meta,
            site_counts=[len(manifest.sites) for manifest in manifests],
            columns=np.flatnonzero(keep),
            split_has_responses=split_has_responses,
        )

    def _sites(self, folders: Sequence[ShardFolder]) -> tuple[list[dict[str, Any]], np.ndarray]:
        """The facts about the sites of all folders, and bool (sites,): which are selected."""
        for flag, names in (("--subjects", self.subjects), ("--regions", self.regions)):
            if names and len(names) != len(folders):
                raise BadInput(f"{flag}: {len(names)} names for {len(folders)} folders; give one for each")
        labels = _numbered([folder.manifest.name for folder in folders])
        ids_of = [{str(site["id"]) for site in folder.manifest.sites} for folder in folders]
        sites = []
        for k, (folder, label) in enumerate(zip(folders, labels, strict=True)):
            other_ids = set().union(*(ids for other, ids in enumerate(ids_of) if other != k))
            prefix = f"{label}_" if ids_of[k] & other_ids else ""  # for all sites of the folder, to be uniform
            facts: dict[str, Any] = {"recording": label}
            if self.subjects:
                facts["subject"] = self.subjects[k]
            if self.regions:
                facts["region"] = self.regions[k]
            sites += [site | {"id": f"{prefix}{site['id']}"} | facts for site in folder.manifest.sites]
        return sites, select_sites(sites, "region", self.region, "--region", "joined")

    def _splits(self, occurrences: Mapping[str, Mapping[int, Occurrence]], meta: list[dict[str, Any]]) -> Dealt:
        """The split of every stimulus."""
        if self.new_split:
            return self.assign(meta, self.source[0])
        self.refuse_split_options("the splits stay as packed without --new-split")
        splits = []
        for stimulus, by_folder in occurrences.items():
            packed_splits = {occurrence.split_name for occurrence in by_folder.values()}
            if len(packed_splits) > 1:
                contradiction = ", ".join(
                    f"{occurrence.split_name} in {self.source[folder]}" for folder, occurrence in by_folder.items()
                )
                raise BadInput(
                    f"stimulus {stimulus!r} is in different splits ({contradiction}); pack the folders with the same "
                    "split, or make a new one with --new-split"
                )
            splits.append(packed_splits.pop())
        return Dealt(splits, "as packed")


@dataclass(frozen=True, slots=True)
class Occurrence:
    """A stimulus in one of the folders: its split, and its position in the split."""

    split_name: str
    split: ShardSplit
    position: int


@dataclass(kw_only=True)
class JoinedRecording(Recording):
    """Shard folders that `Joined.open` has matched; files are opened in the process that reads.

    Attributes (beside those of `Recording`):
        occurrences: of each stimulus, {number of the folder: its occurrence there}.
        site_counts: the number of sites of each folder.
        columns: positions of the selected sites among those of all folders side by side.
    """

    occurrences: list[dict[int, Occurrence]]
    site_counts: list[int]
    columns: np.ndarray

    def read(self, indices: Sequence[int]) -> Iterator[Stimulus]:
        """Yield the stimuli at `indices`, one at a time.

        Raises:
            BadInput: two folders have different images under one id.
        """
        for i in indices:
            image, encoding = self._image(i)
            rates = trials = None
            if self.has_responses(i):
                rates, trials = self._responses(self.occurrences[i])
            yield Stimulus(self.stimulus_ids[i], image, encoding, rates, trials, meta=self.known_meta(i))

    def _image(self, i: int) -> tuple[bytes, str]:
        """The image and its encoding, compared between all folders that have it."""
        first, *others = self.occurrences[i].values()
        image, encoding = first.split.image(first.position)
        for other in others:
            if other.split.image(other.position)[0] != image:
                raise BadInput(
                    f"stimulus {self.stimulus_ids[i]!r} has different images in {other.split.folder} and in "
                    f"{first.split.folder}; an id must stand for the same image everywhere"
                )
        return bytes(image), encoding

    def _responses(self, occurrences: Mapping[int, Occurrence]) -> tuple[np.ndarray, np.ndarray | None]:
        """Rates, float32 (sites,), and trials, (repetitions, sites); NaN for folders without the stimulus."""
        rates, trials = [], []
        for folder, sites in enumerate(self.site_counts):
            folder_rates = folder_trials = None
            if folder in occurrences:
                occurrence = occurrences[folder]
                folder_rates = occurrence.split.array(occurrence.position, "rates.npy")
                folder_trials = occurrence.split.array(occurrence.position, "trials.npy")
            rates.append(np.full(sites, np.nan, np.float32) if folder_rates is None else folder_rates)
            trials.append(np.empty((0, sites), np.float32) if folder_trials is None else folder_trials)
        all_rates = np.concatenate(rates)[self.columns]
        repetitions = max(map(len, trials))
        if not repetitions:
            return all_rates, None
        padded = [pad_repetitions(folder_trials, repetitions) for folder_trials in trials]
        return all_rates, np.concatenate(padded, axis=1)[:, self.columns]


def _occurrences(folder_splits: Sequence[Mapping[str, ShardSplit]]) -> dict[str, dict[int, Occurrence]]:
    """{stimulus: {number of the folder: its occurrence there}}, in the order of the folders and their splits."""
    occurrences: dict[str, dict[int, Occurrence]] = {}
    for folder, splits in enumerate(folder_splits):
        for name in SPLITS:
            if name not in splits:
                continue
            for position, stimulus in enumerate(splits[name].stimulus_ids):
                occurrences.setdefault(stimulus, {})[folder] = Occurrence(name, splits[name], position)
    return occurrences


def _merged_meta(stimulus: str, occurrences: Mapping[int, Occurrence]) -> dict[str, Any]:
    """The facts of all folders about a stimulus; if they differ the first wins, except that objects must agree."""
    merged: dict[str, Any] = {}
    for occurrence in occurrences.values():
        meta = occurrence.split.meta(occurrence.position)
        objects = {facts["object"] for facts in (merged, meta) if "object" in facts}
        if len(objects) > 1:
            raise BadInput(
                f"stimulus {stimulus!r} shows {' or '.join(sorted(objects))}: the folders name different objects"
            )
        merged = meta | merged
    return merged


def _common_value(values: Sequence[Value]) -> Value | None:
    """The value if all are the same, else None."""
    return values[0] if all(value == values[0] for value in values) else None


def _numbered(names: list[str]) -> list[str]:
    """Names, with a number appended to repeated ones."""
    return [f"{name}-{names[: k + 1].count(name)}" if names.count(name) > 1 else name for k, name in enumerate(names)]
