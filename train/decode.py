"""Encoded picture -> uint8 pixels of the size the network sees. Runs in the loader's workers; numpy in, numpy out."""

import io

import numpy as np
import simplejpeg
from PIL import Image

from data_prep.pictures import picture_size


def decode(data: bytes, encoding: str) -> np.ndarray:
    """Decode a picture to RGB as torchvision would: greyscale is repeated, CMYK converted, transparency dropped.

    Args:
        data: the encoded picture.
        encoding: "jpg" or "png".

    Returns:
        uint8 (height, width, 3).

    Raises:
        ValueError: a picture that is damaged, absurdly large, or of more than 8 bits.
    """
    picture_size(data)
    if encoding == "jpg" and simplejpeg.decode_jpeg_header(data)[2] in ("YCbCr", "RGB", "Gray"):
        return simplejpeg.decode_jpeg(data, colorspace="RGB")
    try:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(str(error)) from None


def fit(pixels: np.ndarray, size: int) -> np.ndarray:
    """Bring a picture to (size, size, 3): the shorter side resized bicubically, the longer one cropped centrally.

    A picture that has the size already is returned as it is.
    """
    height, width = pixels.shape[:2]
    if (height, width) == (size, size):
        return pixels
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC, box=box))
