"""Images as the subject saw them: one rule for all formats, applied when an image is packed.

What readers of a shard would see differently is stored as a lossless PNG of what was seen: an image turned by its EXIF
orientation, one with transparent parts, CMYK. All other JPEGs and PNGs keep their bytes; other formats become PNG.
"""

import re
import warnings
from dataclasses import dataclass, field

import numpy as np
from PIL import ExifTags, Image

from data_prep.common.image_decoding import (
    DEEP,
    MODES,
    decode,
    image_size,
    open_image,
    sniff_encoding,
    to_png,
)
from data_prep.shards.image_rules import ImageRules

_EXIF_IN_JPEG = b"Exif\0\0"
_CHUNKS_OF_PNG = (b"eXIf", b"tRNS", b"acTL", b"tiff:Orientation")  # of one that may look otherwise than it is stored
_ALPHA_COLOURS = (4, 6)  # colour types of a PNG
_PPM_LARGEST = re.compile(rb"P[2356](?:(?:\s|#[^\n]*\n)+\d+){2}(?:\s|#[^\n]*\n)+(\d+)")

_UPRIGHT = 1
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BACK = {6: 8, 8: 6}  # the orientation that undoes another; all others undo themselves

TURNED, NOT_TURNED, COMPOSITED, FROM_CMYK = "turned", "not_turned", "on_background", "from_cmyk"
NOTES = (TURNED, NOT_TURNED, COMPOSITED, FROM_CMYK)


@dataclass(frozen=True)
class ShownImage:
    """An image as it goes into a shard.

    Attributes:
        data: the encoded image.
        encoding: "jpg", "png" or "image.npy".
        width, height, mode: of it.
        pixels: uint8 (H, W, 3); None if it was not decoded.
        notes: what was done with it, some of NOTES.
        converted_from: the original format ("bmp"), if the bytes are not the source's.
    """

    data: bytes
    encoding: str
    width: int
    height: int
    mode: str
    pixels: np.ndarray | None
    notes: tuple[str, ...] = ()
    converted_from: str | None = None


@dataclass
class _Loaded:
    """A decoded image on its way to what was shown; `original` is the name of its format in lower case."""

    image: Image.Image
    original: str
    notes: list[str] = field(default_factory=list)


def as_shown(data: bytes, encoding: str, rules: ImageRules) -> ShownImage:
    """An image as the rules say that it was shown.

    Args:
        data: the encoded image.
        encoding: "image.npy" for raw pixels; otherwise the format is recognised by its bytes.
        rules: of the command.

    Raises:
        ValueError: an image that is damaged, too large, has more than 8 bits a channel or several frames.
    """
    width, height, mode = image_size(data)
    kind = encoding if encoding == "image.npy" else sniff_encoding(data)
    if kind is not None and not may_look_otherwise(data, kind, mode):
        pixels = decode(data, kind) if rules.decode else None
        return ShownImage(data, kind, width, height, mode, pixels)
    loaded = _load(data, rules)
    notes = tuple(loaded.notes)
    if kind is not None and notes in ((), (NOT_TURNED,)):
        return ShownImage(data, kind, width, height, mode, decode(data, kind) if rules.decode else None, notes)
    png = to_png(loaded.image)
    width, height = loaded.image.size
    pixels = decode(png, "png") if rules.decode else None
    return ShownImage(png, "png", width, height, loaded.image.mode, pixels, notes, loaded.original)


def may_look_otherwise(data: bytes, kind: str, mode: str) -> bool:
    """Whether an image may look otherwise than it is stored, from a quick look at its bytes.

    Args:
        data: the encoded image.
        kind: "jpg", "png" or "image.npy".
        mode: Pillow's.
    """
    if kind == "jpg":
        return mode == "CMYK" or (_EXIF_IN_JPEG in data and _orientation(open_image(data)) in _TURNS)
    return kind == "png" and (data[25] in _ALPHA_COLOURS or any(chunk in data for chunk in _CHUNKS_OF_PNG))


def _load(data: bytes, rules: ImageRules) -> _Loaded:
    """An image, turned and composited."""
    with open_image(data) as image:
        original = (image.format or "").lower().replace("mpo", "jpeg")
        try:
            _check_kind(image, data)
            loaded = _Loaded(image, original)
            if sniff_encoding(data) == "jpg":
                decode(data, "jpg")  # Pillow overlooks damage
            _turn(loaded, data, rules)
            _flatten(loaded, rules)
        except ValueError:
            raise
        except Exception as error:  # Pillow raises errors of any kind for damaged images
            raise ValueError(f"the image cannot be decoded ({error})") from error
        return loaded


def _check_kind(image: Image.Image, data: bytes) -> None:
    """Refuse what is not a single image of 8 bits a channel."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format not in ("MPO", "JPEG"):  # cameras keep a preview behind a JPEG
        raise ValueError(f"it has {frames} frames or pages; save the one that was shown as an image of its own")
    depths = getattr(image, "tag_v2", {}).get(ExifTags.Base.BitsPerSample, 8)
    largest = _PPM_LARGEST.match(data)
    if max(np.atleast_1d(depths)) > 8 or (largest is not None and int(largest[1]) > 255):
        raise ValueError(DEEP)
    if image.mode not in MODES:
        raise ValueError(
            f"{image.format} pixels of mode {image.mode} do not convert losslessly; save it as an 8-bit RGB PNG"
        )


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8: 1 for upright, and where there is none or it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow prints one for damaged data, without the file's name
            return image.getexif().get(ExifTags.Base.Orientation, _UPRIGHT)
    except Exception:  # Pillow raises errors of any kind for damaged data
        return _UPRIGHT


def _turn(loaded: _Loaded, data: bytes, rules: ImageRules) -> None:
    """Turn an image as its EXIF orientation says, or leave it as it is stored."""
    orientation = _orientation(loaded.image)
    is_tiff = loaded.image.format == "TIFF"
    loaded.image.load()
    if orientation not in _TURNS:
        return
    apply = rules.exif == "apply"
    loaded.notes.append(TURNED if apply else NOT_TURNED)
    if sniff_encoding(data) == "jpg" and loaded.image.mode != "CMYK":  # as the loader decodes it, and strictly
        loaded.image = Image.fromarray(decode(data, "jpg"))
    if is_tiff and not apply:  # Pillow has turned it
        loaded.image = loaded.image.transpose(_TURNS[_BACK.get(orientation, orientation)])
    elif apply and not is_tiff:
        loaded.image = loaded.image.transpose(_TURNS[orientation])


def _flatten(loaded: _Loaded, rules: ImageRules) -> None:
    """Put an image with transparent parts on the background, and turn CMYK into RGB."""
    image = loaded.image
    if image.mode == "CMYK":
        loaded.notes.append(FROM_CMYK)
        loaded.image = image.convert("RGB")
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        if np.asarray(rgba.getchannel("A")).min() < 255:
            loaded.notes.append(COMPOSITED)
            ground = Image.new("RGBA", rgba.size, (*rules.background_rgb, 255))
            rgba = Image.alpha_composite(ground, rgba)
        loaded.image = rgba.convert("RGB")
