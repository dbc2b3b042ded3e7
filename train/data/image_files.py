"""Images as data_prep/pack.py would pack them by default: of files, of Pillow, and a folder of them as stimuli."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from data_prep.common.errors import BadInput
from data_prep.common.image_decoding import MODES
from data_prep.common.safe_reading import is_name, read_regular_file
from data_prep.shards.image_rules import DEFAULT_RULES
from data_prep.shards.shown_images import as_shown
from data_prep.sources.files.image_files import MAX_FILE_BYTES
from train.data.batch_buffers import BatchBuffers
from train.data.batches import SiteGroup
from train.data.order import Layout
from train.data.stimuli import RecordingStimuli, StimulusSet
from train.run.predictor import fit

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm")


def read_image(path: Path) -> np.ndarray:
    """The pixels of an image file as pack.py shows them by default: uint8 (height, width, 3).

    Turned as its EXIF data say, transparent parts on grey.

    Raises:
        BadInput: it is missing, damaged, absurdly large, or no image of 8 bits a channel.
    """
    try:
        pixels = as_shown(read_regular_file(path, MAX_FILE_BYTES), "", DEFAULT_RULES).pixels
    except IsADirectoryError:
        raise BadInput(f"{path} is a folder, not an image; give the paths of its images") from None
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise BadInput(f"{path} cannot be used as an image: {error}") from None
    assert pixels is not None, "the default rules decode"
    return pixels


def as_pixels(image: Image.Image) -> np.ndarray:
    """An image of Pillow as `read_image` would read it: uint8 (height, width, 3).

    Raises:
        BadInput: it is damaged, or has more than 8 bits a channel.
    """
    if image.mode not in MODES:
        raise BadInput(f"an image of mode {image.mode} does not convert losslessly; give an 8-bit RGB or grey image")
    try:
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, (*DEFAULT_RULES.background_rgb, 255)), rgba)
        return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow decodes late, and raises errors of any kind for damaged images
        raise BadInput(f"an image of Pillow cannot be decoded ({error})") from None


def find_images(folder: Path) -> list[str]:
    """The image files in a folder and its sub-folders, by their paths below it, sorted; hidden ones are left out.

    Raises:
        BadInput: there are none, or one has a name that cannot be printed.
    """
    names = []
    for above, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
        below = Path(above).relative_to(folder)
        images = [name for name in files if name.lower().endswith(ENDINGS) and not name.startswith(".")]
        names += [(below / name).as_posix() for name in images]
    if not names:
        raise BadInput(f"{folder} contains no images ({', '.join(ENDINGS)})")
    for name in names:
        if not is_name(name):
            raise BadInput(f"{folder}: {name[:100]!r}: the name is too long or not printable; rename it")
    return sorted(names)


class FileImages(StimulusSet):
    """Image files as stimuli without responses; their paths are the ids.

    Args:
        folder: of the files.
        names: paths below it.
        size: side in pixels of the images to deliver.
    """

    labels = None

    def __init__(self, folder: Path, names: list[str], size: int):
        self._folder, self.stimulus_ids, self.size = folder, names, size
        self._buffers = BatchBuffers()

    @property
    def recordings(self) -> tuple[RecordingStimuli, ...]:
        """None."""
        return ()

    def images(self, positions: np.ndarray) -> torch.Tensor:
        """See `StimulusSet.images`."""
        images = self._buffers.allocate((len(positions), self.size, self.size, 3))
        pixels, done = images.numpy(), dict[int, int]()  # row of each position
        for row, position in enumerate(positions.tolist()):
            if position in done:  # padding repeats a stimulus
                pixels[row] = pixels[done[position]]
                continue
            pixels[row] = fit(read_image(self._folder / self.stimulus_ids[position]), self.size)
            done[position] = row
        return images

    def rates_of(self, positions: np.ndarray) -> None:
        """There are none."""
        return

    def groups_of(self, batch: np.ndarray) -> tuple[SiteGroup, ...]:
        """There are none."""
        return ()

    def layout(self, block_shards: int | None) -> Layout:
        """No order of training is needed."""
        return None

    def shuffle_responses(self, seed: int) -> None:
        """There are none to shuffle."""
        raise ValueError("image files have no responses")

    def shards_to_fetch(self, positions: np.ndarray) -> np.ndarray:
        """There are none."""
        return np.empty(0, np.int64)
