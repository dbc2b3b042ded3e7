"""How long a probe takes: forward passes, inner products, decompositions and regressions, scores.

The forward pass is measured (`launch/check.sh --recipe`), or scaled from a measured network by counted operations; what
decoding and writing cost beside it goes with images and bytes. The linear algebra is in `probe_costs.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from train.planning.operations import ProbedNetwork
from train.planning.probe_costs import FLOAT32, ProbeCosts, ProbeSizes
from train.planning.rates import FeatureRates, Rates
from train.planning.training_time import planned_workers
from train.probing.product_store import kind_of
from train.run.recipe import ProbeRecipe

PAGE_CACHE = 0.5  # share of a machine's memory that activations may take before they are read from disk
FORWARD_OF_TRAINING = {"all": 1 / 3, "head": 1.0}  # of the operations of a step, by what of the backbone is trained


@dataclass(frozen=True)
class ProbeWork:
    """A probe that is planned.

    Attributes:
        recipe: its settings.
        settings: on which the speed of its forward pass depends, see `speed_settings`.
        network: what it reads.
        sizes: stimuli, sites, processes.
        side: of the images, in pixels.
        image_bytes: of an encoded image; None if it is not known.
        recording: its name; None on paper.
    """

    recipe: ProbeRecipe
    settings: dict[str, str]
    network: ProbedNetwork
    sizes: ProbeSizes
    side: int
    image_bytes: float | None
    recording: str | None = None


@dataclass(frozen=True)
class ForwardPass:
    """Seconds of a process for an image, measured or scaled.

    Attributes:
        whole: decoded, computed and written.
        computing: in the network.
        start: until the first batch is done.
        differences: from what was measured, in words.
        rates: of the file.
    """

    whole: float
    computing: float
    start: float
    differences: Sequence[str]
    rates: Rates


def forward_pass(work: ProbeWork, files: Sequence[Rates]) -> ForwardPass | None:
    """The forward pass from the measured probe that differs least, else from a measured training; None without any."""
    probes = [_from_probe(work, run, rates) for rates in files for run in rates.features]
    trainings = [_from_training(work, rates) for rates in files if rates.training]
    return min(probes or trainings, key=lambda candidate: len(candidate.differences), default=None)


def _from_probe(work: ProbeWork, run: FeatureRates, rates: Rates) -> ForwardPass:
    sizes = work.sizes
    numbers = {"processes": (run.processes, sizes.processes), "machines": (run.machines, sizes.machines)}
    differences = run.differences(work.settings, numbers, work.recording)
    computing = run.forward_seconds
    beside = run.image_seconds - run.forward_seconds
    if differences:
        computing *= max(work.network.flops, 1.0) / run.flops * run.slower(rates.place, sizes.processes, sizes.machines)
        image_bytes = run.image_bytes if work.image_bytes is None else work.image_bytes
        decoding, writing = _beside(work, rates, image_bytes, work.side, work.network.features, run.workers)
        measured_decoding, measured_writing = _beside(work, rates, run.image_bytes, run.side, run.features, run.workers)
        beside *= (decoding + writing) / (measured_decoding + measured_writing)
    return ForwardPass(computing + beside, computing, run.start_seconds, differences, rates)


def _beside(
    work: ProbeWork, rates: Rates, image_bytes: float, side: int, features: int, workers: int
) -> tuple[float, float]:
    """Seconds of an image's decoding and writing."""
    machine = rates.machine
    return machine.decoding.seconds_for(image_bytes, side) / max(workers, 1), FLOAT32 * features / machine.page_write


def _from_training(work: ProbeWork, rates: Rates) -> ForwardPass:
    """From the evaluation of a training, which is a forward pass in float32 too."""
    run = min(rates.training, key=lambda run: run.settings.get("backbone.name") != work.settings["backbone.name"])
    sizes = work.sizes
    operations = work.network.flops / (run.flops * FORWARD_OF_TRAINING[run.settings["backbone.trainable"]])
    slower = run.slower(rates.place, sizes.processes, sizes.machines)
    computing = run.evaluation_batch_seconds / run.evaluation_batch * operations * slower
    image_bytes = run.image_bytes if work.image_bytes is None else work.image_bytes
    workers = planned_workers(work.recipe.loader.workers, rates.place, sizes.processes, sizes.machines)
    decoding, writing = _beside(work, rates, image_bytes, work.side, work.network.features, workers)
    whole = max(computing, decoding) + writing if workers and rates.place.on_gpu else computing + decoding + writing
    name = run.settings.get("backbone.name")
    return ForwardPass(whole, computing, run.start_seconds, [f"a training of {name} -> this probe"], rates)


@dataclass(frozen=True)
class ProbeTime:
    """Seconds that a probe takes.

    Attributes:
        work: that is planned.
        forward: of an image.
        start: until the first batch is done, the launcher's included where it was measured.
        activations: all forward passes of a process, with decoding and writing.
        computing: of these, in the network.
        reading, exchange, products: of all layers.
        regressions: of the process that has most matrices.
        scores: of the first process.
        end: the figure of the layers, and the end of the processes.
    """

    work: ProbeWork
    forward: ForwardPass
    start: float
    activations: float
    computing: float
    reading: float
    exchange: float
    products: float
    regressions: float
    scores: float
    end: float

    @property
    def whole(self) -> float:
        """From the command to its end."""
        return self.start + sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Seconds after the start by what they are spent on."""
        return {
            "forward passes": self.computing,
            "decoding and writing": self.activations - self.computing,
            "reading features": self.reading,
            "exchange": self.exchange,
            "inner products": self.products,
            "decompositions and regressions": self.regressions,
            "scores": self.scores,
            "figures and the end": self.end,
        }


def probe_time(work: ProbeWork, forward: ForwardPass) -> ProbeTime:
    """The time of a planned probe."""
    sizes, rates = work.sizes, forward.rates
    images = -(-sizes.stimuli // sizes.processes)
    stored = FLOAT32 * sizes.stimuli * work.network.features / sizes.machines
    in_memory = stored < PAGE_CACHE * rates.place.host_bytes
    activations = images * forward.whole
    if not in_memory:
        activations = max(activations, stored / (sizes.processes / sizes.machines) / rates.machine.disk_write)
    costs_of = ProbeCosts(work.recipe, sizes, rates.machine, in_memory)
    costs = [costs_of.of_layer(layer) for layer in work.network.layers]
    kinds = [kind_of(layer.features, sizes.stimuli) for layer in work.network.layers]
    owned = [cost.regressions for cost, kind in zip(costs, kinds, strict=True) if kind == "owned products"]
    together = sizes.processes if work.recipe.field == "whole" else 1  # owned matrices of layers at the same time
    in_turns = sum(sorted(owned, reverse=True)[::together])
    by_all = sum(cost.regressions for cost in costs) - sum(owned)
    return ProbeTime(
        work=work,
        forward=forward,
        start=forward.start + (rates.place.launch_seconds or 0.0),
        activations=activations,
        computing=images * forward.computing,
        reading=sum(cost.reading for cost in costs),
        exchange=sum(cost.exchange for cost in costs),
        products=sum(cost.products for cost in costs),
        regressions=in_turns + by_all,
        scores=costs_of.scoring(len(costs)),
        end=rates.machine.figure + rates.place.end_seconds,
    )
