"""The rates that launch/check.sh --json measured, from which train/plan.py tells how long a run takes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_prep.common.errors import BadInput
from data_prep.common.safe_reading import parse_json, read_regular_file
from data_prep.common.validation_messages import first_fault

FORMAT: Final = "spiketune-rates"
VERSION: Final = 1
CPU = "CPU"  # the device of processes without a GPU

Seconds = Annotated[float, Field(gt=0)]
Some = Annotated[float, Field(ge=0)]  # seconds that may be none
PerSecond = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class _Measured(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


class Place(_Measured):
    """Where rates were measured.

    Attributes:
        when: date and time.
        hosts: names of the machines.
        device: of each process: the GPU's name, or `CPU`.
        device_bytes: memory of a GPU; None for a CPU.
        host_bytes: memory of a machine.
        processes, machines: over which all rates were measured.
        cores: of each process.
        versions: of packages.
        launch_seconds: until the launcher has started the processes; None if it did not say when it began.
        end_seconds: that a process takes to end once its work is done.
    """

    when: str
    hosts: list[str]
    device: str
    device_bytes: float | None
    host_bytes: PerSecond
    processes: Count
    machines: Count
    cores: Count
    versions: dict[str, str]
    launch_seconds: Some | None
    end_seconds: Some

    @property
    def on_gpu(self) -> bool:
        """Whether each process has a GPU."""
        return self.device != CPU

    def cores_of(self, processes: int, machines: int) -> float:
        """The cores of each of some processes on machines like these."""
        return self.cores * (self.processes / self.machines) / (processes / machines)


class Decoding(_Measured):
    """Decoding in one process without workers.

    Attributes:
        seconds: for an image.
        bytes: of the encoded image.
        side: in pixels, of the decoded image.
    """

    seconds: Seconds
    bytes: PerSecond
    side: Count

    def seconds_for(self, image_bytes: float, side: int) -> float:
        """For an image of another size: half the time goes with the encoded bytes, half with the pixels."""
        return self.seconds * (image_bytes / self.bytes + (side / self.side) ** 2) / 2


class Decomposition(_Measured):
    """Seconds of the decomposition of a symmetric matrix of `stimuli` rows."""

    stimuli: Count
    seconds: Seconds


class MachineRates(_Measured):
    """What all processes at the same time reach, each; the slowest of them.

    Attributes:
        decoding: of a JPEG.
        disk_write: bytes/s onto the disk; `page_write` into the page cache, as long as that has room.
        disk_read: bytes/s of a file from the disk; `column_read` of columns of a table in the page cache.
        bandwidth: bytes/s that a process sends in an all-reduce (NVIDIA's bus bandwidth); None for one process.
        products: by precision, n^2 p / seconds of the inner products of n stimuli's p features.
        decompositions: in float64, two or more.
        multiplication: floating-point operations/s of matrix products in float64 on the host.
        passes: bytes/s of elementwise work in float64 on the host.
        bootstrap_site, bootstrap_response: seconds for each site, and for each response, of an interval of scores.
        similarity: seconds for each pair of scored stimuli, of RSA and CKA.
        figure: seconds of the first figure, most of it to import what draws it.
    """

    decoding: Decoding
    disk_write: PerSecond
    page_write: PerSecond
    disk_read: PerSecond
    column_read: PerSecond
    bandwidth: PerSecond | None
    products: dict[str, PerSecond]
    decompositions: Annotated[list[Decomposition], Field(min_length=1)]
    multiplication: PerSecond
    passes: PerSecond
    bootstrap_site: Some
    bootstrap_response: Some
    similarity: Seconds
    figure: Seconds


class RunRates(_Measured):
    """What training and probing have in common.

    Attributes:
        settings: on which the speed depends.
        processes, machines: that it ran on.
        side: of its images, in pixels.
        image_bytes: of an encoded image.
        flops: floating-point operations for an image.
        workers: decoding processes per rank.
        start_seconds: from the start of the process until the first batch is done, data and weights read.
        recording: the name of the user's recording; None for a made-up one.
    """

    settings: dict[str, str]
    processes: Count
    machines: Count
    side: Count
    image_bytes: PerSecond
    flops: PerSecond
    workers: Annotated[int, Field(ge=0)]
    start_seconds: Seconds
    recording: str | None

    def differences(
        self,
        settings: Mapping[str, str],
        numbers: Mapping[str, tuple[object, object]],
        recording: str | None,
    ) -> list[str]:
        """In what a planned run differs from this one, in words.

        Args:
            settings: of the planned run.
            numbers: measured and planned, by what they count.
            recording: of the planned run; None on paper.
        """
        pairs = {**{name: (self.settings.get(name), value) for name, value in settings.items()}, **numbers}
        changed = [
            f"{name} {measured} -> {planned}" for name, (measured, planned) in pairs.items() if measured != planned
        ]
        if self.recording is None or (recording is not None and self.recording != recording):
            changed.append(f"recording {self.recording or 'made up'} -> {recording or 'on paper'}")
        return changed

    def slower(self, place: Place, processes: int, machines: int) -> float:
        """How many times longer each of some processes computes: on a CPU they share the cores of a machine."""
        if place.on_gpu:
            return 1.0
        return place.cores_of(self.processes, self.machines) / place.cores_of(processes, machines)


class TrainingRates(RunRates):
    """A training that was measured; times are those of the slowest process.

    Attributes:
        strategy: its name.
        share: stimuli of a process in an optimizer step.
        micro_batches: into which it is cut.
        first_step_seconds: of start_seconds, those of the first step, for which decoding processes start.
        weights, trainable: bytes of all weights, and of those that are trained.
        step_seconds: of an optimizer step with a batch that is on the device.
        decoded_seconds: of one whose images are decoded for it.
        cached_seconds: of one whose decoded images are kept; None where none are.
        evaluation_batch: stimuli in a forward pass of an evaluation.
        evaluation_batch_seconds: of such a pass.
        evaluation_seconds: what an evaluation takes besides.
        checkpoint_seconds, checkpoint_bytes: of a checkpoint.
    """

    strategy: str
    share: Count
    micro_batches: Count
    weights: PerSecond
    trainable: Some
    first_step_seconds: Seconds
    step_seconds: Seconds
    decoded_seconds: Seconds
    cached_seconds: Seconds | None
    evaluation_batch: Count
    evaluation_batch_seconds: Seconds
    evaluation_seconds: Some
    checkpoint_seconds: Seconds
    checkpoint_bytes: PerSecond


class FeatureRates(RunRates):
    """A probe whose activations were measured.

    Attributes:
        features: numbers of an image.
        image_seconds: of a process for an image: decoded, passed through the network, its features written.
        forward_seconds: of these, in the network.
    """

    features: Count
    image_seconds: Seconds
    forward_seconds: Seconds


class Rates(_Measured):
    """A file of rates; `verdicts` are the lines of the check."""

    format: Literal["spiketune-rates"] = FORMAT
    version: Literal[1] = VERSION
    place: Place
    machine: MachineRates
    training: list[TrainingRates]
    features: list[FeatureRates]
    verdicts: list[dict[str, Any]] = []


def load_rates(path: Path) -> Rates:
    """Read a file that `launch/check.sh --json` wrote.

    Raises:
        BadInput: it is missing, of another kind or version, or lacks a rate.
    """
    try:
        content = parse_json(read_regular_file(path))
    except FileNotFoundError:
        raise BadInput(f"rates: {path} does not exist; write it with launch/check.sh --json {path}") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"rates: {path} is not readable as JSON ({error})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BadInput(f"rates: {path} is not a file of rates; write one with launch/check.sh --json")
    if content.get("version") != VERSION:
        raise BadInput(
            f"rates: {path} has version {content.get('version')!r} of the format, and this Spiketune reads version "
            f"{VERSION}; run launch/check.sh --json again"
        )
    if content.get("place") is None or content.get("machine") is None:
        failed = [line.get("subject") for line in content.get("verdicts", []) if line.get("outcome") == "failed"]
        why = f", because the check failed: {', '.join(map(str, failed))}" if failed else ""
        raise BadInput(f"rates: {path} has no rates of the machine{why}; run launch/check.sh --json again")
    try:
        return Rates.model_validate(content)
    except ValidationError as error:
        raise BadInput(f"rates: {path}: {first_fault(error)}; run launch/check.sh --json again") from None
