"""The built-in simulated recording: drawn images, IT-like sites, and the truth about both.

It needs no download, so every command can be tried with it, and its noise-free rates are known, so ceilings and scores
can be checked against them. No brain took part, and everything made from it says so.

Stimuli. After the HvM set of Majaj et al. (2015): 64 objects, 8 in each of 8 categories, each at a random position,
size and rotation on a cluttered background. Stimulus i shows object i mod 64.

Sites. The drive of site s by stimulus i is a mixture of five components, each with mean 0 and variance 1 over scenes,
with shares w that differ from site to site (Dirichlet) and add up to 1:

    u_si = sum_k sqrt(w_sk) d_ski
    object   d ~ (a_s . e_o)+ exp(-|p - c_s|^2 / 2 sigma_s^2)   tuning in an embedding e of the objects (a category part
                 and an identity part), half-rectified, inside a receptive field: category-selective, tolerant
    pose     d ~ a_s . (x, y, log size)                         position and size carried along with identity
    view     d ~ sum_j a_sj cos(v_j . r + phi_j,category)       tuning to rotation r that depends on the category
    image  d ~ sum_j a_sj tanh(2 b_j . f)                     two layers: Gabor energies and colours f of the image,
                 averaged in 4 x 4 fields, then random units that each sum a few of them
    detail   d ~ sum_j a_sj cos(3 v_j . r + phi_j,object)       fine tuning to views of single objects, beyond what any
                 model learns from this many stimuli: why the best model stays below the ceiling

The sums run over a pool of units that the sites share, so that the population is of lower dimension than its sites.
The mean rate is a soft threshold of the drive, lambda_si = b_s + g_s log(1 + exp(k (u_si - theta_s))).

Trials. Spike counts in a window of T = 0.1 s are gamma-Poisson (Goris et al. 2014): n ~ Poisson(lambda T G) with G ~
Gamma of mean 1 and variance v, hence Var(n) = lambda T + v (lambda T)^2. A trial's rate is n / T. The reliability of
the average over R trials is then exactly Var(lambda) / (Var(lambda) + E[lambda / T + v lambda^2] / R), with variance
and mean over the stimuli.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import numpy as np
import simplejpeg
from pydantic import BaseModel, ConfigDict, Field

from data_prep.common.errors import BadInput
from data_prep.recording import Recording, Stimulus, trial_average
from data_prep.sources.simulation.drawing import CATEGORIES, OBJECTS_PER_CATEGORY, Pose, draw_scene, make_body
from data_prep.splits import assign_splits

OBJECTS = tuple(f"{category}_{member}" for category in CATEGORIES for member in range(OBJECTS_PER_CATEGORY))
WINDOW_MS = (70.0, 170.0)
WINDOW_S = (WINDOW_MS[1] - WINDOW_MS[0]) / 1000
JPEG_QUALITY = 90

# Ranges of the pose; all uniform, the size in its logarithm.
SHIFT = 0.35  # half image widths
SIZES = (0.55, 0.95)  # radius, half image widths
TURN = (60.0, 20.0, 20.0)  # yaw, pitch, roll, degrees

RETINA = 64  # px; the size at which the sites see the image
FIELDS = 4  # features are averaged in FIELDS x FIELDS receptive fields
WAVELENGTHS, ORIENTATIONS = (4, 8, 16), 4  # of the Gabor filters, px

# Chosen so that pixels, random networks, pretrained networks and fine-tuned networks rank as they do on real
# recordings of IT.
SHARES = {"object": 0.46, "pose": 0.17, "view": 0.02, "image": 0.16, "detail": 0.19}
CONCENTRATION = 12.0  # of the shares over sites: higher = sites more alike
IDENTITY = 0.12  # share of identity, beside category, in the embedding of objects
UNITS, UNITS_PER_SITE = 24, 3  # pool of shared units, and how many of them a site sums
OVERDISPERSION = 0.05  # variance of the trial's gain

# Independent streams of random numbers: default_rng([seed, stream, index]).
POSE, SCENE, NOISE, SITES, CALIBRATION = 2, 3, 4, 5, 6


@dataclass(frozen=True)
class Population:
    """What the sites are: fixed numbers, drawn once from the seed. U = UNITS, F = features of an image.

    Attributes:
        shares: (sites, 5), variance shares w, in the order of `SHARES`.
        embedding: (64, dimensions) of the objects.
        tuning: (sites, dimensions), the vectors a_s of the object component.
        centres: (sites, 2) and `widths`: (sites,), receptive fields, half image widths.
        pose_tuning: (sites, 3), unit vectors.
        views: (3, U) and `category_phases` (8, U), `object_phases` (64, U), of the view and detail units.
        wiring: (F, U), from standardised features to the image units.
        mixing: {"view", "image", "detail"}: (U, sites), weights of the units.
        floor, gain: (sites,), spikes/s; `slope`, `threshold`: (sites,), of the soft threshold.
        feature_scale: (2, F), mean and sd of the features over a fixed set of scenes.
        scale: {component: (2, sites)}, mean and sd of its raw drive over a fixed set of scenes.
    """

    shares: np.ndarray
    embedding: np.ndarray
    tuning: np.ndarray
    centres: np.ndarray
    widths: np.ndarray
    pose_tuning: np.ndarray
    views: np.ndarray
    category_phases: np.ndarray
    object_phases: np.ndarray
    wiring: np.ndarray
    mixing: dict[str, np.ndarray]
    floor: np.ndarray
    gain: np.ndarray
    slope: np.ndarray
    threshold: np.ndarray
    feature_scale: np.ndarray
    scale: dict[str, np.ndarray]


def draw_pose(rng: np.random.Generator) -> Pose:
    """A pose at random."""
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


@lru_cache(maxsize=1)
def gabor_bank() -> np.ndarray:
    """Transfer functions of one-sided (quadrature) Gabor filters: float32 (filters, RETINA, RETINA)."""
    fy, fx = np.fft.fftfreq(RETINA)[:, None], np.fft.fftfreq(RETINA)
    bank = []
    for wavelength in WAVELENGTHS:
        for angle in np.arange(ORIENTATIONS) * np.pi / ORIENTATIONS:
            along, across = fx * np.cos(angle) + fy * np.sin(angle), fy * np.cos(angle) - fx * np.sin(angle)
            bank.append(np.exp(-((along - 1 / wavelength) ** 2 + across**2) / (2 * (0.4 / wavelength) ** 2)))
    return np.stack(bank).astype(np.float32)


def image_features(image: np.ndarray) -> np.ndarray:
    """First layer of the image component: Gabor energies (square root), brightness and two opponent colours.

    Args:
        image: uint8 (RETINA, RETINA, 3).

    Returns:
        float32 (features,), averages over FIELDS x FIELDS receptive fields.
    """
    red, green, blue = np.moveaxis(image.astype(np.float32) / 255, 2, 0)
    grey = (red + green + blue) / 3
    energy = np.abs(np.fft.ifft2(np.fft.fft2(grey - grey.mean()) * gabor_bank()))
    maps = np.concatenate([np.sqrt(energy), [grey, red - green, blue - (red + green) / 2]])
    field = RETINA // FIELDS
    return maps.reshape(-1, FIELDS, field, FIELDS, field).mean((2, 4), dtype=np.float32).ravel()


def raw_drives(sites: Population, objects: np.ndarray, poses: np.ndarray) -> dict[str, np.ndarray]:
    """The components that need no image, before standardising.

    Args:
        sites: the population.
        objects: int (scenes,), index in `OBJECTS`.
        poses: float (scenes, 6), the fields of `Pose`.

    Returns:
        {component: float (scenes, sites)}.
    """
    place, log_size, turn = poses[:, :2], np.log(poses[:, 2:3]), poses[:, 3:] / TURN
    distance = ((place[:, None] - sites.centres) ** 2).sum(2)
    field = np.exp(-distance / (2 * sites.widths**2))
    angle = turn @ sites.views
    category = objects // OBJECTS_PER_CATEGORY
    return {
        "object": np.maximum(sites.embedding[objects] @ sites.tuning.T, 0) * field,
        "pose": np.concatenate([place / SHIFT, log_size / np.log(SIZES).std()], axis=1) @ sites.pose_tuning.T,
        "view": np.cos(angle + sites.category_phases[category]) @ sites.mixing["view"],
        "detail": np.cos(3 * angle + sites.object_phases[objects]) @ sites.mixing["detail"],
    }


def image_drive(sites: Population, features: np.ndarray) -> np.ndarray:
    """The image component before standardising: features (scenes, F) -> float (scenes, sites)."""
    mean, sd = sites.feature_scale
    return np.tanh(2 * ((features - mean) / sd) @ sites.wiring) @ sites.mixing["image"]


def mean_rates(sites: Population, raw: dict[str, np.ndarray]) -> np.ndarray:
    """Raw drives {component: (scenes, sites)} -> noise-free rates, float32 (scenes, sites), spikes/s."""
    drive = np.zeros(next(iter(raw.values())).shape)
    for share, component in zip(sites.shares.T, SHARES, strict=True):
        mean, sd = sites.scale[component]
        drive += np.sqrt(share) * (raw[component] - mean) / sd
    return (sites.floor + sites.gain * np.logaddexp(0, sites.slope * (drive - sites.threshold))).astype(np.float32)


def mixing_weights(rng: np.random.Generator, sites: int) -> np.ndarray:
    """Each site sums UNITS_PER_SITE of the UNITS: float (UNITS, sites)."""
    chosen = rng.random((UNITS, sites)).argsort(0) < UNITS_PER_SITE
    return chosen * rng.normal(size=(UNITS, sites))


def make_population(seed: int, sites: int) -> Population:
    """Draw the sites, then standardise their components over scenes that are nobody's stimuli."""
    rng = np.random.default_rng([seed, SITES])
    features = calibration_features(seed)
    objects = rng.integers(len(OBJECTS), size=2000)
    poses = np.array([tuple(asdict(draw_pose(rng)).values()) for _ in objects])
    category = np.repeat(rng.normal(size=(len(CATEGORIES), 8)), OBJECTS_PER_CATEGORY, axis=0)
    identity = rng.normal(size=(len(OBJECTS), 8))
    wiring = rng.normal(size=(features.shape[1], UNITS))
    wiring *= rng.random(wiring.shape) < 0.05
    pose_tuning = rng.normal(size=(sites, 3))
    population = Population(
        shares=rng.dirichlet(CONCENTRATION * np.array(list(SHARES.values())), size=sites),
        embedding=np.concatenate([np.sqrt(1 - IDENTITY) * category, np.sqrt(IDENTITY) * identity], axis=1),
        tuning=rng.normal(size=(sites, 16)),
        centres=rng.normal(size=(sites, 2)) * 0.2,
        widths=rng.uniform(0.3, 0.8, sites),
        pose_tuning=pose_tuning / np.linalg.norm(pose_tuning, axis=1, keepdims=True),
        views=rng.normal(size=(3, UNITS)) * 0.7,
        category_phases=rng.uniform(0, 2 * np.pi, (len(CATEGORIES), UNITS)),
        object_phases=rng.uniform(0, 2 * np.pi, (len(OBJECTS), UNITS)),
        wiring=wiring / np.linalg.norm(wiring, axis=0),
        mixing={component: mixing_weights(rng, sites) for component in ("view", "image", "detail")},
        floor=rng.uniform(1, 8, sites),
        gain=np.exp(rng.uniform(np.log(6.5), np.log(14), sites)),
        slope=rng.uniform(0.6, 1.1, sites),
        threshold=rng.uniform(-1.0, 0.3, sites),
        feature_scale=np.stack([features.mean(0), features.std(0) + 1e-6]),
        scale={},
    )
    raw = raw_drives(population, objects, poses) | {"image": image_drive(population, features)}
    scale = {name: np.stack([drive.mean(0), drive.std(0) + 1e-6]) for name, drive in raw.items()}
    return replace(population, scale=scale)


@lru_cache(maxsize=4)
def calibration_features(seed: int, scenes: int = 128) -> np.ndarray:
    """Features of images that are not among the stimuli, whatever their number: float32 (scenes, F)."""
    features = []
    for scene in range(scenes):
        rng = np.random.default_rng([seed, CALIBRATION, scene])
        body = make_body(CATEGORIES[scene % 8], scene // 8 % 8, seed)
        features.append(image_features(draw_scene(body, draw_pose(rng), rng, RETINA)))
    return np.stack(features)


def draw_trials(rates: np.ndarray, repetitions: int, rng: np.random.Generator) -> np.ndarray:
    """Gamma-Poisson spike counts over the window, as rates: (sites,) -> float32 (repetitions, sites), spikes/s."""
    shape = 1 / OVERDISPERSION
    gain = rng.gamma(shape, OVERDISPERSION, (repetitions, len(rates)))
    return (rng.poisson(rates * gain * WINDOW_S) / WINDOW_S).astype(np.float32)


def true_reliability(rates: np.ndarray, repetitions: int) -> np.ndarray:
    """Share of the trial average's variance over stimuli that is not noise: (stimuli, sites) -> float64 (sites,)."""
    rates = rates.astype(np.float64)
    noise = (rates / WINDOW_S + OVERDISPERSION * rates**2).mean(0) / repetitions
    return rates.var(0) / (rates.var(0) + noise)


class SimulatedRecording(Recording):
    """A simulated recording: images and trials are made when they are read, the mean rates are held."""

    simulated = True
    response_window_ms = WINDOW_MS
    units = "spikes/s (simulated)"

    def __init__(self, options: "Simulated") -> None:
        """Lay out stimuli and sites and compute all mean rates, for which each scene is drawn once, small."""
        self.options = options
        stimuli, seed = options.stimuli, options.seed
        self.name = f"simulated-hvm{stimuli}"
        self.stimulus_ids = [f"simulated_{index:06d}" for index in range(stimuli)]
        self.objects = [OBJECTS[index % len(OBJECTS)] for index in range(stimuli)]
        fractions = {"val": options.val_fraction, "test": options.test_fraction}
        self.splits = assign_splits(stimuli, {"train": 1 - sum(fractions.values())} | fractions, seed)
        population = make_population(seed, options.sites)
        poses = np.array([tuple(asdict(pose_of(seed, index)).values()) for index in range(stimuli)])
        features = np.stack([image_features(draw_stimulus(seed, index, RETINA)) for index in range(stimuli)])
        raw = raw_drives(population, np.arange(stimuli) % len(OBJECTS), poses)
        self.mean_rates = mean_rates(population, raw | {"image": image_drive(population, features)})
        self.sites = [{"id": f"simulated_site_{s:03d}", "region": "IT (simulated)"} for s in range(options.sites)]
        self.meta = [{"object": shown, "category": shown.split("_")[0]} for shown in self.objects]
        self.truth = {
            "reliability": true_reliability(self.mean_rates, options.repetitions).tolist(),
            "variance_shares": dict(zip(SHARES, population.shares.T.tolist(), strict=True)),
        }
        self.provenance = {
            "source": "simulated by Spiketune: drawn images and model neurons, no brain took part",
            "options": options.model_dump(),
            "split": {"method": "random", "seed": seed, **fractions},
        }

    def read(self, indices: Sequence[int]) -> Iterator[Stimulus]:
        """Draw, encode and add trial noise; what a stimulus is depends on its index and the options alone."""
        for index in map(int, indices):
            image = draw_stimulus(self.options.seed, index, self.options.image_size)
            rates = self.mean_rates[index]
            rng = np.random.default_rng([self.options.seed, NOISE, index])
            trials = draw_trials(rates, self.options.repetitions, rng)
            pose = {name: round(value, 4) for name, value in asdict(pose_of(self.options.seed, index)).items()}
            yield Stimulus(
                id=self.stimulus_ids[index],
                image=simplejpeg.encode_jpeg(image, quality=JPEG_QUALITY, colorspace="RGB"),
                encoding="jpg",
                rates=trial_average(trials),
                trials=trials,
                truth=rates,
                meta=self.meta[index] | pose,
            )


class Simulated(BaseModel):
    """A simulated recording with known truth: 64 drawn objects, IT-like sites, Poisson-like trials."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    stimuli: int = Field(3200, ge=64, le=10_000_000)
    """Number of images; 3200 = 50 views of each of the 64 objects."""
    sites: int = Field(168, ge=1, le=100_000)
    """Number of recording sites."""
    repetitions: int = Field(28, ge=2, le=10_000)
    """Presentations of each image; more of them raise the noise ceiling."""
    image_size: int = Field(256, ge=32, le=2048)
    """Width and height of the images in pixels. The rates do not depend on it."""
    seed: int = Field(0, ge=0, le=2**63 - 1)
    """Decides objects, scenes, sites, noise and splits."""
    val_fraction: float = Field(0.09, ge=0, lt=1)
    """Share of the stimuli held out for validation."""
    test_fraction: float = Field(0.10, ge=0, lt=1)
    """Share of the stimuli held out for the test."""

    def open(self) -> SimulatedRecording:
        """Lay out the recording; about 7 ms a stimulus.

        Raises:
            BadInput: when the held-out fractions leave nothing to train on.
        """
        if self.val_fraction + self.test_fraction >= 1:
            raise BadInput(
                f"val_fraction {self.val_fraction:g} and test_fraction {self.test_fraction:g} leave no training "
                "stimuli; their sum must be below 1"
            )
        return SimulatedRecording(self)
