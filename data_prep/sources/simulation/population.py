"""The model neurons of the simulated recording: a population of IT-like sites, their mean rates, and their trials.

The drive of site s by stimulus i is a mixture of five components, each with mean 0 and variance 1 over scenes, with
shares w that differ from site to site (Dirichlet) and add up to 1:

    u_si = sum_k sqrt(w_sk) d_ski
    object   d ~ (a_s . e_o)+ exp(-|p - c_s|^2 / 2 sigma_s^2)   tuning in an embedding e of the objects (a category part
                 and an identity part), half-rectified, inside a receptive field: category-selective, tolerant
    pose     d ~ a_s . (x, y, log size)                         position and size carried along with identity
    view     d ~ sum_j a_sj cos(v_j . r + phi_j,category)       tuning to rotation r that depends on the category
    image    d ~ sum_j a_sj tanh(2 b_j . f)                     two layers: Gabor energies and colours f of the image,
                 averaged in 4 x 4 fields, then random units that each sum a few of them
    detail   d ~ sum_j a_sj cos(3 v_j . r + phi_j,object)       fine tuning to views of single objects, beyond what any
                 model learns from this many stimuli: why the best model stays below the ceiling

The sums run over a pool of units that the sites share, so the population has fewer dimensions than sites. The mean rate
is a soft threshold of the drive, lambda_si = b_s + g_s log(1 + exp(k (u_si - theta_s))).

Trials are spike counts in a window of T = 0.1 s, gamma-Poisson (Goris et al. 2014): n ~ Poisson(lambda T G) with
G ~ Gamma of mean 1 and variance v, hence Var(n) = lambda T + v (lambda T)^2. A trial's rate is n / T. The reliability
of the average over R trials is then exactly Var(lambda) / (Var(lambda) + E[lambda / T + v lambda^2] / R), with variance
and mean over the stimuli.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np

from data_prep.common.errors import RunFailed
from data_prep.common.worker_processes import serve_parent, usable_cores
from data_prep.sources.simulation.drawing import draw_scene
from data_prep.sources.simulation.objects import CATEGORIES, OBJECTS, OBJECTS_PER_CATEGORY, make_body
from data_prep.sources.simulation.random_streams import CALIBRATION, NOISE, SITES
from data_prep.sources.simulation.stimuli import SHIFT, SIZES, TURN, draw_pose, draw_stimulus, pose_array, pose_of

MANY_STIMULI, PART = 4000, 250  # from how many they are drawn by several processes, and how many by one at a time
WINDOW_MS = (70.0, 170.0)
WINDOW_S = (WINDOW_MS[1] - WINDOW_MS[0]) / 1000

RETINA = 64  # px; size of the image that the sites see
FIELDS = 4  # features are averaged in FIELDS x FIELDS receptive fields
WAVELENGTHS, ORIENTATIONS = (4, 8, 16), 4  # of the Gabor filters, px

# Chosen so that pixels, random networks, pretrained networks and fine-tuned networks rank as on real recordings of IT.
SHARES = {"object": 0.46, "pose": 0.17, "view": 0.02, "image": 0.16, "detail": 0.19}
CONCENTRATION = 12.0  # of the shares over sites: higher = sites more alike
IDENTITY = 0.12  # share of identity, beside category, in the embedding of objects
UNITS, UNITS_PER_SITE = 24, 3  # pool of shared units, and how many of them a site sums
OVERDISPERSION = 0.05  # variance of a trial's gain


@dataclass(frozen=True)
class Population:
    """The parameters of the sites, drawn once from the seed. U = UNITS, F = features of an image.

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


def make_population(seed: int, sites: int) -> Population:
    """Draw the sites, then standardise their components over scenes that are not among the stimuli."""
    rng = np.random.default_rng([seed, SITES])
    features = calibration_features(seed)
    objects = rng.integers(len(OBJECTS), size=2000)
    poses = pose_array([draw_pose(rng) for _ in objects])
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


def mixing_weights(rng: np.random.Generator, sites: int) -> np.ndarray:
    """Each site sums UNITS_PER_SITE of the UNITS: float (UNITS, sites)."""
    chosen = rng.random((UNITS, sites)).argsort(0) < UNITS_PER_SITE
    return chosen * rng.normal(size=(UNITS, sites))


@lru_cache(maxsize=4)
def calibration_features(seed: int, scenes: int = 128) -> np.ndarray:
    """Features of images that are not among the stimuli, however many there are: float32 (scenes, F)."""
    features = []
    for scene in range(scenes):
        rng = np.random.default_rng([seed, CALIBRATION, scene])
        body = make_body(CATEGORIES[scene % 8], scene // 8 % 8, seed)
        features.append(image_features(draw_scene(body, draw_pose(rng), rng, RETINA)))
    return np.stack(features)


# ---- drives and rates ----------------------------------------------------------------------------------------------


def stimulus_drives(sites: Population, seed: int, stimuli: int) -> dict[str, np.ndarray]:
    """The raw drives of the stimuli, {component: float (stimuli, sites)}; draws each scene once, small."""
    poses = pose_array([pose_of(seed, index) for index in range(stimuli)])
    features = stimulus_features(seed, stimuli)
    raw = raw_drives(sites, np.arange(stimuli) % len(OBJECTS), poses)
    return raw | {"image": image_drive(sites, features)}


def stimulus_features(seed: int, stimuli: int) -> np.ndarray:
    """The features of the stimuli's images, float32 (stimuli, features); of many, on all cores.

    Raises:
        RunFailed: a process was killed.
    """
    if stimuli < MANY_STIMULI:
        return features_of_some(seed, range(stimuli))
    parts = [range(start, min(start + PART, stimuli)) for start in range(0, stimuli, PART)]
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(usable_cores(), context, serve_parent) as pool:
        try:
            return np.concatenate(list(pool.map(partial(features_of_some, seed), parts)))
        except BrokenProcessPool:
            raise RunFailed("a packing process was killed (out of memory?); nothing was packed") from None


def features_of_some(seed: int, indices: range) -> np.ndarray:
    """The features of some stimuli's images, float32 (stimuli, features)."""
    return np.stack([image_features(draw_stimulus(seed, index, RETINA)) for index in indices])


def raw_drives(sites: Population, objects: np.ndarray, poses: np.ndarray) -> dict[str, np.ndarray]:
    """The components that need no image, before standardising.

    Args:
        sites: the population.
        objects: int (scenes,), index in `OBJECTS`.
        poses: float (scenes, 6), the fields of `Pose`.

    Returns:
        {component: float (scenes, sites)}.
    """
    position, log_size, turn = poses[:, :2], np.log(poses[:, 2:3]), poses[:, 3:] / TURN
    distance = sum((position[:, axis, None] - sites.centres[:, axis]) ** 2 for axis in (0, 1))
    field = np.exp(-distance / (2 * sites.widths**2))
    angle = turn @ sites.views
    category = objects // OBJECTS_PER_CATEGORY
    return {
        "object": np.maximum(sites.embedding[objects] @ sites.tuning.T, 0) * field,
        "pose": np.concatenate([position / SHIFT, log_size / np.log(SIZES).std()], axis=1) @ sites.pose_tuning.T,
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


# ---- trials --------------------------------------------------------------------------------------------------------


def trials_of(seed: int, index: int, rates: np.ndarray, repetitions: int) -> np.ndarray:
    """The trials of stimulus `index` from its mean rates, as `draw_trials`."""
    return draw_trials(rates, repetitions, np.random.default_rng([seed, NOISE, index]))


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
