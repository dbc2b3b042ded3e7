"""Surfaces of simulated objects, assembled from superquadrics.

An object is a handful of superquadrics (Barr 1981), the classical part vocabulary of object recognition: the surfaces

    ((|x|^q + |y|^q)^(p/q) + |z|^p)^(1/p) = 1

with p = q = 2 an ellipsoid, p = q large a box and p large, q = 2 a cylinder. Each part is scaled, tapered along its z
axis, bent, turned and moved into position. Axes of an object: x to its front, y to its left, z up.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

GRID = 8  # each of a part's six sides has GRID x GRID facets


@dataclass(frozen=True)
class Body:
    """An object's surface, centred and scaled to radius 1.

    Attributes:
        vertices: float32 (vertices, 3).
        facets: int (facets, 4), vertices of each quadrilateral, anticlockwise seen from outside.
        colours: float32 (facets, 3), reflectance 0..1, the surface pattern included.
    """

    vertices: np.ndarray
    facets: np.ndarray
    colours: np.ndarray


@lru_cache(maxsize=1)
def unit_cube() -> tuple[np.ndarray, np.ndarray]:
    """The surface of the cube [-1, 1]^3: float (vertices, 3) and int (facets, 4), anticlockwise seen from outside."""
    ticks = np.tan(np.linspace(-1, 1, GRID + 1) * np.pi / 4)  # even angles once projected to a sphere
    u, v = (grid.ravel() for grid in np.meshgrid(ticks, ticks, indexing="ij"))
    corner = (np.arange(GRID)[:, None] * (GRID + 1) + np.arange(GRID)).ravel()
    quads = np.stack([corner, corner + GRID + 1, corner + GRID + 2, corner + 1], axis=1)
    vertices: list[np.ndarray] = []
    facets: list[np.ndarray] = []
    for axis in range(3):
        for sign in (1.0, -1.0):
            side = np.empty((len(u), 3))
            side[:, axis], side[:, (axis + 1) % 3], side[:, (axis + 2) % 3] = sign, u, v
            facets.append((quads if sign > 0 else quads[:, ::-1]) + len(u) * len(vertices))
            vertices.append(side)
    return np.concatenate(vertices), np.concatenate(facets)


def rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """Rotation matrix (3, 3): by `roll` about x, then `pitch` about y, then `yaw` about z; degrees."""
    angles = np.deg2rad([yaw, pitch, roll])
    (cos_z, cos_y, cos_x), (sin_z, sin_y, sin_x) = np.cos(angles), np.sin(angles)
    about_z = np.array([[cos_z, -sin_z, 0], [sin_z, cos_z, 0], [0, 0, 1]])
    about_y = np.array([[cos_y, 0, sin_y], [0, 1, 0], [-sin_y, 0, cos_y]])
    about_x = np.array([[1, 0, 0], [0, cos_x, -sin_x], [0, sin_x, cos_x]])
    return about_z @ about_y @ about_x


class Sculptor:
    """Collects the parts of one object; `body()` joins them into one surface."""

    def __init__(self) -> None:
        self.parts: list[tuple[np.ndarray, np.ndarray]] = []
        self.contrast = 1.0  # of the surface pattern

    def add(
        self,
        colour: ArrayLike,
        at: ArrayLike,
        half: ArrayLike,
        p: float = 2.0,
        q: float = 2.0,
        turn: tuple[float, float, float] = (0, 0, 0),
        taper: float = 0.0,
        bend: float = 0.0,
    ) -> None:
        """Add a superquadric.

        Args:
            colour: reflectance (3,).
            at: its centre (3,).
            half: its half axes (3,).
            p, q: its exponents.
            turn: yaw, pitch and roll in degrees.
            taper: widens (positive) or narrows it towards its own +z.
            bend: lifts its ends along x.
        """
        cube, _ = unit_cube()
        size = np.abs(cube)
        radius = ((size[:, 0] ** q + size[:, 1] ** q) ** (p / q) + size[:, 2] ** p) ** (1 / p)
        points = cube / radius[:, None]
        points[:, :2] *= 1 + taper * points[:, 2:]
        points[:, 2] += bend * points[:, 0] ** 2
        self.parts.append((points * half @ rotation(*turn).T + at, np.asarray(colour, dtype=float)))

    def pair(
        self,
        colour: ArrayLike,
        at: tuple[float, float, float] | np.ndarray,
        half: ArrayLike,
        turn: tuple[float, float, float] = (0, 0, 0),
        **shape: Any,
    ) -> None:
        """Add a part and its mirror image on the other side of the body."""
        self.add(colour, at, half, turn=turn, **shape)
        x, y, z = at
        yaw, pitch, roll = turn
        self.add(colour, (x, -y, z), half, turn=(-yaw, pitch, -roll), **shape)

    def legs(
        self,
        colour: ArrayLike,
        x: float,
        y: float,
        top: float,
        bottom: float,
        radius: float,
        p: float = 6,
        **shape: Any,
    ) -> None:
        """Add four upright cylinders at (+-x, +-y)."""
        for side in (x, -x):
            self.pair(colour, (side, y, (top + bottom) / 2), (radius, radius, (top - bottom) / 2), p=p, **shape)

    def body(self, rng: np.random.Generator) -> Body:
        """The object, centred, scaled to radius 1 and painted with a random surface pattern."""
        _, quads = unit_cube()
        vertices = np.concatenate([points for points, _ in self.parts])
        vertices -= (vertices.max(0) + vertices.min(0)) / 2
        vertices /= np.linalg.norm(vertices, axis=1).max()
        per_part = len(self.parts[0][0])
        facets = np.concatenate([quads + per_part * part for part in range(len(self.parts))])
        colours = np.repeat([colour for _, colour in self.parts], len(quads), axis=0)
        pattern = surface_pattern(rng, vertices[facets].mean(1))
        colours = np.clip(colours * (1 + self.contrast * pattern[:, None]), 0, 1)
        return Body(vertices.astype(np.float32), facets, colours.astype(np.float32))


def surface_pattern(rng: np.random.Generator, points: np.ndarray) -> np.ndarray:
    """Stripes, spots or mottling, chosen at random: relative changes of reflectance, float (points,)."""
    frequency, contrast = rng.uniform(8, 18), rng.uniform(0.05, 0.45)
    phase = points @ np.linalg.qr(rng.normal(size=(3, 3)))[0] * frequency
    kind = rng.integers(3)
    if kind == 0:
        return contrast * np.sign(np.sin(phase[:, 0]))
    if kind == 1:
        return contrast * np.sign(np.sin(phase).prod(1) - 0.1)
    return contrast * rng.uniform(-1, 1, len(points))
