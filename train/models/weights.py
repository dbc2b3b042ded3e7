"""Weights for a network from a file or from a run folder; nothing in them is unpickled."""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from data_prep.common.errors import BadInput
from train.run.checkpoint import load_tensors, resolve_checkpoint

CONTAINERS = ("state_dict", "model", "model_state_dict")  # keys under which trainers store a state dict
PREFIXES = ("module.", "model.")  # that wrappers put before its names
OUR_PREFIX = "backbone.net."  # in the checkpoints of train/finetune.py
COUNTER = "num_batches_tracked"  # of BatchNorm; older files lack it, and nothing here reads it
NAMES_SHOWN = 3


@dataclass(frozen=True)
class _Mismatch:
    """The names of a network's tensors that are missing, and of those that have another shape."""

    missing: list[str]
    misshapen: list[str]

    @classmethod
    def between(cls, net: nn.Module, tensors: Mapping[str, torch.Tensor]) -> "_Mismatch":
        expected = net.state_dict()
        return cls(
            missing=[name for name in expected if name not in tensors and not name.endswith(COUNTER)],
            misshapen=[name for name in expected if name in tensors and tensors[name].shape != expected[name].shape],
        )

    def __bool__(self) -> bool:
        return bool(self.missing or self.misshapen)


def fits(net: nn.Module, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether `tensors` hold all of a network's tensors in their shapes."""
    return not _Mismatch.between(net, tensors)


def load_into(net: nn.Module, tensors: Mapping[str, torch.Tensor], source: str) -> str:
    """Load all tensors of a network by name, ignoring others.

    Args:
        net: the network, without a classifier.
        tensors: from `read_weights`.
        source: of the tensors, for messages.

    Returns:
        A description of what was loaded and ignored, for the log.

    Raises:
        BadInput: tensors of the network are missing or have another shape.
    """
    expected = net.state_dict()
    unexpected = [name for name in tensors if name not in expected]
    if mismatch := _Mismatch.between(net, tensors):
        faults = {"missing": mismatch.missing, "of another shape": mismatch.misshapen, "unexpected": unexpected}
        raise BadInput(
            f"backbone.weights: {source} does not fit the network: "
            + "; ".join(f"{len(names)} tensors {fault} ({_first(names)})" for fault, names in faults.items() if names)
        )
    net.load_state_dict({name: tensors.get(name, tensor) for name, tensor in expected.items()})
    loaded = f"{source}: all {len(expected)} tensors of the network"
    if not unexpected:
        return loaded
    return f"{loaded}, leaving out {len(unexpected)} that the network does not have ({_first(unexpected)})"


def _first(names: list[str]) -> str:
    return ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")


def read_weights(source: Path) -> dict[str, torch.Tensor]:
    """Tensors under timm's names.

    Args:
        source: a .safetensors file, a torch checkpoint (read with weights_only), or a run folder (its best epoch).

    Raises:
        BadInput: no such file, a damaged one, or one that holds more than tensors.
    """
    best = resolve_checkpoint(source / "checkpoints", "best")
    return _named_as_in_timm(load_tensors(best, "network") if best.is_dir() else _read_file(source))


def _named_as_in_timm(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    ours = {name.removeprefix(OUR_PREFIX): x for name, x in tensors.items() if name.startswith(OUR_PREFIX)}
    if ours:
        return ours
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): x for name, x in tensors.items()}
    return tensors


def _instead_of(folder: Path) -> str:
    """The end of a sentence about a folder that is not a run: what to give instead."""
    if (folder / "best").exists():
        return f" of checkpoints; give the run folder {folder.parent}, of which the best epoch is taken"
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".pth", ".pt"))
    network = next((path for path in files if path.stem in ("network", "model")), next(iter(files), None))
    if network is None:
        return " without weights; give pretrained, random, a .safetensors/.pth file or a run folder"
    return f"; give the file in it that holds the network: {network}"


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    if path.is_dir():
        raise BadInput(f"backbone.weights: {path} is a folder{_instead_of(path)}")
    if not path.is_file():
        raise BadInput(
            f"backbone.weights: {path} is not a file; give pretrained, random, a .safetensors/.pth file or a run folder"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        _check_uncompressed(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise many kinds
        raise BadInput(f"backbone.weights: {path} cannot be read as plain tensors ({type(error).__name__})") from None
    if isinstance(content, dict):
        content = next((content[name] for name in CONTAINERS if isinstance(content.get(name), dict)), content)
    if not _is_state_dict(content):
        raise BadInput(f"backbone.weights: {path} does not hold a state dict (tensors by name)")
    return content


def _is_state_dict(content: object) -> bool:
    return isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in content.items()
    )


def _check_uncompressed(path: Path) -> None:
    """Refuse a torch file with compressed members: torch writes none, and they may expand to any size."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("compressed")
