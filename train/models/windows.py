"""Receptive fields for ridge regression: windows over a layer's map, among which each site finds its own.

A site of the visual cortex sees a part of the image. Ridge that may read from everywhere alike spends its few
stimuli on finding that out. With features scaled by the root of a Gaussian window g, it pays for reading far from the
window's centre; the inner products are then sum_p g_p K_p, K_p being those of the features at position p.
"""

from dataclasses import dataclass

import numpy as np

WIDTHS = (0.17, 0.25, 0.4)  # standard deviations, in half sides of the image
CENTRES = (-4 / 7, -2 / 7, 0.0, 2 / 7, 4 / 7)  # right and down from the middle, in half sides


@dataclass(frozen=True)
class Window:
    """A Gaussian window; `width` None is the whole map, all of it alike.

    Attributes:
        x, y: the centre, right and down from the image's middle, in half sides.
        width: standard deviation, in half sides.
    """

    x: float = 0.0
    y: float = 0.0
    width: float | None = None

    def weights(self, rows: int, columns: int) -> np.ndarray:
        """g, float32 (rows * columns,), at most 1."""
        if self.width is None:
            return np.ones(rows * columns, np.float32)
        down, right = ((np.arange(count) + 0.5) / count * 2 - 1 for count in (rows, columns))
        squared = (down[:, None] - self.y) ** 2 + (right - self.x) ** 2
        return np.exp(-squared / (2 * self.width**2)).astype(np.float32).ravel()


WHOLE = Window()


def windows() -> list[Window]:
    """All that a probe tries: the whole map, and a grid of centres in each width."""
    return [WHOLE, *starting_windows()]


def starting_windows() -> list[Window]:
    """All that a readout may start from (`readout.start: field`)."""
    return [Window(x, y, width) for width in WIDTHS for y in CENTRES for x in CENTRES]
