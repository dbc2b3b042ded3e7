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
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")  # 8 bits or fewer a channel, and PNG keeps them exactly

DECODER = f"simplejpeg {simplejpeg.__version__}, Pillow {PIL.__version__}"  # pixels depend on these
DIRECT_COLOURS = ("YCbCr", "RGB", "Gray")  # colours of a JPEG that libjpeg-turbo turns into RGB as Pillow does

_RAW_START = b"\x93NUMPY"
_JPEG_SCAN, _JPEG_END = b"\xff\xda", b"\xff\xd9"
_JPEG_MODES = {"YCbCr": "RGB", "RGB": "RGB", "Gray": "L"}  # by libjpeg-turbo's name of the colour space
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
    if mode[0] in "IF":
        raise ValueError(f"pixels of mode {mode} have more than 8 bits; save it as an 8-bit RGB or grey image")
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
    with _open(data, _FORMATS_OF[encoding]) as image:
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
    with _open(data) as image:
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
    return _to_png(Image.fromarray(np.ascontiguousarray(array)))


def convert_to_png(data: bytes) -> tuple[bytes, str]:
    """Re-encode an image (its first frame) as lossless PNG.

    Returns:
        The PNG and the name of the original format in lower case ("bmp").

    Raises:
        ValueError: unreadable, too large, or with pixels that an 8-bit PNG does not keep exactly.
    """
    with _open(data) as image:
        if image.mode not in PNG_MODES:
            raise ValueError(
                f"{image.format} pixels of mode {image.mode} do not convert losslessly; save it as an 8-bit RGB PNG"
            )
        try:
            image.load()
        except Exception as error:  # Pillow raises errors of any kind for damaged images
            raise ValueError(f"the image cannot be decoded ({error})") from error
        assert image.format is not None, "it was read from a file"
        return _to_png(image), image.format.lower()


def packable(data: bytes) -> tuple[bytes, str, dict[str, str]]:
    """An image as it goes into a shard: JPEG and PNG as they are, anything else as lossless PNG.

    Returns:
        The bytes, their encoding, and a note for the stimulus's facts if the image was converted.

    Raises:
        ValueError: as `image_size` and `convert_to_png`.
    """
    encoding = sniff_encoding(data)
    image_size(data)
    if encoding is not None:
        return data, encoding, {}
    png, original = convert_to_png(data)
    return png, "png", {"converted_from": original}


def _open(data: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
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


def _to_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=PNG_LEVEL)
    return file.getvalue()
