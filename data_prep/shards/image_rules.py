"""What pack.py does with images before they go into a shard, and its options for that."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class ImageRules(BaseModel):
    """What is done with the images."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    copies: Literal["together", "as-dealt"] = "together"
    """Stimuli that show the same image under different ids: keep them in one split where splits are dealt at random, or
    deal each stimulus by itself. Splits that the source gives stay as they are."""
    decode: bool = True
    """Whether every image is decoded, so that damaged ones are refused and copies are found whatever their files are.
    Without it packing is faster, and only files that are alike byte by byte count as copies."""

    def image_rules(self) -> "ImageRules":
        """These rules alone, without the other options of a command that has them."""
        return ImageRules(**{name: getattr(self, name) for name in ImageRules.model_fields})


DEFAULT_RULES = ImageRules()
