"""RUN/predictor.safetensors: a probe as a linear map from features to sites, with which it predicts any images.

weight.<k>   float32 (sites, features of module k)
centre.<k>   float32 (features of module k,)
bias         float64 (sites,), NaN for a site that could not be fitted
curve        float64 (5, sites): low, high, constant, slope, bend; may be absent
metadata     "probe": JSON, see `SavedProbe`

prediction = bias + the sum over modules of (features - centre) @ weight', in the recording's units. The weights of all
windows and components are merged into these. With a curve, constant + p (slope + p bend) is added, p being the
prediction within low to high.
"""

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from data_prep.common.errors import BadInput, RunFailed
from data_prep.common.safe_reading import parse_json
from data_prep.common.validation_messages import first_fault
from data_prep.shards.manifest import LARGEST_SIDE, Name

SAVED_PROBE = "predictor.safetensors"
VERSION: Final = 1
CURVE_ROWS = 5
LARGEST_BYTES = 16 * 2**30  # of the weights: more would not be read for every prediction
KINDS: dict[str, np.dtype] = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8")}


class SavedProbe(BaseModel):
    """What a probe predicts, and from what.

    Attributes:
        version: of the file.
        modules: of the network, in the order of the tensors; `pixels` stands for the pixels.
        site_ids: in the order of the predictions.
        units: of the predictions.
        rate_mean, rate_std: of each site's responses over the train split; null where there were none.
        recording: that it was fitted on; `simulated` if no brain was recorded.
        image_size: side in pixels of the images.
        network: sha256 of the network's weights; None for pixels.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    version: Literal[1] = VERSION
    modules: list[Name] = Field(min_length=1, max_length=10_000)
    site_ids: list[Name]
    units: Name
    rate_mean: list[float | None]
    rate_std: list[float | None]
    recording: Name
    simulated: bool
    image_size: int = Field(ge=1, le=LARGEST_SIDE)
    network: str | None


def weights_bytes(widths: Sequence[int], sites: int) -> int:
    """Size of the weights of modules with so many features each."""
    return 4 * sum(widths) * sites


class SavedProbeWriter:
    """Writes the file piece by piece, without holding it; it gets its name at the end of a `with` block.

    Args:
        folder: of the probe.
        facts: for the metadata.
        widths: number of features of each module, in order.
        has_curve: whether there is a curve.
    """

    def __init__(self, folder: Path, facts: SavedProbe, widths: Sequence[int], has_curve: bool = False):
        self._path = folder / SAVED_PROBE
        self._temporary = folder / f".{SAVED_PROBE}.tmp"
        self._sites = len(facts.site_ids)
        shapes: dict[str, tuple[str, list[int]]] = {"bias": ("F64", [self._sites])}  # first, to be aligned
        if has_curve:
            shapes["curve"] = ("F64", [CURVE_ROWS, self._sites])
        for number, width in enumerate(widths):
            shapes |= {f"weight.{number}": ("F32", [self._sites, width]), f"centre.{number}": ("F32", [width])}
        header: dict[str, object] = {"__metadata__": {"probe": facts.model_dump_json()}}
        self._offsets, end = {}, 0
        for name, (kind, shape) in shapes.items():
            start, end = end, end + int(np.prod(shape)) * KINDS[kind].itemsize
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
            self._offsets[name] = start
        content = json.dumps(header).encode()
        content += b" " * (-len(content) % 8)
        self._start = 8 + len(content)
        self._temporary.unlink(missing_ok=True)
        self._file = self._temporary.open("xb")
        with self._full_disk_explained():
            self._file.write(struct.pack("<Q", len(content)) + content)
            self._file.flush()
            self._file.truncate(self._start + end)

    def write_weight(self, module: int, first_site: int, weight: np.ndarray) -> None:
        """Write the weights of some sites, float32 (sites, features), the first of which is `first_site`."""
        self._write(f"weight.{module}", weight.astype(KINDS["F32"]), first_site * weight.shape[1])

    def write_centre(self, module: int, centre: np.ndarray) -> None:
        """Write the centre of a module's features, float32 (features,)."""
        self._write(f"centre.{module}", centre.astype(KINDS["F32"]), 0)

    def write_bias(self, bias: np.ndarray) -> None:
        """Write the bias, float64 (sites,)."""
        self._write("bias", bias.astype(KINDS["F64"]), 0)

    def write_curve(self, curve: np.ndarray) -> None:
        """Write the curve, float64 (5, sites)."""
        self._write("curve", curve.astype(KINDS["F64"]), 0)

    def _write(self, name: str, values: np.ndarray, first: int) -> None:
        with self._full_disk_explained():
            self._file.seek(self._start + self._offsets[name] + first * values.itemsize)
            self._file.write(np.ascontiguousarray(values).data)
            self._file.flush()

    @contextmanager
    def _full_disk_explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunFailed(
                f"{self._path.parent} has no room for the predictor ({error.strerror}); make room and continue with "
                "--resume"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._file, suppress(OSError) if kind else self._full_disk_explained():
            os.fsync(self._file.fileno())
        if kind is None:
            self._temporary.replace(self._path)
        else:
            self._temporary.unlink(missing_ok=True)


def read_saved_probe(folder: Path) -> tuple[SavedProbe, dict[str, torch.Tensor]]:
    """The facts and the tensors.

    Raises:
        BadInput: the file is missing or damaged.
    """
    path = folder / SAVED_PROBE
    if path.is_symlink() or not path.is_file():
        raise BadInput(
            f"{folder} has no {SAVED_PROBE}, with which a probe predicts other images: an earlier version made it, or "
            "its weights were too large; probe again"
        )
    try:
        if path.stat().st_size > 2 * LARGEST_BYTES:
            raise ValueError(f"it has more than {2 * LARGEST_BYTES // 2**30} GiB")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
        facts = SavedProbe.model_validate(parse_json(metadata["probe"]))
    except ValidationError as error:
        raise BadInput(f"{path} is damaged ({first_fault(error)}); probe again") from None
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise BadInput(f"{path} is damaged ({error}); probe again") from None
    _check(path, facts, tensors)
    return facts, tensors


def _check(path: Path, facts: SavedProbe, tensors: Mapping[str, torch.Tensor]) -> None:
    if not len(facts.rate_mean) == len(facts.rate_std) == len(facts.site_ids):
        raise BadInput(f"{path} is damaged: its statistics are not those of {len(facts.site_ids)} sites; probe again")
    sites = len(facts.site_ids)
    shapes: dict[str, tuple[int, ...]] = {"bias": (sites,)}
    if "curve" in tensors:
        shapes["curve"] = (CURVE_ROWS, sites)
    for number in range(len(facts.modules)):
        width = tensors[f"weight.{number}"].shape[-1:] if f"weight.{number}" in tensors else ()
        shapes |= {f"weight.{number}": (sites, *width), f"centre.{number}": tuple(width)}
    if shapes.keys() != tensors.keys():
        raise BadInput(f"{path} is damaged: it does not have the tensors of {len(facts.modules)} modules; probe again")
    for name, shape in shapes.items():
        tensor, dtype = tensors[name], torch.float64 if name in ("bias", "curve") else torch.float32
        if tensor.dtype != dtype or tuple(tensor.shape) != shape or not shape:
            raise BadInput(f"{path} is damaged: {name} is {tensor.dtype} {tuple(tensor.shape)}; probe again")
        if not (torch.isfinite(tensor).all() or (name == "bias" and not tensor.isinf().any())):
            raise BadInput(f"{path}: {name} contains NaN or infinity; probe again")
