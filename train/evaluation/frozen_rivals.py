"""Whether a frozen layer, probed beside a fine-tuned run, predicts the same stimuli better."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.common.safe_reading import parse_json, read_regular_file
from data_prep.common.terminal import printable
from train.evaluation.metrics_file import METRICS_FILE
from train.run.folder import RunFolder
from train.run.yaml_files import read_yaml

PIXELS = "pixels"
MOST_NEIGHBOURS = 200  # folders that are looked at
UNTUNED = ("pretrained", "random")  # other weights may be those of a fine-tuned run
ADVICE = "report the frozen one, or see docs/best.md for what makes fine-tuning win"


@dataclass(frozen=True)
class FrozenLayer:
    """The chosen layer of a probe.

    Attributes:
        r2: the mean over sites.
        name: of the layer.
        probe: folder, for people.
    """

    r2: float
    name: str
    probe: str


def frozen_ahead(run: Path, split: str, recording: str, metrics: Mapping[str, Any]) -> str:
    """A sentence if a probe in the same folder as a run has a higher R2 on the same stimuli; else empty.

    Args:
        run: folder of the run.
        split: that was scored.
        recording: that was scored.
        metrics: of the run.
    """
    score = _r2(metrics)
    if score is None or "control" in metrics:
        return ""
    best = max(_layers(run, split, recording, metrics), key=lambda layer: layer.r2, default=None)
    if best is None or best.r2 <= score:
        return ""
    ahead = f"{best.name} of {best.probe}, R2 {best.r2:.4f} against {score:.4f}"
    return f"a frozen layer is ahead of this run: {ahead}; {ADVICE}"


def _layers(run: Path, split: str, recording: str, metrics: Mapping[str, Any]) -> Iterator[FrozenLayer]:
    """The chosen layers of the probes beside a run that were scored on the same stimuli."""
    try:
        neighbours = sorted(path for path in run.absolute().parent.iterdir() if path.is_dir() and not path.is_symlink())
    except OSError:  # the folder around a run may not be ours to list
        return
    for path in neighbours[:MOST_NEIGHBOURS]:
        try:
            content = parse_json(read_regular_file(RunFolder(path).results_on(split, recording) / METRICS_FILE))
            recipe = read_yaml(RunFolder(path).recipe)
            is_frozen = recipe["layers"] != [PIXELS] and recipe["backbone"]["weights"] in UNTUNED
            same = all(content.get(key) == metrics[key] for key in ("recording", "fingerprint"))
            r2 = _r2(content)
            if is_frozen and same and r2 is not None and "control" not in content and not _has_leaks(content):
                yield FrozenLayer(r2, printable(str(content["chosen"])), printable(str(run.parent / path.name)))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # no probe, or one that is not done or damaged


def _has_leaks(metrics: Mapping[str, Any]) -> bool:
    """Whether stimuli were scored that the probe or its network had been fitted on."""
    seen = metrics.get("seen") or {}
    return bool(seen.get("fitted") or seen.get("taught"))


def _r2(metrics: Mapping[str, Any]) -> float | None:
    mean = metrics.get("regression", {}).get("r2", {}).get("mean")
    return float(mean) if isinstance(mean, int | float) else None
