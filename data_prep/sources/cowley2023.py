"""Source `cowley2023`: one session of Cowley et al. (2023), macaque V4, as their repository holds it.

    images/images_SESSION.zip                       image0001.jpg ..., 112 x 112 px, in the order of the responses
    responses_repeat_averaged/responses_SESSION.npy (sites, images), spikes in a window of 100 ms
    responses_raw/responses_SESSION.npy             (sites, images, repetitions), NaN-padded; optional

A session's name is its date, YYMMDD. The first digits tell the animal.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from data_prep.common.errors import BadInput
from data_prep.recording import Recording, trial_average
from data_prep.sources.files.held_out import HeldOut
from data_prep.sources.files.image_files import ImageFiles
from data_prep.sources.files.named_images_recording import NamedImagesRecording
from data_prep.sources.responses.response_arrays import Responses, as_float32, map_npy
from data_prep.sources.responses.trial_axes import check_agreement

AVERAGES, TRIALS = "responses_repeat_averaged", "responses_raw"
ANIMALS = {"19": "WE", "20": "PE", "2102": "PE", "2103": "PE", "2106": "RA", "2110": "RA", "2111": "RA"}

_ARCHIVE = re.compile(r"images_(\d{6})\.zip")


class Cowley2023(HeldOut):
    """A session of Cowley et al. (2023): macaque V4, natural and other images."""

    source: tyro.conf.Positional[Path]
    """The session's images, images/images_SESSION.zip; responses_repeat_averaged and responses_raw are beside that
    folder."""
    name: str | None = None
    """Name of the recording. Default: v4_SESSION."""

    def open(self) -> Recording:
        """Check the files against each other.

        Raises:
            BadInput: naming the file, and what would be right.
        """
        archive = _ARCHIVE.fullmatch(self.source.name)
        if archive is None or not self.source.is_file():
            problem = "no such file" if archive else "not named like a session"
            raise BadInput(f"{self.source}: {problem}; SOURCE must be a file images_SESSION.zip, as images_210325.zip")
        session, folder = archive[1], self.source.absolute().parent.parent
        averages, trials = self._responses(folder, session)
        sites, stimuli = averages.shape[1], averages.shape[0]
        ids = [f"{session}_{number:04d}" for number in range(1, stimuli + 1)]
        images = ImageFiles(self.source)
        names = images.find_all({stimulus: [_image_name(k + 1)] for k, stimulus in enumerate(ids)})
        if images.find_path(_image_name(stimuli + 1)) is not None:
            raise BadInput(f"{self.source}: more images than the {stimuli} that {averages.path} has responses to")
        site_ids = [f"{session}_{site:03d}" for site in range(sites)]
        for responses in (averages, trials):
            if responses is not None:
                responses.check_finite(ids, site_ids)
        if trials is not None:
            check_agreement(averages, trials, ids, site_ids)
        animal = next((ANIMALS[session[:digits]] for digits in (4, 2) if session[:digits] in ANIMALS), None)
        subject = {} if animal is None else {"subject": animal}
        dealt = self.assign([{} for _ in ids], self.source)
        return Cowley2023Recording(
            name=self.name or f"v4_{session}",
            provenance={
                "source": "cowley2023",
                "path": str(self.source.resolve()),
                "session": session,
                "rates": "as given" if trials is None else "mean over repetitions",
                "split": {"method": "random", **dealt.rule},
            },
            sites=[{"id": site_id, "region": "V4", **subject} for site_id in site_ids],
            units="spikes in 100 ms",
            stimulus_ids=ids,
            splits=dealt.splits,
            deal=dealt.deal,
            group_by=self.group_by,
            images=images,
            image_names=names,
            averages=averages,
            trials=trials,
        )

    def _responses(self, folder: Path, session: str) -> tuple[Responses, Responses | None]:
        """Averages (stimuli, sites) and, if they are there, trials (stimuli, repetitions, sites)."""
        averages, trials = (folder / kind / f"responses_{session}.npy" for kind in (AVERAGES, TRIALS))
        if not averages.is_file():
            raise BadInput(f"{averages}: no such file; it belongs to {self.source}")
        opened = _StimuliFirst.open(averages, ("sites", "images"))
        if not trials.is_file():
            return opened, None
        repeated = _StimuliFirst.open(trials, ("sites", "images", "repetitions"))
        if (repeated.shape[0], repeated.shape[2]) != opened.shape:
            raise BadInput(
                f"{trials}: {repeated.shape[2]} sites and {repeated.shape[0]} images, but {averages} has "
                f"{opened.shape[1]} and {opened.shape[0]}"
            )
        return opened, repeated


def _image_name(number: int) -> str:
    return f"image{number:04d}.jpg"


@dataclass(frozen=True)
class _StimuliFirst:
    """An array (sites, stimuli, ...) of a .npy file that is indexed by stimuli; opened when it is read."""

    path: Path

    @classmethod
    def open(cls, path: Path, axes: tuple[str, ...]) -> Responses:
        """The file's responses: (stimuli, sites) or (stimuli, repetitions, sites)."""
        shape = map_npy(path).shape
        if len(shape) != len(axes) or not all(shape):
            raise BadInput(f"{path}: the shape is {shape}, expected ({', '.join(axes)})")
        return Responses(path, (shape[1], *shape[2:], shape[0]), cls(path))

    def __getitem__(self, stimuli: int | slice) -> np.ndarray:
        return np.moveaxis(map_npy(self.path)[:, stimuli], 0, -1)


@dataclass(kw_only=True)
class Cowley2023Recording(NamedImagesRecording):
    """A session that `Cowley2023.open` has checked.

    Attributes (beside those of `NamedImagesRecording`):
        averages: over repetitions, (stimuli, sites).
        trials: (stimuli, repetitions, sites); None if they were not downloaded.
    """

    averages: Responses
    trials: Responses | None

    def responses(self, indices: Sequence[int]) -> Iterator[tuple[np.ndarray | None, np.ndarray | None]]:
        """Yield averages and trials; with trials, the averages are theirs."""
        averages = self.averages.load()
        trials = None if self.trials is None else self.trials.load()
        for i in indices:
            if trials is None:
                yield as_float32(averages[i]), None
            else:
                stimulus_trials = as_float32(trials[i])
                yield trial_average(stimulus_trials), stimulus_trials
