"""Source `joined`: several packed recordings of different sites, as one recording.

The stimuli are matched by id, and where several recordings hold one, their images must be the same bytes. Sites of a
recording that does not hold a stimulus have NaN there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from data_prep.common.errors import BadInput
from data_prep.recording import SPLITS, Recording, Stimulus
from data_prep.shards.folder import ShardFolder, ShardSplit
from data_prep.sources.files.presentations import HeldOut, objects_of
from data_prep.sources.files.trials import select_sites

Place = tuple[str, int]  # split of the folder, position in it


class Joined(HeldOut):
    """Several packed recordings of different sites as one: stimuli are matched by id, sites are put side by side."""

    source: tyro.conf.Positional[tuple[Path, ...]]
    """Shard folders made by data_prep/pack.py."""
    new_split: bool = False
    """Divide anew at random. By default the splits are as packed, and must agree on the stimuli that are shared."""
    subjects: tuple[str, ...] = ()
    """The subject of each folder's sites, one name per folder. Default: as the folders say."""
    regions: tuple[str, ...] = ()
    """The region of each folder's sites, one name per folder. Default: as the folders say."""
    region: tuple[str, ...] = ()
    """Only sites in these regions."""
    name: str | None = None
    """Name of the recording. Default: the names of the recordings, with + between them."""

    def open(self) -> Recording:
        """Match the stimuli, sites and splits of the folders; images are compared when stimuli are read.

        Raises:
            BadInput: folders that cannot be read or contradict each other.
        """
        if len(self.source) < 2:
            raise BadInput("joined: give two shard folders or more; one alone needs no joining")
        folders = [ShardFolder(path) for path in self.source]
        parts = [{name: folder.split(name) for name in folder.manifest.splits} for folder in folders]
        places = _places(parts)
        sites, keep = self._sites(folders)
        meta = [_merged_meta(stimulus, parts, found) for stimulus, found in places.items()]
        splits, rule = self._splits(places, meta)
        answered = dict.fromkeys(splits, False)
        for split, found in zip(splits, places.values(), strict=True):
            answered[split] |= any(parts[folder][packed].has_responses for folder, (packed, _) in found.items())
        manifests = [folder.manifest for folder in folders]
        return JoinedRecording(
            name=self.name or "+".join(manifest.name for manifest in manifests),
            provenance={
                "source": "joined",
                "split": rule,
                "selected": {"region": self.region},
                "recordings": [
                    {"path": str(folder.folder.resolve()), "name": manifest.name, "fingerprint": manifest.fingerprint}
                    | {"sites": len(manifest.sites), "provenance": manifest.provenance}
                    for folder, manifest in zip(folders, manifests, strict=True)
                ],
            },
            simulated=any(manifest.simulated for manifest in manifests),
            sites=[site for site, kept in zip(sites, keep, strict=True) if kept],
            response_window_ms=_common([manifest.response_window_ms for manifest in manifests]),
            units=_common([manifest.rates.units for manifest in manifests]) or "differ between the recordings",
            stimulus_ids=list(places),
            splits=splits,
            objects=objects_of(meta),
            group_by=self.group_by if self.new_split else _common([m.group_by for m in manifests]),
            parts=parts,
            places=list(places.values()),
            meta=meta,
            columns=np.flatnonzero(keep),
            answered=answered,
        )

    def _sites(self, folders: list[ShardFolder]) -> tuple[list[dict[str, Any]], np.ndarray]:
        """The facts of the sites of all folders, and bool (sites,): which are kept."""
        labels = _distinct([folder.manifest.name for folder in folders])
        for flag, given in (("--subjects", self.subjects), ("--regions", self.regions)):
            if given and len(given) != len(folders):
                raise BadInput(f"{flag}: {len(given)} names for {len(folders)} folders; give one for each")
        sites, taken = [], [{str(site["id"]) for site in folder.manifest.sites} for folder in folders]
        for k, (folder, label) in enumerate(zip(folders, labels, strict=True)):
            others = set().union(*(ids for j, ids in enumerate(taken) if j != k))
            shared = bool(taken[k] & others)  # then all of this folder's get its name, so that they stay alike
            for site in folder.manifest.sites:
                site_id = f"{label}_{site['id']}" if shared else str(site["id"])
                said = {"subject": self.subjects[k]} if self.subjects else {}
                said |= {"region": self.regions[k]} if self.regions else {}
                sites.append(site | {"id": site_id, "recording": label} | said)
        return sites, select_sites(sites, "region", self.region, "--region", "joined")

    def _splits(self, places: dict[str, dict[int, Place]], meta: list[dict[str, Any]]) -> tuple[list[str], Any]:
        if self.new_split:
            return self.deal(meta, self.source[0])
        self.refuse_options("the splits are as packed unless you say --new-split")
        splits = []
        for stimulus, found in places.items():
            names = {split for split, _ in found.values()}
            if len(names) > 1:
                said = ", ".join(f"{self.source[folder]} in {split}" for folder, (split, _) in found.items())
                raise BadInput(
                    f"stimulus {stimulus!r} is for {said}; pack them with the same split, "
                    "or divide anew with --new-split"
                )
            splits.append(names.pop())
        return splits, "as packed"


@dataclass(kw_only=True)
class JoinedRecording(Recording):
    """Shard folders that `Joined.open` has matched.

    Attributes (beside those of `Recording`):
        parts: of each folder, its splits; they open their files in the process that reads.
        places: of each stimulus, {folder: where it is there}.
        columns: the sites that are kept, of those of all folders side by side.
    """

    parts: list[dict[str, ShardSplit]]
    places: list[dict[int, Place]]
    columns: np.ndarray

    def read(self, indices: Sequence[int]) -> Iterator[Stimulus]:
        """Yield the stimuli at `indices`, one at a time.

        Raises:
            BadInput: two folders have different images under one id.
        """
        for i in indices:
            found = {folder: self.parts[folder][split] for folder, (split, _) in self.places[i].items()}
            image, encoding = self._image(i, found)
            rates = trials = None
            if self.answered[self.splits[i]]:
                rates, trials = self._responses(i, found)
            yield Stimulus(self.stimulus_ids[i], image, encoding, rates, trials, meta=self.meta[i])

    def _image(self, i: int, found: dict[int, ShardSplit]) -> tuple[bytes, str]:
        """The image and its encoding, compared between all folders that hold it."""
        (first, split), *others = found.items()
        image, encoding = split.image(self.places[i][first][1])
        for folder, other in others:
            if other.image(self.places[i][folder][1])[0] != image:
                raise BadInput(
                    f"stimulus {self.stimulus_ids[i]!r} is another image in {other.folder} than in {split.folder}; "
                    "an id must mean the same image everywhere"
                )
        return bytes(image), encoding

    def _responses(self, i: int, found: dict[int, ShardSplit]) -> tuple[np.ndarray, np.ndarray | None]:
        """Rates, float32 (sites,), and trials, (repetitions, sites), NaN where a folder has none."""
        rates, trials = [], []
        for folder, part in enumerate(self.parts):
            sites = len(next(iter(part.values())).manifest.sites)
            here = {}
            if folder in found:
                position = self.places[i][folder][1]
                here = {name: found[folder].array(position, name) for name in ("rates.npy", "trials.npy")}
            rates.append(_or(here.get("rates.npy"), np.full(sites, np.nan, np.float32)))
            trials.append(_or(here.get("trials.npy"), np.empty((0, sites), np.float32)))
        depth = max(map(len, trials))
        padded = [np.pad(part, ((0, depth - len(part)), (0, 0)), constant_values=np.nan) for part in trials]
        return np.concatenate(rates)[self.columns], np.concatenate(padded, 1)[:, self.columns] if depth else None


def _or(array: np.ndarray | None, default: np.ndarray) -> np.ndarray:
    return default if array is None else array


def _places(parts: list[dict[str, ShardSplit]]) -> dict[str, dict[int, Place]]:
    """{stimulus: {folder: where it is there}}, in the order of the folders and their splits."""
    places: dict[str, dict[int, Place]] = {}
    for folder, part in enumerate(parts):
        for name in SPLITS:
            for position, stimulus in enumerate(part[name].stimulus_ids if name in part else ()):
                places.setdefault(stimulus, {})[folder] = (name, position)
    return places


def _merged_meta(stimulus: str, parts: list[dict[str, ShardSplit]], found: dict[int, Place]) -> dict[str, Any]:
    """What all folders say of a stimulus; where they differ the first is right, except for the object shown."""
    merged: dict[str, Any] = {}
    for folder, (split, position) in found.items():
        meta = parts[folder][split].meta(position)
        shown = {facts["object"] for facts in (merged, meta) if "object" in facts}
        if len(shown) > 1:
            raise BadInput(
                f"stimulus {stimulus!r} shows {' or '.join(sorted(shown))}: the folders name different objects"
            )
        merged = meta | merged
    return merged


def _common(values: list[Any]) -> Any:
    """The value that all have, else None."""
    return values[0] if all(value == values[0] for value in values) else None


def _distinct(names: list[str]) -> list[str]:
    """Names with a number behind those that occur several times."""
    return [f"{name}-{names[: k + 1].count(name)}" if names.count(name) > 1 else name for k, name in enumerate(names)]
