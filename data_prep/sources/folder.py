"""Source `folder`: a table of stimuli, their image files, and responses as .npy, .csv or .parquet."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from data_prep.common.errors import BadInput
from data_prep.common.safe_reading import is_name
from data_prep.recording import SPLITS, Recording, trial_average
from data_prep.sources.files.held_out import HeldOut
from data_prep.sources.files.ids import safe_ids, source_id
from data_prep.sources.files.image_files import ImageFiles, is_inside, spelling
from data_prep.sources.files.named_images_recording import NamedImagesRecording
from data_prep.sources.files.tables import Table, parse_cells, read_table, row_facts, text_cells
from data_prep.sources.responses.rasters_and_z_scores import count_rasters, to_z_scores
from data_prep.sources.responses.response_arrays import Responses, as_float32, open_npy
from data_prep.sources.responses.row_matching import StimulusNames
from data_prep.sources.responses.site_columns import SiteNames, SiteTable, open_rates, read_site_table
from data_prep.sources.responses.trial_axes import TrialAxes, check_agreement, in_order
from data_prep.splits import Dealt

RATES_FILES = ("rates.npy", "rates.csv", "rates.parquet")


class Folder(HeldOut):
    """Images and responses from a folder with stimuli.csv and rates or trials."""

    source: tyro.conf.Positional[Path]
    """Folder with images, responses and stimuli.csv (stimulus_id, image; optionally object, category, split ...)."""
    stimuli: Path | None = None
    """Table of stimuli, one row each. Default: SOURCE/stimuli.csv."""
    rates: Path | None = None
    """Responses (stimuli x sites), .npy, .csv or .parquet. Default: SOURCE/rates.*, else the mean of the trials."""
    trials: Path | None = None
    """Single trials (stimuli x repetitions x sites), .npy, NaN-padded. Default: SOURCE/trials.npy if it exists."""
    trial_axes: TrialAxes | None = None
    """Order of the second and third axis of trials or rasters, where the numbers do not tell it."""
    rasters: Path | None = None
    """Spikes per millisecond (stimuli x repetitions x sites x ms), .npy, -1 = missing; counted in --window-ms in place
    of trials. Default: SOURCE/rasters.npy if it exists."""
    raster_start_ms: float = 0.0
    """Start of the rasters, in ms after stimulus onset; negative if before it."""
    baseline_ms: tuple[float, float] | None = None
    """Window of the rasters whose rate is subtracted from each trial's response, in ms after stimulus onset."""
    z_score: bool = False
    """Turn responses into z-scores, for each site over all presentations (of a session, see --sessions)."""
    sessions: str | None = None
    """Sessions to z-score within: a column of the stimulus table, or a .npy file of integers (stimuli x repetitions).
    Default: a single session."""
    sites: Path | None = None
    """Table of sites, one row each, with a column id. Default: SOURCE/sites.csv if it exists. It decides which columns
    of rates.csv or rates.parquet are sites."""
    site_columns: tuple[str, ...] = ()
    """Columns of rates.csv or rates.parquet that are sites: names, or patterns like 'unit*'. Default: those that
    sites.csv lists, else all that do not name stimuli; what may be no site is asked about."""
    object_column: str = "object"
    """Column of the stimulus table that names the object shown (the class label)."""
    group_by: str | None = None
    """Column whose values must not be shared between splits. With a column split: the column it was based on."""
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
        stimuli_path = self._find(self.stimuli, ("stimuli.csv",), "--stimuli")
        if stimuli_path is None:
            raise BadInput(f"{self.source / 'stimuli.csv'}: no such file; name the table of stimuli with --stimuli")
        table = read_table(stimuli_path)
        names = _stimulus_names(table)
        ids = safe_ids(names)
        images = _image_paths(table, ImageFiles(self.source))
        objects = self._objects(table)
        dealt = self._splits(table)
        site_table = self._site_table()
        responses = self._responses(table, StimulusNames(stimuli_path.name, names, images), site_table)
        sites = self._sites(responses.primary, site_table)
        recorded = responses.check_finite(names, [site["id"] for site in sites])
        responses.check_agreement(names, [site["id"] for site in sites])
        converted = _check_images(self.source, images, table)
        provenance = {
            "source": "folder",
            "path": str(self.source.resolve()),
            "stimuli": stimuli_path.name,
            "responses": responses.file_names,
            "rates": "mean over repetitions" if responses.rates is None else "as given",
            "rows": responses.primary.rows,
            **self._processing(),
            "split": dealt.rule,
            "warnings": list(responses.primary.warnings),
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
            splits=dealt.splits,
            deal=dealt.deal,
            objects=objects,
            group_by=self.group_by,
            images=ImageFiles(self.source),
            image_names=images,
            meta=[source_id(*pair) | facts for *pair, facts in zip(names, ids, _meta(table, objects), strict=True)],
            files=responses,
            split_has_responses={
                split: any(recorded[i] for i, other in enumerate(dealt.splits) if other == split) for split in SPLITS
            },
        )

    def _objects(self, table: Table) -> list[str] | None:
        if self.object_column == "object" and "object" not in table.columns:
            return None
        return table.complete_column(self.object_column, "--object-column")

    def _splits(self, table: Table) -> Dealt:
        """The split of every stimulus."""
        facts: list[dict[str, Any]] = [{} for _ in range(len(table))]
        if self.group_by is not None:
            facts = [{self.group_by: cell} for cell in table.complete_column(self.group_by, "--group-by")]
        if "split" not in table.columns:
            dealt = self.assign(facts, table.path)
            return replace(dealt, rule={"method": "random" if self.group_by is None else "grouped", **dealt.rule})
        self.refuse_split_options(f"{table.path} has a column split", allowed=("group_by",))
        for i, split in enumerate(table.columns["split"]):
            if split not in SPLITS:
                raise BadInput(f"{table.location(i)}: split must be one of {', '.join(SPLITS)}, not {split!r}")
        return Dealt(list(table.columns["split"]), "column split")

    def _responses(self, table: Table, stimuli: StimulusNames, site_table: SiteTable | None) -> "ResponseFiles":
        """The responses as they go into the recording."""
        site_names = SiteNames(
            self.site_columns,
            None if site_table is None else site_table.ids,
            "sites.csv" if site_table is None else str(site_table.path),
            table.columns,
        )
        files = self._response_files(stimuli, site_names)
        if not self.z_score:
            if self.sessions is not None:
                raise BadInput("--sessions would be ignored without --z-score")
            return files
        rates, trials = files.rates, files.trials
        if rates is not None and trials is not None:
            raise BadInput(f"--z-score: {rates.path} and {trials.path} would become different z-scores; remove one")
        sessions = self.sessions
        if sessions is not None and sessions.endswith(".npy"):
            sessions = str(self._find(Path(sessions), (), "--sessions"))
        z_scores = to_z_scores(files.primary, sessions, table)
        return ResponseFiles(None, z_scores) if rates is None else ResponseFiles(z_scores, None)

    def _response_files(self, stimuli: StimulusNames, site_names: SiteNames) -> "ResponseFiles":
        """The responses before z-scoring."""
        count = len(stimuli.ids)
        rates_path = self._find(self.rates, RATES_FILES, "--rates")
        trials_path = self._find(self.trials, ("trials.npy",), "--trials")
        rasters_path = self._find_rasters()
        if rates_path is None and trials_path is None and rasters_path is None:
            raise BadInput(
                f"{self.source}: no responses; put {', '.join(RATES_FILES)}, trials.npy or rasters.npy there, "
                "or name a file with --rates, --trials or --rasters"
            )
        rates = trials = None
        known_sites = None if site_names.listed is None else len(site_names.listed)
        if rates_path is not None:
            rates = open_rates(rates_path, stimuli, site_names)
            rates.check_shape(count, ("stimuli", "sites"))
            known_sites = rates.shape[-1]
        if rasters_path is not None:
            if other := rates_path or trials_path:
                raise BadInput(f"{rasters_path} and {other} would give different responses; remove one of them")
            trials = count_rasters(rasters_path, count, self.raster_start_ms, self.window_ms, self.baseline_ms)
        elif self.baseline_ms is not None or self.raster_start_ms:
            flag = "--baseline-ms" if self.baseline_ms is not None else "--raster-start-ms"
            raise BadInput(f"{flag} is for rasters, but there are none (--rasters)")
        if trials_path is not None:
            trials = open_npy(trials_path)
            trials.check_shape(count, ("stimuli", "repetitions", "sites"))
        if trials is not None:
            trials = in_order(trials, self.trial_axes, known_sites)
        elif self.trial_axes is not None:
            raise BadInput("--trial-axes is for trials or rasters, but there are none")
        if self.site_columns and (rates is None or rates.site_ids is None):
            raise BadInput("--site-columns is for the columns of rates.csv or rates.parquet; leave it out")
        if rates is not None and trials is not None and rates.shape[-1] != trials.shape[-1]:
            raise BadInput(
                f"{rates.path} has {rates.shape[-1]} sites but {trials.path} has {trials.shape[-1]}; "
                "they must have the same sites in the same order"
            )
        return ResponseFiles(rates, trials)

    def _processing(self) -> dict[str, Any]:
        """How the responses were processed, for the manifest."""
        steps: dict[str, Any] = {}
        if self.baseline_ms is not None:
            steps["baseline_ms_subtracted"] = self.baseline_ms
        if self.z_score:
            steps["z_scored_within"] = self.sessions or "the recording"
        return steps

    def _default_units(self) -> str:
        if self.z_score:
            return "z-score within sessions" if self.sessions else "z-score"
        if self._find_rasters() is None:
            return "as recorded"
        return "spikes/s" if self.baseline_ms is None else "spikes/s above baseline"

    def _site_table(self) -> SiteTable | None:
        """The table of sites, if there is one."""
        path = self._find(self.sites, ("sites.csv",), "--sites")
        if path is None:
            return None
        return read_site_table(path)

    def _sites(self, responses: Responses, table: SiteTable | None) -> list[dict[str, Any]]:
        """One dict per site in the order of the responses."""
        n = responses.shape[-1]
        if table is None:
            return [{"id": site_id} for site_id in responses.site_ids or [f"site_{i:03d}" for i in range(n)]]
        if responses.site_ids is None and len(table.ids) != n:
            raise BadInput(f"{table.path} describes {len(table.ids)} sites, but {responses.path} holds {n}")
        if responses.site_ids is None:
            return table.sites
        site_of = dict(zip(table.ids, table.sites, strict=True))
        if unknown := [site_id for site_id in responses.site_ids if site_id not in site_of]:
            raise BadInput(
                f"{table.path} and {responses.path} name different sites: {unknown[0]!r} is not in {table.path}"
            )
        return [site_of[site_id] for site_id in responses.site_ids]

    def _find_rasters(self) -> Path | None:
        return self._find(self.rasters, ("rasters.npy",), "--rasters")

    def _find(self, named: Path | None, defaults: Sequence[str], flag: str) -> Path | None:
        """The file that a flag names (a path, or a name below SOURCE), else the only default that exists."""
        if named is not None:
            path = next((path for path in (named, self.source / named) if path.is_file()), None)
            if path is None:
                raise BadInput(f"{flag} {named}: no such file, neither as given nor in {self.source}")
            return path
        existing = [self.source / default for default in defaults if (self.source / default).is_file()]
        if len(existing) > 1:
            raise BadInput(f"{self.source} holds {' and '.join(path.name for path in existing)}; pick one with {flag}")
        return existing[0] if existing else None


@dataclass(frozen=True)
class ResponseFiles:
    """Rates (stimuli, sites) and trials (stimuli, repetitions, sites); one of them may be None."""

    rates: Responses | None
    trials: Responses | None

    @property
    def primary(self) -> Responses:
        """The rates if they are given, else the trials."""
        primary = self.trials if self.rates is None else self.rates
        assert primary is not None, "a folder has rates or trials"
        return primary

    @property
    def file_names(self) -> list[str]:
        """Names of the files."""
        return [responses.path.name for responses in (self.rates, self.trials) if responses is not None]

    def check_agreement(self, stimulus_ids: list[str], site_ids: list[str]) -> None:
        """Refuse rates that are not the means of the trials; see `trial_axes.check_agreement`."""
        if self.rates is not None and self.trials is not None:
            check_agreement(self.rates, self.trials, stimulus_ids, site_ids)

    def check_finite(self, stimulus_ids: list[str], site_ids: list[str]) -> np.ndarray:
        """Refuse infinite responses, and responses that are all NaN; returns as `Responses.check_finite`."""
        if self.rates is not None and self.trials is not None:
            self.trials.check_finite(stimulus_ids, site_ids)
        recorded = self.primary.check_finite(stimulus_ids, site_ids)
        if not recorded.any():
            raise BadInput(f"{self.primary.path}: every response is NaN; nothing was recorded")
        return recorded


@dataclass(kw_only=True)
class FolderRecording(NamedImagesRecording):
    """A folder that `Folder.open` has checked; in memory are only tables and the responses of text files.

    Attributes (beside those of `NamedImagesRecording`):
        files: of the responses.
    """

    files: ResponseFiles

    def responses(self, indices: Sequence[int]) -> Iterator[tuple[np.ndarray | None, np.ndarray | None]]:
        """Yield rates and trials; the rates are the average of the trials if no rates are given."""
        rates = None if self.files.rates is None else self.files.rates.load()
        trials = None if self.files.trials is None else self.files.trials.load()
        for i in indices:
            if not self.has_responses(i):
                yield None, None
                continue
            stimulus_trials = None if trials is None else as_float32(trials[i])
            if rates is not None:
                yield as_float32(rates[i]), stimulus_trials
            elif stimulus_trials is not None:
                yield trial_average(stimulus_trials), stimulus_trials


# ---- stimuli -------------------------------------------------------------------------------------------------------


def _stimulus_names(table: Table) -> list[str]:
    """The stimuli's ids as the table has them."""
    names = table.complete_column("stimulus_id")
    for i, name in enumerate(names):
        if not is_name(name):
            raise BadInput(f"{table.location(i)}: stimulus_id {name[:100]!r} is too long or not printable")
    table.check_unique("stimulus_id")
    return names


def _image_paths(table: Table, files: ImageFiles) -> list[str]:
    """The image of every stimulus below the folder; another spelling is found if it is the only one."""
    paths = []
    for i, image in enumerate(table.complete_column("image")):
        # Only the text is checked: a symbolic link that the user put into the folder may point anywhere.
        if not is_inside(image) or not is_inside(os.path.normpath(spelling(image))):
            raise BadInput(f"{table.location(i)}: image {image!r} must be a path inside {files.path}, relative to it")
        paths.append(files.find_path(image) or image)
    return paths


def _check_images(root: Path, images: list[str], table: Table) -> int:
    """Check the first bytes of every image; returns how many must be converted to PNG."""
    from data_prep.common.image_decoding import sniff_encoding  # slow to import

    converted = 0
    for i, image in enumerate(images):
        path = root / image
        try:
            if path.exists() and not path.is_file():  # opening a pipe would block
                raise ValueError("it is not a regular file")
            with path.open("rb") as file:
                converted += sniff_encoding(file.read(16)) is None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise BadInput(f"{table.location(i)}: the image {path} cannot be read ({reason})") from error
    return converted


def _meta(table: Table, objects: list[str] | None) -> list[dict[str, Any]]:
    """The facts about each stimulus except id, file and split; object and category stay text."""
    columns: dict[str, list[Any]] = {
        name: text_cells(cells) if name in ("object", "category") else parse_cells(cells)
        for name, cells in table.columns.items()
        if name not in ("stimulus_id", "image", "split")
    }
    if objects is not None:
        columns["object"] = objects
    return [row_facts(columns, row) for row in range(len(table))]
