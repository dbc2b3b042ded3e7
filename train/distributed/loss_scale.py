"""A factor on the loss of a float16 network, adapted on the device, so that the host never waits for it."""

from collections.abc import Mapping

import torch

INITIAL, GROWTH, BACKOFF, GROWTH_INTERVAL = 2.0**16, 2.0, 0.5, 2000  # as torch's GradScaler has them
SCALE, GOOD_STEPS = "scale", "_growth_tracker"  # names in a checkpoint, also GradScaler's


class LossScale:
    """Multiplies the loss, so that small float16 gradients do not become 0, and divides the gradients again.

    The factor is halved after a step whose gradients overflowed, and doubled after 2,000 others in a row. Torch's
    GradScaler does the same, but reads on the host whether the gradients overflowed, unless the optimizer is fused.
    """

    def __init__(self, device: torch.device):
        self._scale = torch.full((), INITIAL, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def of(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss times the factor."""
        return loss * self._scale

    @property
    def inverse(self) -> torch.Tensor:
        """One divided by the factor: float32 (), on the device."""
        return self._scale.double().reciprocal().float()

    @property
    def may_overflow(self) -> torch.Tensor:
        """Whether the factor may be why a gradient is not finite: bool (), on the device. At 1 or below it is not."""
        return self._scale > 1

    def update(self, overflowed: torch.Tensor) -> None:
        """Adapt the factor after a step; `overflowed` is float32 (), 0 where all gradients were finite."""
        torch._amp_update_scale_(self._scale, self._good_steps, overflowed, GROWTH, BACKOFF, GROWTH_INTERVAL)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds of it, by name."""
        return {SCALE: self._scale.clone(), GOOD_STEPS: self._good_steps.clone()}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore what `tensors` returned."""
        self._scale.copy_(tensors[SCALE])
        self._good_steps.copy_(tensors[GOOD_STEPS])
