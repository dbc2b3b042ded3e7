"""Simple CNNs of two and three layers, registered with timm as `cnn2` and `cnn3`."""

from itertools import pairwise

import torch
from timm.models import register_model
from torch import nn

WIDTHS = (32, 64, 128)  # channels of the layers


class SmallCnn(nn.Module):
    """Layers of 5 x 5 convolution with stride 2, rectification and 2 x 2 max-pooling; no normalisation.

    Each layer divides the sides of its map by 4. The network has timm's interface (`forward_features`, `forward_head`,
    `num_features`, `feature_info`, `pretrained_cfg`), so that it can be used wherever a timm network can.

    Args:
        layers: 1 to 3.
    """

    def __init__(self, layers: int):
        super().__init__()
        channels = (3, *WIDTHS[:layers])
        self.stages = nn.Sequential(*(_layer(before, after) for before, after in pairwise(channels)))
        self.num_features = channels[-1]
        self.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "input_size": (3, 224, 224)}
        self.feature_info = [
            {"num_chs": width, "reduction": 4 ** (index + 1), "module": f"stages.{index}"}
            for index, width in enumerate(channels[1:])
        ]

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """(b, 3, h, w) -> (b, channels, about h / 4^layers, about w / 4^layers)."""
        return self.stages(images)

    def forward_head(self, features: torch.Tensor, pre_logits: bool = True) -> torch.Tensor:
        """Map (b, channels, rows, columns) -> its mean over positions (b, channels); there is no classifier."""
        return features.mean((2, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(b, 3, h, w) -> (b, channels)."""
        return self.forward_head(self.forward_features(images))


def _layer(before: int, after: int) -> nn.Sequential:
    convolution = nn.Conv2d(before, after, kernel_size=5, stride=2, padding=2)
    nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)
    return nn.Sequential(convolution, nn.ReLU(), nn.MaxPool2d(2))


# The ignored options that timm passes concern pretrained weights and classifiers; these networks have neither.


@register_model
def cnn2(pretrained: bool = False, **_options) -> SmallCnn:
    """Two layers, 54,000 parameters."""
    return SmallCnn(2)


@register_model
def cnn3(pretrained: bool = False, **_options) -> SmallCnn:
    """Three layers, 259,000 parameters."""
    return SmallCnn(3)
