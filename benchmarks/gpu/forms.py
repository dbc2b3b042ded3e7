"""The two forms of the GPU check: one for a GPU, and a small one that takes the same way through the code on a CPU."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """A network whose speed is measured.

    Attributes:
        network: timm's name.
        side: of its images, in pixels.
        batch: stimuli in a step; halved until the plan fits into the GPU.
        stimuli: how many different ones it is fed with.
    """

    network: str
    side: int
    batch: int
    stimuli: int

    @property
    def name(self) -> str:
        """In tables and files."""
        return f"{self.network} {self.side} px"


@dataclass(frozen=True)
class Form:
    """Device and sizes.

    Attributes:
        device: "cuda" or "cpu".
        cases: of speed; the first is also measured in other precisions, with other optimizers and strategies, compiled.
        seconds: that a measurement of speed takes.
        images, stimuli: different JPEGs, and the stimuli as which they are packed.
        workers: decoding processes to try.
        matrix: side of square matrices to multiply.
        probed, features: stimuli and features of a probe.
        precisions: of the small network that strategies train.
        strategies: to try; the first two with a GPU in every precision, and on the first case.
        variants: names of other settings in which the speed of the first case is measured.
        epochs: of the runs that are stopped and resumed.
        together: small entries that run at the same time.
        diverging: precisions of runs that must notice that they diverge.
    """

    device: str
    cases: tuple[Case, ...]
    seconds: float
    images: int
    stimuli: int
    workers: tuple[int, ...]
    matrix: int
    probed: int
    features: int
    precisions: tuple[str, ...]
    strategies: tuple[str, ...]
    variants: tuple[str, ...]
    epochs: int
    together: int
    diverging: tuple[str, ...]

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device == "cuda"


def form_of(device: str, cores: int) -> Form:
    """The form for a device; `cores` bounds what runs at the same time."""
    if device == "cuda":
        return Form(
            device="cuda",
            cases=(
                Case("resnet50", 224, 256, 8192),
                Case("tf_efficientnet_b6", 528, 32, 768),
                Case("resnet152", 224, 128, 4096),
                Case("densenet169", 224, 128, 4096),
            ),
            seconds=2.5,
            images=256,
            stimuli=9216,
            workers=tuple(n for n in (1, 2, 4, 8, 12, 16) if n <= max(cores, 1)),
            matrix=8192,
            probed=2880,
            features=50176,
            precisions=("fp32", "bf16"),
            strategies=("zero2", "zero3", "zero0", "zero1", "zero2_offload", "zero3_offload"),
            variants=("zero2", "zero3", "fp16", "fp32", "tf32", "nadam", "zero2_offload", "zero3_offload"),
            epochs=12,
            together=min(max(cores // 3, 2), 5),
            diverging=("bf16", "fp16"),
        )
    return Form(
        device="cpu",
        cases=(Case("test_resnet", 64, 16, 64),),
        seconds=0.3,
        images=16,
        stimuli=160,
        workers=(0, 1),
        matrix=512,
        probed=300,
        features=2048,
        precisions=("fp32",),
        strategies=("zero2", "zero3_offload"),
        variants=("zero3", "tf32", "nadam"),
        epochs=2,
        together=min(max(cores, 1), 2),
        diverging=("bf16",),
    )


def usable_device(wanted: str | None) -> str:
    """The device asked for; by default a GPU if there is one.

    Raises:
        SystemExit: a GPU was asked for, and there is none.
    """
    if wanted == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
        return "cpu"
    from train.distributed.launch_environment import uses_gpu

    if uses_gpu():
        return "cuda"
    if wanted == "cuda":
        raise SystemExit("error: --device cuda: torch sees no GPU here (or ACCELERATE_USE_CPU is set)")
    os.environ["ACCELERATE_USE_CPU"] = "true"
    return "cpu"
