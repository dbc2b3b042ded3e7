"""Network and optimizer that step in the same way under every strategy: one process, DDP, DeepSpeed.

`Engine` is one process and DDP, where every rank holds everything; `zero.py` is DeepSpeed, whose ZeRO partitions it.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel

from train.distributed.loss_scale import LossScale
from train.distributed.runtime import Runtime
from train.distributed.step_timing import StepClock, Timestamp

SHARED_STATE = ("step", "mu_product")  # in an optimizer's state: one number, not one per weight
SCALER = "loss_scale"  # stands for a parameter in the names of the optimizer's tensors
FLAGS = 64  # made at a time


@dataclass(frozen=True)
class StepOutcome:
    """What became of a step; both are scalars on the device, not 0 if true, and the same on every rank.

    Attributes:
        left_out: the gradient was not finite, so the step was skipped.
        may_be_scale: the loss was scaled for float16, which explains such a gradient where the loss itself is finite.
    """

    left_out: torch.Tensor
    may_be_scale: torch.Tensor


class Engine:
    """Network and optimizer, each whole on every rank.

    Attributes:
        clock: where the time of a step goes; communication is waiting for the network and for other ranks.

    Args:
        runtime: this process.
        wrapped: the network as the strategy wrapped it.
        network: the network itself.
        optimizer: the torch optimizer; its parameter groups hold the learning rates under every strategy.
        accumulation_steps: micro-batches per optimizer step.
        clip_norm: largest norm of the gradient, or None.
        scales_loss: multiply the loss by a factor that keeps float16 gradients from becoming 0, and adapt that factor.
    """

    def __init__(
        self,
        runtime: Runtime,
        wrapped: nn.Module,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        accumulation_steps: int,
        clip_norm: float | None,
        scales_loss: bool = False,
    ):
        self.runtime, self.network, self.optimizer = runtime, network, optimizer
        self.clock = StepClock(runtime.device)
        self._wrapped, self._accumulation_steps, self._clip_norm = wrapped, accumulation_steps, clip_norm
        self._ddp = wrapped if isinstance(wrapped, DistributedDataParallel) else None
        self._training_forward: Callable[[torch.Tensor], dict[str, torch.Tensor]] = wrapped
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._names = {id(parameter): name for name, parameter in network.named_parameters()}
        self._scale_of_one = torch.ones((), device=runtime.device)
        self._gradient_of_loss = torch.full((), float(runtime.ranks), device=runtime.device)
        self._flags: list[torch.Tensor] = []
        self._not_scaled = torch.zeros((), dtype=torch.bool, device=runtime.device)
        self._loss_scale = LossScale(runtime.device) if scales_loss else None

    def compile(self) -> None:
        """Let torch compile the network for training; scoring is not compiled, so that scores do not depend on it."""
        self._training_forward = torch.compile(self._wrapped, dynamic=False)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """The network's outputs for a micro-batch, in training."""
        return self._training_forward(images)

    def accumulate(self, index: int) -> AbstractContextManager:
        """Around forward and backward of micro-batch `index`: ranks exchange gradients with the last one only."""
        if self._ddp is not None and index < self._accumulation_steps - 1:
            return self._ddp.no_sync()
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's gradients. `loss` is its part of the global batch's loss (`train/models/losses.py`).

        DDP averages over ranks, which is undone here, so that the result is the sum of the parts. Factors of the loss
        are given as its gradient, which spares a product in each direction.
        """
        gradient = self._gradient_of_loss if self._loss_scale is None else self._loss_scale.of(self._gradient_of_loss)
        if self._ddp is None:
            loss.backward(gradient)
            return
        computed: list[Timestamp] = []
        # Autograd runs callbacks in the order in which they were queued, and DDP queues the one that waits for the last
        # gradients to arrive after it has sent them.
        queue_callback = Variable._execution_engine.queue_callback
        loss.register_hook(lambda _: queue_callback(lambda: computed.append(self.clock.now())))
        loss.backward(gradient)
        self.clock.count("communication", computed[0])

    def step(self) -> StepOutcome:
        """One optimizer step with the gradients of a whole global batch; clears them.

        It is skipped if the gradient is not finite.
        """
        outcome = self._check_gradient()
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        self._step_unless(outcome.left_out, self.optimizer.step)
        self.optimizer.zero_grad(set_to_none=True)
        return outcome

    def _gradients(self) -> list[torch.Tensor]:
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    def _new_flag(self) -> torch.Tensor:
        """A float32 () of 0 on the device; made in one kernel for many steps."""
        if not self._flags:
            self._flags = list(torch.zeros(FLAGS, device=self.runtime.device).unbind())
        return self._flags.pop()

    def _check_gradient(self) -> StepOutcome:
        """Whether the step must be skipped. Undoes the scale of the loss, and adapts it."""
        scale, non_finite = self._loss_scale, self._new_flag()
        inverse = self._scale_of_one if scale is None else scale.inverse
        # As in GradScaler: one pass over all gradients. On a CPU a norm of each takes thirty times as long.
        torch._amp_foreach_non_finite_check_and_unscale_(self._gradients(), non_finite, inverse)
        if scale is None:
            return StepOutcome(non_finite, self._not_scaled)
        may_be_scale = scale.may_overflow
        scale.update(non_finite)
        return StepOutcome(non_finite, may_be_scale)

    def _step_unless(self, skip: torch.Tensor, step: Callable[[], object]) -> None:
        """Step, or skip where `skip`, float32 (), is not 0; on a GPU without making the host wait for it.

        There a fused optimizer reads it on the device. Other optimizers step with a gradient of 0 instead, which moves
        the weights by their momentum.
        """
        if skip.device.type == "cpu":
            if not skip:
                step()
            return
        if all(group.get("fused") for group in self.optimizer.param_groups):
            # As GradScaler passes them to fused optimizers; the base class does not declare them.
            self.optimizer.grad_scale, self.optimizer.found_inf = None, skip  # type: ignore[attr-defined]
        else:
            clear_if(skip, self._gradients())
        step()

    def set_learning_rate(self, factor: float) -> None:
        """Set every group's learning rate to `factor` times its peak."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor

    # --- for checkpoints: whole tensors, whatever the strategy

    def network_tensors(self) -> dict[str, torch.Tensor]:
        """The network's tensors by name; every rank must take part."""
        return self.network.state_dict()

    def local_tensors(self) -> list[torch.Tensor]:
        """The network's float32 tensors as this rank holds them: whole, or its partition of each.

        The same objects throughout a run, in the order of `network_tensors`.
        """
        return [tensor for tensor in self.network.state_dict().values() if tensor.dtype == torch.float32]

    def partition(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Whole tensors like the network's -> this rank's partitions of them, like `local_tensors`."""
        return tensors

    def gather(self, local_tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """This rank's partitions, like `local_tensors` -> whole tensors; every rank must take part."""
        return local_tensors

    def optimizer_tensors(self) -> dict[str, torch.Tensor]:
        """The optimizer's state as `<parameter>|<key>`; every rank must take part."""
        state = self.optimizer.state
        tensors = {
            f"{name}|{key}": value
            for name, parameter in self.network.named_parameters()
            for key, value in state.get(parameter, {}).items()
        }
        scale = {} if self._loss_scale is None else self._loss_scale.tensors()
        return tensors | {f"{SCALER}|{key}": value for key, value in scale.items()}

    def load_optimizer(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore an optimizer's state from `optimizer_tensors`, which may come from another strategy."""
        saved = self.optimizer.state_dict()
        for index, parameter in enumerate(self._parameters):
            saved["state"][index] = parameter_state(tensors, self._names[id(parameter)])
        self.optimizer.load_state_dict(saved)
        for state in self.optimizer.state.values():
            if "mu_product" in state:  # NAdam reads it on the host in every step; torch has moved it to the device
                state["mu_product"] = state["mu_product"].cpu()
        scale = parameter_state(tensors, SCALER)
        if scale and self._loss_scale is not None:
            self._loss_scale.load(scale)


def clear_if(skip: torch.Tensor, gradients: Sequence[torch.Tensor]) -> None:
    """Set float32 gradients to 0 where `skip`, a scalar, is not 0: one kernel for all of them.

    NaN times 0 is NaN, so what is multiplied are the bits: those of any number times 0 are those of 0.
    """
    torch._foreach_mul_([gradient.view(torch.int32) for gradient in gradients], (skip == 0).int())


def parameter_state(tensors: dict[str, torch.Tensor], parameter: str) -> dict[str, torch.Tensor]:
    """The part of `Engine.optimizer_tensors` that belongs to one parameter, by key."""
    prefix = f"{parameter}|"
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
