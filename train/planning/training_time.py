"""How long a training takes, from the measured one that is most like it.

A step of b images a process computes for c and exchanges gradients for x. The measured step is used as it is where
nothing differs. Otherwise

    c = (measured step - measured exchange) * (operations of b images) / (operations of those measured) * cores
    x = (bytes that a process sends, see train/planning/memory.py) / (bytes/s that the network carried)

where `cores` counts on a CPU only: cores of a measured process / cores of a planned one. Exchange is taken to follow
the computing; where it is hidden behind it, as on GPUs, the measured step has it hidden too. What images cost beside a
step goes with their number and size, and is at least b * (decoding of an image) / workers where workers decode.

    first epoch  = warm-up + steps * (step while images are decoded) + evaluation + checkpoint
    later epochs = steps * (step while images are read from the cache, as many as fit into it) + evaluation + checkpoint
    evaluation   = ceil(stimuli / (processes * batch)) * (batch in float32) + what it takes besides
    checkpoint   = measured, times bytes / (bytes of the measured one)
    warm-up      = first measured step - a later one, as decoding processes start

The time until the first step is done has this step in it, which the whole run does not count twice.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from train.data.image_cache import DEFAULT_FRACTION
from train.data.loader import workers_per_rank
from train.data.order import accumulation, steps_per_epoch
from train.models.losses import RESPONSE_LOSSES
from train.planning.memory import GIB, bytes_sent, read_strategy
from train.planning.rates import Place, Rates, TrainingRates
from train.planning.step_cost import StepCost
from train.run.recipe import Recipe

MOST_OF_A_STEP = 0.5  # that the exchange of a measured step is taken to be, whatever the network's rate says


@dataclass(frozen=True)
class TrainingWork:
    """A training that is planned.

    Attributes:
        recipe: its settings.
        settings: on which the speed depends, see `speed_settings`.
        fit, selection: stimuli that are trained on, and that select the best epoch.
        side: of the images, in pixels.
        image_bytes: of an encoded image; None if it is not known.
        flops: floating-point operations for an image.
        cost: memory of a step, for bytes of weights and checkpoints.
        strategy: its name.
        processes, machines: to use.
        recording: its name; None on paper.
    """

    recipe: Recipe
    settings: dict[str, str]
    fit: int
    selection: int
    side: int
    image_bytes: float | None
    flops: float
    cost: StepCost
    strategy: str
    processes: int
    machines: int
    recording: str | None = None

    @property
    def global_size(self) -> int:
        """Stimuli of an optimizer step."""
        return min(self.recipe.batch.global_size, self.fit)

    @property
    def share(self) -> int:
        """The most stimuli of a process in an optimizer step."""
        return -(-self.global_size // self.processes)

    @property
    def micro_batches(self) -> int:
        """Of a process in an optimizer step."""
        return accumulation(self.global_size, self.processes, self.recipe.batch.per_device)

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return steps_per_epoch(self.fit, self.global_size)

    @property
    def calibrates(self) -> bool:
        """Whether an evaluation reads what is trained on as well, as the loss leaves the scale open."""
        return self.recipe.task.predicts_responses and RESPONSE_LOSSES[self.recipe.loss.responses].needs_calibration

    @property
    def checkpoint_bytes(self) -> float:
        """Of network, optimizer and running average."""
        return self.cost.weights + self.cost.optimizer_state + self.cost.running_average


@dataclass(frozen=True)
class Measurement:
    """A measured training among the rates of a machine, and in what the planned one differs.

    Attributes:
        run: that was measured.
        rates: of the same file.
        differences: in words; empty if it was measured as it is planned.
    """

    run: TrainingRates
    rates: Rates
    differences: Sequence[str]


def nearest(work: TrainingWork, files: Sequence[Rates]) -> Measurement:
    """The measured training, of at least one, that differs least from the planned one."""
    candidates = [Measurement(run, rates, _differences(work, run)) for rates in files for run in rates.training]
    return min(candidates, key=lambda candidate: len(candidate.differences))


def _differences(work: TrainingWork, run: TrainingRates) -> list[str]:
    numbers = {
        "strategy": (run.strategy, work.strategy),
        "processes": (run.processes, work.processes),
        "machines": (run.machines, work.machines),
        "images of a process in a step": (run.share, work.share),
        "micro-batches": (run.micro_batches, work.micro_batches),
    }
    return run.differences(work.settings, numbers, work.recording)


@dataclass(frozen=True)
class TrainingTime:
    """Seconds that a training takes.

    Attributes:
        work, measurement: what it follows from.
        start: until the first step is done, the launcher's included where it was measured.
        warm_up: by which the first step takes longer than others.
        computing, exchange: of a step.
        decoding, reading: what images cost a step beside these, decoded for it, or read from the cache.
        decoded_images: of a process and second, that its decoding could deliver.
        cached: share of the images that the cache has room for.
        evaluation: of an epoch, without decoding.
        selection_decoding, fit_decoding: of all images that an evaluation reads, which are those of the selection and,
            under a loss without a scale, those that are trained on.
        checkpoint: of one.
        end: of the processes.
        unmeasured: what is not counted, in words.
    """

    work: TrainingWork
    measurement: Measurement
    start: float
    warm_up: float
    computing: float
    exchange: float
    decoding: float
    reading: float
    decoded_images: float
    cached: float
    evaluation: float
    selection_decoding: float
    fit_decoding: float
    checkpoint: float
    end: float
    unmeasured: Sequence[str] = field(default_factory=list)

    @property
    def step(self) -> float:
        """Of a batch that is on the device."""
        return self.computing + self.exchange

    @property
    def images(self) -> float:
        """What images cost a step after the first epoch."""
        return self.cached * self.reading + (1 - self.cached) * self.decoding

    @property
    def starts_in_closed_form(self) -> bool:
        """Whether a ridge on all training stimuli comes before the first step."""
        return self.work.recipe.readout.start != "zero"

    @property
    def first_epoch(self) -> float:
        """Its steps, evaluation and checkpoints."""
        if self.starts_in_closed_form:  # which has decoded the images
            return self.warm_up + self.later_epoch
        return self.first_steps + self.first_evaluation + self.saving

    @property
    def first_steps(self) -> float:
        """The steps of the first epoch, whose images are decoded for them."""
        return self.warm_up + self.work.steps * (self.step + self.decoding)

    @property
    def first_evaluation(self) -> float:
        """Of the first epoch, after which the cache keeps the images that are trained on."""
        return self.evaluation + self.selection_decoding + (1 - self.cached) * self.fit_decoding

    @property
    def later_epoch(self) -> float:
        """As `first_epoch`."""
        evaluation = self.evaluation + (1 - self.cached) * (self.selection_decoding + self.fit_decoding)
        return self.work.steps * (self.step + self.images) + evaluation + self.saving

    @property
    def saving(self) -> float:
        """The checkpoints of an epoch."""
        every = self.work.recipe.checkpoint.every_steps
        return self.checkpoint * (1 + (self.work.steps - 1) // every if every else 1)

    def after(self, epochs: int) -> float:
        """From the command until `epochs` are done."""
        first = self.first_evaluation + self.checkpoint if self.starts_in_closed_form else 0.0
        first_step = self.warm_up + self.step + self.decoding
        return max(self.start - first_step, 0.0) + first + self.first_epoch + (epochs - 1) * self.later_epoch + self.end

    @property
    def whole(self) -> float:
        """Of all epochs; early stopping may end the run sooner."""
        return self.after(self.work.recipe.epochs)

    @property
    def soonest(self) -> float | None:
        """If no epoch improves on the first scores; None if that does not end the run early."""
        epochs = self.work.recipe.early_stopping.patience + (not self.starts_in_closed_form)
        return self.after(epochs) if epochs < self.work.recipe.epochs else None

    def parts(self) -> dict[str, float]:
        """Seconds of a later epoch by what they are spent on."""
        steps = self.work.steps
        return {
            "computing": steps * self.computing,
            "exchange": steps * self.exchange,
            "images": steps * self.images,
            "evaluation": self.later_epoch - steps * (self.step + self.images) - self.saving,
            "checkpoints": self.saving,
        }


def training_time(work: TrainingWork, measurement: Measurement) -> TrainingTime:
    """The time of a planned training; see the top of this file."""
    run, rates = measurement.run, measurement.rates
    place, machine = rates.place, rates.machine
    is_measured = not measurement.differences
    before = _measured_exchange(run, rates)
    slower = run.slower(place, work.processes, work.machines)
    operations = 1.0 if is_measured else work.flops / run.flops * slower
    exchange = before if is_measured else _planned_exchange(work, run, rates)
    computing = (run.step_seconds - before) * operations * work.share / run.share
    unmeasured = []
    if work.processes > 1 and machine.bandwidth is None:
        unmeasured.append("the exchange of gradients, as the rates are those of one process")
    if place.launch_seconds is None:
        unmeasured.append("the launcher")
    if work.recipe.readout.start != "zero" and (run.recording is None or not is_measured):
        unmeasured.append(f"readout.start: {work.recipe.readout.start}, a ridge on all training stimuli")
    image_bytes = run.image_bytes if is_measured or work.image_bytes is None else work.image_bytes
    decode = machine.decoding.seconds_for(image_bytes, work.side)
    workers = planned_workers(work.recipe.loader.workers, place, work.processes, work.machines)
    evaluated = run.evaluation_batch_seconds / run.evaluation_batch * operations
    decoded = decode / work.processes / max(workers, 1)
    return TrainingTime(
        work=work,
        measurement=measurement,
        start=run.start_seconds + (place.launch_seconds or 0.0),
        warm_up=max(run.first_step_seconds - run.decoded_seconds, 0.0),
        computing=computing,
        exchange=exchange,
        decoding=_decoding(work, measurement, decode, workers, computing + exchange),
        reading=_reading(work, run),
        decoded_images=max(workers, 1) / decode,
        cached=cached_share(work, place),
        evaluation=_evaluation(work, run, evaluated),
        selection_decoding=decoded * work.selection,
        fit_decoding=decoded * work.fit if work.calibrates else 0.0,
        checkpoint=run.checkpoint_seconds * (1 if is_measured else work.checkpoint_bytes / run.checkpoint_bytes),
        end=place.end_seconds,
        unmeasured=unmeasured,
    )


def planned_workers(setting: int | None, place: Place, processes: int, machines: int) -> int:
    """Decoding processes of a rank, as `train.data.loader.workers_per_rank` counts them."""
    return workers_per_rank(setting, max(int(place.cores_of(processes, machines)), 1))


def has_cores_to_decode(setting: int | None, place: Place, processes: int, machines: int) -> bool:
    """Whether more decoding processes would have cores; on a CPU, those that the rank itself does not compute on."""
    workers = planned_workers(setting, place, processes, machines)
    return place.on_gpu or place.cores_of(processes, machines) > 1 + workers


def _measured_exchange(run: TrainingRates, rates: Rates) -> float:
    """Of a step."""
    bandwidth = rates.machine.bandwidth
    if run.processes == 1 or bandwidth is None:
        return 0.0
    sent = bytes_sent(read_strategy(run.strategy), run, run.processes, run.micro_batches)
    return min(sent / bandwidth, MOST_OF_A_STEP * run.step_seconds)


def _planned_exchange(work: TrainingWork, run: TrainingRates, rates: Rates) -> float:
    bandwidth = rates.machine.bandwidth
    if work.processes == 1 or bandwidth is None:
        return 0.0
    sent = bytes_sent(read_strategy(work.strategy), work.cost, work.processes, work.micro_batches)
    if run.processes == 1 or not run.trainable:
        return sent / bandwidth
    before = bytes_sent(read_strategy(run.strategy), run, run.processes, run.micro_batches)
    return _measured_exchange(run, rates) * sent / before


def _decoding(work: TrainingWork, measurement: Measurement, decode: float, workers: int, step: float) -> float:
    """What decoding costs a step, beside computing."""
    run, rates = measurement.run, measurement.rates
    measured = run.decoded_seconds - run.step_seconds
    if not measurement.differences:
        return measured
    before = rates.machine.decoding.seconds_for(run.image_bytes, run.side)
    scaled = measured * work.share / run.share * decode / before
    if workers == run.workers:
        delivered = work.share * decode / workers if workers else 0.0
        return max(scaled, delivered - step if rates.place.on_gpu else 0.0)
    if workers == 0:
        return work.share * decode
    return max(work.share * decode / workers - step, 0.0)


def _reading(work: TrainingWork, run: TrainingRates) -> float:
    """What images from the cache cost a step, beside computing."""
    if run.cached_seconds is None:
        return run.decoded_seconds - run.step_seconds
    pixels = (work.side / run.side) ** 2
    return (run.cached_seconds - run.step_seconds) * work.share / run.share * pixels


def _evaluation(work: TrainingWork, run: TrainingRates, image_seconds: float) -> float:
    """Of the stimuli that select, and under a loss without a scale of all that are trained on."""
    batch = work.recipe.evaluation_batch_size
    counts = [work.selection, work.fit] if work.calibrates else [work.selection]
    batches = sum(math.ceil(count / work.processes / batch) for count in counts)
    return batches * batch * image_seconds + len(counts) * run.evaluation_seconds


def cached_share(work: TrainingWork, place: Place) -> float:
    """The share of the images that stays decoded after the first epoch."""
    loader = work.recipe.loader
    if loader.cache == "off" or loader.engine != "indexed":
        return 0.0
    needed = (work.fit + work.selection) * work.side**2 * 3
    room = DEFAULT_FRACTION * place.host_bytes if loader.cache_gib is None else loader.cache_gib * GIB
    return min(room / needed, 1.0)
