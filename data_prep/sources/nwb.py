"""Source `nwb`: spike times and a table of presentations from an NWB file, counted in windows after stimulus onset.

/units                  spike_times with spike_times_index, a row per unit, and columns about the units
/intervals/TABLE        start_time and a column that names the stimulus, a row per presentation
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any

import numpy as np
import tyro

from data_prep.common.errors import BadInput
from data_prep.recording import Recording
from data_prep.sources.files import hdf5, nwb_tables
from data_prep.sources.files.held_out import HeldOut
from data_prep.sources.files.ids import safe_ids, select_sites, source_id
from data_prep.sources.files.image_files import ImageFiles
from data_prep.sources.files.named_images_recording import NamedImagesRecording, objects_of
from data_prep.sources.files.presentations import rates_and_trials, rows_by_stimulus, rows_in_memory
from data_prep.sources.files.tables import row_facts
from data_prep.spikes import check_windows, spike_counts

if TYPE_CHECKING:
    import h5py

STIMULUS_COLUMNS = ("stimulus_id", "image_id", "stimulus_name", "image_name", "stim_id", "stimulus", "image", "frame")
OBJECT_COLUMNS = {"object_name": "object", "category_name": "category"}  # names in the tables, and ours
REGION_COLUMNS = ("region", "brain_area", "brain_region", "area", "location")
TABLES = ("presentations", "stimulus_presentations", "trials")  # preferred in this order, if there are several
NOT_PRESENTATIONS = ("epochs", "invalid_times")  # other tables among the intervals

Windows = tuple[tuple[float, float], ...]


class Nwb(HeldOut):
    """Spike times and presentations from an NWB file."""

    source: tyro.conf.Positional[Path]
    """The NWB file (HDF5)."""
    images: str
    """Folder or zip with an image per stimulus, or a template of their paths: 'stimuli/{stimulus_id}.png'."""
    table: str | None = None
    """Table of presentations in /intervals. Default: the only one, else presentations or trials."""
    stimulus_column: str | None = None
    """Its column with the stimulus. Default: the first of stimulus_id, image_id, stimulus_name ... that exists."""
    onset_column: str = "start_time"
    """Its column with the time of the onset in seconds."""
    image_column: str | None = None
    """Its column with the image's path in --images. Default: the image has the name of the stimulus."""
    window_ms: Windows = ((70.0, 170.0),)
    """Start and end of the window after onset. Several windows (70 120 120 170) give a site per unit and window."""
    region: tuple[str, ...] = ()
    """Only units in these regions."""
    region_column: str | None = None
    """Column of the units with the region. Default: region, brain_area ..., else the location of the electrode."""
    ignore: tuple[str, ...] = ()
    """Stimuli to leave out, such as blank screens."""
    name: str | None = None
    """Name of the recording. Default: the file's name without its ending."""

    def open(self) -> Recording:
        """Check the file's tables and find the images; spikes are counted when stimuli are read.

        Raises:
            BadInput: naming the file, the table, column or option, and what would be right.
        """
        check_windows(self.window_ms)
        with hdf5.open_file(self.source) as file:
            presentations = self._presentations(file)
            units = self._units(file)
        left_out = {"", *self.ignore}
        rows = {name: rows for name, rows in rows_by_stimulus(presentations.stimuli).items() if name not in left_out}
        if not rows:
            raise BadInput(
                f"{self.source}: no presentation has a stimulus in the column {presentations.stimulus_column}"
            )
        facts = [
            _constant_facts(presentations.facts, shown_at) | {"stimulus_id": name} for name, shown_at in rows.items()
        ]
        images, image_names = self._find_images(list(rows), facts)
        ids = safe_ids(list(rows))
        meta = [
            _as_meta(known) | source_id(name, safe_id) for known, name, safe_id in zip(facts, rows, ids, strict=True)
        ]
        dealt = self.assign(meta, self.source)
        return NwbRecording(
            name=self.name or self.source.stem,
            provenance={
                "source": "nwb",
                "path": str(self.source.resolve()),
                "presentations": sum(map(len, rows.values())),
                "columns": {"onset": presentations.onset_column, "stimulus": presentations.stimulus_column},
                "windows_ms": self.window_ms,
                "selected": {"region": self.region},
                "split": dealt.rule,
            },
            sites=_sites(units, self.window_ms),
            response_window_ms=self.window_ms[0] if len(self.window_ms) == 1 else None,
            units="spikes/s",
            stimulus_ids=ids,
            splits=dealt.splits,
            deal=dealt.deal,
            objects=objects_of(meta),
            group_by=self.group_by,
            images=images,
            image_names=image_names,
            meta=meta,
            path=self.source,
            onsets=presentations.onsets,
            rows=list(rows.values()),
            recorded_units=units,
            windows=self.window_ms,
        )

    def _presentations(self, file: h5py.File) -> Presentations:
        table = self._presentation_table(file)
        onset_column = nwb_tables.find_column(table, (self.onset_column,), "--onset-column")
        stimulus_names = (self.stimulus_column,) if self.stimulus_column else STIMULUS_COLUMNS
        stimulus_column = nwb_tables.find_column(table, stimulus_names, "--stimulus-column")
        return Presentations(
            onset_column=onset_column,
            stimulus_column=stimulus_column,
            onsets=hdf5.numeric_dataset(table, onset_column, 1)[()].astype(np.float64),
            stimuli=nwb_tables.read_names(hdf5.dataset(table, stimulus_column)),
            facts={
                name: nwb_tables.read_values(column)
                for name, column in nwb_tables.columns(table).items()
                if not name.endswith("_time")
            },
        )

    def _presentation_table(self, file: h5py.File) -> h5py.Group:
        intervals = hdf5.subgroup(file, "intervals")
        names = [name for name in intervals if name not in NOT_PRESENTATIONS]
        if self.table is not None:
            names = [name for name in intervals if name == self.table]
        elif len(names) > 1:
            names = [name for name in TABLES if name in names]
        if not names:
            existing = ", ".join(intervals) or "nothing"
            raise BadInput(f"{self.source}: name the table of presentations with --table; /intervals holds {existing}")
        return hdf5.subgroup(intervals, names[0])

    def _units(self, file: h5py.File) -> list[Unit]:
        """The selected units."""
        group = hdf5.subgroup(file, "units")
        if not hdf5.contains(group, "spike_times"):
            raise BadInput(f"{self.source}: /units has no spike_times; it holds {', '.join(group)}")
        spans = nwb_tables.ragged_spans(group, "spike_times")
        columns = {name: nwb_tables.read_values(column) for name, column in nwb_tables.columns(group).items()}
        columns["region"] = self._regions(file, group, columns) or [None] * len(spans)
        columns["subject"] = [nwb_tables.subject_id(file)] * len(spans)
        if hdf5.contains(group, "id"):
            ids = hdf5.read_texts(hdf5.dataset(group, "id"))
        else:
            ids = [str(row) for row in range(len(spans))]
        facts = [{"id": f"unit_{ids[row]}"} | row_facts(columns, row) for row in range(len(spans))]
        keep = select_sites(facts, "region", self.region, "--region", self.source)
        return [Unit(row, facts[row], spans[row]) for row in np.flatnonzero(keep).tolist()]

    def _regions(self, file: h5py.File, units: h5py.Group, columns: dict[str, list[Any]]) -> list[Any] | None:
        """The region of each unit."""
        if self.region_column:
            return columns[nwb_tables.find_column(units, (self.region_column,), "--region-column")]
        for name in REGION_COLUMNS:
            if name in columns:
                return columns[name]
        return nwb_tables.electrode_locations(file, units)

    def _find_images(self, names: list[str], facts: list[dict[str, Any]]) -> tuple[ImageFiles, list[str]]:
        """The folder or archive of the images, and each stimulus's image there."""
        if "{" in self.images:
            folder, slash, _ = self.images.split("{")[0].rpartition("/")
            template = self.images[len(folder + slash) :]
            files = ImageFiles(Path(folder + slash or "."))
            wanted = [[_fill_template(template, known)] for known in facts]
        elif self.image_column is not None:
            files = ImageFiles(Path(self.images))
            paths = [str(_known_fact(known, self.image_column, "--image-column")) for known in facts]
            wanted = [[path, name] for path, name in zip(paths, names, strict=True)]
        else:
            files = ImageFiles(Path(self.images))
            wanted = [[name] for name in names]
        return files, files.find_all(dict(zip(names, wanted, strict=True)))


@dataclass(frozen=True)
class Presentations:
    """The table of presentations.

    Attributes:
        onset_column, stimulus_column: names of the columns of `onsets` and `stimuli`.
        onsets: float64 (presentations,), in seconds.
        stimuli: the stimulus of each presentation.
        facts: {column: its values}.
    """

    onset_column: str
    stimulus_column: str
    onsets: np.ndarray
    stimuli: list[str]
    facts: dict[str, list[Any]]


@dataclass(frozen=True)
class Unit:
    """A unit of the file.

    Attributes:
        row: in /units.
        facts: `id` and everything else that is known about it.
        span: start and end of its spikes in spike_times.
    """

    row: int
    facts: dict[str, Any]
    span: tuple[int, int]


@dataclass(kw_only=True)
class NwbRecording(NamedImagesRecording):
    """A file that `Nwb.open` has checked.

    Attributes (beside those of `NamedImagesRecording`):
        path: the NWB file.
        onsets: of all presentations, in seconds.
        rows: the presentations of each stimulus.
        recorded_units: in the order of the sites.
        windows: after onset, in ms; the windows of a unit are consecutive sites.
    """

    path: Path
    onsets: np.ndarray
    rows: list[np.ndarray]
    recorded_units: list[Unit]
    windows: Windows

    def responses(self, indices: Sequence[int]) -> Iterator[tuple[np.ndarray | None, np.ndarray | None]]:
        """Yield rates and trials in spikes/s; NaN for presentations during which a unit was not observed."""
        repetitions = max(map(len, self.rows))
        block = rows_in_memory(len(self.sites) * repetitions)
        with hdf5.open_file(self.path) as file:
            for start in range(0, len(indices), block):
                rows = [self.rows[i] for i in indices[start : start + block]]
                rates = self._rates(file, self.onsets[np.concatenate(rows)])
                yield from rates_and_trials(np.split(rates, np.cumsum(list(map(len, rows)))[:-1]), repetitions)

    def _rates(self, file: h5py.File, onsets: np.ndarray) -> np.ndarray:
        """The rates of all sites by presentation, float32 (presentations, sites); reads one unit at a time."""
        windows = np.array(self.windows) / 1000
        spikes = hdf5.numeric_dataset(file, "units/spike_times", 1)
        observed = nwb_tables.observation_intervals(hdf5.subgroup(file, "units"))
        rates = np.empty((len(onsets), len(self.recorded_units), len(self.windows)), np.float32)
        for k, unit in enumerate(self.recorded_units):
            counts = spike_counts(np.sort(spikes[slice(*unit.span)]), onsets, windows)
            if observed is not None:
                counts[~_within_intervals(observed(unit.row), onsets, windows)] = np.nan
            rates[:, k] = counts / (windows[:, 1] - windows[:, 0])
        return rates.reshape(len(onsets), -1)


def _within_intervals(intervals: np.ndarray, onsets: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """Whether each window (seconds) of each presentation lies within an interval: bool (presentations, windows)."""
    start, end = onsets[:, None] + windows[:, 0], onsets[:, None] + windows[:, 1]
    inside = np.zeros(start.shape, bool)
    for first, last in intervals:
        inside |= (start >= first) & (end <= last)
    return inside


def _sites(units: list[Unit], windows: Windows) -> list[dict[str, Any]]:
    """The facts about every site: a unit, or a unit in one of several windows."""
    if len(windows) == 1:
        return [unit.facts for unit in units]
    return [
        unit.facts
        | {"id": f"{unit.facts['id']}_{start:g}-{end:g}ms", "unit": unit.facts["id"], "window_ms": [start, end]}
        for unit in units
        for start, end in windows
    ]


# ---- facts about stimuli -------------------------------------------------------------------------------------------


def _constant_facts(columns: dict[str, list[Any]], rows: np.ndarray) -> dict[str, Any]:
    """The facts that are the same in all presentations of a stimulus."""
    facts = {}
    for name, values in columns.items():
        distinct = {values[row] for row in rows}
        if len(distinct) == 1 and distinct != {None}:
            facts[name] = distinct.pop()
    return facts


def _as_meta(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts in the form of `Stimulus.meta`: object and category have these names, and are text."""
    meta = {OBJECT_COLUMNS.get(name, name): value for name, value in facts.items() if name != "stimulus_id"}
    return meta | {name: str(meta[name]) for name in ("object", "category") if name in meta}


def _known_fact(facts: dict[str, Any], name: str, flag: str) -> Any:
    if name not in facts:
        known = ", ".join(sorted(facts))
        raise BadInput(f"{flag}: {name!r} is not known for stimulus {facts['stimulus_id']!r}; known facts: {known}")
    return facts[name]


def _fill_template(template: str, facts: dict[str, Any]) -> str:
    """The path of a stimulus's image by a template; only names of facts may be in its braces."""
    try:
        fields = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
        return template.format(**{name: _known_fact(facts, name, "--images") for name in fields})
    except (ValueError, KeyError, IndexError) as error:
        raise BadInput(f"--images {template}: not a template such as stimuli/{{stimulus_id}}.png ({error})") from None
