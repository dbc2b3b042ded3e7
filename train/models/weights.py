"""Weights for a network from a file or from a run of ours; nothing in them is unpickled."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from data_prep.common.errors import BadInput
from train.run.checkpoint import current, load_tensors

# What other trainers put around a state dict, and what wrappers put before its names.
CONTAINERS = ("state_dict", "model", "model_state_dict")
PREFIXES = ("module.", "model.")
OUR_PREFIX = "backbone.net."  # in the checkpoints of train/finetune.py
COUNTER = "num_batches_tracked"  # of BatchNorm, which older files lack and nothing here reads
NAMES_SHOWN = 3


def fits(net: nn.Module, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether all of a network's tensors are there in their shapes."""
    missing, odd = _faults(net, tensors)
    return not missing and not odd


def _faults(net: nn.Module, tensors: Mapping[str, torch.Tensor]) -> tuple[list[str], list[str]]:
    """The network's tensors that are missing, and those of another shape."""
    expected = net.state_dict()
    missing = [name for name in expected if name not in tensors and not name.endswith(COUNTER)]
    return missing, [name for name in expected if name in tensors and tensors[name].shape != expected[name].shape]


def load_into(net: nn.Module, tensors: Mapping[str, torch.Tensor], source: str) -> str:
    """Load all tensors of a network, by name; what there is beyond them is left out.

    Args:
        net: the network, without a classifier.
        tensors: from `read_weights`.
        source: where they are from, for messages.

    Returns:
        What was loaded and what was left out, in words.

    Raises:
        BadInput: tensors of the network are missing or have another shape.
    """
    missing, odd = _faults(net, tensors)
    expected = net.state_dict()
    unexpected = [name for name in tensors if name not in expected]
    if missing or odd:
        faults = [("missing", missing), ("of another shape", odd), ("unexpected", unexpected)]
        raise BadInput(
            f"backbone.weights: {source} does not fit the network: "
            + "; ".join(f"{len(names)} tensors {what} ({_some(names)})" for what, names in faults if names)
        )
    net.load_state_dict({name: tensors.get(name, tensor) for name, tensor in expected.items()})
    left = f", leaving out {len(unexpected)} that the network does not have ({_some(unexpected)})" if unexpected else ""
    return f"{source}: all {len(expected)} tensors of the network{left}"


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


def read_weights(source: Path) -> dict[str, torch.Tensor]:
    """Tensors under timm's names.

    Args:
        source: a .safetensors file, a torch checkpoint (read with weights_only), or a run folder (its best epoch).

    Raises:
        BadInput: no such file, one that is damaged, or one that holds more than tensors.
    """
    best = current(source / "checkpoints", "best")
    return _named_as_in_timm(load_tensors(best, "network") if best.is_dir() else _read(source))


def _check_not_squeezed(path: Path) -> None:
    """Refuse a torch file whose members are compressed, which torch's never are: they claim what they like."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise ValueError("compressed")


def _read(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise BadInput(
            f"backbone.weights: {path} is no file; give pretrained, random, a .safetensors/.pth file or a run folder"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        _check_not_squeezed(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise many kinds
        raise BadInput(f"backbone.weights: {path} is not readable as plain tensors ({type(error).__name__})") from None
    if isinstance(content, dict):
        content = next((content[name] for name in CONTAINERS if isinstance(content.get(name), dict)), content)
    plain = isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in content.items()
    )
    if not plain:
        raise BadInput(f"backbone.weights: {path} does not hold a state dict (tensors by name)")
    return content
