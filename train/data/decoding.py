"""Encoded image -> uint8 pixels of the size the network sees. Runs in the loader's workers; numpy in, numpy out."""

import numpy as np
import PIL
import simplejpeg

from data_prep.common.errors import BadInput
from data_prep.common.image_decoding import MAX_PIXELS, check_scans, raw_pixels, rgb_image
from data_prep.shards.folder import ShardSplit
from train.run.predictor import fit

# Pixels depend on this besides the encoded bytes; raise the number when a change here changes pixels.
VERSION = f"1, simplejpeg {simplejpeg.__version__}, Pillow {PIL.__version__}"
_DIRECT_COLOURS = ("YCbCr", "RGB", "Gray")  # colours of a JPEG that libjpeg-turbo turns into RGB as Pillow does


def decode_into(pixels: np.ndarray, data: bytes | memoryview, encoding: str) -> None:
    """Decode an image into an array; a JPEG of that size is decoded in place.

    Args:
        pixels: uint8 (size, size, 3), contiguous, for instance a row of a batch. Undefined after an error.
        data: the encoded image.
        encoding: "jpg", "png" or "image.npy" (raw pixels).

    Raises:
        ValueError: as `decode`.
    """
    if encoding == "jpg":
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if (height, width) == pixels.shape[:2] and colours in _DIRECT_COLOURS:
            check_scans(data, height * width)
            simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=pixels)
            return
    pixels[:] = fit(decode(data, encoding), len(pixels))


def decode_at(split: ShardSplit, position: int, pixels: np.ndarray) -> None:
    """Decode a stimulus's image into an array, see `decode_into`.

    Raises:
        BadInput: it cannot be decoded, naming the tar and the stimulus.
    """
    data, encoding = split.image(position)
    try:
        decode_into(pixels, data, encoding)
    except ValueError as error:
        raise BadInput(f"{split.location(position)}.{encoding} cannot be decoded ({error})") from None


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
        if colours in _DIRECT_COLOURS and height * width <= MAX_PIXELS:
            check_scans(data, height * width)
            return simplejpeg.decode_jpeg(data, colorspace="RGB")
    if encoding == "image.npy":
        return raw_pixels(data)
    return np.asarray(rgb_image(data, encoding))
