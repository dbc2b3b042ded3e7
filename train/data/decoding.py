"""Encoded image -> uint8 pixels of the size the network sees. Runs in the loader's workers; numpy in, numpy out."""

import numpy as np
import simplejpeg

from data_prep.common.errors import BadInput
from data_prep.common.image_decoding import DECODER, DIRECT_COLOURS, check_scans, decode
from data_prep.shards.folder import ShardSplit
from train.run.predictor import fit

VERSION = f"1, {DECODER}"  # pixels depend on this besides the encoded bytes; raise it when a change here changes them


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
        if (height, width) == pixels.shape[:2] and colours in DIRECT_COLOURS:
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
