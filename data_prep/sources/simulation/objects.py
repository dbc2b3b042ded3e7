"""The 64 objects of the simulated recording: 8 in each of 8 categories, built from random superquadrics."""

from functools import lru_cache

import numpy as np

from data_prep.sources.simulation.random_streams import BODY
from data_prep.sources.simulation.superquadrics import Body, Sculptor

CATEGORIES = ("animal", "boat", "car", "chair", "face", "fruit", "plane", "table")
OBJECTS_PER_CATEGORY = 8
OBJECTS = tuple(f"{category}_{member}" for category in CATEGORIES for member in range(OBJECTS_PER_CATEGORY))

DARK = np.array([0.10, 0.10, 0.12])  # reflectances
WHITE = np.array([0.93, 0.92, 0.88])


@lru_cache(maxsize=256)
def make_body(category: str, member: int, seed: int) -> Body:
    """The surface of object `member` of a category; always the same for the same seed."""
    rng = np.random.default_rng([seed, BODY, CATEGORIES.index(category), member])
    sculptor = Sculptor()
    BUILDERS[category](rng, sculptor)
    return sculptor.body(rng)


def paint(rng: np.random.Generator) -> np.ndarray:
    """A random paint: reflectance (3,)."""
    hue = rng.uniform(0, 2 * np.pi) + np.array([0, 2, 4]) * np.pi / 3
    return np.clip(rng.uniform(0.35, 0.75) + rng.uniform(0.1, 0.38) * np.cos(hue), 0.05, 1)


def earth(rng: np.random.Generator) -> np.ndarray:
    """Fur, wood or skin: a brown between cream and near-black, reflectance (3,)."""
    return np.array([0.85, 0.62, 0.42]) * rng.uniform(0.35, 1.1) + rng.uniform(-0.04, 0.04, 3)


def animal(rng: np.random.Generator, sculptor: Sculptor) -> None:
    """Four legs, a trunk, a neck, a head with snout and ears, a tail."""
    fur = earth(rng)
    long, fat, leg, neck = rng.uniform(0.5, 0.8), rng.uniform(0.2, 0.36), rng.uniform(0.25, 0.65), rng.uniform(0, 0.6)
    head, ear = rng.uniform(0.15, 0.27), rng.uniform(0.06, 0.25)
    sculptor.add(fur, (0, 0, 0), (long, fat, fat * 1.05), p=2.3, q=2.3)
    sculptor.legs(fur * 0.85, long * 0.7, fat * 0.6, -fat * 0.3, -fat * 0.3 - leg, 0.085, taper=0.25)
    front = np.array([long * 0.85 + neck * 0.35, 0, fat * 0.6 + neck])
    sculptor.add(
        fur, (long * 0.85 + neck * 0.15, 0, fat * 0.3 + neck * 0.5), (0.11, 0.1, neck * 0.6 + 0.12), turn=(0, 22, 0)
    )
    sculptor.add(fur, front, (head * 1.15, head * 0.85, head))
    sculptor.add(
        fur * rng.uniform(0.6, 1.3),
        front + np.array([head * 1.1, 0, -head * 0.3]),
        (head * rng.uniform(0.4, 0.9), head * 0.5, head * 0.45),
    )
    sculptor.pair(
        fur * 0.7, front + np.array([-head * 0.3, head * 0.6, head * 0.8]), (0.04, 0.07, ear), turn=(0, 0, -25)
    )
    sculptor.pair(DARK, front + np.array([head * 0.85, head * 0.5, head * 0.35]), (0.04, 0.04, 0.045))
    sculptor.add(
        fur * 0.8,
        (-long * 1.1, 0, fat * 0.3),
        (0.045, 0.045, rng.uniform(0.15, 0.4)),
        turn=(0, rng.uniform(-160, -40), 0),
    )


def boat(rng: np.random.Generator, sculptor: Sculptor) -> None:
    """A hull with a bow, a cabin, and a mast with a sail or a funnel."""
    hull, cabin = paint(rng), WHITE * rng.uniform(0.7, 1)
    wide, deep, sail = rng.uniform(0.2, 0.34), rng.uniform(0.14, 0.24), rng.random() < 0.5
    sculptor.add(hull, (0, 0, -deep), (0.8, wide, deep), p=8, q=2.6, taper=0.3, bend=rng.uniform(0.1, 0.5))
    sculptor.add(hull * 0.5, (0, 0, -deep * 0.1), (0.85, wide * 1.08, 0.035), p=8, q=2.6)
    x, long, high = rng.uniform(-0.4, 0.1), rng.uniform(0.18, 0.35), rng.uniform(0.1, 0.2)
    sculptor.add(cabin, (x, 0, high), (long, wide * 0.7, high), p=8, q=8)
    sculptor.add(DARK + 0.1, (x, 0, high * 1.3), (long * 1.02, wide * 0.72, high * 0.3), p=8, q=8)
    if sail:
        tall = rng.uniform(0.5, 0.85)
        sculptor.add(earth(rng), (0.15, 0, tall * 0.9), (0.03, 0.03, tall), p=6)
        sculptor.add(paint(rng) * 0.4 + 0.55, (-0.15, 0, tall), (0.3, 0.03, tall * 0.72), p=6, q=6, taper=-0.85)
        sculptor.add(WHITE, (0.4, 0, tall * 0.8), (0.2, 0.025, tall * 0.6), p=6, q=6, taper=-0.85)
    else:
        sculptor.add(paint(rng), (x - 0.05, 0, high * 2 + 0.17), (0.11, 0.1, 0.2), p=8, turn=(0, -8, 0))
        sculptor.add(cabin * 0.9, (x + long * 0.6, 0, high * 2.4), (0.12, wide * 0.55, high * 0.6), p=8, q=8)


def car(rng: np.random.Generator, sculptor: Sculptor) -> None:
    """A body on four wheels, a cabin with windows, lamps."""
    body = paint(rng)
    high, long, cabin = rng.uniform(0.13, 0.2), rng.uniform(0.7, 0.95), rng.uniform(0.28, 0.6)
    back, rise, wheel = rng.uniform(-0.35, 0.0), rng.uniform(0.13, 0.24), rng.uniform(0.14, 0.2)
    sculptor.add(body, (0, 0, 0), (long, 0.38, high), p=6, q=6, taper=-0.06)
    sculptor.add(
        DARK + np.array([0.12, 0.16, 0.2]), (back, 0, high + rise * 0.85), (cabin, 0.33, rise), p=6, q=6, taper=-0.25
    )
    sculptor.add(body, (back, 0, high + rise * 1.75), (cabin * 0.78, 0.27, 0.04), p=6, q=6)
    for x in (long * 0.6, -long * 0.6):
        sculptor.pair(DARK, (x, 0.36, -high * 0.9), (wheel, wheel, 0.07), p=8, turn=(0, 0, 90))
        sculptor.pair(WHITE * 0.7, (x, 0.41, -high * 0.9), (wheel * 0.5, wheel * 0.5, 0.04), p=8, turn=(0, 0, 90))
    sculptor.pair(WHITE, (long * 0.98, 0.25, 0.02), (0.03, 0.08, 0.05))
    sculptor.pair((0.8, 0.1, 0.1), (-long * 0.98, 0.25, 0.02), (0.03, 0.08, 0.05))


def chair(rng: np.random.Generator, sculptor: Sculptor) -> None:
    """A seat, a back of slats or one board, four legs or a column, arms on some."""
    frame, seat = earth(rng), paint(rng)
    wide, leg, back = rng.uniform(0.3, 0.42), rng.uniform(0.3, 0.55), rng.uniform(0.35, 0.75)
    thick = rng.uniform(0.04, 0.12)
    sculptor.add(seat, (0, 0, 0), (0.36, wide, thick), p=7, q=7)
    if rng.random() < 0.65:
        sculptor.legs(frame, 0.3, wide * 0.85, 0, -leg, 0.05)
    else:
        sculptor.add(frame, (0, 0, -leg / 2), (0.06, 0.06, leg / 2), p=6)
        sculptor.add(frame, (0, 0, -leg), (0.36, 0.07, 0.04), p=6, q=6)
        sculptor.add(frame, (0, 0, -leg), (0.07, 0.36, 0.04), p=6, q=6)
    tilt = rng.uniform(-14, 0)
    if rng.random() < 0.5:
        sculptor.add(seat, (-0.36, 0, back * 0.55), (0.05, wide, back * 0.55), p=7, q=7, turn=(0, tilt, 0))
    else:
        sculptor.add(frame, (-0.4, 0, back), (0.05, wide, 0.07), p=7, q=7, turn=(0, tilt, 0))
        for y in np.linspace(-wide * 0.9, wide * 0.9, int(rng.integers(3, 6))):
            sculptor.add(frame, (-0.37, y, back / 2), (0.03, 0.035, back / 2), p=6, turn=(0, tilt, 0))
    if rng.random() < 0.4:
        sculptor.pair(frame, (-0.03, wide, 0.28), (0.33, 0.05, 0.035), p=7, q=7)
        sculptor.pair(frame, (0.25, wide, 0.13), (0.035, 0.035, 0.15), p=6)


def face(rng: np.random.Generator, sculptor: Sculptor) -> None:
    """A head with hair, eyes, brows, nose, mouth, ears and neck."""
    skin, hair = np.array([0.95, 0.75, 0.62]) * rng.uniform(0.4, 1.03), earth(rng) * rng.uniform(0.3, 1.1)
    wide, deep, apart, level = (
        rng.uniform(0.42, 0.56),
        rng.uniform(0.48, 0.58),
        rng.uniform(0.16, 0.23),
        rng.uniform(0.02, 0.15),
    )
    sculptor.add(skin, (0, 0, 0), (deep, wide, 0.7), p=2.2, q=2.2, taper=rng.uniform(0.0, 0.2))
    sculptor.add(skin * 0.92, (-0.1, 0, -0.75), (0.25, 0.23, 0.3), p=6)
    sculptor.add(hair, (-0.14, 0, rng.uniform(0.16, 0.26)), (deep * 0.98, wide * 1.08, 0.6), p=2.3, q=2.3)
    if rng.random() < 0.5:
        sculptor.add(hair, (-0.3, 0, -0.2), (0.32, wide * 1.15, rng.uniform(0.4, 0.75)), p=3, q=3)
    front = deep * 0.9
    sculptor.contrast = 0.2
    sculptor.pair(WHITE, (front - 0.02, apart, level), (0.06, 0.105, 0.065))
    sculptor.pair(paint(rng) * 0.4, (front + 0.035, apart, level), (0.03, 0.045, 0.05))
    sculptor.pair(
        hair * 0.8,
        (front + 0.02, apart, level + rng.uniform(0.11, 0.17)),
        (0.04, 0.12, 0.025),
        turn=(0, 0, rng.uniform(-15, 15)),
    )
    sculptor.add(
        skin * 1.03, (front + 0.07, 0, -0.12), (0.11, rng.uniform(0.06, 0.1), rng.uniform(0.1, 0.17)), taper=-0.3
    )
    sculptor.add(
        (0.7, 0.25, 0.25) * skin, (front - 0.02, 0, -0.37), (0.05, rng.uniform(0.12, 0.22), rng.uniform(0.025, 0.06))
    )
    sculptor.pair(skin * 0.9, (0, wide * 1.02, 0.02), (0.09, 0.05, 0.14))


def fruit(rng: np.random.Generator, sculptor: Sculptor) -> None:
    """A round, long, pear-shaped or bent fruit, or a bunch of berries; with stalk and leaf."""
    skin = paint(rng) * (1.1, 1.0, 0.55)
    kind = int(rng.integers(4))
    stalk, leaf = np.array([0.35, 0.25, 0.12]), np.array([0.2, 0.5, 0.15])
    if kind == 0:
        sculptor.add(skin, (0, 0, 0), (0.6, 0.6, rng.uniform(0.5, 0.62)), p=2.4, taper=rng.uniform(-0.05, 0.2))
        top = 0.6
    elif kind == 1:
        tall = rng.uniform(0.35, 0.5)
        sculptor.add(skin, (0, 0, -0.2), (0.5, 0.5, 0.45))
        sculptor.add(skin, (0, 0, 0.25), (0.3, 0.3, tall), taper=-0.2)
        top = 0.25 + tall
    elif kind == 2:
        sculptor.add(skin, (0, 0, 0), (0.85, 0.2, rng.uniform(0.17, 0.26)), p=2.4, bend=rng.uniform(1.0, 2.2))
        sculptor.add(stalk, (0.88, 0, 0.42), (0.09, 0.05, 0.06))
        return
    else:
        size = rng.uniform(0.2, 0.27)
        for ring, count, z in ((0.32, 5, 0.2), (0.3, 4, -0.12), (0.14, 2, -0.42)):
            for angle in np.arange(count) * 2 * np.pi / count + ring:
                sculptor.add(skin, (ring * np.cos(angle), ring * np.sin(angle), z), (size, size, size))
        top = 0.35
    sculptor.add(stalk, (0, 0, top + 0.07), (0.04, 0.04, 0.16), p=6, turn=(0, 12, 0))
    if rng.random() < 0.7:
        sculptor.add(leaf, (0.17, 0, top + 0.1), (0.2, 0.1, 0.03), turn=(rng.uniform(-180, 180), -20, 0))


def plane(rng: np.random.Generator, sculptor: Sculptor) -> None:
    """A fuselage, swept or straight wings, a tail, engines or a propeller."""
    hull, trim = WHITE * rng.uniform(0.45, 1), paint(rng)
    fat, span, sweep, chord = (
        rng.uniform(0.09, 0.17),
        rng.uniform(0.5, 0.95),
        rng.uniform(0, 38),
        rng.uniform(0.11, 0.2),
    )
    height = rng.choice([-0.5, 0.7]) * fat
    sculptor.add(hull, (0, 0, 0), (0.95, fat, fat), p=2.8, q=2.8)
    sculptor.add(DARK + 0.15, (0.7, 0, fat * 0.55), (0.14, fat * 0.6, fat * 0.4))
    reach = np.sin(np.deg2rad(sweep)) * span / 2
    sculptor.pair(trim, (0.1 - reach, span / 2, height), (chord, span / 2, 0.028), p=6, q=6, turn=(sweep, 0, 0))
    sculptor.pair(trim, (-0.85, 0.2, fat * 0.6), (0.1, 0.22, 0.022), p=6, q=6, turn=(sweep, 0, 0))
    sculptor.add(
        trim * 0.8,
        (-0.83, 0, fat + 0.15),
        (0.14, 0.025, rng.uniform(0.17, 0.28)),
        p=6,
        q=6,
        turn=(0, -25, 0),
        taper=-0.3,
    )
    if rng.random() < 0.6:
        sculptor.pair(hull * 0.6, (0.12 - reach * 0.8, span * 0.42, height - 0.09), (0.15, 0.07, 0.07), p=4, q=4)
    else:
        sculptor.add(DARK, (0.97, 0, 0), (0.02, 0.05, 0.3), p=3, turn=(0, 0, rng.uniform(0, 180)))


def table(rng: np.random.Generator, sculptor: Sculptor) -> None:
    """A round or square top on four legs or a column."""
    top, leg = (earth(rng), earth(rng)) if rng.random() < 0.6 else (paint(rng), earth(rng) * 0.6)
    long, wide, high = rng.uniform(0.5, 0.9), rng.uniform(0.38, 0.6), rng.uniform(0.3, 0.75)
    if rng.random() < 0.35:
        sculptor.add(top, (0, 0, 0), (wide * 1.15, wide * 1.15, 0.05), p=8)
        sculptor.add(leg, (0, 0, -high / 2), (0.08, 0.08, high / 2), p=6, taper=-0.2)
        sculptor.add(leg, (0, 0, -high), (0.36, 0.36, 0.05), p=5, taper=-0.4)
    else:
        sculptor.add(top, (0, 0, 0), (long, wide, 0.05), p=8, q=8)
        sculptor.legs(leg, long * 0.85, wide * 0.82, 0, -high, rng.uniform(0.04, 0.08), q=rng.choice([2, 6]))
        if rng.random() < 0.5:
            sculptor.add(top * 0.8, (0, 0, -0.12), (long * 0.85, wide * 0.82, 0.07), p=8, q=8)
        if rng.random() < 0.3:
            sculptor.add(leg, (0, 0, -high * 0.75), (long * 0.8, wide * 0.75, 0.03), p=8, q=8)


BUILDERS = dict(zip(CATEGORIES, (animal, boat, car, chair, face, fruit, plane, table), strict=True))
