"""Drawing the images of the simulated recording: one object in 3-D, lit, on a cluttered background.

Apart from a noise field of fixed size, a scene consists of vector graphics, so it can be drawn at any size: large for
the stimulus and small for the simulated sites.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from data_prep.sources.simulation.superquadrics import Body, rotation

NOISE_SIZE = 128  # px; size of the background's noise field, whatever the size of the image
SUPERSAMPLING = 2


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


def draw_scene(body: Body, pose: Pose, rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw an object on a random background.

    Args:
        body: the object.
        pose: where it is and how it is turned.
        rng: for the background and the light; the same state gives the same scene at any size.
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
        corners, first_angle = int(rng.integers(0, 6)), rng.uniform(0, 2 * np.pi)
        colour = tuple(int(c) for c in rng.uniform(30, 225) + rng.uniform(-30, 30, 3))
        if corners < 3:
            draw.ellipse([*(centre - half), *(centre + half)], fill=colour)
        else:
            angles = first_angle + np.arange(corners) * 2 * np.pi / corners
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
