"""Source `brainio`: a Brain-Score assembly (NetCDF), its stimulus set (CSV) and the images (zip or folder).

An assembly is one variable over presentation, neuroid and usually time_bin, in any order, with coordinates along these:
stimulus_id (image_id in older files), repetition, neuroid_id, region, animal, time_bin_start and time_bin_end.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from data_prep.common.errors import BadInput
from data_prep.recording import Recording
from data_prep.sources.files.held_out import HeldOut
from data_prep.sources.files.ids import safe_ids, select_sites, source_id, unique_site_ids
from data_prep.sources.files.image_files import ImageFiles
from data_prep.sources.files.named_images_recording import NamedImagesRecording, objects_of
from data_prep.sources.files.netcdf import Variable, open_netcdf
from data_prep.sources.files.presentations import gather_trials, rates_and_trials, rows_by_stimulus
from data_prep.sources.files.tables import Table, parse_cells, read_table, row_facts, text_cells

ID_NAMES = ("stimulus_id", "image_id")
SITE_ID_NAMES = ("neuroid_id", "neuroid")
ANIMAL_NAMES = ("animal", "subject")
FILE_COLUMNS = ("filename", "image_file_name", "stimulus_path_within_store", "image_path_within_store")
OBJECT_COLUMNS = {"object_name": "object", "category_name": "category"}  # BrainIO's names, and ours

Coordinates = Mapping[str, Variable]  # along one axis


class Brainio(HeldOut):
    """A Brain-Score assembly with its stimulus set and images."""

    source: tyro.conf.Positional[Path]
    """The assembly, a NetCDF file (.nc)."""
    stimuli: Path
    """The stimulus set, a CSV with a column stimulus_id or image_id."""
    images: Path
    """Zip archive or folder of the images."""
    region: tuple[str, ...] = ()
    """Only sites in these regions."""
    animal: tuple[str, ...] = ()
    """Only sites of these animals."""
    time_bin: tuple[float, float] | None = None
    """Start and end in ms of the time bin; bins that fill it without gaps are averaged. Default: the only bin."""
    variable: str | None = None
    """Name of the variable with the responses, if the file has several."""
    name: str | None = None
    """Name of the recording. Default: the assembly's file name without its ending."""
    units: str = "as recorded"
    """Units of the responses, such as spikes/s."""

    def open(self) -> Recording:
        """Check the assembly against the stimulus set and the images, and describe the recording.

        Raises:
            BadInput: naming the file, the coordinate, column or option, and what would be right.
        """
        table = read_table(self.stimuli)
        id_column = _first_known(ID_NAMES, table.columns)
        if id_column is None:
            raise table.missing_column(" or ".join(ID_NAMES))
        with open_netcdf(self.source) as variables:
            assembly = self._assembly(variables, id_column)
        names = list(assembly.rows)
        row_of = self._rows_of_stimuli(table, id_column, names)
        meta = _stimulus_facts(table, row_of, assembly.labels)
        images = ImageFiles(self.images)
        dealt = self.assign(meta, self.source)
        return BrainioRecording(
            name=self.name or self.source.stem,
            provenance={
                "source": "brainio",
                "path": str(self.source.resolve()),
                "stimuli": self.stimuli.name,
                "presentations": sum(map(len, assembly.rows.values())),
                "selected": {"region": self.region, "animal": self.animal, "time_bin": self.time_bin},
                "split": dealt.rule,
                "not_shown": len(table) - len(names),
            },
            sites=assembly.sites,
            response_window_ms=assembly.window_ms,
            units=self.units,
            stimulus_ids=safe_ids(names),
            splits=dealt.splits,
            deal=dealt.deal,
            objects=objects_of(meta),
            group_by=self.group_by,
            images=images,
            image_names=images.find_all(_image_names(table, row_of)),
            meta=meta,
            path=self.source,
            assembly=assembly,
        )

    def _assembly(self, variables: Mapping[str, Variable], id_column: str) -> "Assembly":
        """The assembly as its coordinates describe it, with the selected sites and time bins."""
        data = self._responses_variable(variables)
        sites, columns = self._sites(_coordinates(variables, data, "neuroid"))
        bins, window = self._time_bins(_coordinates(variables, data, "time_bin"), data)
        presentation = _coordinates(variables, data, "presentation")
        id_coordinate = _first_known((id_column, *ID_NAMES), presentation)
        if id_coordinate is None:
            raise self._missing_coordinate("presentation", ID_NAMES, presentation)
        repetition = _ranks(presentation["repetition"].values()) if "repetition" in presentation else None
        rows = rows_by_stimulus(presentation[id_coordinate].texts(), repetition)
        labels = {
            fact: _label_of(rows, presentation[coordinate].texts())
            for coordinate, fact in OBJECT_COLUMNS.items()
            if coordinate in presentation
        }
        return Assembly(data.name, sites, columns, bins, window, rows, labels)

    def _responses_variable(self, variables: Mapping[str, Variable]) -> Variable:
        """The only variable over presentation and neuroid, or the one that --variable names."""
        fitting = {
            name: variable
            for name, variable in variables.items()
            if variable.numeric
            and {"presentation", "neuroid"} <= set(variable.axes) <= {"presentation", "neuroid", "time_bin"}
        }
        if not fitting:
            numeric = [
                f"{name} ({', '.join(variable.axes)})" for name, variable in variables.items() if variable.numeric
            ]
            raise BadInput(
                f"{self.source}: no variable has the axes presentation and neuroid (and time_bin); "
                f"there is {', '.join(numeric) or 'none'}"
            )
        if self.variable is None:
            if len(fitting) > 1:
                raise BadInput(f"{self.source}: pick one of the variables {', '.join(fitting)} with --variable")
            return next(iter(fitting.values()))
        if self.variable not in fitting:
            raise BadInput(
                f"{self.source}: there is no variable {self.variable!r} over presentation and neuroid; "
                f"there is {', '.join(fitting)}"
            )
        return fitting[self.variable]

    def _sites(self, coordinates: Coordinates) -> tuple[list[dict[str, Any]], np.ndarray]:
        """The facts about the selected sites, and the positions of their neuroids."""
        id_name = _first_known(SITE_ID_NAMES, coordinates)
        if id_name is None:
            raise self._missing_coordinate("neuroid", SITE_ID_NAMES, coordinates)
        ids = coordinates[id_name].texts()
        columns = {name: variable.values() for name, variable in coordinates.items() if name not in (id_name, "id")}
        animal_name = _first_known(ANIMAL_NAMES, columns) or "animal"
        sites = [row_facts(columns, position) for position in range(len(ids))]
        keep = select_sites(sites, "region", self.region, "--region", self.source)
        keep &= select_sites(sites, animal_name, self.animal, "--animal", self.source)
        if not keep.any():
            raise BadInput(f"{self.source}: no site is of animal {self.animal} and in region {self.region}")
        unique = unique_site_ids(ids, [str(site.get(animal_name, "")) for site in sites])
        for site, site_id in zip(sites, unique, strict=True):
            if animal_name in site:
                site["subject"] = site.pop(animal_name)
            site["id"] = site_id
        return list(compress(sites, keep)), np.flatnonzero(keep)

    def _time_bins(self, coordinates: Coordinates, data: Variable) -> tuple[list[int], tuple[float, float] | None]:
        """The time bins to average, none if the assembly has no such axis, and the window that they cover, in ms."""
        if "time_bin" not in data.axes:
            if self.time_bin is not None:
                raise BadInput(f"{self.source}: the assembly has no axis time_bin for --time-bin to pick from")
            return [], None
        count = data.shape[data.axes.index("time_bin")]
        if not {"time_bin_start", "time_bin_end"} <= set(coordinates):
            if count == 1 and self.time_bin is None:
                return [0], None
            raise self._missing_coordinate("time_bin", ("time_bin_start", "time_bin_end"), coordinates)
        starts, ends = coordinates["time_bin_start"].values(), coordinates["time_bin_end"].values()
        edges = list(zip(starts, ends, strict=True))
        available = ", ".join(f"{start:g}-{end:g}" for start, end in edges[:12]) + (", ..." if count > 12 else "")
        if self.time_bin is None:
            if count > 1:
                raise BadInput(f"{self.source}: pick a time bin with --time-bin START END; there are {available} ms")
            return [0], edges[0]
        bins = _bins_filling(self.time_bin, edges)
        if not bins:
            start, end = self.time_bin
            raise BadInput(
                f"{self.source}: no time bin is {start:g}-{end:g} ms, nor do bins fill it without gaps and overlaps "
                f"(--time-bin); there are {available} ms"
            )
        return bins, self.time_bin

    def _rows_of_stimuli(self, table: Table, id_column: str, names: list[str]) -> dict[str, int]:
        """{stimulus: its row in the stimulus set}."""
        table.check_unique(id_column)
        row_of = {name: row for row, name in enumerate(table.columns[id_column])}
        if unknown := [name for name in names if name not in row_of]:
            raise BadInput(
                f"{table.path}: {len(unknown)} of the {len(names)} stimuli of {self.source} have no row, e.g. "
                f"{unknown[0]!r}, where its ids are like {next(iter(row_of), '')!r}; it must be the stimulus set of "
                "this assembly"
            )
        return {name: row_of[name] for name in names}

    def _missing_coordinate(self, axis: str, names: Sequence[str], coordinates: Coordinates) -> BadInput:
        return BadInput(
            f"{self.source}: there is no coordinate {' or '.join(names)} along {axis}; "
            f"there is {', '.join(coordinates) or 'none'}"
        )


@dataclass(frozen=True)
class Assembly:
    """The part of an assembly that is read.

    Attributes:
        variable: name of the variable with the responses.
        sites: the facts about the selected sites.
        columns: the positions of their neuroids.
        bins: the time bins to average; none if there is no such axis.
        window_ms: the window that the bins cover, if known.
        rows: {stimulus: its presentations}, in order of repetition.
        labels: {fact: {stimulus: its value}}, from the coordinates of the presentations.
    """

    variable: str
    sites: list[dict[str, Any]]
    columns: np.ndarray
    bins: list[int]
    window_ms: tuple[float, float] | None
    rows: dict[str, np.ndarray]
    labels: dict[str, dict[str, str]]


@dataclass(kw_only=True)
class BrainioRecording(NamedImagesRecording):
    """An assembly that `Brainio.open` has checked.

    Attributes (beside those of `NamedImagesRecording`):
        path: the NetCDF file.
        assembly: the part of it that is read.
    """

    path: Path
    assembly: Assembly

    def responses(self, indices: Sequence[int]) -> Iterator[tuple[np.ndarray | None, np.ndarray | None]]:
        """Yield rates and trials; repetitions that a stimulus lacks are NaN."""
        rows = list(self.assembly.rows.values())
        with open_netcdf(self.path) as variables:
            data = variables[self.assembly.variable]
            trials = gather_trials(
                self._reader(data),
                [rows[i] for i in indices],
                len(self.assembly.columns),
                data.rows_at_once("presentation"),
            )
            yield from rates_and_trials(trials, max(map(len, rows)))

    def _reader(self, data: Variable) -> Callable[[slice], np.ndarray]:
        order = [data.axes.index(name) for name in ("presentation", "neuroid", "time_bin") if name in data.axes]
        columns, bins = self.assembly.columns, self.assembly.bins

        def read(rows: slice) -> np.ndarray:
            responses = data.read_rows("presentation", rows).transpose(order)[:, columns]
            return responses[:, :, bins].mean(axis=2) if bins else responses

        return read


# ---- coordinates ---------------------------------------------------------------------------------------------------


def _first_known(names: Iterable[str], known: Iterable[str]) -> str | None:
    known = set(known)
    return next((name for name in names if name in known), None)


def _coordinates(variables: Mapping[str, Variable], data: Variable, axis: str) -> Coordinates:
    return {name: variable for name, variable in variables.items() if variable.axes == (axis,) and name != data.name}


def _bins_filling(window: tuple[float, float], edges: list[tuple[float, float]]) -> list[int]:
    """The bin that is `window`, else the bins that fill it without gaps and overlaps, in order; empty if none do."""
    if window in edges:
        return [edges.index(window)]
    start, end = window
    inside = [k for k, (first, last) in enumerate(edges) if start <= first and last <= end]
    inside.sort(key=lambda k: edges[k])
    starts, ends = [edges[k][0] for k in inside], [edges[k][1] for k in inside]
    return inside if [*starts, end] == [start, *ends] else []


def _ranks(values: list[Any]) -> np.ndarray:
    """Numbers in the order of the values, unknown values last."""
    known = sorted({value for value in values if value is not None})
    rank = {value: k for k, value in enumerate(known)}
    return np.array([rank.get(value, len(known)) for value in values])


# ---- the stimulus set ----------------------------------------------------------------------------------------------


def _label_of(rows: Mapping[str, np.ndarray], labels: list[str]) -> dict[str, str]:
    """{stimulus: the label of its first presentation}."""
    return {name: labels[presentations[0]] for name, presentations in rows.items()}


def _stimulus_facts(
    table: Table, row_of: Mapping[str, int], labels: Mapping[str, Mapping[str, str]]
) -> list[dict[str, Any]]:
    """The facts about each stimulus: those of its row, and the assembly's labels {fact: {stimulus: label}}."""
    columns: dict[str, list[Any]] = {
        OBJECT_COLUMNS.get(name, name): text_cells(cells) if name in OBJECT_COLUMNS else parse_cells(cells)
        for name, cells in table.columns.items()
        if name not in (*FILE_COLUMNS, *ID_NAMES)
    }
    meta = []
    for (name, row), safe_id in zip(row_of.items(), safe_ids(list(row_of)), strict=True):
        facts = row_facts(columns, row) | source_id(name, safe_id)
        for fact, label_of in labels.items():
            facts.setdefault(fact, label_of[name])
        meta.append(facts)
    return meta


def _image_names(table: Table, row_of: Mapping[str, int]) -> dict[str, list[str]]:
    """{stimulus: names that its image may have}."""
    columns = [table.columns[name] for name in FILE_COLUMNS if name in table.columns]
    return {name: [*(cells[row] for cells in columns), name] for name, row in row_of.items()}
