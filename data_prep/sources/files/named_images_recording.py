"""A recording whose images are loaded by name from a folder, an archive or an array, apart from the responses."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from data_prep.recording import Recording, Stimulus
from data_prep.sources.files.image_files import EncodedImage


class ImageStore(Protocol):
    """Where images are stored, such as `ImageFiles`."""

    def reading(self) -> AbstractContextManager[Callable[[str], EncodedImage]]:
        """Open for reading: a function from an image's name to the image."""


@dataclass(kw_only=True)
class NamedImagesRecording(Recording):
    """A recording whose images are stored apart from its responses.

    Attributes (beside those of `Recording`):
        images: where the images are stored.
        image_names: the name of each stimulus's image there.
    """

    images: ImageStore
    image_names: list[str]

    @abstractmethod
    def responses(self, indices: Sequence[int]) -> Iterator[tuple[np.ndarray | None, np.ndarray | None]]:
        """Yield `Stimulus.rates` and `Stimulus.trials` of the stimuli at `indices`."""

    def read(self, indices: Sequence[int]) -> Iterator[Stimulus]:
        """Yield the stimuli at `indices`; files are open while this runs, and only in the process that runs it.

        Raises:
            BadInput: an image that is missing, unreadable or absurdly large, or responses that cannot be read.
        """
        with self.images.reading() as load:
            for i, (rates, trials) in zip(indices, self.responses(indices), strict=True):
                image = load(self.image_names[i])
                yield Stimulus(
                    id=self.stimulus_ids[i],
                    image=image.data,
                    encoding=image.encoding,
                    rates=rates,
                    trials=trials,
                    meta=self.known_meta(i),
                    location=image.location,
                )


def objects_of(meta: Sequence[dict[str, Any]]) -> list[str] | None:
    """The object that each stimulus shows, or None if it is not known for every stimulus."""
    return [str(facts["object"]) for facts in meta] if all("object" in facts for facts in meta) else None
