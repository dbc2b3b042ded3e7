"""What the linear algebra of a probe costs: all formulas in one place, so that they can follow `train/regression/`.

N = n + h stimuli, n to fit and h held out, s sites, p features of a layer, k components, W windows over a map of P
positions, R processes, c = min(h, MOST_COMPARED). Rates are those of `MachineRates`; D(n) is the decomposition of n x n
numbers, a power law through those measured, cubic beyond them. Seconds of a layer:

| inner products: a process owns a matrix, or all share it by rows (N >= LEAST_STIMULI)                                |
| ---------------------- | ------------------------------------------------------------------------------------------- |
| features from disk     | readings * 4 N p / R / column_read; about parts / 2 + 1 readings, parts by --memory         |
| exchanged              | readings * 4 N p (R - 1) / R^2 / bandwidth, only between machines                           |
| whole map              | N^2 p / R / products                                                                        |
| W windows, P <= W      | 2 N^2 p / R / products + 2 W P N^2 / R / multiplication                                     |
| W windows, P > W       | 2 W N^2 p / R / products                                                                    |
| summed                 | 8 N^2 W (R - 1) / R / bandwidth                                                             |
| written, read, centred | PASSES * 8 N^2 / passes                                                                     |
| all eigenvectors       | D(n)                                                                                        |
| k of many stimuli      | (6 k n^2 + 36 k^2 n) / R / multiplication + 2 D(3 k) + SWEEPS * 4 N^2 / R / column_read     |

| features, if these are few (2 p <= N)                                                                                |
| ---------------------- | ------------------------------------------------------------------------------------------- |
| features from disk     | READINGS * 4 N p / R / column_read                                                          |
| covariance             | n p^2 / R / multiplication + D(p), or k of many features as above                           |
| components, orthogonal | (2 n p k / R + 6 n k^2) / multiplication                                                    |

| then                   |                                                                                             |
| ---------------------- | ------------------------------------------------------------------------------------------- |
| ridge: hat diagonals   | 2 PENALTIES n k / multiplication + VECTORS * 8 n k / passes                                 |
| ridge: errors          | (PENALTIES + 5) (2 n k s / multiplication + ERRORS * 8 n s / passes); / R where shared      |
| least squares          | 6 n k s / multiplication                                                                    |
| partial least squares  | 2 n^2 s / multiplication + latent (8 n^2 / passes + 2 n s^2 / multiplication + D(s))        |
| inner folds            | ols and pls: each as above, of the other stimuli                                            |
| RSA and CKA            | c^2 * similarity                                                                            |
| intervals              | s * bootstrap_site + h s * bootstrap_response, for each layer and the chosen one            |
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from train.models.windows import probe_windows
from train.planning.operations import Layer
from train.planning.rates import Decomposition, MachineRates
from train.probing.product_store import Kind, kind_of
from train.probing.source_reading import MOST_COMPARED
from train.regression.inner_products import parts_of
from train.regression.krylov import BASIS, BLOCKS_PER_COMPONENTS, LEAST_BLOCK, worth_it
from train.regression.ridge import PENALTIES
from train.run.recipe import ProbeRecipe

FLOAT32, FLOAT64 = 4, 8
PASSES = 26  # over a matrix of N x N numbers: written, read, converted, centred, compared, into memory that is new
VECTORS = 3  # passes over the eigenvectors: turned into an order that BLAS reads, and squared
ERRORS = 2  # passes over the errors for each penalty, in memory that is used again
READINGS = 5  # of features that are regressed on: means, covariance, components, weights, predictions
SEARCHED = 3  # products with the matrix for each of the leading eigenvectors


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
    """D: seconds of one decomposition."""
    known = sorted(measured, key=lambda one: one.stimuli)
    largest = known[-1]
    if stimuli >= largest.stimuli or len(known) == 1:
        return largest.seconds * (stimuli / largest.stimuli) ** 3
    upper = max(next(index for index, one in enumerate(known) if one.stimuli > stimuli), 1)
    low, high = known[upper - 1], known[upper]
    power = math.log(high.seconds / low.seconds) / math.log(high.stimuli / low.stimuli)
    return high.seconds * (stimuli / high.stimuli) ** power


@dataclass(frozen=True)
class LayerCost:
    """Seconds of one layer, of the process that takes longest.

    Attributes:
        reading: features from disk.
        exchange: features between machines, and sums of products.
        products: inner products.
        regressions: of all the layer's windows and partitions, RSA and CKA included.
    """

    reading: float
    exchange: float
    products: float
    regressions: float


@dataclass(frozen=True)
class ProbeCosts:
    """The costs of a probe's layers.

    Attributes:
        recipe: of the probe.
        sizes: of the probe.
        machine: what it reaches.
        in_memory: whether the page cache holds the activations.
    """

    recipe: ProbeRecipe
    sizes: ProbeSizes
    machine: MachineRates
    in_memory: bool = True

    def of_layer(self, layer: Layer) -> LayerCost:
        """The cost of a layer."""
        stimuli, ranks = self.sizes.stimuli, self.sizes.processes
        kind = kind_of(layer.features, stimuli)
        table = FLOAT32 * stimuli * layer.features / ranks
        if kind == "features":
            read = READINGS * windows_of(self.recipe) * len(self.sizes.fit) * table
            return LayerCost(read / self._read_rate, 0.0, 0.0, self._regressions(layer, kind))
        readings = self._readings(layer)
        sent = FLOAT64 * stimuli**2 * windows_of(self.recipe) * (ranks - 1) / ranks
        if self.sizes.machines > 1:
            sent += readings * table * (ranks - 1) / ranks
        return LayerCost(
            reading=readings * table / self._read_rate,
            exchange=sent / self.machine.bandwidth if self.machine.bandwidth else 0.0,
            products=self._products(layer),
            regressions=self._regressions(layer, kind),
        )

    @property
    def _read_rate(self) -> float:
        column_read = self.machine.column_read
        return column_read if self.in_memory else min(column_read, self.machine.disk_read)

    def _readings(self, layer: Layer) -> float:
        """How often all features are read: for each part of the matrix, those of the stimuli below it."""
        windows, stimuli = windows_of(self.recipe), self.sizes.stimuli
        bound = self.recipe.memory * 2**30
        scaled = int(len(layer.widths) > 1)  # the mean square of each module is computed first
        if windows == 1:
            parts = len(parts_of(stimuli, bound / 2 / min(len(layer.widths), 2)))
            return (parts + 1) / 2 + scaled
        mixed = max((count for count in layer.positions if count <= windows), default=0)
        height = max(int(bound / (stimuli * (FLOAT64 * windows + 12 * mixed))), 1)
        return -(-stimuli // height) + scaled

    def _products(self, layer: Layer) -> float:
        squared, windows, ranks = self.sizes.stimuli**2, windows_of(self.recipe), self.sizes.processes
        rate = self.machine.products[self.recipe.products]
        if windows == 1:
            return squared * layer.features / ranks / rate
        seconds = 0.0
        for width, positions in zip(layer.widths, layer.positions, strict=True):
            if positions <= windows:
                mixing = 2 * windows * positions * squared / ranks / self.machine.multiplication
                seconds += 2 * squared * width / ranks / rate + mixing
            else:
                seconds += windows * 2 * squared * width / ranks / rate
        return seconds

    def _regressions(self, layer: Layer, kind: Kind) -> float:
        """Owned matrices are regressed on at the same time, as many as there are processes; others by all together."""
        windows, held_out = windows_of(self.recipe), min(sum(self.sizes.scored), MOST_COMPARED)
        one = held_out**2 * self.machine.similarity / windows  # only of the whole map
        if kind != "features":
            shared = self.sizes.processes if kind == "shared products" else 1
            one += PASSES * FLOAT64 * self.sizes.stimuli**2 / shared / self.machine.passes
        for fit in self.sizes.fit:
            one += self._fit(layer, kind, fit)
            if self.recipe.readout != "ridge":
                one += self.recipe.inner_folds * self._fit(layer, kind, fit - fit // self.recipe.inner_folds)
        if kind == "owned products" and windows > 1:
            return -(-windows // self.sizes.processes) * one
        return windows * one

    def _fit(self, layer: Layer, kind: Kind, fit: int) -> float:
        ranks = 1 if kind == "owned products" else self.sizes.processes
        sites, multiplication, passes = self.sizes.sites, self.machine.multiplication, self.machine.passes
        if self.recipe.readout == "pls":
            of_dimension = FLOAT64 * fit**2 / ranks / passes + 2 * fit * sites**2 / multiplication
            of_dimension += decomposition_seconds(sites, self.machine.decompositions)
            return 2 * fit**2 * sites / ranks / multiplication + self.recipe.latent * of_dimension
        components = min(self.recipe.components or fit, fit, layer.features)
        product = 2 * fit * components * sites / multiplication
        found = self._components(layer, kind, fit, components)
        if self.recipe.readout == "ols":
            return found + 3 * product
        hat = 2 * len(PENALTIES) * fit * components / multiplication + VECTORS * FLOAT64 * fit * components / passes
        passed = ERRORS * FLOAT64 * fit * sites / passes
        return found + hat + (len(PENALTIES) + 5) * (product + passed) / ranks

    def _components(self, layer: Layer, kind: Kind, fit: int, components: int) -> float:
        """Seconds until the components are found."""
        ranks, multiplication = self.sizes.processes, self.machine.multiplication
        if kind == "owned products":
            return decomposition_seconds(fit, self.machine.decompositions)
        if kind == "shared products":
            return self._leading(fit, components)
        features = layer.features
        work = fit * features**2 / ranks + 2 * fit * features * components / ranks + 6 * fit * components**2
        return work / multiplication + self._leading(features, components)

    def _leading(self, size: int, components: int) -> float:
        """Seconds of the leading eigenvectors of a matrix of size x size numbers whose rows are shared out."""
        if not worth_it(size, components):
            return decomposition_seconds(size, self.machine.decompositions)
        ranks = self.sizes.processes
        work = (2 * SEARCHED * components * size**2 + 36 * components**2 * size) / ranks
        block = max(components // BLOCKS_PER_COMPONENTS, LEAST_BLOCK)
        sweeps = SEARCHED * components / block
        return (
            work / self.machine.multiplication
            + 2 * decomposition_seconds(SEARCHED * components, self.machine.decompositions)
            + sweeps * FLOAT32 * size**2 / ranks / self.machine.column_read
        )

    def scoring(self, layers: int) -> float:
        """Seconds of the intervals of all layers' scores, and with folds of those that each chose."""
        responses = sum(self.sizes.scored) * self.machine.bootstrap_response
        return (layers + (len(self.sizes.scored) > 1)) * self.sizes.sites * (self.machine.bootstrap_site + responses)


@dataclass(frozen=True)
class ProbeSpace:
    """Bytes that a process of a probe takes.

    Attributes:
        products: of memory, while inner products are computed.
        regressions: of memory, while a layer is regressed on.
        disk: of activations, matrices and results together, of all processes of the machine with the leading one.
    """

    products: float
    regressions: float
    disk: float


def probe_space(recipe: ProbeRecipe, layers: Sequence[Layer], features: int, sizes: ProbeSizes) -> ProbeSpace:
    """Memory beyond that of the program and network, and disk space.

    `memory` bounds the blocks of features and the sum of products together, and the basis of a search for components.
    All eigenvectors of n stimuli (or features) take four matrices of 8 n^2 bytes on the process that computes them, an
    owned matrix 8 N^2 more.

    Args:
        recipe: of the probe.
        layers: with their features.
        features: numbers that are stored of an image.
        sizes: of the probe.
    """
    bound, matrix = recipe.memory * 2**30, FLOAT64 * sizes.stimuli**2
    kinds = [kind_of(layer.features, sizes.stimuli) for layer in layers]
    block = 4 * FLOAT32 * sizes.stimuli * max(layer.features for layer in layers) / sizes.processes
    has_products = any(kind != "features" for kind in kinds)
    matrices = 0.0
    if "owned products" in kinds and recipe.field == "whole":
        matrices = matrix * min(sizes.processes, kinds.count("owned products"))
    elif has_products:
        matrices = matrix * windows_of(recipe) / (1 if recipe.products == "float64" else 2)
    of_response = FLOAT64 + (FLOAT32 if recipe.readout == "ridge" else 0)  # dual weights, left-out predictions
    results = of_response * sum(sizes.fit) * sizes.sites * windows_of(recipe) * len(layers)
    return ProbeSpace(
        products=min(bound, matrix * 1.25 + block) if has_products else min(bound, block),
        regressions=max(
            _regression_bytes(recipe, layer, kind, sizes) for layer, kind in zip(layers, kinds, strict=True)
        ),
        disk=(FLOAT32 * sizes.stimuli * features + matrices) / sizes.machines + results,
    )


def _regression_bytes(recipe: ProbeRecipe, layer: Layer, kind: Kind, sizes: ProbeSizes) -> float:
    fit = max(sizes.fit)
    components = min(recipe.components or fit, fit, layer.features)
    size = layer.features if kind == "features" else fit
    held = FLOAT64 * fit * (2 * components + 6 * sizes.sites)
    if kind == "owned products":
        return FLOAT64 * (sizes.stimuli**2 + 4 * fit**2) + held
    covariance = FLOAT64 * size**2 if kind == "features" else 0.0
    if recipe.readout != "pls" and worth_it(size, components):
        basis = min(FLOAT64 * BASIS * components * size / sizes.processes, recipe.memory * 2**30)
        return held + covariance + basis + 32 * (SEARCHED * components) ** 2
    return held + covariance + (0.0 if recipe.readout == "pls" else 4 * FLOAT64 * size**2)
