"""Encoded images: detect their format and size, decode them to RGB, convert other formats to lossless PNG."""

import io
import warnings

import numpy as np
import PIL
import simplejpeg
from PIL import Image

from data_prep.common.safe_reading import parse_npy

MAX_PIXELS = 100_000_000  # a header that claims more is damaged or malicious
MAX_SCANS = 200  # of a JPEG; each scan visits all pixels, and camera files have about ten
QUICK_STEPS = 2**34  # pixels x bytes of a JPEG that decodes quickly however many scans it has
PNG_LEVEL = 1  # zlib's fastest: three times as fast as Pillow's default for about a tenth more bytes

# Formats that Pillow may try; some of its other readers start external programs (EPS: Ghostscript).
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK")  # of 8 bits or fewer a channel, with a plain way to RGB
DEEP = "it has more than 8 bits a channel, and a network is shown 8: save it as an 8-bit RGB or grey image"

DECODER = f"simplejpeg {simplejpeg.__version__}, Pillow {PIL.__version__}"  # pixels depend on these
DIRECT_COLOURS = ("YCbCr", "RGB", "Gray")  # colours of a JPEG that libjpeg-turbo turns into RGB as Pillow does
_INK_COLOURS = ("CMYK", "YCCK")

_RAW_START = b"\x93NUMPY"
_JPEG_SCAN, _JPEG_END = b"\xff\xda", b"\xff\xd9"
_JPEG_MODES = {"YCbCr": "RGB", "RGB": "RGB", "Gray": "L"}  # by libjpeg-turbo's name of the colour space
_PNG_DEPTH = 24  # the byte of a PNG with its bits per channel
_PNG_END = b"IEND\xaeB`\x82"
_FORMATS_OF = {"jpg": ("JPEG",), "png": ("PNG",)}  # allowed for a member with that extension


def sniff_encoding(data: bytes) -> str | None:
    """The encoding according to the first bytes, not the file name: "jpg", "png", or None for anything else."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    return None


def image_size(data: bytes) -> tuple[int, int, str]:
    """Read width, height (pixels) and Pillow's mode ("RGB", "L", ...) from the header, without decoding.

    Raises:
        ValueError: not an image in one of `FORMATS`, more than `MAX_PIXELS`, or a JPEG or PNG that was cut short.
    """
    if data[: len(_RAW_START)] == _RAW_START:
        height, width = raw_pixels(data).shape[:2]
        return width, height, "RGB"
    width, height, mode = _jpeg_size(data) or _other_size(data)
    if mode[0] in "IF" or (sniff_encoding(data) == "png" and data[_PNG_DEPTH] > 8):
        raise ValueError(DEEP)
    if not _is_whole(data):
        raise ValueError("the image is cut short (its end marker is missing)")
    if sniff_encoding(data) == "jpg":
        check_scans(data, width * height)
    return width, height, mode


def check_scans(data: bytes | memoryview, pixels: int) -> None:
    """Refuse a small JPEG that would make a decoder visit its pixels thousands of times.

    Raises:
        ValueError: more than `MAX_SCANS`.
    """
    if pixels * len(data) <= QUICK_STEPS:
        return
    scans = bytes(data).count(_JPEG_SCAN)
    if scans > MAX_SCANS:
        raise ValueError(f"the image has {scans} scans, more than {MAX_SCANS}")


def decode(data: bytes | memoryview, encoding: str) -> np.ndarray:
    """Decode an image to RGB as torchvision would: greyscale is repeated, CMYK converted, transparency dropped.

    Args:
        data: the encoded image.
        encoding: "jpg", "png" or "image.npy" (raw pixels).

    Returns:
        uint8 (height, width, 3).

    Raises:
        ValueError: an image that is damaged, absurdly large, or of more than 8 bits.
    """
    if encoding == "jpg":
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours in DIRECT_COLOURS and height * width <= MAX_PIXELS:
            check_scans(data, height * width)
            return simplejpeg.decode_jpeg(data, colorspace="RGB")
        if colours in _INK_COLOURS:
            simplejpeg.decode_jpeg(data, colorspace="CMYK")  # Pillow would not notice damage
    if encoding == "image.npy":
        return raw_pixels(data)
    return np.asarray(rgb_image(data, encoding))


def rgb_image(data: bytes | memoryview, encoding: str) -> Image.Image:
    """Decode a member of a shard to RGB with Pillow.

    Args:
        data: of the member.
        encoding: its extension; data of any other format is refused.

    Raises:
        ValueError: an image that is damaged, absurdly large, of more than 8 bits, or of another format.
    """
    if encoding == "image.npy":
        return Image.fromarray(raw_pixels(data))
    data = bytes(data)
    image_size(data)
    with open_image(data, _FORMATS_OF[encoding]) as image:
        try:
            return image.convert("RGB")
        except Exception as error:  # Pillow raises errors of any kind for damaged images
            raise ValueError(str(error)) from None


def _jpeg_size(data: bytes) -> tuple[int, int, str] | None:
    """Width, height and mode of a JPEG, ten times as fast as Pillow; None for anything out of the ordinary."""
    if sniff_encoding(data) != "jpg":
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    ordinary = colours in _JPEG_MODES and height * width <= MAX_PIXELS
    return (width, height, _JPEG_MODES[colours]) if ordinary else None


def _other_size(data: bytes) -> tuple[int, int, str]:
    with open_image(data) as image:
        width, height = image.size
        return width, height, image.mode


def raw_pixels(data: bytes | memoryview) -> np.ndarray:
    """The pixels of a raw image (.npy): uint8 (H, W, 3); grey values are repeated.

    Raises:
        ValueError: not an npy array, not uint8, or of another shape than (H, W), (H, W, 1) or (H, W, 3).
    """
    try:
        array = parse_npy(data)
    except ValueError as error:
        raise ValueError(f"not a complete npy array ({error})") from None
    if array.ndim == 2:
        array = array[..., None]
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3) or 0 in array.shape:
        raise ValueError(f"raw pixels must be uint8 (H, W, 3), not {array.dtype} {array.shape}")
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


def encode_png(array: np.ndarray) -> bytes:
    """Encode uint8 (H, W, 3) as lossless PNG.

    Raises:
        ValueError: another dtype or shape.
    """
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"an image must be uint8 (H, W, 3), not {array.dtype} {array.shape}")
    return to_png(Image.fromarray(np.ascontiguousarray(array)))


def open_image(data: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Open an image with Pillow, without decoding it.

    Raises:
        ValueError: not in one of these formats, or more than `MAX_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # checked below against our own limit
            image = Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError as error:
        raise ValueError(f"the image claims more than {MAX_PIXELS // 10**6} megapixels") from error
    except Exception as error:  # Pillow raises errors of any kind for damaged images
        raise ValueError(f"not a readable image ({', '.join(formats)})") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"the image claims {width} x {height} pixels, more than {MAX_PIXELS // 10**6} megapixels")
    return image


def _is_whole(data: bytes) -> bool:
    """False for a JPEG or PNG without its end. The markers of a JPEG cannot occur in its pixel data by chance."""
    encoding = sniff_encoding(data)
    if encoding == "jpg":  # a thumbnail's end marker lies before the image's own scan
        return data.endswith(_JPEG_END) or data.rfind(_JPEG_END) > data.rfind(_JPEG_SCAN)
    return encoding is None or data.rfind(_PNG_END) >= 0


def to_png(image: Image.Image) -> bytes:
    """Encode an image, of a mode that PNG has, as lossless PNG without anything beside its pixels."""
    file, bare = io.BytesIO(), image.copy()
    bare.info = {}
    bare.save(file, format="PNG", compress_level=PNG_LEVEL)
    return file.getvalue()
