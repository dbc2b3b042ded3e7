"""Images in any form that a program has them in, as batches of pixels for networks."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data_prep.common.errors import BadInput
from train.data.image_files import as_pixels, read_image
from train.run.predictor import fit

ImageLike = str | Path | Image.Image | np.ndarray
"""The path of a file, an image of Pillow, or uint8 (height, width, 3) or (height, width), of any size."""
Images = ImageLike | Iterable[ImageLike]
"""One image, or several: a list, a generator, or an array uint8 (images, height, width, 3)."""

MOST_THREADS = 8


def batches(images: Images, sizes: Sequence[int], batch_size: int) -> Iterator[dict[int, torch.Tensor]]:
    """Decode images and resize them as the loader does.

    Args:
        images: to decode, batch by batch.
        sizes: sides in pixels of the images that networks take.
        batch_size: images in a batch.

    Yields:
        By size, the same images uint8 (b, 3, size, size).

    Raises:
        BadInput: something is no image.
    """
    if batch_size < 1:
        raise BadInput(f"batch_size must be at least 1, not {batch_size}")
    remaining = _each(images)
    with ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_THREADS)) as pool:
        while batch := list(islice(remaining, batch_size)):
            yield _fitted(list(pool.map(pixels_of, batch)), sizes, pool.map)


def _fitted(
    pixels: Sequence[np.ndarray], sizes: Sequence[int], run: Callable[..., Iterator[np.ndarray]]
) -> dict[int, torch.Tensor]:
    fitted = {}
    for size in sizes:
        stacked = np.stack(list(run(lambda image, size=size: fit(image, size), pixels)))
        fitted[size] = torch.from_numpy(stacked).permute(0, 3, 1, 2)
    return fitted


def _each(images: Images) -> Iterator[ImageLike]:
    if isinstance(images, np.ndarray):
        are_several = images.ndim == 4 or images.dtype.kind in "OU"  # an array of paths
        return iter(images) if are_several else iter([images])
    if isinstance(images, str | Path | Image.Image) or not isinstance(images, Iterable):
        return iter([images])
    return iter(images)


def pixels_of(image: ImageLike) -> np.ndarray:
    """The pixels of an image, uint8 (height, width, 3).

    Raises:
        BadInput: it is no image.
    """
    match image:
        case str() | Path():
            return read_image(Path(image))
        case Image.Image():
            return as_pixels(image)
        case np.ndarray():
            return _checked(image)
    raise BadInput(f"an image must be a path, an image of Pillow or a uint8 array, not {type(image).__name__}")


def _checked(array: np.ndarray) -> np.ndarray:
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=2)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise BadInput(
            f"an array must be uint8 (height, width, 3), with values of 0 to 255, not {array.dtype} {array.shape}"
        )
    return np.ascontiguousarray(array)
