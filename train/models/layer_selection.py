"""Resolves `all`, names and globs of layers to modules of a network."""

import difflib
import fnmatch
import re

import torch

from data_prep.common.errors import BadInput
from train.models.backbone import Backbone
from train.models.features import LayerFeatures
from train.models.timm_networks import TimmNetwork
from train.models.truncation import is_dropped
from train.run.layer_names import JOIN, modules_of

STAGE_PATTERNS = (r"blocks\.\d+", r"stages\.\d+", r"layer\d+")  # names of the stages in most of timm's networks


def stage_names(net: TimmNetwork) -> list[str]:
    """The stages of a timm network in order: the children of `blocks` or `stages`, `layer1` ..., or timm's own list."""
    names = [name for name, _ in net.named_modules()]
    for pattern in STAGE_PATTERNS:
        if stages := [name for name in names if re.fullmatch(pattern, name)]:
            return stages
    return [stage["module"] for stage in net.feature_info]


def choose_layers(backbone: Backbone, patterns: list[str], image_size: int) -> list[str]:
    """Resolve `all`, names and globs to names of modules, in the order of the network.

    A `*` stands for one part of a dotted name: `blocks.*` are the stages, not what is in them. Names joined by `+` are
    one layer with the features of all (`modules_of`); those come after the others.

    Args:
        backbone: with the modules.
        patterns: `all`, names and globs.
        image_size: side in pixels of the images.

    Raises:
        BadInput: a pattern matches no module (names the nearest ones), or none whose output the forward pass
            gives.
    """
    selection = _LayerSelection(backbone, image_size)
    joined = [JOIN.join(selection.in_order(modules_of(pattern))) for pattern in patterns if JOIN in pattern]
    single = selection.in_order([pattern for pattern in patterns if JOIN not in pattern])
    return [*single, *dict.fromkeys(joined)]


def readable_layers(backbone: Backbone, image_size: int) -> list[str]:
    """The modules that have an output of their own in the forward pass, in the order of the network.

    Args:
        backbone: with the modules.
        image_size: side in pixels of the images.
    """
    net, device = backbone.net, backbone.mean.device
    names = [name for name, _ in net.named_modules() if name]
    image = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8, device=device)
    with torch.no_grad():
        features = LayerFeatures(backbone, names, grid=1)(image)
    return [name for name in names if name in features and not is_dropped(net.get_submodule(name))]


class _LayerSelection:
    def __init__(self, backbone: Backbone, image_size: int):
        net = backbone.net
        self._names = [name for name, _ in net.named_modules() if name]
        self._readable = set(readable_layers(backbone, image_size))
        self._stages = [name for name in stage_names(net) if name in self._readable]
        cuts = [] if backbone.cut is None else modules_of(backbone.cut)
        self._stages += [name for name in cuts if name not in self._stages]

    def in_order(self, patterns: list[str]) -> list[str]:
        """The layers that match any of the patterns, in the order of the network."""
        chosen = {name for pattern in patterns for name in self._matching(pattern)}
        return [name for name in self._names if name in chosen]

    def _matching(self, pattern: str) -> list[str]:
        matching = self._stages if pattern == "all" else [name for name in self._names if _matches(name, pattern)]
        if not matching:
            near = difflib.get_close_matches(pattern, self._names, n=3) or self._stages
            raise BadInput(f"layers: the network has no module {pattern!r}; nearest are {', '.join(near)}")
        readable = [name for name in matching if name in self._readable]
        if not readable:
            raise BadInput(f"layers: {pattern} has no output of its own in the forward pass; name another module")
        return readable


def _matches(name: str, pattern: str) -> bool:
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))
