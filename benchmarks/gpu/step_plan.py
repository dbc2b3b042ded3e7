"""What a training step should cost: memory by the plan, and floating-point operations; computed without a GPU."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from data_prep.shards.manifest import Manifest
from train.planning.memory import estimate_memory, read_strategy, usable_memory
from train.planning.operations import training_flops
from train.planning.step_cost import StepCost, measure_step
from train.run.recipe import Recipe

TERA = 1e12
# Dense tensor-core rates in TFLOP/s by precision, from NVIDIA's data sheets; fp32 is without tensor cores. The first
# name that a GPU's name contains counts.
DATA_SHEETS: dict[str, dict[str, float]] = {
    "H100 PCIe": {"bf16": 756, "fp16": 756, "tf32": 378, "fp32": 51},
    "H100 NVL": {"bf16": 835, "fp16": 835, "tf32": 417, "fp32": 60},
    "H100": {"bf16": 989, "fp16": 989, "tf32": 495, "fp32": 67},
    "H200": {"bf16": 989, "fp16": 989, "tf32": 495, "fp32": 67},
    "A100": {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5},
    "L40S": {"bf16": 362, "fp16": 362, "tf32": 183, "fp32": 91.6},
    "RTX 3090": {"bf16": 71, "fp16": 71, "tf32": 35.6, "fp32": 35.6},
    "RTX 4090": {"bf16": 165, "fp16": 165, "tf32": 82.6, "fp32": 82.6},
    "V100": {"fp16": 125, "fp32": 15.7},
}


@dataclass(frozen=True)
class StepPlan:
    """What a step of a recipe costs.

    Attributes:
        cost: memory, in bytes.
        flops: floating-point operations for an image: forward and backward, a multiply-add counts as two.
    """

    cost: StepCost
    flops: float

    @classmethod
    def of(cls, recipe: Recipe, manifest: Manifest) -> "StepPlan":
        """Of a recipe, on torch's fake tensors."""
        return cls(measure_step(recipe, manifest), training_flops(recipe, manifest))

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "StepPlan":
        """As `to_json` wrote it."""
        return cls(StepCost(**content["cost"]), content["flops"])

    def to_json(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)

    def bytes(self, strategy: str, batch: int) -> float:
        """Bytes of the GPU that one process takes, without CUDA itself."""
        return estimate_memory(read_strategy(strategy), self.cost, 1, batch, 1).total

    def fitting_batch(self, batch: int, gpu_bytes: int) -> int:
        """The batch, halved until the plan fits into a GPU."""
        while batch > 1 and self.bytes("ddp", batch) > usable_memory(gpu_bytes):
            batch //= 2
        return batch


def data_sheet_rate(name: str, precision: str) -> float | None:
    """The most floating-point operations a second of a GPU according to its data sheet; None if it is not known."""
    rates = next((rates for part, rates in DATA_SHEETS.items() if part in name), {})
    rate = rates.get(precision)
    return None if rate is None else rate * TERA


def total_memory() -> int:
    """Bytes of this process's GPU."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
