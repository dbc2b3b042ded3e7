"""Small backbones with random weights, and images for them."""

import warnings
from pathlib import Path

import pytest
import timm
import torch
from helpers import ROOT
from requirements import installed_version

from data_prep.common.errors import BadInput
from train.models.backbone import Backbone
from train.run.recipe import Source

SIZE = 64
NEW_IN_TIMM = ("test_maxvit", "test_vit_relpos")  # of small networks for tests
NEWEST_TIMM = next(
    line.partition("==")[2] for line in (ROOT / "requirements.txt").read_text().split() if line.startswith("timm==")
)


def skip_unless_timm_has(name: str) -> None:
    """Skip a test of a network that this timm is too old for."""
    if not timm.is_model(name) and name in NEW_IN_TIMM and installed_version("timm") != NEWEST_TIMM:
        pytest.skip(f"timm {installed_version('timm')} has no {name}")


def backbone(
    name: str,
    cut: str | None = None,
    *,
    size: int = SIZE,
    weights: str | Path = "random",
    seed: int = 0,
    pools: bool = True,
    maps: bool = False,
) -> Backbone:
    """A backbone in evaluation mode; random weights are drawn with this seed."""
    skip_unless_timm_has(name)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's, when it resamples position embeddings
        return Backbone(Source(name=name, weights=str(weights), cut=cut), size, pools=pools, maps=maps).eval()


def refusal(name: str, cut: str | None = None, *, size: int = SIZE, weights: str | Path = "random") -> str:
    """The one-line error message for an invalid backbone."""
    with pytest.raises(BadInput) as caught:
        backbone(name, cut, size=size, weights=weights)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def images(count: int = 2, size: int = SIZE, seed: int = 0) -> torch.Tensor:
    """Random uint8 images (count, 3, size, size)."""
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed)).byte()
