"""Predict responses to images with an exported run, probe or ensemble. Needs torch, numpy and Pillow, no Spiketune.

    from predictor import Predictor

    predictor = Predictor()                        # loads the files beside this one
    rates = predictor.predict(["a.jpg", "b.png"])  # (2, sites), in the recording's units
    predictor.site_ids, predictor.units

train/export.py writes this file, `network.pt2` (all networks, from torch.export) and `predictor.json` into one folder.
They may also lie in a zip archive on sys.path, as one file.
Load networks only from people you trust: they are programs.
"""

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

if TYPE_CHECKING:
    import torch

GREY = (128, 128, 128, 255)  # behind transparent parts of an image

ImageLike = str | Path | Image.Image | np.ndarray
Images = ImageLike | Sequence[ImageLike]


def fit(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resize an image so that its shorter side fits, bicubically, and crop the longer one centrally: (size, size, 3).

    An image of that size is returned unchanged.
    """
    height, width = pixels.shape[:2]
    if (height, width) == (size, size):
        return pixels
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC, box=box))


@contextmanager
def float32_convolutions() -> Iterator[None]:
    """Convolve in float32 on a GPU, as train/evaluate.py does; torch rounds to TF32 there unless told otherwise."""
    import torch

    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _read(folder: str | Path | None, name: str) -> bytes:
    """The content of a file in a folder; by default in that of this file, which may lie in a zip archive."""
    if folder is not None:
        return (Path(folder) / name).read_bytes()
    return globals()["__loader__"].get_data(str(Path(__file__).parent / name))


class Predictor:
    """An exported network.

    Args:
        folder: that holds `network.pt2` and `predictor.json`; by default the folder, or the zip archive, of this file.
        device: of torch, e.g. "cuda".

    Attributes:
        site_ids: sites, in the order of the predicted rates; None for a network without rates.
        classes: in the order of the probabilities; None for a network without classes.
        units: of the rates.
        image_sizes: sides in pixels of the images that the networks see.
    """

    def __init__(self, folder: str | Path | None = None, device: str = "cpu"):
        import torch
        from torch.export.passes import move_to_device_pass

        facts = json.loads(_read(folder, "predictor.json"))
        self.site_ids: list[str] | None = facts["site_ids"]
        self.classes: list[str] | None = facts["classes"]
        self.units: str = facts["units"]
        self.image_sizes: list[int] = facts["image_sizes"]
        self._torch, self._device = torch, device
        program = torch.export.load(io.BytesIO(_read(folder, "network.pt2")))
        # `.to` alone would leave the device in operations that name the one they were exported on.
        self._network = move_to_device_pass(program, device).module()

    def predict(self, images: Images, batch_size: int = 32) -> np.ndarray:
        """Predict the rates of all sites; NaN for a site that could not be fitted.

        Images are turned as their EXIF data say, and transparent parts are grey.

        Args:
            images: file names, PIL images, or uint8 arrays (height, width, 3) or (height, width) of any size; all in
                one array (images, height, width, 3); or a single image.
            batch_size: images in one forward pass.

        Returns:
            float32 (images, sites), in `units`.
        """
        if self.site_ids is None:
            raise ValueError("this network predicts classes only; use predict_classes")
        return self._run(images, batch_size, "rates", len(self.site_ids))

    def predict_classes(self, images: Images, batch_size: int = 32) -> np.ndarray:
        """Probabilities of all `classes`: float32 (images, classes)."""
        if self.classes is None:
            raise ValueError("this network predicts rates only; use predict")
        logits = self._torch.from_numpy(self._run(images, batch_size, "classes", len(self.classes)))
        return logits.softmax(1).numpy()

    def _run(self, images: Images, batch_size: int, output: str, columns: int) -> np.ndarray:
        """One of the network's outputs, float32 (images, columns)."""
        if isinstance(images, str | Path | Image.Image) or (isinstance(images, np.ndarray) and images.ndim in (2, 3)):
            images = [images]
        rows = [np.empty((0, columns), np.float32)]
        for start in range(0, len(images), batch_size):
            pixels = [self._pixels(image) for image in images[start : start + batch_size]]
            batch = [self._batch(pixels, size) for size in self.image_sizes]
            with self._torch.no_grad(), float32_convolutions():
                rows.append(self._network(batch)[output].cpu().numpy())
        return np.concatenate(rows)

    def _batch(self, pixels: Sequence[np.ndarray], size: int) -> "torch.Tensor":
        """Images as networks of a size take them, uint8 (images, 3, size, size)."""
        fitted = np.stack([fit(image, size) for image in pixels])
        return self._torch.from_numpy(fitted).permute(0, 3, 1, 2).to(self._device)

    def _pixels(self, image: ImageLike) -> np.ndarray:
        """An image as it is seen, uint8 (height, width, 3)."""
        if isinstance(image, str | Path):
            with Image.open(image) as opened:
                opened.load()
                image = opened
        if isinstance(image, Image.Image):
            if image.mode[0] in "IF":  # Pillow would clip what is above 255
                raise ValueError(f"an image must have 8 bits a channel, not pixels of mode {image.mode}")
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                rgba = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", rgba.size, GREY), rgba)
            image = np.asarray(image.convert("RGB"))
        if image.ndim == 2:
            image = np.repeat(image[..., None], 3, axis=2)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"an image must be uint8 (height, width, 3), not {image.dtype} {image.shape}")
        return image
