"""What pack.py does with images before they go into a shard, and its options for that."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict

from data_prep.common.errors import BadInput
from data_prep.common.option_fields import ValueName

_COLOURS = {"black": "#000000", "grey": "#808080", "white": "#ffffff"}


def _colour(text: str) -> str:
    if text not in _COLOURS and not re.fullmatch("#[0-9a-fA-F]{6}", text):
        raise BadInput(f"--background {text}: must be {', '.join(_COLOURS)} or #rrggbb, such as #7f7f7f")
    return text


Background = Annotated[str, AfterValidator(_colour), ValueName("COLOUR")]


class ImageRules(BaseModel):
    """What is done with the images."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    exif: Literal["apply", "ignore"] = "apply"
    """An image whose EXIF data say that it is to be turned or mirrored: turn it, as viewers and browsers do, or leave
    it as it is stored, as Matlab and PsychoPy do. Choose what the subject saw."""
    background: Background = "grey"
    """The colour behind transparent parts of an image: black, grey (128), white or #rrggbb. Choose what the subject
    saw."""
    copies: Literal["together", "as-dealt"] = "together"
    """Stimuli that show the same image under different ids: keep them in one split where splits are dealt at random, or
    deal each stimulus by itself. Splits that the source gives stay as they are."""
    decode: bool = True
    """Whether every image is decoded, so that damaged ones are refused and copies are found whatever their files are.
    Without it packing is faster, and only files that are alike byte by byte count as copies."""

    @property
    def background_rgb(self) -> tuple[int, int, int]:
        """The background as red, green and blue, 0 to 255."""
        digits = _COLOURS.get(self.background, self.background).removeprefix("#")
        red, green, blue = bytes.fromhex(digits)
        return red, green, blue

    def image_rules(self) -> "ImageRules":
        """These rules alone, without the other options of a command that has them."""
        return ImageRules(**{name: getattr(self, name) for name in ImageRules.model_fields})


DEFAULT_RULES = ImageRules()
