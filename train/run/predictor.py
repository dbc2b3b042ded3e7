"""Predict responses to images with an exported network. Needs torch, numpy and Pillow, and no Spiketune.

    from predictor import Predictor

    predictor = Predictor()                        # loads the files beside this one
    rates = predictor.predict(["a.jpg", "b.png"])  # (2, sites), in the recording's units
    predictor.site_ids, predictor.units

train/export.py writes this file, `network.pt2` (the network, from torch.export) and `predictor.json` into one folder.
Load networks only from people you trust: they are programs.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

ImageLike = str | Path | Image.Image | np.ndarray


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


class Predictor:
    """An exported network.

    Args:
        folder: that holds `network.pt2` and `predictor.json`; by default the folder of this file.
        device: of torch, e.g. "cuda".

    Attributes:
        site_ids: sites, in the order of the predicted rates; None for a network without rates.
        classes: in the order of the probabilities; None for a network without classes.
        units: of the rates.
        image_size: side in pixels of the images that the network sees.
    """

    def __init__(self, folder: str | Path | None = None, device: str = "cpu"):
        import torch

        folder = Path(__file__).resolve().parent if folder is None else Path(folder)
        facts = json.loads((folder / "predictor.json").read_text(encoding="utf-8"))
        self.site_ids: list[str] | None = facts["site_ids"]
        self.classes: list[str] | None = facts["classes"]
        self.units: str = facts["units"]
        self.image_size: int = facts["image_size"]
        self._torch, self._device = torch, device
        self._network = torch.export.load(folder / "network.pt2").module().to(device)

    def predict(self, images: Sequence[ImageLike] | np.ndarray, batch_size: int = 32) -> np.ndarray:
        """Predict the rates of all sites.

        Args:
            images: file names, PIL images, or uint8 arrays (height, width, 3) of any size, or all in one array
                (images, height, width, 3).
            batch_size: images in one forward pass.

        Returns:
            float32 (images, sites), in `units`.
        """
        if self.site_ids is None:
            raise ValueError("this network predicts classes only; use predict_classes")
        return self._run(images, batch_size, "rates", len(self.site_ids))

    def predict_classes(self, images: Sequence[ImageLike] | np.ndarray, batch_size: int = 32) -> np.ndarray:
        """Probabilities of all `classes`: float32 (images, classes)."""
        if self.classes is None:
            raise ValueError("this network predicts rates only; use predict")
        logits = self._torch.from_numpy(self._run(images, batch_size, "classes", len(self.classes)))
        return logits.softmax(1).numpy()

    def _run(self, images: Sequence[ImageLike] | np.ndarray, batch_size: int, output: str, columns: int) -> np.ndarray:
        """One of the network's outputs, float32 (images, columns)."""
        rows = [np.empty((0, columns), np.float32)]
        for start in range(0, len(images), batch_size):
            batch = np.stack([self._pixels(image) for image in images[start : start + batch_size]])
            pixels = self._torch.from_numpy(batch).permute(0, 3, 1, 2).to(self._device)
            with self._torch.no_grad():
                rows.append(self._network(pixels)[output].cpu().numpy())
        return np.concatenate(rows)

    def _pixels(self, image: ImageLike) -> np.ndarray:
        """An image as the network takes it, uint8 (size, size, 3)."""
        if isinstance(image, str | Path):
            with Image.open(image) as opened:
                image = opened.convert("RGB")
        if isinstance(image, Image.Image):
            image = np.asarray(image.convert("RGB"))
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"an image must be uint8 (height, width, 3), not {image.dtype} {image.shape}")
        return fit(image, self.image_size)
