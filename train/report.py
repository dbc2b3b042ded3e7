"""Compare runs and probes in one table.

python train/report.py RUN [RUN ...] --out DIR [--split val]
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field

from data_prep.command_line import parse
from data_prep.errors import BadInput, run_command
from train.run_folder import RunFolder, check_writable, write_atomically

TOP1 = "top-1"
COLUMNS = {
    "R2": "r2",
    "EV": "explained_variance",
    "MSE": "mse",
    "Pearson r": "pearson_r",
    "ceiled EV": "ceiled_explained_variance",
    "ceiled r": "ceiled_pearson_r",
    "FEVE": "feve",
}


class Report(BaseModel):
    """Compare runs and probes in one table."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    runs: Annotated[list[Path], tyro.conf.Positional] = Field(min_length=1)
    """Run folders that have been evaluated."""
    out: Path
    """Folder for the table (table.md)."""
    split: Literal["train", "val", "test"] = "val"
    """The split whose scores are compared."""


@dataclass
class Row:
    """One model's line: its name, the metrics of the split, and whether the recording is simulated."""

    name: str
    metrics: dict[str, Any]

    @property
    def regression(self) -> dict[str, Any]:
        """The block of response metrics; empty for a classifier."""
        return self.metrics.get("regression", {})

    @property
    def top1(self) -> float | None:
        """Share of stimuli whose object is named right; None for a network that names none."""
        return self.metrics.get("classification", {}).get("top1")


def read_row(run: Path, split: str) -> Row:
    """A run's scores.

    Raises:
        BadInput: it has not been evaluated on the split, or its metrics.json is damaged.
    """
    if not run.is_dir():
        raise BadInput(f"{run} is no folder; give run folders made by train/finetune.py or train/probe.py")
    path = RunFolder(run).evaluation(split) / "metrics.json"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise BadInput(f"{path} is missing; score the run first: train/evaluate.py {run} --split {split}") from None
    except ValueError as error:
        raise BadInput(f"{path} is damaged ({error}); evaluate the run again") from None
    if not isinstance(metrics, dict) or not {"regression", "classification"} & metrics.keys():
        raise BadInput(f"{path} has no scores (`regression` or `classification`); evaluate the run again")
    layer = f" ({metrics['chosen']})" if len(metrics.get("layers", {})) > 1 else ""
    control = f" (CONTROL: {metrics['control']})" if "control" in metrics else ""
    return Row(run.name + layer + control, metrics)


def check_comparable(rows: list[Row]) -> None:
    """Refuse runs that were scored on different stimuli or sites.

    Raises:
        BadInput: naming two that differ.
    """
    first = next((row for row in rows if row.regression), rows[0])
    for row in rows:
        for what, of in (
            ("recording", lambda row: row.metrics["recording"]),
            ("number of stimuli", lambda row: row.metrics["stimuli"]),
            ("stimuli and responses", lambda row: row.metrics["fingerprint"] if row.regression else None),
            ("sites", lambda row: _site_count(row) if row.regression else None),
        ):
            if None not in (of(row), of(first)) and of(row) != of(first):
                raise BadInput(f"{first.name} and {row.name} were not scored on the same {what}; compare them apart")


def _site_count(row: Row) -> int:
    return len(row.regression["r2"]["per_site"])


def table(rows: list[Row]) -> str:
    """The comparison as a Markdown table: mean over sites, with the 95 % interval over stimuli in brackets."""
    first = next((row for row in rows if row.regression), rows[0])
    columns = [name for name, key in COLUMNS.items() if any(key in row.regression for row in rows)]
    columns += [TOP1] if any(row.top1 is not None for row in rows) else []
    lines = [_line(["model", *columns, "selected on"]), _line(["---"] * (len(columns) + 2))]
    for row in rows:
        cells = [_top1(row) if name == TOP1 else _cell(row.regression.get(COLUMNS[name])) for name in columns]
        lines.append(_line([row.name, *cells, ", ".join(row.metrics.get("selected_on", ["-"]))]))
    if ceiling := first.regression.get("ceiling"):
        lines.append(_ceiling_line(ceiling, columns))
    stimuli, split = first.metrics["stimuli"], first.metrics["split"]
    notes = [
        f"{first.metrics['recording']}: {f'mean over {_site_count(first)} sites ' if first.regression else ''}on the "
        f"{stimuli} stimuli of {split}; in brackets the 95 % interval over stimuli."
    ]
    if ceiling:
        notes.append(f"Ceiling: {ceiling['method']}; it bounds R2 and EV, its square root bounds r.")
    notes += _ceiling_notes(rows)
    if any(split in row.metrics.get("selected_on", []) for row in rows):
        notes.append(f"A model selected on {split} is flattered by its score there.")
    if any(row.metrics.get("simulated") for row in rows):
        notes.append("The recording is SIMULATED: no brain took part.")
    return "\n".join([*lines, "", *notes])


def _ceiling_notes(rows: list[Row]) -> list[str]:
    """What the ceiled scores in the table are relative to."""
    names: dict[str, list[str]] = {}
    for name, key in COLUMNS.items():
        found = {row.regression[key]["ceiling"] for row in rows if "ceiling" in row.regression.get(key, {})}
        for against in sorted(found):
            names.setdefault(against, []).append(name)
    return [f"{' and '.join(columns)}: relative to {against}." for against, columns in names.items()]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(block: dict[str, Any] | None) -> str:
    if block is None or block["mean"] is None:
        return "-"
    interval = block.get("ci95")
    return f"{block['mean']:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def _top1(row: Row) -> str:
    return "-" if row.top1 is None else f"{row.top1:.3f}"


def _ceiling_line(ceiling: dict[str, Any], columns: list[str]) -> str:
    reliability = ceiling["mean"]
    root = sum(math.sqrt(max(value, 0)) for value in ceiling["per_site"] if value is not None)
    count = sum(value is not None for value in ceiling["per_site"])
    if not count:
        return _line(["*ceiling*", *["-"] * (len(columns) + 1)])
    values = {"R2": reliability, "EV": reliability, "Pearson r": root / count}
    values |= dict.fromkeys(("ceiled EV", "ceiled r", "FEVE"), 1.0)
    return _line(["*ceiling*", *(f"{values[name]:.3f}" if name in values else "-" for name in columns), "-"])


def main() -> None:
    """Parse, read, compare, write."""
    options = parse(Report, args=sys.argv[1:])
    check_writable(options.out)
    rows = [read_row(run, options.split) for run in options.runs]
    check_comparable(rows)
    text = table(rows)
    target = options.out / "table.md"
    write_atomically(target, (text + "\n").encode())
    print(f"{text}\n\nwritten to {target}")


if __name__ == "__main__":
    run_command(main)
