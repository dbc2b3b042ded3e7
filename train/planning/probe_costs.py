"""What the linear algebra of a probe costs: all formulas in one place, so that they can follow `train/regression/`.

N = n + h stimuli, n to fit and h that are scored (of all partitions together in cross-validation), s sites, p features
of a layer, W windows over a map of P positions, R processes, k components. Rates are those of `MachineRates`.

| part                  | seconds                                                                                    |
| --------------------- | ------------------------------------------------------------------------------------------ |
| features from disk    | 4 N p / R / column_read, or / disk_read for what does not fit into the page cache          |
| exchanged             | 4 N p (R - 1) / R^2 / bandwidth                                                            |
| products, whole map   | N^2 p / R / products                                                                       |
| ... at P positions    | 2 N^2 p / R / products + 2 W P N^2 / R / multiplication, if P <= W                         |
| ... window by window  | 2 W N^2 p / R / products, if P > W                                                         |
| summed over processes | 8 N^2 W (R - 1) / R / bandwidth                                                            |
| decomposition         | D(n): a power law through the measured ones, cubic beyond them                             |
| centred, loaded       | PASSES * 8 N^2 / passes                                                                    |
| ridge                 | 2 n k s (PENALTIES + 5) / multiplication + 6 * 8 n s PENALTIES / passes                    |
| least squares         | 6 n k s / multiplication, for each of the inner folds too, with a decomposition each       |
| partial least squares | latent * (2 n^2 s / multiplication + 4 * 8 n^2 / passes + D(s)), for each fold too          |
| RSA and CKA           | h^2 * similarity                                                                           |
| intervals             | s * bootstrap_site + h s * bootstrap_response, for each layer and the chosen one           |

Whole matrices belong to one process each, in turns, so that the slowest has ceil(layers W / R) of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from train.models.windows import probe_windows
from train.planning.operations import Layer
from train.planning.rates import Decomposition, MachineRates
from train.regression.ridge import PENALTIES
from train.run.recipe import ProbeRecipe

FLOAT32, FLOAT64 = 4, 8
PASSES = 12  # over a matrix of N x N numbers: written, read, converted, centred, compared


@dataclass(frozen=True)
class ProbeSizes:
    """The numbers that the cost of a probe follows from.

    Attributes:
        fit: stimuli to fit, of each partition.
        scored: of each partition.
        stimuli: in all.
        sites: of the recording.
        processes, machines: to use.
    """

    fit: Sequence[int]
    scored: Sequence[int]
    stimuli: int
    sites: int
    processes: int
    machines: int = 1


def windows_of(recipe: ProbeRecipe) -> int:
    """Windows that each layer is read through."""
    return len(probe_windows()) if recipe.field == "gaussian" else 1


def decomposition_seconds(stimuli: int, measured: Sequence[Decomposition]) -> float:
    """Seconds of one decomposition: a power law through the two nearest that were measured, cubic beyond them."""
    known = sorted(measured, key=lambda one: one.stimuli)
    largest = known[-1]
    if stimuli >= largest.stimuli or len(known) == 1:
        return largest.seconds * (stimuli / largest.stimuli) ** 3
    upper = next(index for index, one in enumerate(known) if one.stimuli > stimuli)
    low, high = known[max(upper - 1, 0)], known[max(upper, 1)]
    power = math.log(high.seconds / low.seconds) / math.log(high.stimuli / low.stimuli)
    return high.seconds * (stimuli / high.stimuli) ** power


@dataclass(frozen=True)
class LayerCost:
    """Seconds of one layer, of the process that takes longest.

    Attributes:
        reading: features from disk; twice where they are read again.
        exchange: features between processes, and sums of products.
        products: inner products.
        regressions: of one of the layer's matrices.
    """

    reading: float
    exchange: float
    products: float
    regressions: float


def layer_cost(
    recipe: ProbeRecipe, layer: Layer, sizes: ProbeSizes, machine: MachineRates, in_memory: bool
) -> LayerCost:
    """The cost of a layer.

    Args:
        recipe: of the probe.
        layer: its features.
        sizes: of the probe.
        machine: what it reaches.
        in_memory: whether the page cache holds the activations.
    """
    stimuli, ranks, windows = sizes.stimuli, sizes.processes, windows_of(recipe)
    table = FLOAT32 * stimuli * layer.features / ranks
    square = FLOAT64 * stimuli**2
    passes = _reads(recipe, layer, sizes)
    sent = table * (ranks - 1) / ranks * passes + square * windows * (ranks - 1) / ranks
    rate = machine.products[recipe.products]
    return LayerCost(
        reading=passes * table / (machine.column_read if in_memory else min(machine.column_read, machine.disk_read)),
        exchange=sent / machine.bandwidth if machine.bandwidth else 0.0,
        products=_products(recipe, layer, sizes, machine, rate),
        regressions=regression_seconds(recipe, sizes, machine),
    )


def _reads(recipe: ProbeRecipe, layer: Layer, sizes: ProbeSizes) -> int:
    """How often the features are read: once, or for each stripe of rows of all windows' matrices."""
    windows = windows_of(recipe)
    if windows == 1:
        return 1
    mixed = max((count for count in layer.positions if count <= windows), default=0)
    row_bytes = sizes.stimuli * (FLOAT64 * windows + 12 * mixed)
    height = max(int(recipe.memory * 2**30 / row_bytes), 1)
    scaled = int(len(layer.widths) > 1)  # the mean square of each module is computed first
    return -(-sizes.stimuli // height) + scaled


def _products(recipe: ProbeRecipe, layer: Layer, sizes: ProbeSizes, machine: MachineRates, rate: float) -> float:
    squared, windows, ranks = sizes.stimuli**2, windows_of(recipe), sizes.processes
    if windows == 1:
        return squared * layer.features / ranks / rate
    seconds = 0.0
    for width, positions in zip(layer.widths, layer.positions, strict=True):
        if positions <= windows:
            mixing = 2 * windows * positions * squared / ranks / machine.multiplication
            seconds += 2 * squared * width / ranks / rate + mixing
        else:
            seconds += windows * 2 * squared * width / ranks / rate
    return seconds


def regression_seconds(recipe: ProbeRecipe, sizes: ProbeSizes, machine: MachineRates) -> float:
    """Seconds of the regressions on one matrix, in all partitions."""
    held_out = sum(sizes.scored)
    seconds = PASSES * FLOAT64 * sizes.stimuli**2 / machine.passes + held_out**2 * machine.similarity
    for fit in sizes.fit:
        seconds += _fit_seconds(recipe, fit, sizes.sites, machine)
        if recipe.readout != "ridge":
            others = fit - fit // recipe.inner_folds
            seconds += recipe.inner_folds * _fit_seconds(recipe, others, sizes.sites, machine)
    return seconds


def _fit_seconds(recipe: ProbeRecipe, fit: int, sites: int, machine: MachineRates) -> float:
    components = min(recipe.components or fit, fit)
    product = 2 * fit * components * sites / machine.multiplication
    match recipe.readout:
        case "ridge":
            passes = 6 * FLOAT64 * fit * sites * len(PENALTIES) / machine.passes
            fitting = product * (len(PENALTIES) + 5) + passes
            return decomposition_seconds(fit, machine.decompositions) + fitting
        case "ols":
            return decomposition_seconds(fit, machine.decompositions) + 3 * product
    dimension = 2 * fit**2 * sites / machine.multiplication + 4 * FLOAT64 * fit**2 / machine.passes
    return recipe.latent * (dimension + decomposition_seconds(sites, machine.decompositions))


def scoring_seconds(layers: int, sizes: ProbeSizes, machine: MachineRates) -> float:
    """Seconds of the intervals of all layers' scores, and of the chosen one's."""
    held_out = sum(sizes.scored)
    of_layer = sizes.sites * (machine.bootstrap_site + held_out * machine.bootstrap_response)
    return (layers + 1) * of_layer


@dataclass(frozen=True)
class ProbeSpace:
    """Bytes that a process of a probe takes.

    Attributes:
        products: of memory, while inner products are computed.
        regressions: of memory, while a matrix is regressed on.
        disk: of activations and matrices together, of all processes of a machine.
    """

    products: float
    regressions: float
    disk: float


def probe_space(recipe: ProbeRecipe, layers: Sequence[Layer], features: int, sizes: ProbeSizes) -> ProbeSpace:
    """Memory beyond that of the program and network, and disk space.

    The sum of products is 8 N^2 bytes (twice that for several modules), and a quarter of it while a block is added;
    `memory` bounds the blocks of features, and with windows the rows of all their matrices. A regression holds the
    products, the centred matrix of the stimuli to fit, its eigenvectors, and what LAPACK needs for them.

    Args:
        recipe: of the probe.
        layers: with their features.
        features: numbers that are stored of an image.
        sizes: of the probe.
    """
    square, bound = FLOAT64 * sizes.stimuli**2, recipe.memory * 2**30
    joined = any(len(layer.widths) > 1 for layer in layers)
    windows = windows_of(recipe)
    fit, held_out = max(sizes.fit), max(sizes.scored)
    components = min(recipe.components or fit, fit)
    blocks = min(bound, 4 * FLOAT32 * sizes.stimuli * max(layer.features for layer in layers) / sizes.processes)
    of_sum = square * (1.25 + joined) if windows == 1 else min(bound, square * windows * 2)
    fitting = FLOAT64 * (fit * components * 2 + 6 * fit * sizes.sites)
    matrices = len(layers) * windows * (square if windows == 1 else FLOAT32 * sizes.stimuli**2)
    per_machine = sizes.processes / sizes.machines
    return ProbeSpace(
        products=blocks + of_sum,
        regressions=square + FLOAT64 * fit * (2 * fit + held_out) + max(2 * FLOAT64 * fit**2, fitting),
        disk=(FLOAT32 * sizes.stimuli * features + matrices) * per_machine / sizes.processes,
    )
