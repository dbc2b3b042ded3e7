"""Encoded images are recognised by their bytes, converted without loss, and refused if damaged or too large."""

import zlib

import numpy as np
import pytest
from make_sources import encode, make_images
from recordings import pixels

from data_prep.common import image_decoding
from data_prep.common.image_decoding import encode_png, image_size, sniff_encoding


def test_images_are_recognised_by_content_and_kept_exactly():
    image = make_images(1)[0][0]
    png = encode_png(image)
    assert np.array_equal(pixels(png), image)
    assert sniff_encoding(png) == "png"
    assert sniff_encoding(encode(image, "jpg")) == "jpg"
    assert sniff_encoding(encode(image, "bmp")) is None
    assert image_size(png) == (32, 32, "RGB")


@pytest.mark.parametrize("array", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8)])
def test_encode_png_refuses_other_arrays(array):
    with pytest.raises(ValueError, match="uint8"):
        encode_png(array)


@pytest.mark.parametrize("encoding", ["jpg", "png"])
def test_an_image_cut_short_is_found_from_its_bytes(encoding):
    data = encode(make_images(1)[0][0], encoding)
    with pytest.raises(ValueError, match="cut short"):
        image_size(data[:-20])


def test_a_header_that_claims_gigapixels_is_refused():
    png = bytearray(encode_png(np.zeros((8, 8, 3), np.uint8)))
    for side in (12_000, 100_000):  # above our limit, above Pillow's
        png[16:24] = side.to_bytes(4, "big") * 2
        png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
        with pytest.raises(ValueError, match="megapixels"):
            image_size(bytes(png))


def test_postscript_is_not_tried():
    """Pillow would hand it to Ghostscript."""
    assert "EPS" not in image_decoding.FORMATS
    with pytest.raises(ValueError, match="not a readable image"):
        image_size(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
