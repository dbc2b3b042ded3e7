"""Gaussian windows over a layer's map, among which each site finds its receptive field.

A site of the visual cortex sees a part of the image. Ridge over the whole map spends its few stimuli on finding that
part. With features scaled by the root of a Gaussian window g, reading far from the window's centre is penalised; the
inner products are then sum_p g_p K_p, with K_p those of the features at position p.
"""

from dataclasses import dataclass

import numpy as np

# In half sides of the image.
WIDTHS = (0.17, 0.25, 0.4)  # standard deviations
CENTRES = (-4 / 7, -2 / 7, 0.0, 2 / 7, 4 / 7)  # right and down from the middle


@dataclass(frozen=True)
class Window:
    """A Gaussian window over a map, or the whole map where `width` is None.

    Attributes:
        x, y: centre, right and down from the image's middle, in half sides.
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


WHOLE_MAP = Window()


def gaussian_windows() -> list[Window]:
    """A grid of centres for each width: where a readout may start (`readout.start: field`)."""
    return [Window(x, y, width) for width in WIDTHS for y in CENTRES for x in CENTRES]


def probe_windows() -> list[Window]:
    """The windows that a probe tries: the whole map, and all Gaussian ones."""
    return [WHOLE_MAP, *gaussian_windows()]
