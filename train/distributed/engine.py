"""Network and optimizer that step in the same way under every strategy: one process, DDP, DeepSpeed.

`Engine` is one process and DDP, where every rank holds everything; `zero.py` is DeepSpeed, whose ZeRO partitions it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel

from train.distributed.runtime import Runtime
from train.distributed.step_timing import StepClock, Timestamp

SHARED_STATE = ("step", "mu_product")  # in an optimizer's state: one number, not one per weight
SCALER = "loss_scale"  # stands for a parameter in the names of the optimizer's tensors


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
        self._training_forward: Callable[[torch.Tensor], dict[str, torch.Tensor]] = wrapped
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._names = {id(parameter): name for name, parameter in network.named_parameters()}
        self._scale_of_one = torch.ones((), device=runtime.device)
        self._scaler = torch.amp.GradScaler(runtime.device.type, enabled=scales_loss)

    def compile(self) -> None:
        """Let torch compile the network for training; scoring is not compiled, so that scores do not depend on it."""
        self._training_forward = torch.compile(self._wrapped, dynamic=False)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """The network's outputs for a micro-batch, in training."""
        return self._training_forward(images)

    def accumulate(self, index: int) -> AbstractContextManager:
        """Around forward and backward of micro-batch `index`: ranks exchange gradients with the last one only."""
        if isinstance(self._wrapped, DistributedDataParallel) and index < self._accumulation_steps - 1:
            return self._wrapped.no_sync()
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's gradients. `loss` is its part of the global batch's loss (`train/models/losses.py`).

        DDP averages over ranks, which is undone here, so that the result is the sum of the parts.
        """
        scaled = self._scaler.scale(loss * self.runtime.ranks)
        if not isinstance(self._wrapped, DistributedDataParallel):
            scaled.backward()
            return
        computed: list[Timestamp] = []
        # Autograd runs callbacks in the order in which they were queued, and DDP queues the one that waits for the last
        # gradients to arrive after it has sent them.
        queue_callback = Variable._execution_engine.queue_callback
        scaled.register_hook(lambda _: queue_callback(lambda: computed.append(self.clock.now())))
        scaled.backward()
        self.clock.count("communication", computed[0])

    def step(self) -> torch.Tensor:
        """One optimizer step with the gradients of a whole global batch; clears them.

        Returns:
            Whether it was skipped because the gradient is not finite: bool (), the same on every rank, on the device.
        """
        if self._scaler.is_enabled():
            skipped = self._scaled_step()
        else:
            skipped = self._gradient_is_not_finite()
            if self._clip_norm is not None:
                nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
            self._step_unless(skipped)
        self.optimizer.zero_grad(set_to_none=True)
        return skipped

    def _gradients(self) -> list[torch.Tensor]:
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    def _gradient_is_not_finite(self) -> torch.Tensor:
        non_finite = torch.zeros((), device=self.runtime.device)
        # As in GradScaler: one pass over all gradients. On a CPU a norm of each takes thirty times as long.
        torch._amp_foreach_non_finite_check_and_unscale_(self._gradients(), non_finite, self._scale_of_one)
        return non_finite.bool()

    def _step_unless(self, skip: torch.Tensor) -> None:
        """Step or skip; on a GPU without making the host wait for `skip`.

        There a fused optimizer reads it on the device. Other optimizers step with a gradient of 0 instead, which moves
        the weights by their momentum.
        """
        if skip.device.type == "cpu":
            if not skip:
                self.optimizer.step()
            return
        if all(group.get("fused") for group in self.optimizer.param_groups):
            # As GradScaler passes them to fused optimizers; the base class does not declare them.
            self.optimizer.grad_scale, self.optimizer.found_inf = None, skip.float()  # type: ignore[attr-defined]
        else:
            for gradient in self._gradients():
                gradient.masked_fill_(skip, 0)
        self.optimizer.step()

    def _scaled_step(self) -> torch.Tensor:
        """With a scaled loss an overflowing gradient is no fault: that is how the scale adapts."""
        if self._clip_norm is not None:
            self._scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        return torch.zeros((), dtype=torch.bool, device=self.runtime.device)

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
        scale = {f"{SCALER}|{key}": torch.tensor(value) for key, value in self._scaler.state_dict().items()}
        return tensors | scale

    def load_optimizer(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore an optimizer's state from `optimizer_tensors`, which may come from another strategy."""
        saved = self.optimizer.state_dict()
        for index, parameter in enumerate(self._parameters):
            saved["state"][index] = parameter_state(tensors, self._names[id(parameter)])
        self.optimizer.load_state_dict(saved)
        for state in self.optimizer.state.values():
            if "mu_product" in state:  # NAdam reads it on the host in every step; torch has moved it to the device
                state["mu_product"] = state["mu_product"].cpu()
        if scale := parameter_state(tensors, SCALER):
            self._scaler.load_state_dict({key: value.item() for key, value in scale.items()})


def parameter_state(tensors: dict[str, torch.Tensor], parameter: str) -> dict[str, torch.Tensor]:
    """The part of `Engine.optimizer_tensors` that belongs to one parameter, by key."""
    prefix = f"{parameter}|"
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
