"""Source `brainio`: a Brain-Score assembly (NetCDF), its stimulus set (CSV) and the images (zip or folder).

An assembly is one variable over presentation, neuroid and mostly time_bin, in any order, and coordinates along these:
stimulus_id (image_id in older files), repetition, neuroid_id, region, animal, time_bin_start and time_bin_end.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from data_prep.common.errors import BadInput
from data_prep.recording import Recording
from data_prep.sources.files.image_files import ImageFiles
from data_prep.sources.files.netcdf import Variable, open_netcdf
from data_prep.sources.files.presentations import HeldOut, PresentedRecording, objects_of
from data_prep.sources.files.tables import Table, check_unique, present, read_table, typed
from data_prep.sources.files.trials import (
    gather_trials,
    rates_and_trials,
    rows_by_stimulus,
    safe_ids,
    select_sites,
    unique_site_ids,
)

ID_NAMES = ("stimulus_id", "image_id")
SITE_ID_NAMES = ("neuroid_id", "neuroid")
ANIMAL_NAMES = ("animal", "subject")
FILE_COLUMNS = ("filename", "image_file_name", "stimulus_path_within_store", "image_path_within_store")
OBJECT_COLUMNS = {"object_name": "object", "category_name": "category"}  # what a stimulus set calls them, and we


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
    """Name of the variable with the responses, where the file has several."""
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
        with open_netcdf(self.source) as variables:
            data = _responses_variable(variables, self.variable, self.source)
            sites, keep = self._sites(_along(variables, data, "neuroid"))
            bins, window = self._bins(_along(variables, data, "time_bin"), data)
            shown = _along(variables, data, "presentation")
            id_column = _first(table.columns, ID_NAMES)
            if id_column is None:
                raise table.lacks(" or ".join(ID_NAMES), None)
            coordinate = _first(shown, (id_column, *ID_NAMES))
            if coordinate is None:
                raise _lacks(self.source, "presentation", ID_NAMES, shown)
            stimuli = shown[coordinate].texts()
            order = shown["repetition"].values() if "repetition" in shown else None
            rows = rows_by_stimulus(stimuli, _ranks(order))
            labels = {name: shown[name].texts() for name in OBJECT_COLUMNS if name in shown}
        names = list(rows)
        meta, files = _stimulus_set(table, id_column, names, self.source)
        for coordinate, fact in OBJECT_COLUMNS.items():
            for name, facts in zip(names, meta, strict=True):
                if fact not in facts and coordinate in labels:
                    facts[fact] = labels[coordinate][rows[name][0]]
        images = ImageFiles(self.images)
        splits, rule = self.deal(meta, self.source)
        return BrainioRecording(
            name=self.name or self.source.stem,
            provenance={
                "source": "brainio",
                "path": str(self.source.resolve()),
                "stimuli": self.stimuli.name,
                "presentations": len(stimuli),
                "selected": {"region": self.region, "animal": self.animal, "time_bin": self.time_bin},
                "split": rule,
                "not_shown": len(table) - len(names),
            },
            sites=sites,
            response_window_ms=window,
            units=self.units,
            stimulus_ids=safe_ids(names),
            splits=splits,
            objects=objects_of(meta),
            group_by=self.group_by,
            images=images,
            image_names=images.find_all(files),
            meta=meta,
            path=self.source,
            variable=data.name,
            rows=list(rows.values()),
            columns=np.flatnonzero(keep),
            bins=bins,
        )

    def _sites(self, along: dict[str, Variable]) -> tuple[list[dict[str, Any]], np.ndarray]:
        """Facts of the sites that are kept, and bool (neuroids,): which they are."""
        id_name = _first(along, SITE_ID_NAMES)
        if id_name is None:
            raise _lacks(self.source, "neuroid", SITE_ID_NAMES, along)
        ids = along[id_name].texts()
        columns = {name: found.values() for name, found in along.items() if name not in (id_name, "id")}
        animal_name = _first(columns, ANIMAL_NAMES) or "animal"
        sites = [present(columns, i) for i in range(len(ids))]
        keep = select_sites(sites, "region", self.region, "--region", self.source)
        keep &= select_sites(sites, animal_name, self.animal, "--animal", self.source)
        if not keep.any():
            raise BadInput(f"{self.source}: no site is of animal {self.animal} and in region {self.region}")
        unique = unique_site_ids(ids, [str(site.get(animal_name, "")) for site in sites])
        for site, site_id in zip(sites, unique, strict=True):
            if animal_name in site:
                site["subject"] = site.pop(animal_name)
            site |= {"id": site_id}
        return [site for site, kept in zip(sites, keep, strict=True) if kept], keep

    def _bins(self, along: dict[str, Variable], data: Variable) -> tuple[list[int], tuple[float, float] | None]:
        """The time bins to average, none where the assembly has no such axis, and the window that they cover, in ms."""
        if "time_bin" not in data.axes:
            if self.time_bin is not None:
                raise BadInput(
                    f"{self.source}: the assembly has no axis time_bin, so --time-bin has nothing to pick from"
                )
            return [], None
        count = data.shape[data.axes.index("time_bin")]
        if not {"time_bin_start", "time_bin_end"} <= set(along):
            if count == 1 and self.time_bin is None:
                return [0], None
            raise _lacks(self.source, "time_bin", ("time_bin_start", "time_bin_end"), along)
        edges = list(zip(along["time_bin_start"].values(), along["time_bin_end"].values(), strict=True))
        there = ", ".join(f"{start:g}-{end:g}" for start, end in edges[:12]) + (", ..." if count > 12 else "")
        if self.time_bin is None:
            if count > 1:
                raise BadInput(f"{self.source}: pick a time bin with --time-bin START END; there are {there} ms")
            return [0], edges[0]
        if self.time_bin in edges:
            return [edges.index(self.time_bin)], self.time_bin
        start, end = self.time_bin
        inside = sorted((k for k in range(count) if start <= edges[k][0] and edges[k][1] <= end), key=edges.__getitem__)
        covered = [start, *(edges[k][1] for k in inside)]
        if not inside or covered[:-1] != [edges[k][0] for k in inside] or covered[-1] != end:
            raise BadInput(
                f"{self.source}: no time bin is {start:g}-{end:g} ms, nor do bins fill it without gaps and overlaps "
                f"(--time-bin); there are {there} ms"
            )
        return inside, self.time_bin


@dataclass(kw_only=True)
class BrainioRecording(PresentedRecording):
    """An assembly that `Brainio.open` has checked.

    Attributes (beside those of `PresentedRecording`):
        path: the NetCDF file.
        variable: in which the responses are.
        rows: the presentations of each stimulus, in order of repetition.
        columns: the neuroids that are kept.
        bins: the time bins to average; none where there is no such axis.
    """

    path: Path
    variable: str
    rows: list[np.ndarray]
    columns: np.ndarray
    bins: list[int]

    def responses(self, indices: Sequence[int]) -> Iterator[tuple[np.ndarray | None, np.ndarray | None]]:
        """Yield rates and trials; repetitions that a stimulus lacks are NaN."""
        with open_netcdf(self.path) as variables:
            data = variables[self.variable]
            wanted = [self.rows[i] for i in indices]
            trials = gather_trials(self._reader(data), wanted, len(self.columns), data.rows_at_once("presentation"))
            yield from rates_and_trials(trials, max(map(len, self.rows)))

    def _reader(self, data: Variable) -> Callable[[slice], np.ndarray]:
        order = [data.axes.index(name) for name in ("presentation", "neuroid", "time_bin") if name in data.axes]

        def read(rows: slice) -> np.ndarray:
            piece = data.piece("presentation", rows).transpose(order)[:, self.columns]
            return piece[:, :, self.bins].mean(axis=2) if self.bins else piece

        return read


# ---- the assembly --------------------------------------------------------------------------------------------------


def _first(known: Any, names: Sequence[str]) -> str | None:
    return next((name for name in names if name in known), None)


def _lacks(path: Path, axis: str, names: Sequence[str], along: dict[str, Variable]) -> BadInput:
    return BadInput(
        f"{path}: there is no coordinate {' or '.join(names)} along {axis}; there is {', '.join(along) or 'none'}"
    )


def _responses_variable(variables: dict[str, Variable], name: str | None, path: Path) -> Variable:
    """The one variable over presentation and neuroid, or the one that was asked for."""
    fitting = {
        key: found
        for key, found in variables.items()
        if found.numeric and {"presentation", "neuroid"} <= set(found.axes) <= {"presentation", "neuroid", "time_bin"}
    }
    if not fitting:
        there = ", ".join(f"{key} ({', '.join(found.axes)})" for key, found in variables.items() if found.numeric)
        raise BadInput(
            f"{path}: no variable is over presentation and neuroid (and time_bin); there is {there or 'none'}"
        )
    if name is None and len(fitting) > 1:
        raise BadInput(f"{path}: pick one of the variables {', '.join(fitting)} with --variable")
    if name is not None and name not in fitting:
        raise BadInput(
            f"{path}: there is no variable {name!r} over presentation and neuroid; there is {', '.join(fitting)}"
        )
    return next(iter(fitting.values())) if name is None else fitting[name]


def _along(variables: dict[str, Variable], data: Variable, axis: str) -> dict[str, Variable]:
    """The coordinates along one axis."""
    return {name: found for name, found in variables.items() if found.axes == (axis,) and name != data.name}


def _ranks(order: list[Any] | None) -> np.ndarray | None:
    """Numbers or text of any kind as numbers that sort alike, unknown ones last."""
    if order is None:
        return None
    known = sorted({value for value in order if value is not None})
    rank = {value: k for k, value in enumerate(known)}
    return np.array([rank.get(value, len(known)) for value in order])


def _stimulus_set(
    table: Table, id_column: str, names: list[str], path: Path
) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """What the table says of each stimulus, and the names its image may go by."""
    check_unique(table, id_column)
    row_of = {name: row for row, name in enumerate(table.columns[id_column])}
    if unknown := [name for name in names if name not in row_of]:
        raise BadInput(
            f"{table.path}: {len(unknown)} of the {len(names)} stimuli of {path} have no row, {unknown[0]!r} for one; "
            "it must be the stimulus set of this assembly"
        )
    files = [name for name in FILE_COLUMNS if name in table.columns]
    facts = {
        OBJECT_COLUMNS.get(name, name): [cell or None for cell in cells] if name in OBJECT_COLUMNS else typed(cells)
        for name, cells in table.columns.items()
        if name not in (*files, *ID_NAMES)
    }
    meta, wanted = [], {}
    for name, safe in zip(names, safe_ids(names), strict=True):
        row = row_of[name]
        meta.append(present(facts, row) | ({} if safe == name else {"source_id": name}))
        wanted[name] = [*(table.columns[column][row] for column in files), name]
    return meta, wanted
