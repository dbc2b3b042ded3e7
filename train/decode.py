"""Encoded picture -> uint8 pixels of the size the network sees. Runs in the loader's workers; numpy in, numpy out."""

import io

import numpy as np
import PIL
import simplejpeg
from PIL import Image

from data_prep.pictures import MAX_PIXELS, picture_size, raw_pixels
from train.predictor import fit

# What pixels depend on besides the encoded bytes; raise the number when this file comes to decode otherwise.
VERSION = f"1, simplejpeg {simplejpeg.__version__}, Pillow {PIL.__version__}"
_DIRECT = ("YCbCr", "RGB", "Gray")  # colours of a JPEG that libjpeg-turbo turns into RGB as Pillow does


def decode_into(place: np.ndarray, data: bytes | memoryview, encoding: str) -> None:
    """Decode a picture to where it belongs; a JPEG that has the size already is written there and nowhere else.

    Args:
        place: uint8 (size, size, 3), contiguous, for instance a row of a batch. Undefined after an error.
        data: the encoded picture.
        encoding: "jpg", "png" or "image.npy" (raw pixels).

    Raises:
        ValueError: as `decode`.
    """
    if encoding == "jpg":
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if (height, width) == place.shape[:2] and colours in _DIRECT:
            simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=place)
            return
    place[:] = fit(decode(data, encoding), len(place))


def decode(data: bytes | memoryview, encoding: str) -> np.ndarray:
    """Decode a picture to RGB as torchvision would: greyscale is repeated, CMYK converted, transparency dropped.

    Args:
        data: the encoded picture.
        encoding: "jpg", "png" or "image.npy" (raw pixels).

    Returns:
        uint8 (height, width, 3).

    Raises:
        ValueError: a picture that is damaged, absurdly large, or of more than 8 bits.
    """
    if encoding == "jpg":
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours in _DIRECT and height * width <= MAX_PIXELS:
            return simplejpeg.decode_jpeg(data, colorspace="RGB")
    if encoding == "image.npy":
        return raw_pixels(data)
    data = bytes(data)
    picture_size(data)
    try:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(str(error)) from None
