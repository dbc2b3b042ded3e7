"""Which windows the sites of a probe read, kept in its metrics.json as the prior of another recording (`prior`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from data_prep.common.errors import BadInput
from data_prep.common.safe_reading import parse_json, read_regular_file
from train.evaluation.predictions_file import METRICS_FILE
from train.models.windows import Window, probe_windows

WINDOW_PRIOR = "window_prior"
HOW_TO_MAKE = "probe it with --field gaussian --sites-learn together"


class WindowShare(BaseModel):
    """How probable a window is for a site of which nothing else is known.

    Attributes:
        x, y, width: see `train/models/windows.py`.
        share: of all windows.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    x: float
    y: float
    width: float | None
    share: float = Field(ge=0, le=1)


_SHARES = TypeAdapter(list[WindowShare])


def window_prior_block(priors: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """The mean of the priors of all partitions, each float64 (windows,), for metrics.json."""
    shares = np.mean(priors, axis=0).tolist()
    windows = zip(probe_windows(), shares, strict=True)
    return [
        WindowShare(x=window.x, y=window.y, width=window.width, share=share).model_dump() for window, share in windows
    ]


def read_window_prior(probes: Sequence[str]) -> np.ndarray | None:
    """The mean of the priors of some probes, float64 (windows,), which sums to 1; None without any.

    Raises:
        BadInput: a folder is not that of a probe with such a prior, or it is damaged.
    """
    if not probes:
        return None
    return np.mean([_of_probe(Path(probe)) for probe in probes], axis=0)


def _of_probe(probe: Path) -> np.ndarray:
    paths = sorted((probe / "eval").glob(f"*/{METRICS_FILE}"))
    if not paths:
        raise BadInput(f"prior: {probe} has no results of a probe; {HOW_TO_MAKE}")
    try:
        metrics = parse_json(read_regular_file(paths[0]))
        block = metrics["layers"][metrics["chosen"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise BadInput(f"prior: {paths[0]} is not that of a probe, or damaged; probe again") from None
    if not isinstance(block, Mapping) or WINDOW_PRIOR not in block:
        raise BadInput(f"prior: {probe} does not tell which windows its sites share; {HOW_TO_MAKE}")
    try:
        found = _SHARES.validate_python(block[WINDOW_PRIOR])
    except ValidationError:
        raise BadInput(f"prior: {paths[0]} is damaged; probe again") from None
    shares = np.array([entry.share for entry in found])
    if [Window(entry.x, entry.y, entry.width) for entry in found] != probe_windows() or not shares.sum() > 0:
        raise BadInput(f"prior: {probe} read other windows than this version does; probe it again")
    return shares / shares.sum()
