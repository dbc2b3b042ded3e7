"""What a recipe computes: floating-point operations, features, and the settings that its speed depends on.

A training step is counted on torch's fake tensors, so without data or time; a probe's network sees one black image.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from data_prep.shards.manifest import Manifest
from train.models.backbone import Backbone
from train.models.features import PIXELS, ImageFeatures, LayerFeatures, PixelFeatures
from train.models.layer_selection import choose_layers
from train.models.network import Network
from train.models.population import read_population, with_population
from train.planning.step_cost import LiveBytes, empty_batch, forward_and_backward
from train.run.layer_names import modules_of
from train.run.recipe import ProbeRecipe, Recipe

COUNTED = 2  # stimuli in the step whose operations are counted
# Settings on which the time of a batch depends, beside the size of the batch.
STEP_SETTINGS = (
    *("task.kind", "backbone.name", "backbone.cut", "backbone.trainable", "backbone.batch_norm"),
    *("backbone.gradient_checkpointing", "readout.kind", "readout.rank", "loss.responses", "optimizer.name"),
    *("precision", "compile", "deterministic", "loader.engine", "loader.workers", "loader.cache"),
)
PROBE_SETTINGS = ("layers", "pool", "population", "backbone.name", "backbone.cut", "batch_size", "loader.workers")
SWITCHES = ("optimizer.clip_norm", "ema")  # it matters whether they are set, not to what


def speed_settings(recipe: Recipe | ProbeRecipe, side: int) -> dict[str, str]:
    """The settings of a recipe on which the time of a batch depends, as text.

    Args:
        recipe: of a run or a probe.
        side: of its images, in pixels.
    """
    flat = recipe.model_dump(mode="json")
    settings = {"images.size": str(side)}
    for name in PROBE_SETTINGS if isinstance(recipe, ProbeRecipe) else STEP_SETTINGS:
        settings[name] = str(_value(flat, name))
    if isinstance(recipe, Recipe):
        settings |= {name: "on" if _value(flat, name) is not None else "off" for name in SWITCHES}
        settings["augment"] = "on" if recipe.augment.is_on else "off"
    return settings


def _value(settings: dict, name: str) -> object:
    section, _, rest = name.partition(".")
    return _value(settings[section], rest) if rest else settings[section]


def training_flops(recipe: Recipe, manifest: Manifest) -> float:
    """Floating-point operations of forward and backward for an image, by the shapes of products and convolutions."""
    side = recipe.images.size or manifest.image.side
    network, fake = Network(recipe.for_checkpoint(), manifest, side).train(), FakeTensorMode()
    with FakeCopyMode(fake):
        network = copy.deepcopy(network)
    with fake, FlopCounterMode(display=False) as counted:
        forward_and_backward(network, recipe, empty_batch(recipe, manifest, COUNTED))
    return counted.get_total_flops() / COUNTED


@dataclass(frozen=True)
class Layer:
    """A layer of a probe: its modules' features, and positions of their maps.

    Attributes:
        name: as in the probe's results.
        widths: features of each module.
        positions: of each module's map, 1 for vectors.
    """

    name: str
    widths: Sequence[int]
    positions: Sequence[int]

    @property
    def features(self) -> int:
        """Of all modules."""
        return sum(self.widths)


@dataclass(frozen=True)
class ProbedNetwork:
    """What a probe reads from an image.

    Attributes:
        layers: in order.
        features: numbers that are stored of an image; a module that several layers read is stored once.
        flops: floating-point operations of the forward pass.
        weights: bytes.
        activations: the most bytes that the pass holds, with the features.
    """

    layers: Sequence[Layer]
    features: int
    flops: float
    weights: int
    activations: int


def probed_network(recipe: ProbeRecipe, side: int) -> ProbedNetwork:
    """Pass one black image through the network of a probe, with random weights.

    Raises:
        BadInput: the network has no such layers.
    """
    extractor: ImageFeatures = PixelFeatures()
    names = [PIXELS]
    if recipe.layers != [PIXELS]:
        source = recipe.backbone.model_copy(update={"weights": "random"})
        backbone = Backbone(source, side).eval()
        names = choose_layers(backbone, recipe.layers, side)
        modules = dict.fromkeys(module for name in names for module in modules_of(name))
        features = LayerFeatures(backbone, list(modules), recipe.pool)
        extractor = features
        if recipe.population is not None:
            population = read_population(Path(recipe.population))
            population.check_layers(names, side, recipe.pool)
            extractor = features.joined_by(population)
            names = [with_population(name) for name in names]
    image = torch.zeros(1, 3, side, side, dtype=torch.uint8)
    with torch.no_grad(), FlopCounterMode(display=False) as counted, LiveBytes([]) as held:
        widths = {name: features.shape[1] for name, features in extractor(image).items()}
    with torch.no_grad():
        sizes = {name: rows * columns for name, (rows, columns) in extractor.map_sizes(image).items()}
    layers = [
        Layer(name, [widths[module] for module in modules_of(name)], [sizes[module] for module in modules_of(name)])
        for name in names
    ]
    return ProbedNetwork(
        layers,
        features=sum(widths.values()),
        flops=float(counted.get_total_flops()),
        weights=4 * extractor.parameters,
        activations=held.peak,
    )
