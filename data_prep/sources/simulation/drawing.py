"""Drawing the images of the simulated recording: one object in 3-D, lit, on a cluttered background.

An object is a handful of superquadrics (Barr 1981), the classical part vocabulary of object recognition: the surfaces

    ((|x|^q + |y|^q)^(p/q) + |z|^p)^(1/p) = 1

with p = q = 2 an ellipsoid, p = q large a box and p large, q = 2 a cylinder; each part is scaled, tapered along its z
axis, bent, turned and put in its place. Axes of an object: x to its front, y to its left, z up.

A scene is drawn with vector operations alone, apart from a noise field of fixed size, so that the same scene can be
drawn at any size: large for the stimulus and small for the simulated sites that look at it.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

CATEGORIES = ("animal", "boat", "car", "chair", "face", "fruit", "plane", "table")
OBJECTS_PER_CATEGORY = 8
GRID = 8  # a part's six sides have GRID x GRID facets each
NOISE_SIZE = 128  # px; the background's noise field has this size whatever the size of the image
SUPERSAMPLING = 2

DARK = np.array([0.10, 0.10, 0.12])
WHITE = np.array([0.93, 0.92, 0.88])


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


@dataclass(frozen=True)
class Pose:
    """Where an object is and how it is turned.

    Attributes:
        x, y: of its centre, in half image widths; 0 = middle, positive = right and up.
        size: its radius in half image widths.
        yaw, pitch, roll: degrees; 0 = its standard three-quarter view.
    """

    x: float
    y: float
    size: float
    yaw: float
    pitch: float
    roll: float


@lru_cache(maxsize=1)
def unit_cube() -> tuple[np.ndarray, np.ndarray]:
    """The surface of the cube [-1, 1]^3: float (vertices, 3) and int (facets, 4), anticlockwise seen from outside."""
    ticks = np.tan(np.linspace(-1, 1, GRID + 1) * np.pi / 4)  # even angles once projected to a sphere
    u, v = (grid.ravel() for grid in np.meshgrid(ticks, ticks, indexing="ij"))
    corner = (np.arange(GRID)[:, None] * (GRID + 1) + np.arange(GRID)).ravel()
    quads = np.stack([corner, corner + GRID + 1, corner + GRID + 2, corner + 1], axis=1)
    vertices, facets = [], []
    for axis in range(3):
        for sign in (1.0, -1.0):
            side = np.empty((len(u), 3))
            side[:, axis], side[:, (axis + 1) % 3], side[:, (axis + 2) % 3] = sign, u, v
            facets.append((quads if sign > 0 else quads[:, ::-1]) + len(u) * len(vertices))
            vertices.append(side)
    return np.concatenate(vertices), np.concatenate(facets)


def rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """Rotation matrix (3, 3): by `roll` about x, then `pitch` about y, then `yaw` about z; degrees."""
    (a, b, c), (s, t, u) = (f(np.deg2rad([yaw, pitch, roll])) for f in (np.cos, np.sin))
    about_z = np.array([[a, -s, 0], [s, a, 0], [0, 0, 1]])
    about_y = np.array([[b, 0, t], [0, 1, 0], [-t, 0, b]])
    about_x = np.array([[1, 0, 0], [0, c, -u], [0, u, c]])
    return about_z @ about_y @ about_x


class Sculptor:
    """Collects the parts of one object; `body()` hands them out as one surface."""

    def __init__(self) -> None:
        self.parts: list[tuple[np.ndarray, np.ndarray]] = []
        self.contrast = 1.0  # of the surface pattern

    def add(
        self, colour, at, half, p: float = 2.0, q: float = 2.0, turn=(0, 0, 0), taper: float = 0.0, bend: float = 0.0
    ) -> None:
        """Add a superquadric with half axes `half` at `at`; `turn` in degrees (yaw, pitch, roll).

        `taper` widens (positive) or narrows it towards its own +z; `bend` lifts its ends along x.
        """
        cube, _ = unit_cube()
        size = np.abs(cube)
        radius = ((size[:, 0] ** q + size[:, 1] ** q) ** (p / q) + size[:, 2] ** p) ** (1 / p)
        points = cube / radius[:, None]
        points[:, :2] *= 1 + taper * points[:, 2:]
        points[:, 2] += bend * points[:, 0] ** 2
        self.parts.append((points * half @ rotation(*turn).T + at, np.asarray(colour, dtype=float)))

    def pair(self, colour, at, half, turn=(0, 0, 0), **shape) -> None:
        """Add a part and its mirror image on the other side of the body."""
        self.add(colour, at, half, turn=turn, **shape)
        x, y, z = at
        yaw, pitch, roll = turn
        self.add(colour, (x, -y, z), half, turn=(-yaw, pitch, -roll), **shape)

    def legs(self, colour, x: float, y: float, top: float, bottom: float, radius: float, p: float = 6, **shape) -> None:
        """Add four upright cylinders at (+-x, +-y)."""
        for side in (x, -x):
            self.pair(colour, (side, y, (top + bottom) / 2), (radius, radius, (top - bottom) / 2), p=p, **shape)

    def body(self, rng: np.random.Generator) -> Body:
        """The object, centred, scaled to radius 1 and painted with a surface pattern of its own."""
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
    """Stripes, spots or mottling, drawn by lot: relative changes of reflectance, float (points,)."""
    frequency, contrast = rng.uniform(8, 18), rng.uniform(0.05, 0.45)
    phase = points @ np.linalg.qr(rng.normal(size=(3, 3)))[0] * frequency
    kind = rng.integers(3)
    if kind == 0:
        return contrast * np.sign(np.sin(phase[:, 0]))
    if kind == 1:
        return contrast * np.sign(np.sin(phase).prod(1) - 0.1)
    return contrast * rng.uniform(-1, 1, len(points))


def paint(rng: np.random.Generator) -> np.ndarray:
    """A random paint: reflectance (3,)."""
    hue = rng.uniform(0, 2 * np.pi) + np.array([0, 2, 4]) * np.pi / 3
    return np.clip(rng.uniform(0.35, 0.75) + rng.uniform(0.1, 0.38) * np.cos(hue), 0.05, 1)


def earth(rng: np.random.Generator) -> np.ndarray:
    """Fur, wood or skin: a brown between cream and near-black, reflectance (3,)."""
    return np.array([0.85, 0.62, 0.42]) * rng.uniform(0.35, 1.1) + rng.uniform(-0.04, 0.04, 3)


def animal(rng: np.random.Generator, s: Sculptor) -> None:
    """Four legs, a trunk, a neck, a head with snout and ears, a tail."""
    fur = earth(rng)
    long, fat, leg, neck = rng.uniform(0.5, 0.8), rng.uniform(0.2, 0.36), rng.uniform(0.25, 0.65), rng.uniform(0, 0.6)
    head, ear = rng.uniform(0.15, 0.27), rng.uniform(0.06, 0.25)
    s.add(fur, (0, 0, 0), (long, fat, fat * 1.05), p=2.3, q=2.3)
    s.legs(fur * 0.85, long * 0.7, fat * 0.6, -fat * 0.3, -fat * 0.3 - leg, 0.085, taper=0.25)
    front = np.array([long * 0.85 + neck * 0.35, 0, fat * 0.6 + neck])
    s.add(fur, (long * 0.85 + neck * 0.15, 0, fat * 0.3 + neck * 0.5), (0.11, 0.1, neck * 0.6 + 0.12), turn=(0, 22, 0))
    s.add(fur, front, (head * 1.15, head * 0.85, head))
    s.add(
        fur * rng.uniform(0.6, 1.3),
        front + np.array([head * 1.1, 0, -head * 0.3]),
        (head * rng.uniform(0.4, 0.9), head * 0.5, head * 0.45),
    )
    s.pair(fur * 0.7, front + np.array([-head * 0.3, head * 0.6, head * 0.8]), (0.04, 0.07, ear), turn=(0, 0, -25))
    s.pair(DARK, front + np.array([head * 0.85, head * 0.5, head * 0.35]), (0.04, 0.04, 0.045))
    s.add(
        fur * 0.8,
        (-long * 1.1, 0, fat * 0.3),
        (0.045, 0.045, rng.uniform(0.15, 0.4)),
        turn=(0, rng.uniform(-160, -40), 0),
    )


def boat(rng: np.random.Generator, s: Sculptor) -> None:
    """A hull with a bow, a cabin, and a mast with a sail or a funnel."""
    hull, cabin = paint(rng), WHITE * rng.uniform(0.7, 1)
    wide, deep, sail = rng.uniform(0.2, 0.34), rng.uniform(0.14, 0.24), rng.random() < 0.5
    s.add(hull, (0, 0, -deep), (0.8, wide, deep), p=8, q=2.6, taper=0.3, bend=rng.uniform(0.1, 0.5))
    s.add(hull * 0.5, (0, 0, -deep * 0.1), (0.85, wide * 1.08, 0.035), p=8, q=2.6)
    x, long, high = rng.uniform(-0.4, 0.1), rng.uniform(0.18, 0.35), rng.uniform(0.1, 0.2)
    s.add(cabin, (x, 0, high), (long, wide * 0.7, high), p=8, q=8)
    s.add(DARK + 0.1, (x, 0, high * 1.3), (long * 1.02, wide * 0.72, high * 0.3), p=8, q=8)
    if sail:
        tall = rng.uniform(0.5, 0.85)
        s.add(earth(rng), (0.15, 0, tall * 0.9), (0.03, 0.03, tall), p=6)
        s.add(paint(rng) * 0.4 + 0.55, (-0.15, 0, tall), (0.3, 0.03, tall * 0.72), p=6, q=6, taper=-0.85)
        s.add(WHITE, (0.4, 0, tall * 0.8), (0.2, 0.025, tall * 0.6), p=6, q=6, taper=-0.85)
    else:
        s.add(paint(rng), (x - 0.05, 0, high * 2 + 0.17), (0.11, 0.1, 0.2), p=8, turn=(0, -8, 0))
        s.add(cabin * 0.9, (x + long * 0.6, 0, high * 2.4), (0.12, wide * 0.55, high * 0.6), p=8, q=8)


def car(rng: np.random.Generator, s: Sculptor) -> None:
    """A body on four wheels, a cabin with windows, lamps."""
    body = paint(rng)
    high, long, cabin = rng.uniform(0.13, 0.2), rng.uniform(0.7, 0.95), rng.uniform(0.28, 0.6)
    back, rise, wheel = rng.uniform(-0.35, 0.0), rng.uniform(0.13, 0.24), rng.uniform(0.14, 0.2)
    s.add(body, (0, 0, 0), (long, 0.38, high), p=6, q=6, taper=-0.06)
    s.add(DARK + np.array([0.12, 0.16, 0.2]), (back, 0, high + rise * 0.85), (cabin, 0.33, rise), p=6, q=6, taper=-0.25)
    s.add(body, (back, 0, high + rise * 1.75), (cabin * 0.78, 0.27, 0.04), p=6, q=6)
    for x in (long * 0.6, -long * 0.6):
        s.pair(DARK, (x, 0.36, -high * 0.9), (wheel, wheel, 0.07), p=8, turn=(0, 0, 90))
        s.pair(WHITE * 0.7, (x, 0.41, -high * 0.9), (wheel * 0.5, wheel * 0.5, 0.04), p=8, turn=(0, 0, 90))
    s.pair(WHITE, (long * 0.98, 0.25, 0.02), (0.03, 0.08, 0.05))
    s.pair((0.8, 0.1, 0.1), (-long * 0.98, 0.25, 0.02), (0.03, 0.08, 0.05))


def chair(rng: np.random.Generator, s: Sculptor) -> None:
    """A seat, a back of slats or one board, four legs or a column, arms on some."""
    frame, seat = earth(rng), paint(rng)
    wide, leg, back = rng.uniform(0.3, 0.42), rng.uniform(0.3, 0.55), rng.uniform(0.35, 0.75)
    thick = rng.uniform(0.04, 0.12)
    s.add(seat, (0, 0, 0), (0.36, wide, thick), p=7, q=7)
    if rng.random() < 0.65:
        s.legs(frame, 0.3, wide * 0.85, 0, -leg, 0.05)
    else:
        s.add(frame, (0, 0, -leg / 2), (0.06, 0.06, leg / 2), p=6)
        s.add(frame, (0, 0, -leg), (0.36, 0.07, 0.04), p=6, q=6)
        s.add(frame, (0, 0, -leg), (0.07, 0.36, 0.04), p=6, q=6)
    tilt = rng.uniform(-14, 0)
    if rng.random() < 0.5:
        s.add(seat, (-0.36, 0, back * 0.55), (0.05, wide, back * 0.55), p=7, q=7, turn=(0, tilt, 0))
    else:
        s.add(frame, (-0.4, 0, back), (0.05, wide, 0.07), p=7, q=7, turn=(0, tilt, 0))
        for y in np.linspace(-wide * 0.9, wide * 0.9, int(rng.integers(3, 6))):
            s.add(frame, (-0.37, y, back / 2), (0.03, 0.035, back / 2), p=6, turn=(0, tilt, 0))
    if rng.random() < 0.4:
        s.pair(frame, (-0.03, wide, 0.28), (0.33, 0.05, 0.035), p=7, q=7)
        s.pair(frame, (0.25, wide, 0.13), (0.035, 0.035, 0.15), p=6)


def face(rng: np.random.Generator, s: Sculptor) -> None:
    """A head with hair, eyes, brows, nose, mouth, ears and neck."""
    skin, hair = np.array([0.95, 0.75, 0.62]) * rng.uniform(0.4, 1.03), earth(rng) * rng.uniform(0.3, 1.1)
    wide, deep, apart, level = (
        rng.uniform(0.42, 0.56),
        rng.uniform(0.48, 0.58),
        rng.uniform(0.16, 0.23),
        rng.uniform(0.02, 0.15),
    )
    s.add(skin, (0, 0, 0), (deep, wide, 0.7), p=2.2, q=2.2, taper=rng.uniform(0.0, 0.2))
    s.add(skin * 0.92, (-0.1, 0, -0.75), (0.25, 0.23, 0.3), p=6)
    s.add(hair, (-0.14, 0, rng.uniform(0.16, 0.26)), (deep * 0.98, wide * 1.08, 0.6), p=2.3, q=2.3)
    if rng.random() < 0.5:
        s.add(hair, (-0.3, 0, -0.2), (0.32, wide * 1.15, rng.uniform(0.4, 0.75)), p=3, q=3)
    front, s.contrast = deep * 0.9, 0.2
    s.pair(WHITE, (front - 0.02, apart, level), (0.06, 0.105, 0.065))
    s.pair(paint(rng) * 0.4, (front + 0.035, apart, level), (0.03, 0.045, 0.05))
    s.pair(
        hair * 0.8,
        (front + 0.02, apart, level + rng.uniform(0.11, 0.17)),
        (0.04, 0.12, 0.025),
        turn=(0, 0, rng.uniform(-15, 15)),
    )
    s.add(skin * 1.03, (front + 0.07, 0, -0.12), (0.11, rng.uniform(0.06, 0.1), rng.uniform(0.1, 0.17)), taper=-0.3)
    s.add((0.7, 0.25, 0.25) * skin, (front - 0.02, 0, -0.37), (0.05, rng.uniform(0.12, 0.22), rng.uniform(0.025, 0.06)))
    s.pair(skin * 0.9, (0, wide * 1.02, 0.02), (0.09, 0.05, 0.14))


def fruit(rng: np.random.Generator, s: Sculptor) -> None:
    """A round, long, pear-shaped or bent fruit, or a bunch of berries; with stalk and leaf."""
    skin = paint(rng) * (1.1, 1.0, 0.55)
    kind = int(rng.integers(4))
    stalk, leaf = np.array([0.35, 0.25, 0.12]), np.array([0.2, 0.5, 0.15])
    if kind == 0:
        s.add(skin, (0, 0, 0), (0.6, 0.6, rng.uniform(0.5, 0.62)), p=2.4, taper=rng.uniform(-0.05, 0.2))
        top = 0.6
    elif kind == 1:
        tall = rng.uniform(0.35, 0.5)
        s.add(skin, (0, 0, -0.2), (0.5, 0.5, 0.45))
        s.add(skin, (0, 0, 0.25), (0.3, 0.3, tall), taper=-0.2)
        top = 0.25 + tall
    elif kind == 2:
        s.add(skin, (0, 0, 0), (0.85, 0.2, rng.uniform(0.17, 0.26)), p=2.4, bend=rng.uniform(1.0, 2.2))
        s.add(stalk, (0.88, 0, 0.42), (0.09, 0.05, 0.06))
        return
    else:
        size = rng.uniform(0.2, 0.27)
        for ring, count, z in ((0.32, 5, 0.2), (0.3, 4, -0.12), (0.14, 2, -0.42)):
            for angle in np.arange(count) * 2 * np.pi / count + ring:
                s.add(skin, (ring * np.cos(angle), ring * np.sin(angle), z), (size, size, size))
        top = 0.35
    s.add(stalk, (0, 0, top + 0.07), (0.04, 0.04, 0.16), p=6, turn=(0, 12, 0))
    if rng.random() < 0.7:
        s.add(leaf, (0.17, 0, top + 0.1), (0.2, 0.1, 0.03), turn=(rng.uniform(-180, 180), -20, 0))


def plane(rng: np.random.Generator, s: Sculptor) -> None:
    """A fuselage, swept or straight wings, a tail, engines or a propeller."""
    hull, trim = WHITE * rng.uniform(0.45, 1), paint(rng)
    fat, span, sweep, chord = (
        rng.uniform(0.09, 0.17),
        rng.uniform(0.5, 0.95),
        rng.uniform(0, 38),
        rng.uniform(0.11, 0.2),
    )
    height = rng.choice([-0.5, 0.7]) * fat
    s.add(hull, (0, 0, 0), (0.95, fat, fat), p=2.8, q=2.8)
    s.add(DARK + 0.15, (0.7, 0, fat * 0.55), (0.14, fat * 0.6, fat * 0.4))
    reach = np.sin(np.deg2rad(sweep)) * span / 2
    s.pair(trim, (0.1 - reach, span / 2, height), (chord, span / 2, 0.028), p=6, q=6, turn=(sweep, 0, 0))
    s.pair(trim, (-0.85, 0.2, fat * 0.6), (0.1, 0.22, 0.022), p=6, q=6, turn=(sweep, 0, 0))
    s.add(
        trim * 0.8,
        (-0.83, 0, fat + 0.15),
        (0.14, 0.025, rng.uniform(0.17, 0.28)),
        p=6,
        q=6,
        turn=(0, -25, 0),
        taper=-0.3,
    )
    if rng.random() < 0.6:
        s.pair(hull * 0.6, (0.12 - reach * 0.8, span * 0.42, height - 0.09), (0.15, 0.07, 0.07), p=4, q=4)
    else:
        s.add(DARK, (0.97, 0, 0), (0.02, 0.05, 0.3), p=3, turn=(0, 0, rng.uniform(0, 180)))


def table(rng: np.random.Generator, s: Sculptor) -> None:
    """A round or square top on four legs or a column."""
    top, leg = (earth(rng), earth(rng)) if rng.random() < 0.6 else (paint(rng), earth(rng) * 0.6)
    long, wide, high = rng.uniform(0.5, 0.9), rng.uniform(0.38, 0.6), rng.uniform(0.3, 0.75)
    if rng.random() < 0.35:
        s.add(top, (0, 0, 0), (wide * 1.15, wide * 1.15, 0.05), p=8)
        s.add(leg, (0, 0, -high / 2), (0.08, 0.08, high / 2), p=6, taper=-0.2)
        s.add(leg, (0, 0, -high), (0.36, 0.36, 0.05), p=5, taper=-0.4)
    else:
        s.add(top, (0, 0, 0), (long, wide, 0.05), p=8, q=8)
        s.legs(leg, long * 0.85, wide * 0.82, 0, -high, rng.uniform(0.04, 0.08), q=rng.choice([2, 6]))
        if rng.random() < 0.5:
            s.add(top * 0.8, (0, 0, -0.12), (long * 0.85, wide * 0.82, 0.07), p=8, q=8)
        if rng.random() < 0.3:
            s.add(leg, (0, 0, -high * 0.75), (long * 0.8, wide * 0.75, 0.03), p=8, q=8)


BUILDERS = dict(zip(CATEGORIES, (animal, boat, car, chair, face, fruit, plane, table), strict=True))


@lru_cache(maxsize=256)
def make_body(category: str, member: int, seed: int) -> Body:
    """The surface of object `member` of a category; always the same for the same seed."""
    rng = np.random.default_rng([seed, 1, CATEGORIES.index(category), member])
    sculptor = Sculptor()
    BUILDERS[category](rng, sculptor)
    return sculptor.body(rng)


def draw_scene(body: Body, pose: Pose, rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw an object on a background of its own.

    Args:
        body: the object.
        pose: where it is and how it is turned.
        rng: decides background and light; the same state gives the same scene at any size.
        size: of the image, px.

    Returns:
        uint8 (size, size, 3).
    """
    image = draw_background(rng, size * SUPERSAMPLING)
    light = rng.normal(size=3) * (0.7, 0.7, 0.3) + (-0.9, 0.3, 0.9)  # from the viewer's side and above
    draw_body(image, body, pose, light / np.linalg.norm(light), rng.uniform(0.7, 1.2))
    return np.asarray(image.reduce(SUPERSAMPLING))


def draw_background(rng: np.random.Generator, size: int) -> Image.Image:
    """A coloured 1/f noise field with a gradient, under a few random ellipses, bars and polygons."""
    field = pink_noise(rng) * rng.uniform(0.06, 0.2) + rng.uniform(0.3, 0.65) + rng.uniform(-0.1, 0.1, 3)
    ramp = np.linspace(-1, 1, NOISE_SIZE)
    tilt = rng.normal(size=(2, 1)) * 0.1 + rng.normal(size=(2, 3)) * 0.03
    field = field + ramp[:, None, None] * tilt[0] + ramp[None, :, None] * tilt[1]
    noise = Image.fromarray((np.clip(field, 0, 1) * 255).astype(np.uint8))
    image = noise.resize((size, size), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(2, 8))):
        centre, half = rng.uniform(0, size, 2), rng.uniform(0.03, 0.22, 2) * size
        corners, sides = int(rng.integers(0, 6)), rng.uniform(0, 2 * np.pi)
        colour = tuple(int(c) for c in rng.uniform(30, 225) + rng.uniform(-30, 30, 3))
        if corners < 3:
            draw.ellipse([*(centre - half), *(centre + half)], fill=colour)
        else:
            angles = sides + np.arange(corners) * 2 * np.pi / corners
            draw.polygon((centre + np.stack([np.cos(angles), np.sin(angles)], 1) * half).ravel().tolist(), fill=colour)
    return image


@lru_cache(maxsize=1)
def pink_amplitude() -> np.ndarray:
    """Amplitude 1/f of each frequency of the noise field, without the mean; float (NOISE_SIZE, NOISE_SIZE // 2 + 1)."""
    f = np.hypot(np.fft.fftfreq(NOISE_SIZE)[:, None], np.fft.rfftfreq(NOISE_SIZE))
    f[0, 0] = np.inf
    return (1 / f).astype(np.float32)  # float32 halves the time of the transforms


def pink_noise(rng: np.random.Generator) -> np.ndarray:
    """Noise with the amplitude spectrum 1/f of natural scenes: float (NOISE_SIZE, NOISE_SIZE, 3), sd 1 over all."""
    white = rng.standard_normal((3, NOISE_SIZE, NOISE_SIZE), dtype=np.float32)
    white += 3 * rng.standard_normal((NOISE_SIZE, NOISE_SIZE), dtype=np.float32)  # natural colours are correlated
    pink = np.fft.irfft2(np.fft.rfft2(white) * pink_amplitude(), s=(NOISE_SIZE, NOISE_SIZE))
    return np.moveaxis(pink / pink.std(), 0, 2)


def draw_body(image: Image.Image, body: Body, pose: Pose, light: np.ndarray, brightness: float) -> None:
    """Project the body in perspective and paint its facets from back to front, with diffuse and specular light."""
    # The viewer looks along +x from the front; the standard view is three-quarter, slightly from above.
    turn = rotation(0, 18, 0) @ rotation(pose.yaw + 35, 0, 0) @ rotation(0, pose.pitch, pose.roll)
    points = body.vertices @ turn.T.astype(np.float32)
    half = image.width / 2
    scale = pose.size * half * 4 / (4 - points[:, 0])  # the eye is 4 radii away
    flat = np.stack([half * (1 + pose.x) + points[:, 1] * scale, half * (1 - pose.y) - points[:, 2] * scale], axis=1)
    corners = points[body.facets]
    normals = np.cross(corners[:, 2] - corners[:, 0], corners[:, 3] - corners[:, 1])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-9
    middle = corners.mean(1)
    towards_eye = ((4, 0, 0) - middle) / 4
    seen = np.flatnonzero((normals * towards_eye).sum(1) > 0)
    seen = seen[np.argsort(middle[seen, 0])]
    towards_light = light * (-1, 1, 1)
    diffuse = np.clip(normals[seen] @ towards_light, 0, None)
    halfway = towards_light + np.array([1, 0, 0])
    shine = np.clip(normals[seen] @ (halfway / np.linalg.norm(halfway)), 0, None) ** 16
    shaded = body.colours[seen] * (0.45 + 0.85 * diffuse)[:, None] * brightness + 0.15 * shine[:, None]
    inks = (np.clip(shaded, 0, 1) * 255).astype(np.int64) @ (1, 1 << 8, 1 << 16)  # packed RGB: Pillow's quickest way
    outlines = flat[body.facets[seen]].reshape(len(seen), 8).tolist()
    draw = ImageDraw.Draw(image)
    for outline, ink in zip(outlines, inks.tolist(), strict=True):
        draw.polygon(outline, fill=ink)
