"""Weights for a network from a file or from a run of ours; nothing in them is unpickled."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from data_prep.errors import BadInput

# What other trainers put around a state dict, and what wrappers put before its names.
CONTAINERS = ("state_dict", "model", "model_state_dict")
PREFIXES = ("module.", "model.")
OUR_PREFIX = "backbone.net."  # in the checkpoints of train/finetune.py
NAMES_SHOWN = 3


def load_into(net: nn.Module, source: Path) -> str:
    """Load all tensors of a network, by name; what the file has beyond them is left out.

    Args:
        net: the network, without a classifier.
        source: a .safetensors file, a torch checkpoint of plain tensors, or a run folder (its best epoch).

    Returns:
        What was loaded and what was left out, in words.

    Raises:
        BadInput: the file cannot be read, or lacks tensors of the network or has them in another shape.
    """
    path = source / "checkpoints" / "best" / "network.safetensors" if source.is_dir() else source
    tensors, expected = _named_as_in_timm(read_weights(path)), net.state_dict()
    missing = [name for name in expected if name not in tensors]
    odd = [name for name in expected if name in tensors and tensors[name].shape != expected[name].shape]
    unexpected = [name for name in tensors if name not in expected]
    if missing or odd:
        faults = [("missing", missing), ("of another shape", odd), ("unexpected", unexpected)]
        raise BadInput(
            f"backbone.weights: {path} does not fit the network: "
            + "; ".join(f"{len(names)} tensors {what} ({_some(names)})" for what, names in faults if names)
        )
    net.load_state_dict({name: tensors[name] for name in expected})
    left = f", leaving out {len(unexpected)} that the network does not have ({_some(unexpected)})" if unexpected else ""
    return f"{path}: all {len(expected)} tensors of the network{left}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")


def _named_as_in_timm(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under the names they have in a timm network."""
    ours = {name.removeprefix(OUR_PREFIX): x for name, x in tensors.items() if name.startswith(OUR_PREFIX)}
    if ours:
        return ours
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): x for name, x in tensors.items()}
    return tensors


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name from a .safetensors file, or from a torch checkpoint read with weights_only.

    Raises:
        BadInput: no such file, one that is damaged, or one that holds more than tensors.
    """
    if not path.is_file():
        raise BadInput(
            f"backbone.weights: {path} is no file; give pretrained, random, a .safetensors/.pth file or a run folder"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise many kinds
        raise BadInput(f"backbone.weights: {path} is not readable as plain tensors ({type(error).__name__})") from None
    if isinstance(content, dict):
        content = next((content[name] for name in CONTAINERS if isinstance(content.get(name), dict)), content)
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise BadInput(f"backbone.weights: {path} does not hold a state dict (tensors by name)")
    return content
