"""Source `nwb`: spike times and a table of presentations from an NWB file, counted in windows after stimulus onset.

/units                  spike_times with spike_times_index, a row per unit, and columns about the units
/intervals/TABLE        start_time and a column that tells the stimulus, a row per presentation
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

import h5py
import numpy as np
import tyro

from data_prep.common.errors import BadInput
from data_prep.recording import Recording
from data_prep.sources.files import hdf5
from data_prep.sources.files.image_files import ImageFiles
from data_prep.sources.files.presentations import HeldOut, PresentedRecording, objects_of
from data_prep.sources.files.tables import present
from data_prep.sources.files.trials import TRIALS_BYTES, rates_and_trials, rows_by_stimulus, safe_ids, select_sites
from data_prep.spikes import check_windows, spike_counts

STIMULUS_COLUMNS = ("stimulus_id", "image_id", "stimulus_name", "image_name", "stim_id", "stimulus", "image", "frame")
OBJECT_COLUMNS = {"object_name": "object", "category_name": "category"}  # what tables call them, and we
REGION_COLUMNS = ("region", "brain_area", "brain_region", "area", "location")
TABLES = ("presentations", "stimulus_presentations", "trials")  # preferred in this order, if there are several
NO_PRESENTATIONS = ("epochs", "invalid_times")  # what else may be among the intervals

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
    """Its column that tells the stimulus. Default: stimulus_id, image_id, stimulus_name ..., whichever is there."""
    onset_column: str = "start_time"
    """Its column with the time of the onset in seconds."""
    image_column: str | None = None
    """Its column with the image's path in --images. Default: the image has the name of the stimulus."""
    window_ms: Windows = ((70.0, 170.0),)
    """Start and end of the window after onset. With several (70 120 120 170) there is a site per unit and window."""
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
        with hdf5.reading(self.source) as file:
            table = self._table(file)
            onset = _column(table, (self.onset_column,), "--onset-column")
            stimulus = _column(
                table, (self.stimulus_column,) if self.stimulus_column else STIMULUS_COLUMNS, "--stimulus-column"
            )
            onsets = hdf5.numbers(table, onset, 1)[()].astype(np.float64)
            stimuli = _texts(hdf5.dataset(table, stimulus))
            facts = {name: _values(found) for name, found in _columns(table).items() if not name.endswith("_time")}
            units, spans = self._units(file)
        left_out = {"", *self.ignore}
        rows = {name: rows for name, rows in rows_by_stimulus(stimuli).items() if name not in left_out}
        if not rows:
            raise BadInput(f"{self.source}: the column {stimulus} tells no stimulus of any presentation")
        ids = safe_ids(list(rows))
        facts = [_constant(facts, shown) | {"stimulus_id": name} for name, shown in rows.items()]
        images, image_names = self._images(list(rows), facts)
        meta = [_meta(known, name, safe) for known, name, safe in zip(facts, rows, ids, strict=True)]
        splits, rule = self.deal(meta, self.source)
        return NwbRecording(
            name=self.name or self.source.stem,
            provenance={
                "source": "nwb",
                "path": str(self.source.resolve()),
                "presentations": sum(map(len, rows.values())),
                "columns": {"onset": onset, "stimulus": stimulus},
                "windows_ms": self.window_ms,
                "selected": {"region": self.region},
                "split": rule,
            },
            sites=_sites(units, self.window_ms),
            response_window_ms=self.window_ms[0] if len(self.window_ms) == 1 else None,
            units="spikes/s",
            stimulus_ids=ids,
            splits=splits,
            objects=objects_of(meta),
            group_by=self.group_by,
            images=images,
            image_names=image_names,
            meta=meta,
            path=self.source,
            onsets=onsets,
            rows=list(rows.values()),
            spans=spans,
            windows=self.window_ms,
        )

    def _table(self, file: h5py.File) -> h5py.Group:
        """The table of presentations."""
        intervals = hdf5.subgroup(file, "intervals")
        names = [name for name in intervals if name not in NO_PRESENTATIONS]
        if self.table is not None:
            names = [name for name in intervals if name == self.table]
        elif len(names) > 1:
            names = [name for name in TABLES if name in names]
        if not names:
            there = ", ".join(intervals) or "nothing"
            raise BadInput(f"{self.source}: name the table of presentations with --table; /intervals holds {there}")
        return hdf5.subgroup(intervals, names[0])

    def _units(self, file: h5py.File) -> tuple[list[dict[str, Any]], dict[int, tuple[int, int]]]:
        """The facts of the units that are kept, and {unit's row: where its spikes begin and end in spike_times}."""
        group = hdf5.subgroup(file, "units")
        if not hdf5.has(group, "spike_times"):
            raise BadInput(f"{self.source}: /units has no spike_times; it holds {', '.join(group)}")
        spans = _spans(group, "spike_times")
        columns = {name: _values(found) for name, found in _columns(group).items() if name != "id"}
        names = [self.region_column] if self.region_column else [name for name in REGION_COLUMNS if name in columns]
        if self.region_column and self.region_column not in columns:
            raise _no_column(group, (self.region_column,), "--region-column")
        locations = columns[names[0]] if names else _electrode_locations(file, group)
        columns["region"] = locations or [None] * len(spans)
        columns["subject"] = [_subject(file)] * len(spans)
        ids = hdf5.texts(hdf5.dataset(group, "id")) if hdf5.has(group, "id") else [str(k) for k in range(len(spans))]
        units = [{"id": f"unit_{ids[k]}"} | present(columns, k) for k in range(len(spans))]
        keep = select_sites(units, "region", self.region, "--region", self.source)
        kept = np.flatnonzero(keep).tolist()
        return [units[k] for k in kept], {k: spans[k] for k in kept}

    def _images(self, names: list[str], facts: list[dict[str, Any]]) -> tuple[ImageFiles, list[str]]:
        """Where the images lie, and each stimulus's there."""
        if "{" in self.images:
            fixed = self.images.split("{")[0].rpartition("/")
            template = self.images[len("".join(fixed[:2])) :]
            files = ImageFiles(Path("".join(fixed[:2]) or "."))
            wanted = [[_filled(template, known)] for known in facts]
        else:
            files = ImageFiles(Path(self.images))
            wanted = [[name] for name in names]
            if self.image_column is not None:
                for paths, known in zip(wanted, facts, strict=True):
                    paths.insert(0, str(_known(known, self.image_column, "--image-column")))
        return files, files.find_all(dict(zip(names, wanted, strict=True)))


@dataclass(kw_only=True)
class NwbRecording(PresentedRecording):
    """A file that `Nwb.open` has checked.

    Attributes (beside those of `PresentedRecording`):
        path: the NWB file.
        onsets: of all presentations, in seconds.
        rows: the presentations of each stimulus.
        spans: {unit's row: where its spikes begin and end in spike_times}, in the order of the sites.
        windows: after onset, in ms; they are the faster index of the sites.
    """

    path: Path
    onsets: np.ndarray
    rows: list[np.ndarray]
    spans: dict[int, tuple[int, int]]
    windows: Windows

    def responses(self, indices: Sequence[int]) -> Iterator[tuple[np.ndarray | None, np.ndarray | None]]:
        """Yield rates and trials in spikes/s; NaN for presentations during which a unit was not observed."""
        repetitions = max(map(len, self.rows))
        block = max(1, TRIALS_BYTES // (4 * len(self.sites) * repetitions))
        with hdf5.reading(self.path) as file:
            for start in range(0, len(indices), block):
                rows = [self.rows[i] for i in indices[start : start + block]]
                rates = self._rates(file, self.onsets[np.concatenate(rows)])
                yield from rates_and_trials(np.split(rates, np.cumsum(list(map(len, rows)))[:-1]), repetitions)

    def _rates(self, file: h5py.File, onsets: np.ndarray) -> np.ndarray:
        """The rates of all sites in some presentations: float32 (presentations, sites). One unit is held at a time."""
        windows = np.array(self.windows) / 1000
        spikes = hdf5.numbers(file, "units/spike_times", 1)
        observed = _observed(hdf5.subgroup(file, "units"))
        rates = np.empty((len(onsets), len(self.spans), len(self.windows)), np.float32)
        for k, (unit, (begin, end)) in enumerate(self.spans.items()):
            counts = spike_counts(np.sort(spikes[begin:end]), onsets, windows)
            if observed is not None:
                counts[~_within(observed(unit), onsets, windows)] = np.nan
            rates[:, k] = counts / (windows[:, 1] - windows[:, 0])
        return rates.reshape(len(onsets), -1)


# ---- tables of NWB -------------------------------------------------------------------------------------------------


def _columns(table: h5py.Group) -> dict[str, h5py.Dataset]:
    """The columns that hold one number or text a row."""
    rows = len(hdf5.dataset(table, "id")) if hdf5.has(table, "id") else None
    columns = {}
    for name in table:
        found = hdf5.member(table, name)
        plain = isinstance(found, h5py.Dataset) and found.ndim == 1 and (hdf5.is_numeric(found) or hdf5.is_text(found))
        ragged = name.endswith("_index") or hdf5.has(table, f"{name}_index")
        if plain and not ragged and rows in (None, len(found)) and name != "id":
            columns[name] = hdf5.contained(found)
    return columns


def _no_column(table: h5py.Group, names: Sequence[str], flag: str) -> BadInput:
    there = ", ".join(_columns(table)) or "none"
    return BadInput(f"{hdf5.at(table)}: there is no column {' or '.join(names)}; there are {there}; choose with {flag}")


def _column(table: h5py.Group, names: Sequence[str], flag: str) -> str:
    """The first of `names` that is a column of the table."""
    columns = _columns(table)
    found = next((name for name in names if name in columns), None)
    if found is None:
        raise _no_column(table, names, flag)
    return found


def _texts(found: h5py.Dataset) -> list[str]:
    """A column spelled out; whole floats without a point, nothing where there is no number."""
    if found.dtype.kind == "f":
        return ["" if np.isnan(value) else f"{value:g}" for value in found[()].tolist()]
    return hdf5.texts(found)


def _values(found: h5py.Dataset) -> list[Any]:
    """A column as plain numbers or text, None for what is not known."""
    if hdf5.is_text(found):
        return [text or None for text in hdf5.texts(found)]
    return [value if np.isfinite(value) else None for value in found[()].tolist()]


def _constant(columns: dict[str, list[Any]], rows: np.ndarray) -> dict[str, Any]:
    """What is the same in all presentations of a stimulus."""
    same = {}
    for name, values in columns.items():
        found = {values[row] for row in rows}
        if len(found) == 1 and (value := found.pop()) is not None:
            same[name] = value
    return same


def _meta(facts: dict[str, Any], name: str, safe: str) -> dict[str, Any]:
    """Facts as a Stimulus has them: object and category under these names, as text."""
    meta = {OBJECT_COLUMNS.get(fact, fact): value for fact, value in facts.items() if fact != "stimulus_id"}
    meta |= {fact: str(meta[fact]) for fact in ("object", "category") if fact in meta}
    return meta if safe == name else meta | {"source_id": name}


def _known(facts: dict[str, Any], name: str, flag: str) -> Any:
    if name not in facts:
        there = ", ".join(sorted(facts))
        raise BadInput(f"{flag}: {name!r} is not known of stimulus {facts['stimulus_id']!r}; known are {there}")
    return facts[name]


def _filled(template: str, facts: dict[str, Any]) -> str:
    """A template of paths for one stimulus; only names of facts may stand in its braces."""
    try:
        fields = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
        return template.format(**{name: _known(facts, name, "--images") for name in fields})
    except (ValueError, KeyError, IndexError) as error:
        raise BadInput(f"--images {template}: not a template such as stimuli/{{stimulus_id}}.png ({error})") from None


def _spans(group: h5py.Group, name: str) -> list[tuple[int, int]]:
    """Where each row's values begin and end in a ragged column."""
    ends = hdf5.numbers(group, f"{name}_index", 1)[()].astype(np.int64)
    if len(ends) and (ends[0] < 0 or np.any(np.diff(ends) < 0) or ends[-1] > len(hdf5.numbers(group, name))):
        raise BadInput(f"{hdf5.at(group)}/{name}_index does not fit {name}; the file is damaged")
    return list(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True))


def _electrode_locations(file: h5py.File, units: h5py.Group) -> list[str | None] | None:
    """The location of each unit's first electrode, where the file has electrodes."""
    path = "general/extracellular_ephys/electrodes/location"
    if not hdf5.has(units, "electrodes") or not hdf5.has(file, path):
        return None
    locations = hdf5.texts(hdf5.dataset(file, path))
    rows = hdf5.numbers(units, "electrodes", 1)[()].tolist()
    if any(not 0 <= row < len(locations) for row in rows):
        raise BadInput(f"{hdf5.at(units)}/electrodes names electrodes that there are not; the file is damaged")
    spans = (
        _spans(units, "electrodes") if hdf5.has(units, "electrodes_index") else [(k, k + 1) for k in range(len(rows))]
    )
    return [locations[rows[begin]] or None if begin < end else None for begin, end in spans]


def _subject(file: h5py.File) -> str | None:
    path = "general/subject/subject_id"
    return hdf5.decoded(hdf5.dataset(file, path)[()]) if hdf5.has(file, path) else None


def _observed(units: h5py.Group) -> Any:
    """From a unit's row to the spans of time in which it was observed, (spans, 2) seconds; None if that is not told."""
    if not hdf5.has(units, "obs_intervals"):
        return None
    intervals, spans = hdf5.numbers(units, "obs_intervals", 2), _spans(units, "obs_intervals")
    return lambda unit: intervals[slice(*spans[unit])]


def _within(intervals: np.ndarray, onsets: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """Whether each window (seconds) of each presentation lies within an interval: bool (presentations, windows)."""
    start, end = onsets[:, None] + windows[:, 0], onsets[:, None] + windows[:, 1]
    inside = np.zeros(start.shape, bool)
    for first, last in intervals:
        inside |= (start >= first) & (end <= last)
    return inside


def _sites(units: list[dict[str, Any]], windows: Windows) -> list[dict[str, Any]]:
    """The facts of every site: a unit, or a unit in one of several windows."""
    if len(windows) == 1:
        return units
    return [
        unit | {"id": f"{unit['id']}_{start:g}-{end:g}ms", "unit": unit["id"], "window_ms": [start, end]}
        for unit in units
        for start, end in windows
    ]
