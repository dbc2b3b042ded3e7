"""Activations of this rank's stimuli on disk, one growing file per layer.

They take no memory, and survive when the process is killed.

    FOLDER/<layer>.f32      float32 (stimuli of this rank, features), row after row
"""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from data_prep.common.errors import RunFailed

FLOAT32_BYTES = 4


class FeatureStore:
    """The activations of one rank's stimuli.

    Args:
        folder: where they lie; made when the first are added.
        widths: number of features of each layer.
    """

    def __init__(self, folder: Path, widths: Mapping[str, int]):
        self._folder, self._widths = folder, dict(widths)

    def _path(self, layer: str) -> Path:
        return self._folder / f"{layer}.f32"

    def complete_rows(self) -> int:
        """Number of stimuli stored for all layers: a killed process may leave some layers behind, or half a row."""
        return min(
            self._path(layer).stat().st_size // (width * FLOAT32_BYTES) if self._path(layer).exists() else 0
            for layer, width in self._widths.items()
        )

    def truncate(self, rows: int) -> None:
        """Drop all but the first `rows` stimuli."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for layer, width in self._widths.items():
            with self._path(layer).open("ab") as file:
                file.truncate(rows * width * FLOAT32_BYTES)

    def append(self, features: Mapping[str, torch.Tensor]) -> None:
        """Add stimuli.

        Args:
            features: per layer float32 (stimuli, features), on the CPU.

        Raises:
            RunFailed: the disk is full.
        """
        for layer, rows in features.items():
            try:
                with self._path(layer).open("ab") as file:
                    file.write(rows.contiguous().numpy().data)
            except OSError as error:
                raise RunFailed(
                    f"{self._folder} has no room for the activations ({error.strerror}); probe fewer --layers, lower "
                    "--pool, or choose another folder with --scratch"
                ) from None

    def width(self, layer: str) -> int:
        """Number of features of a layer."""
        return self._widths[layer]

    def read_columns(self, layer: str, start: int, out: np.ndarray, first_row: int = 0) -> None:
        """Read some features of some stimuli, and nothing else.

        Args:
            layer: whose features.
            start: the first of the features.
            out: float32 (stimuli, features), which is filled.
            first_row: the first of the stimuli, among those of the rank.

        Raises:
            RunFailed: the file ends early.
        """
        stride = self._widths[layer] * FLOAT32_BYTES
        with self._path(layer).open("rb", buffering=0) as file:
            descriptor = file.fileno()
            for row, features in enumerate(out, start=first_row):
                if os.preadv(descriptor, [features.data], row * stride + start * FLOAT32_BYTES) != features.nbytes:
                    raise RunFailed(f"{self._path(layer)} has changed or was cut while the probe ran; start it again")
