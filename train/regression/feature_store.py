"""Activations of a rank's stimuli on disk, one growing file per layer: they need no memory, and survive a kill.

FOLDER/<layer>.f32      float32 (own stimuli, features), row after row
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from data_prep.common.errors import RunFailed

BYTES = 4


class FeatureStore:
    """The activations of one rank's stimuli.

    Args:
        folder: made if it is not there.
        widths: features of each layer.
    """

    def __init__(self, folder: Path, widths: Mapping[str, int]):
        self._folder, self._widths = folder, dict(widths)
        folder.mkdir(parents=True, exist_ok=True)

    def _path(self, layer: str) -> Path:
        return self._folder / f"{layer}.f32"

    def rows(self) -> int:
        """How many stimuli are there for all layers; a kill may have left some layers behind, or half a row."""
        return min(
            self._path(layer).stat().st_size // (width * BYTES) if self._path(layer).exists() else 0
            for layer, width in self._widths.items()
        )

    def keep(self, rows: int) -> None:
        """Drop all but the first `rows` stimuli."""
        for layer, width in self._widths.items():
            with self._path(layer).open("ab") as file:
                file.truncate(rows * width * BYTES)

    def append(self, features: Mapping[str, torch.Tensor]) -> None:
        """Add stimuli.

        Args:
            features: per layer float32 (stimuli, features), on the CPU.

        Raises:
            RunFailed: there is no room.
        """
        for layer, rows in features.items():
            try:
                with self._path(layer).open("ab") as file:
                    file.write(memoryview(rows.contiguous().numpy()).cast("B"))
            except OSError as error:
                raise RunFailed(
                    f"{self._folder} has no room for the activations ({error.strerror}); probe fewer --layers, lower "
                    "--pool, or give another place with --scratch"
                ) from None

    def width(self, layer: str) -> int:
        """Features of a layer."""
        return self._widths[layer]

    def read_columns(self, layer: str, start: int, stop: int, into: np.ndarray) -> None:
        """Some features of all stimuli of this rank; only these are read, and nothing else is held.

        Args:
            layer: whose features.
            start, stop: of the features.
            into: float32 (own stimuli, stop - start), which is filled.
        """
        stride = self._widths[layer] * BYTES
        with self._path(layer).open("rb", buffering=0) as file:
            for row, features in enumerate(into):
                file.seek(row * stride + start * BYTES)
                file.readinto(memoryview(features).cast("B"))

    def discard(self, layer: str) -> None:
        """Free the space of a layer."""
        self._path(layer).unlink(missing_ok=True)
