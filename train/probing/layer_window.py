"""A layer through a window over its map: what a probe regresses on at a time."""

import hashlib
from dataclasses import dataclass

from train.models.windows import Window

LONGEST_NAME = 120  # characters of a layer's name in a file name


@dataclass(frozen=True)
class LayerWindow:
    """A layer through a window over its map, which has a regression of its own.

    Attributes:
        layer: one module, or several joined by `+`.
        window: over the map.
    """

    layer: str
    window: Window

    @property
    def file_name(self) -> str:
        """Of what is kept of it, without an ending; a hash replaces a layer's name too long for file systems."""
        layer, window = self.layer, self.window
        if len(layer) > LONGEST_NAME:
            layer = hashlib.sha256(layer.encode()).hexdigest()
        if window.width is not None:
            layer += f"@{window.x:+.2f}{window.y:+.2f}~{window.width:.2f}"
        return layer
