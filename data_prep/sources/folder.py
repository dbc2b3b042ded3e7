"""Source `folder`: a table of stimuli, their image files, and responses as .npy, .csv or .parquet."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from pydantic import BaseModel, Field

from data_prep.common.errors import BadInput
from data_prep.common.image_decoding import packable, sniff_encoding
from data_prep.common.safe_reading import read_regular
from data_prep.recording import SPLITS, Recording, Stimulus, trial_average
from data_prep.sources.files.computed_responses import counted, z_scored
from data_prep.sources.files.image_files import MAX_FILE_BYTES
from data_prep.sources.files.response_arrays import Responses, check_finite, check_shape, float32, open_npy, open_rates
from data_prep.sources.files.tables import Table, check_unique, filled, present, read_table, typed
from data_prep.splits import assign_splits

RATES_FILES = ("rates.npy", "rates.csv", "rates.parquet")
SITE_ID_COLUMNS = ("id", "site_id", "neuroid_id")

_STIMULUS_ID = re.compile(r"[A-Za-z0-9_-]+")


class Folder(BaseModel, extra="forbid", use_attribute_docstrings=True):
    """Images and responses from a folder with stimuli.csv and rates or trials."""

    source: tyro.conf.Positional[Path]
    """Folder with stimuli.csv (stimulus_id, image, optionally object, category, split and others), images, rates."""
    stimuli: Path | None = None
    """Table of stimuli, one row each. Default: SOURCE/stimuli.csv."""
    rates: Path | None = None
    """Responses (stimuli x sites), .npy, .csv or .parquet. Default: SOURCE/rates.*, else the mean of the trials."""
    trials: Path | None = None
    """Single trials (stimuli x repetitions x sites), .npy, NaN-padded. Default: SOURCE/trials.npy if it is there."""
    rasters: Path | None = None
    """Spikes per millisecond (stimuli x repetitions x sites x ms), .npy, -1 = missing, to count in --window-ms instead
    of giving trials. Default: SOURCE/rasters.npy if it is there."""
    raster_start_ms: float = 0.0
    """When the rasters begin, in ms after stimulus onset; negative: before it."""
    baseline_ms: tuple[float, float] | None = None
    """Window of the rasters whose rate is subtracted from each trial's response, in ms after stimulus onset."""
    z_score: bool = False
    """Turn responses into z-scores, for each site over all presentations (of a session, see --sessions)."""
    sessions: str | None = None
    """Sessions to z-score within: a column of the stimulus table, or a .npy file of integers (stimuli x repetitions).
    Default: all is one session."""
    sites: Path | None = None
    """Table of sites, one row each, with a column id. Default: SOURCE/sites.csv if it is there."""
    object_column: str = "object"
    """Column of the stimulus table that names the object shown (the class label)."""
    group_by: str | None = None
    """Column whose values no two splits may share. With a column split: the one that split went by."""
    val_fraction: float = Field(0.09, ge=0, lt=1)
    """Share of the stimuli for validation, when the table has no column split."""
    test_fraction: float = Field(0.10, ge=0, lt=1)
    """Share of the stimuli for testing, when the table has no column split."""
    seed: int = Field(0, ge=0, le=2**63 - 1)
    """Seed of the split, when the table has no column split."""
    name: str | None = None
    """Name of the recording. Default: the folder's name."""
    window_ms: tuple[float, float] | None = None
    """Start and end of the response window, in ms after stimulus onset."""
    units: str | None = None
    """Units of the rates, such as spikes/s. Default: "as recorded"."""

    def open(self) -> Recording:
        """Check everything but the images' contents, and describe the recording.

        Raises:
            BadInput: naming the file, the row or column, and what would be right.
        """
        if not self.source.is_dir():
            raise BadInput(f"{self.source}: no such folder; SOURCE must be a folder with stimuli.csv and responses")
        if self.window_ms is not None and not self.window_ms[0] < self.window_ms[1]:
            raise BadInput(f"--window-ms: the window must start before it ends, not {self.window_ms}")
        stimuli_path = _find(self.source, self.stimuli, ("stimuli.csv",), "--stimuli")
        if stimuli_path is None:
            raise BadInput(f"{self.source / 'stimuli.csv'}: no such file; name the table of stimuli with --stimuli")
        table = read_table(stimuli_path)
        ids = _stimulus_ids(table)
        images = _image_paths(table, self.source)
        objects = self._objects(table)
        splits, split_rule = self._splits(table)
        rates, trials, site_ids = self._responses(table)
        sites = self._sites(rates if rates is not None else trials, site_ids)
        labels = [site["id"] for site in sites]
        if trials is not None:
            recorded = check_finite(trials, ids, labels)
        if rates is not None:  # what is given as rates decides, the trials only go along
            recorded = check_finite(rates, ids, labels)
        if not recorded.any():
            raise BadInput(f"{(rates or trials).path}: every response is NaN; nothing was recorded")
        answered = {split: any(recorded[i] for i, s in enumerate(splits) if s == split) for split in SPLITS}
        converted = _check_images(self.source, images, table)
        provenance = {
            "source": "folder",
            "path": str(self.source.resolve()),
            "stimuli": stimuli_path.name,
            "responses": [responses.path.name for responses in (rates, trials) if responses is not None],
            "rates": "as given" if rates is not None else "mean over repetitions",
            **self._derivation(),
            "split": split_rule,
            "warnings": _shared_images(images, splits),
        }
        if converted:
            provenance["converted_to_png"] = f"{converted} of {len(ids)} images were neither JPEG nor PNG"
        return FolderRecording(
            name=self.name or self.source.resolve().name,
            provenance=provenance,
            sites=sites,
            response_window_ms=self.window_ms,
            units=self.units or self._default_units(),
            stimulus_ids=ids,
            splits=splits,
            objects=objects,
            group_by=self.group_by,
            root=self.source,
            images=images,
            meta=_meta(table, objects),
            rates=rates,
            trials=trials,
            answered=answered,
        )

    def _objects(self, table: Table) -> list[str] | None:
        if self.object_column not in table.columns:
            if self.object_column != "object":
                raise table.lacks(self.object_column, "--object-column")
            return None
        return filled(table, self.object_column)

    def _splits(self, table: Table) -> tuple[list[str], Any]:
        """The split of every stimulus, and how it came about."""
        groups = None
        if self.group_by is not None:
            if self.group_by not in table.columns:
                raise table.lacks(self.group_by, "--group-by")
            groups = filled(table, self.group_by)
        if "split" not in table.columns:
            held_out = {"val": self.val_fraction, "test": self.test_fraction}
            fractions = {"train": 1.0 - self.val_fraction - self.test_fraction, **held_out}
            method = "random" if groups is None else "grouped"
            rule = {"method": method, "seed": self.seed, "group_by": self.group_by, **held_out}
            return assign_splits(len(table), fractions, self.seed, groups), rule
        for option in ("val_fraction", "test_fraction", "seed"):
            if getattr(self, option) != type(self).model_fields[option].default:
                flag = "--" + option.replace("_", "-")
                raise BadInput(
                    f"{table.path} has a column split, so {flag} would be ignored; remove the column or the flag"
                )
        for i, split in enumerate(table.columns["split"]):
            if split not in SPLITS:
                raise BadInput(f"{table.at(i)}: split must be one of {', '.join(SPLITS)}, not {split!r}")
        return list(table.columns["split"]), "column split"

    def _responses(self, table: Table) -> tuple[Responses | None, Responses | None, list[str] | None]:
        """Rates, trials (one of them may be None) and the site ids, where the rates' file names them."""
        rates, trials, site_ids = self._recorded(table.columns["stimulus_id"])
        if not self.z_score:
            if self.sessions is not None:
                raise BadInput("--sessions would be ignored without --z-score")
            return rates, trials, site_ids
        if rates is not None and trials is not None:
            raise BadInput(f"--z-score: {rates.path} and {trials.path} would become different z-scores; remove one")
        sessions = self.sessions
        if sessions is not None and sessions.endswith(".npy"):
            sessions = str(_find(self.source, Path(sessions), (), "--sessions"))
        scored = z_scored(rates or trials, sessions, table)
        return (scored, None, site_ids) if rates is not None else (None, scored, site_ids)

    def _recorded(self, ids: list[str]) -> tuple[Responses | None, Responses | None, list[str] | None]:
        """As `_responses`, before z-scoring."""
        rates_path = _find(self.source, self.rates, RATES_FILES, "--rates")
        trials_path = _find(self.source, self.trials, ("trials.npy",), "--trials")
        rasters_path = _find(self.source, self.rasters, ("rasters.npy",), "--rasters")
        if rates_path is None and trials_path is None and rasters_path is None:
            raise BadInput(
                f"{self.source}: no responses; put {', '.join(RATES_FILES)}, trials.npy or rasters.npy there, "
                "or name a file with --rates, --trials or --rasters"
            )
        rates = trials = site_ids = None
        if rasters_path is not None:
            if other := rates_path or trials_path:
                raise BadInput(f"{rasters_path} would give other responses than {other}; remove one of them")
            trials = counted(rasters_path, len(ids), self.raster_start_ms, self.window_ms, self.baseline_ms)
        elif self.baseline_ms is not None or self.raster_start_ms:
            flag = "--baseline-ms" if self.baseline_ms is not None else "--raster-start-ms"
            raise BadInput(f"{flag} is for rasters, of which there are none (--rasters)")
        if trials_path is not None:
            trials = open_npy(trials_path)
            check_shape(trials, len(ids), "(stimuli, repetitions, sites)", 3)
        if rates_path is not None:
            rates, site_ids = open_rates(rates_path, ids)
            check_shape(rates, len(ids), "(stimuli, sites)", 2)
        if rates is not None and trials is not None and rates.shape[-1] != trials.shape[-1]:
            raise BadInput(
                f"{rates.path} has {rates.shape[-1]} sites but {trials.path} has {trials.shape[-1]}; "
                "they must have the same sites in the same order"
            )
        return rates, trials, site_ids

    def _derivation(self) -> dict[str, Any]:
        """What was done to the responses, for the manifest."""
        done: dict[str, Any] = {}
        if self.baseline_ms is not None:
            done["baseline_ms_subtracted"] = self.baseline_ms
        if self.z_score:
            done["z_scored_within"] = self.sessions or "the recording"
        return done

    def _default_units(self) -> str:
        if self.z_score:
            return "z-score within sessions" if self.sessions else "z-score"
        if _find(self.source, self.rasters, ("rasters.npy",), "--rasters") is None:
            return "as recorded"
        return "spikes/s" if self.baseline_ms is None else "spikes/s above baseline"

    def _sites(self, responses: Responses, site_ids: list[str] | None) -> list[dict[str, Any]]:
        """One dict per site in the order of the responses."""
        n = responses.shape[-1]
        path = _find(self.source, self.sites, ("sites.csv",), "--sites")
        if path is None:
            return [{"id": site_id} for site_id in site_ids or [f"site_{i:03d}" for i in range(n)]]
        table = read_table(path)
        column = next((name for name in SITE_ID_COLUMNS if name in table.columns), None)
        if column is None:
            raise table.lacks("id", None)
        names = filled(table, column)
        check_unique(table, column)
        if len(names) != n:
            raise BadInput(f"{path} describes {len(names)} sites, but {responses.path} holds {n}")
        others = {name: typed(cells) for name, cells in table.columns.items() if name not in (column, "id")}
        sites = [{"id": names[i]} | present(others, i) for i in range(n)]
        if site_ids is None:
            return sites
        if odd := set(site_ids) ^ set(names):
            raise BadInput(
                f"{path} and the header of {responses.path} name different sites ({sorted(odd)[0]!r} is new)"
            )
        by_id = {site["id"]: site for site in sites}
        return [by_id[site_id] for site_id in site_ids]


@dataclass(kw_only=True)
class FolderRecording(Recording):
    """A folder that `Folder.open` has checked; all that is held is text, and responses that came as text.

    Attributes (beside those of `Recording`):
        root: the folder that `images` are relative to.
        images: path of each stimulus's image.
        rates: (stimuli, sites), or None where they are the average of the trials.
        trials: (stimuli, repetitions, sites), or None.
    """

    root: Path
    images: list[str]
    rates: Responses | None
    trials: Responses | None

    def read(self, indices: Sequence[int]) -> Iterator[Stimulus]:
        """Yield the stimuli at `indices`, one image file at a time.

        Raises:
            BadInput: an image that is missing, unreadable or absurdly large.
        """
        rates = None if self.rates is None else self.rates.load()
        trials = None if self.trials is None else self.trials.load()
        for i in indices:
            image, encoding, converted = self._image(i)
            here = trial_rows = None
            if self.answered[self.splits[i]]:
                trial_rows = None if trials is None else float32(trials[i])
                here = trial_average(trial_rows) if rates is None else float32(rates[i])
            yield Stimulus(
                id=self.stimulus_ids[i],
                image=image,
                encoding=encoding,
                rates=here,
                trials=trial_rows,
                meta=self.meta[i] | converted,
            )

    def _image(self, i: int) -> tuple[bytes, str, dict[str, str]]:
        """The encoded image, its encoding, and a note where it had to be converted."""
        path = self.root / self.images[i]
        try:
            return packable(read_regular(path, MAX_FILE_BYTES))
        except (OSError, ValueError) as error:
            raise BadInput(f"{path} (image of stimulus {self.stimulus_ids[i]}): {error}") from error


# ---- stimuli -------------------------------------------------------------------------------------------------------


def _stimulus_ids(table: Table) -> list[str]:
    if "stimulus_id" not in table.columns:
        raise table.lacks("stimulus_id", None)
    for i, name in enumerate(table.columns["stimulus_id"]):
        if not _STIMULUS_ID.fullmatch(name):
            raise BadInput(
                f"{table.at(i)}: stimulus_id {name!r} must consist of the letters A-Z a-z, digits, _ and - "
                "(it becomes a file name in a shard)"
            )
    check_unique(table, "stimulus_id")
    return list(table.columns["stimulus_id"])


def _image_paths(table: Table, root: Path) -> list[str]:
    if "image" not in table.columns:
        raise table.lacks("image", None)
    images = filled(table, "image")
    for i, image in enumerate(images):
        # Judged by its text: a symbolic link that the user put into the folder may lead anywhere.
        if os.path.isabs(image) or os.path.normpath(image).split(os.sep)[0] == "..":
            raise BadInput(f"{table.at(i)}: image {image!r} must be a path inside {root}, relative to it")
    return images


def _check_images(root: Path, images: list[str], table: Table) -> int:
    """Look at the first bytes of every image; returns how many have to be converted to PNG."""
    converted = 0
    for i, image in enumerate(images):
        try:
            if (root / image).exists() and not (root / image).is_file():  # a pipe would be waited for
                raise ValueError("it is no regular file")
            with (root / image).open("rb") as file:
                converted += sniff_encoding(file.read(16)) is None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise BadInput(f"{table.at(i)}: the image {root / image} cannot be read ({reason})") from error
    return converted


def _shared_images(images: list[str], splits: list[str]) -> list[str]:
    """A warning where one image file is used in several splits, so that held-out scores would be too good."""
    seen: dict[str, set[str]] = {}
    for image, split in zip(images, splits, strict=True):
        seen.setdefault(os.path.normpath(image), set()).add(split)
    shared = sorted(image for image, where in seen.items() if len(where) > 1)
    return [f"{len(shared)} image files are in more than one split, {shared[0]} for one"] if shared else []


def _meta(table: Table, objects: list[str] | None) -> list[dict[str, Any]]:
    """What the table says of each stimulus, beside its id, file and split; object and category stay text."""
    text = ("object", "category")
    columns = {
        name: [cell or None for cell in cells] if name in text else typed(cells)
        for name, cells in table.columns.items()
        if name not in ("stimulus_id", "image", "split")
    }
    if objects is not None:
        columns["object"] = objects
    return [present(columns, i) for i in range(len(table))]


# ---- files ---------------------------------------------------------------------------------------------------------


def _find(root: Path, named: Path | None, defaults: Sequence[str], flag: str) -> Path | None:
    """The file that the flag names (as given, else below `root`), or the one default that is there."""
    if named is not None:
        found = next((path for path in (named, root / named) if path.is_file()), None)
        if found is None:
            raise BadInput(f"{flag} {named}: no such file, neither here nor in {root}")
        return found
    there = [root / default for default in defaults if (root / default).is_file()]
    if len(there) > 1:
        raise BadInput(f"{root} holds {' and '.join(path.name for path in there)}; pick one with {flag}")
    return there[0] if there else None
