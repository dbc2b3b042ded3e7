"""Small backbones with random weights, and images for them."""

import warnings

import pytest
import torch

from data_prep.common.errors import BadInput
from train.models.backbone import Backbone
from train.run.recipe import Source

SIZE = 64


def backbone(name, cut=None, *, size=SIZE, weights="random", seed=0, **reads) -> Backbone:
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's, when it resamples position embeddings
        return Backbone(Source(name=name, weights=str(weights), cut=cut), size, **reads).eval()


def refusal(*args, **options) -> str:
    with pytest.raises(BadInput) as caught:
        backbone(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def images(count=2, size=SIZE, seed=0) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed)).byte()
