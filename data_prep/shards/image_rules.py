"""What pack.py does with images before they go into a shard."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageRules:
    """The rules for all images of a recording.

    Attributes:
        decode: decode every image, so that damage and copies are noticed.
    """

    decode: bool = True


DEFAULT_RULES = ImageRules()
