"""A population: what the sites of other recordings read from a network, as maps that the probe of a new one reads too.

DIR/population.safetensors     weight.<k>  float32 (sites, channels of module k)
                               metadata "population": JSON, see `PopulationFacts`
DIR/card.json  card.md         what it is, for whoever it is handed on to
DIR/seen.npz                   the images that the sites were fitted on, see train/data/seen.py

The weights of a site are those of its probe, summed over the positions of the map: the channels that it responds to,
wherever in the image they are. Applied at each position they give a map of what such a site would respond if it looked
there. A new site resembles some of these more than it resembles a channel of the network, so that reading them needs
fewer stimuli.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from data_prep.common.atomic_writes import write_bytes
from data_prep.common.errors import BadInput
from data_prep.common.safe_reading import parse_json
from data_prep.common.validation_messages import first_fault
from data_prep.shards.manifest import LARGEST_SIDE, Name
from train.models.joined_layers import GRID, averages
from train.run.layer_names import JOIN, modules_of

POPULATION = "population"  # the module of a layer that has the maps
POPULATION_FILE = "population.safetensors"
# The mean square of the maps in a layer, relative to all of its modules together. On three V4 recordings read with the
# sites of six others, 3 scored best or nearly so with 100 to 600 stimuli, and 1 a little better with 100.
SHARE = 3.0
LARGEST_BYTES = 16 * 2**30  # of a file


class PopulationRecording(BaseModel):
    """A recording whose sites are in a population.

    Attributes:
        name: of the recording.
        simulated: whether no brain was recorded.
        site_ids: of the sites.
        stimuli: that they were fitted on; of a cross-validated probe, all that it predicted.
        inner_r2: the mean over sites, of stimuli left out of the fit; None if unknown.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: Name
    simulated: bool
    site_ids: list[Name] = Field(min_length=1)
    stimuli: int = Field(ge=1)
    inner_r2: float | None


class PopulationFacts(BaseModel):
    """What a population was read from.

    Attributes:
        version: of the file.
        backbone: name of the network.
        network: sha256 of its weights.
        modules: of the network, in the order of the tensors.
        pool: at most so many rows and columns of their maps; None for whole maps.
        image_size: side in pixels of the images.
        recordings: whose sites they are, in the order of the rows.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    version: Literal[1] = 1
    backbone: Name
    network: Name
    modules: list[Name] = Field(min_length=1, max_length=10_000)
    pool: int | None
    image_size: int = Field(ge=1, le=LARGEST_SIDE)
    recordings: list[PopulationRecording] = Field(min_length=1)

    @property
    def sites(self) -> int:
        """Number of sites of all recordings."""
        return sum(len(recording.site_ids) for recording in self.recordings)

    @property
    def simulated(self) -> bool:
        """Whether some sites are simulated."""
        return any(recording.simulated for recording in self.recordings)


@dataclass(frozen=True)
class Population:
    """Sites of other recordings.

    Attributes:
        folder: of the population.
        facts: what they were read from.
        weights: by module, float32 (sites, channels).
        digest: sha256 of the facts and the weights.
    """

    folder: Path
    facts: PopulationFacts
    weights: Mapping[str, torch.Tensor]
    digest: str

    def check_layers(self, layers: Sequence[str], image_size: int, pool: int | None) -> None:
        """Refuse a probe that does not read what these sites were read from.

        Raises:
            BadInput: naming what differs.
        """
        facts = self.facts
        if len(layers) != 1 or set(modules_of(layers[0])) != set(facts.modules):
            raise BadInput(
                f"population: the sites of {self.folder} read {_few(facts.modules)} together, and this probe "
                f"{_few(layers)}; probe the same modules as one layer (--layers {JOIN.join(facts.modules[:2])}...)"
            )
        for what, theirs, ours in (("images.size", facts.image_size, image_size), ("pool", facts.pool, pool)):
            if theirs != ours:
                raise BadInput(f"population: the sites of {self.folder} were read with {what} {theirs}, not {ours}")

    def check_network(self, network: str | None) -> None:
        """Refuse a network other than the one that these sites were read from.

        Raises:
            BadInput: its weights differ.
        """
        if network != self.facts.network:
            raise BadInput(
                f"population: the sites of {self.folder} were read from other weights of a network "
                f"({self.facts.backbone}, sha256 {self.facts.network[:12]}); probe that network, or make a population "
                "from probes of yours"
            )

    def check_channels(self, channels: Mapping[str, int]) -> None:
        """Refuse a network whose modules have other numbers of channels.

        Raises:
            BadInput: naming the first that has.
        """
        for module, weights in self.weights.items():
            if weights.shape[1] != channels[module]:
                raise BadInput(
                    f"population: the sites of {self.folder} weigh {weights.shape[1]:,} channels of {module}, this "
                    f"network has {channels[module]:,}; probe {self.facts.backbone}"
                )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, ..., {names[-1]} ({len(names)})"


class SiteMaps(nn.Module):
    """Maps of a network's modules -> maps of sites.

    Attributes:
        modules_read: of the network.
        sites: number of sites.
        digest: see `Population`.

    Args:
        weights: by module, float32 (sites, channels).
        map_sizes: (rows, columns) of each module's map, 1 x 1 for vectors.
        digest: of the population.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], map_sizes: Mapping[str, tuple[int, int]], digest: str):
        super().__init__()
        self.modules_read, self.digest = list(weights), digest
        self.sites = next(iter(weights.values())).shape[0]
        for number, (module, of_module) in enumerate(weights.items()):
            rows, columns = map_sizes[module]
            for name, tensor in (("weight", of_module), ("rows", averages(rows)), ("columns", averages(columns))):
                self.register_buffer(f"{name}_{number}", tensor, persistent=False)

    def forward(self, maps: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Sum over modules what a site reads at each position of their maps, averaged to GRID x GRID.

        Args:
            maps: by module, (b, channels, rows, columns).

        Returns:
            (b, sites, GRID, GRID).
        """
        first = maps[self.modules_read[0]]
        total = first.new_zeros(len(first), self.sites, GRID, GRID)
        for number, module in enumerate(self.modules_read):
            of_module = maps[module]
            weight, rows, columns = (self.get_buffer(f"{name}_{number}") for name in ("weight", "rows", "columns"))
            read = (weight @ of_module.flatten(2)).unflatten(2, of_module.shape[2:])
            total += rows @ read @ columns.T
        return total

    def of_module(self, module: str, weights: torch.Tensor) -> torch.Tensor:
        """What weights of the sites' maps are as weights of a module's map.

        Args:
            module: its name.
            weights: (n, sites, GRID, GRID), on any device.

        Returns:
            (n, channels, rows, columns), where the maps are computed.
        """
        number = self.modules_read.index(module)
        weight, rows, columns = (self.get_buffer(f"{name}_{number}") for name in ("weight", "rows", "columns"))
        on_grid = rows.T @ weights.to(weight) @ columns
        return (weight.T @ on_grid.flatten(2)).unflatten(2, on_grid.shape[2:])


def with_population(layer: str) -> str:
    """The layer that also has the maps of a population."""
    return JOIN.join([layer, POPULATION])


def mean_squares_of(channels: Mapping[str, int], joined: Literal["alike", "by_channels"]) -> dict[str, float]:
    """The mean square that each module of a layer is scaled to; 1 in the mean over the modules of the network.

    Args:
        channels: number of each module's channels, or of a population's sites.
        joined: whether all modules count alike, or as many times as they have channels.
    """
    of_network = {module: count for module, count in channels.items() if module != POPULATION}
    modules, total = len(of_network), sum(of_network.values())
    squares = {module: 1.0 if joined == "alike" else count * modules / total for module, count in of_network.items()}
    return {module: SHARE * modules if module == POPULATION else squares[module] for module in channels}


def write_population(folder: Path, facts: PopulationFacts, weights: Sequence[np.ndarray]) -> None:
    """Write FOLDER/population.safetensors.

    Args:
        folder: of the population.
        facts: what it was read from.
        weights: of each module, float32 (sites, channels).

    Raises:
        CannotWrite: the disk is full, the folder read-only ...
    """
    tensors = {f"weight.{number}": torch.from_numpy(of_module) for number, of_module in enumerate(weights)}
    write_bytes(folder / POPULATION_FILE, save(tensors, {POPULATION: facts.model_dump_json()}))


def read_population(folder: Path) -> Population:
    """Read a folder that train/population.py wrote.

    Raises:
        BadInput: it is none, or damaged.
    """
    path = folder / POPULATION_FILE
    if path.is_symlink() or not path.is_file():
        raise BadInput(f"population: {folder} has no {POPULATION_FILE}; make one with train/population.py PROBE ...")
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise ValueError(f"it has more than {LARGEST_BYTES // 2**30} GiB")
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {})[POPULATION]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
        facts = PopulationFacts.model_validate(parse_json(text))
        _check(facts, tensors)
    except ValidationError as error:
        raise BadInput(f"population: {path} is damaged ({first_fault(error)}); make it again") from None
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise BadInput(f"population: {path} is damaged ({error}); make it again") from None
    weights = {module: tensors[f"weight.{number}"] for number, module in enumerate(facts.modules)}
    digest = hashlib.sha256(text.encode())
    for of_module in weights.values():
        digest.update(of_module.contiguous().numpy().data)
    return Population(folder, facts, weights, digest.hexdigest())


def _check(facts: PopulationFacts, tensors: Mapping[str, torch.Tensor]) -> None:
    if tensors.keys() != {f"weight.{number}" for number in range(len(facts.modules))}:
        raise ValueError(f"it does not have the weights of {len(facts.modules)} modules")
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or tensor.ndim != 2 or len(tensor) != facts.sites:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not that of {facts.sites} sites")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} contains NaN or infinity")
