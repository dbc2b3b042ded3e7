"""Random changes of training images, on the device, for a whole batch at once.

The random numbers come with the batch (`train.data.order.augmentation_draws`): they depend on seed, epoch and step, but
not on the number of ranks.
"""

import torch
import torch.nn.functional as F

from train.run.recipe import Augment

KINDS = 6  # random numbers per stimulus: shift right, shift down, zoom, brightness, contrast, flip


def augment(images: torch.Tensor, draws: torch.Tensor, settings: Augment) -> torch.Tensor:
    """Shift, zoom, mirror, and change brightness and contrast.

    Areas that a shift or a smaller image uncovers repeat the image's edge. Without zoom, shifts are by whole pixels, so
    that nothing is interpolated.

    Args:
        images: uint8 (b, 3, size, size).
        draws: (b, KINDS), uniform in [-1, 1).
        settings: the largest changes.

    Returns:
        float32 (b, 3, size, size), 0..255.
    """
    pixels = images.float()
    right, down, zoom, brightness, contrast, flip = draws.unbind(1)
    if settings.shift or settings.zoom or settings.flip:
        mirror = torch.where((flip > 0) & settings.flip, -1.0, 1.0)
        pixels = _moved(pixels, settings, right, down, 1 + settings.zoom * zoom, mirror)
    if settings.contrast:
        mean = pixels.mean((1, 2, 3), keepdim=True)
        pixels = mean + (pixels - mean) * _per_image(1 + settings.contrast * contrast)
    if settings.brightness:
        pixels = pixels * _per_image(1 + settings.brightness * brightness)
    return pixels.clamp(0, 255)


def _per_image(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None, None]


def _moved(
    pixels: torch.Tensor,
    settings: Augment,
    right: torch.Tensor,
    down: torch.Tensor,
    scale: torch.Tensor,
    mirror: torch.Tensor,
) -> torch.Tensor:
    size = pixels.shape[-1]
    shift = torch.stack([right, down], dim=1) * settings.shift * size
    if not settings.zoom:
        shift = shift.round()
    # Rows of the affine map from positions in the new image to positions in the old one, in half sides.
    x = torch.stack([mirror / scale, torch.zeros_like(scale), -shift[:, 0] * 2 / size], dim=1)
    y = torch.stack([torch.zeros_like(scale), 1 / scale, -shift[:, 1] * 2 / size], dim=1)
    grid = F.affine_grid(torch.stack([x, y], dim=1), list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return moved.contiguous(memory_format=torch.channels_last)
