"""The stimuli of the simulated recording: stimulus i shows object i mod 64 in a random pose on a random background."""

from dataclasses import astuple

import numpy as np

from data_prep.sources.simulation.drawing import Pose, draw_scene
from data_prep.sources.simulation.objects import CATEGORIES, OBJECTS, OBJECTS_PER_CATEGORY, make_body
from data_prep.sources.simulation.random_streams import POSE, SCENE

# Ranges of the pose; all uniform, the size in its logarithm.
SHIFT = 0.35  # half image widths
SIZES = (0.55, 0.95)  # radius, half image widths
TURN = (60.0, 20.0, 20.0)  # yaw, pitch, roll, degrees


def draw_pose(rng: np.random.Generator) -> Pose:
    """A random pose."""
    x, y = rng.uniform(-SHIFT, SHIFT, 2)
    size = np.exp(rng.uniform(*np.log(SIZES)))
    yaw, pitch, roll = rng.uniform(-1, 1, 3) * TURN
    return Pose(float(x), float(y), float(size), float(yaw), float(pitch), float(roll))


def pose_of(seed: int, index: int) -> Pose:
    """The pose in stimulus `index`."""
    return draw_pose(np.random.default_rng([seed, POSE, index]))


def draw_stimulus(seed: int, index: int, size: int) -> np.ndarray:
    """The image of stimulus `index`: uint8 (size, size, 3)."""
    category, member = divmod(index % len(OBJECTS), OBJECTS_PER_CATEGORY)
    body = make_body(CATEGORIES[category], member, seed)
    return draw_scene(body, pose_of(seed, index), np.random.default_rng([seed, SCENE, index]), size)


def pose_array(poses: list[Pose]) -> np.ndarray:
    """The fields of poses: float (poses, 6)."""
    return np.array([astuple(pose) for pose in poses])
