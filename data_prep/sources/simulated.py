"""Source `simulated`: drawn images, IT-like model neurons, and the truth about both.

It needs no download, so every command can be tried with it. Its noise-free rates are known, so ceilings and scores can
be checked against them. Everything derived from it is marked as simulated.

The stimuli follow the HvM set of Majaj et al. (2015): 64 objects, 8 in each of 8 categories, each at a random position,
size and rotation on a cluttered background. `simulation/population.py` describes the sites and the trials.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from pydantic import BaseModel, Field

from data_prep.common.errors import BadInput
from data_prep.recording import Recording, Stimulus, trial_average
from data_prep.splits import RandomDeal

JPEG_QUALITY = 90


class Simulated(BaseModel, extra="forbid", use_attribute_docstrings=True):
    """A simulated recording with known truth: 64 drawn objects, IT-like sites, Poisson-like trials."""

    stimuli: int = Field(3200, ge=64, le=10_000_000)
    """Number of images; 3200 = 50 views of each of the 64 objects."""
    sites: int = Field(168, ge=1, le=100_000)
    """Number of recording sites."""
    repetitions: int = Field(28, ge=2, le=10_000)
    """Presentations of each image; more of them raise the noise ceiling."""
    image_size: int = Field(256, ge=32, le=2048)
    """Width and height of the images in pixels. The rates do not depend on it."""
    seed: int = Field(0, ge=0, le=2**63 - 1)
    """Seed of the objects, scenes, sites, noise and splits."""
    val_fraction: float = Field(0.09, ge=0, lt=1)
    """Share of the stimuli for validation."""
    test_fraction: float = Field(0.10, ge=0, lt=1)
    """Share of the stimuli for testing."""

    def open(self) -> SimulatedRecording:
        """Draw the sites and compute the mean rates for all stimuli, which takes about 7 ms of a core per stimulus.

        Raises:
            BadInput: the held-out fractions leave nothing to train on.
        """
        from data_prep.sources.simulation import population as model  # slow to import
        from data_prep.sources.simulation.objects import OBJECTS

        if self.val_fraction + self.test_fraction >= 1:
            raise BadInput(
                f"val_fraction {self.val_fraction:g} and test_fraction {self.test_fraction:g} leave no training "
                "stimuli; their sum must be below 1"
            )
        held_out = {"val": self.val_fraction, "test": self.test_fraction}
        deal = RandomDeal({"train": 1 - sum(held_out.values())} | held_out, self.seed)
        objects = [OBJECTS[index % len(OBJECTS)] for index in range(self.stimuli)]
        population = model.make_population(self.seed, self.sites)
        mean_rates = model.mean_rates(population, model.stimulus_drives(population, self.seed, self.stimuli))
        return SimulatedRecording(
            name=f"simulated-hvm{self.stimuli}",
            provenance={
                "source": "simulated by Spiketune: drawn images and model neurons, no brain took part",
                "options": self.model_dump(),
                "split": {"method": "random", "seed": self.seed, **held_out},
            },
            simulated=True,
            sites=[{"id": f"simulated_site_{site:03d}", "region": "IT (simulated)"} for site in range(self.sites)],
            response_window_ms=model.WINDOW_MS,
            units="spikes/s (simulated)",
            stimulus_ids=[f"simulated_{index:06d}" for index in range(self.stimuli)],
            splits=deal(np.arange(self.stimuli)),
            deal=deal,
            objects=objects,
            truth={
                "reliability": model.true_reliability(mean_rates, self.repetitions).tolist(),
                "variance_shares": dict(zip(model.SHARES, population.shares.T.tolist(), strict=True)),
            },
            meta=[{"object": shown, "category": shown.split("_")[0]} for shown in objects],
            options=self,
            mean_rates=mean_rates,
        )


@dataclass(kw_only=True)
class SimulatedRecording(Recording):
    """A simulated recording; images and trials are made when they are read.

    Attributes (beside those of `Recording`):
        options: of the simulation.
        mean_rates: float32 (stimuli, sites), noise-free.
    """

    options: Simulated
    mean_rates: np.ndarray

    def read(self, indices: Sequence[int]) -> Iterator[Stimulus]:
        """Draw, encode and add trial noise; a stimulus depends on its index and the options alone."""
        import simplejpeg  # slow to import

        from data_prep.sources.simulation.population import trials_of
        from data_prep.sources.simulation.stimuli import draw_stimulus, pose_of

        seed = self.options.seed
        for index in map(int, indices):
            image = draw_stimulus(seed, index, self.options.image_size)
            rates = self.mean_rates[index]
            trials = trials_of(seed, index, rates, self.options.repetitions)
            pose = {name: round(value, 4) for name, value in asdict(pose_of(seed, index)).items()}
            yield Stimulus(
                id=self.stimulus_ids[index],
                image=simplejpeg.encode_jpeg(image, quality=JPEG_QUALITY, colorspace="RGB"),
                encoding="jpg",
                rates=trial_average(trials),
                trials=trials,
                truth=rates,
                meta=self.known_meta(index) | pose,
            )
