"""Network and optimizer that step in the same way under every strategy: one process, DDP, DeepSpeed.

`Engine` is one process, DDP and ZeRO-0, where every rank holds everything; `zero.py` is what ZeRO cuts up.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.autograd import Variable

from train.distributed.runtime import Runtime
from train.distributed.step_timing import Moment, StepClock

SHARED_STATE = ("step", "mu_product")  # of an optimizer: numbers, not one per weight
SCALER = "loss_scale"  # stands for a parameter in the names of the optimizer's tensors


class Engine:
    """Network and optimizer, each whole on every rank.

    Attributes:
        clock: where the time of a step goes; communication is what a step waits for the network and for other ranks.

    Args:
        runtime: this process.
        wrapped: the network as the strategy wrapped it.
        network: the network itself.
        optimizer: the torch optimizer; its parameter groups hold the learning rates under every strategy.
        accumulation_steps: micro-batches per optimizer step.
        clip_norm: largest norm of the gradient, or None.
        scales_loss: multiply the loss by a factor that keeps float16 gradients from becoming 0, and find that factor.
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
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._names = {id(parameter): name for name, parameter in network.named_parameters()}
        self._unscaled = torch.ones((), device=runtime.device)
        self._scaler = torch.amp.GradScaler(runtime.device.type, enabled=scales_loss)

    def compile(self) -> None:
        """Let torch compile the network for training; scoring stays as it is, so that scores do not depend on it."""
        self.forward = torch.compile(self._wrapped, dynamic=False)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """The network's outputs for a micro-batch, in training."""
        return self._wrapped(images)

    def accumulate(self, piece: int) -> AbstractContextManager:
        """Around forward and backward of a micro-batch: gradients travel between ranks with the last one only."""
        return self._wrapped.no_sync() if self._is_ddp and piece < self._accumulation_steps - 1 else nullcontext()

    @property
    def _is_ddp(self) -> bool:
        return isinstance(self._wrapped, nn.parallel.DistributedDataParallel)

    def backward(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's gradients. `loss` is its part of the global batch's loss (`train/models/losses.py`).

        DDP averages over ranks, which is undone here, so that what arrives is the sum of the parts.
        """
        scaled = self._scaler.scale(loss * self.runtime.ranks)
        if not self._is_ddp:
            scaled.backward()
            return
        computed: list[Moment] = []
        # Autograd calls back in the order in which it was asked to, and DDP, which waits for the last gradients to
        # arrive, asks when it has sent them.
        ask = Variable._execution_engine.queue_callback
        scaled.register_hook(lambda _: ask(lambda: computed.append(self.clock.now())))
        scaled.backward()
        self.clock.count("communication", computed[0])

    def step(self) -> torch.Tensor:
        """One optimizer step with the gradients of a whole global batch; clears them.

        Returns:
            Whether it was left out because the gradient is not finite: bool (), the same on every rank, on the device.
        """
        if self._scaler.is_enabled():
            left_out = self._scaled_step()
        else:
            left_out = self._gradient_is_not_finite()
            if self._clip_norm is not None:
                nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
            self._step_unless(left_out)
        self.optimizer.zero_grad(set_to_none=True)
        return left_out

    def _gradients(self) -> list[torch.Tensor]:
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    def _gradient_is_not_finite(self) -> torch.Tensor:
        found = torch.zeros((), device=self.runtime.device)
        # GradScaler's own look, one pass over all gradients; on a CPU a norm of each takes thirty times as long.
        torch._amp_foreach_non_finite_check_and_unscale_(self._gradients(), found, self._unscaled)
        return found.bool()

    def _step_unless(self, left_out: torch.Tensor) -> None:
        """Step, or do not; on a GPU the host does not wait to know.

        A fused optimizer takes the answer along. Another one there steps with a gradient of 0 instead, which moves the
        weights by what momentum it has.
        """
        if left_out.device.type == "cpu":
            if not left_out:
                self.optimizer.step()
            return
        if all(group.get("fused") for group in self.optimizer.param_groups):
            self.optimizer.grad_scale, self.optimizer.found_inf = None, left_out.float()
        else:
            for gradient in self._gradients():
                gradient.masked_fill_(left_out, 0)
        self.optimizer.step()

    def _scaled_step(self) -> torch.Tensor:
        """With a scaled loss a gradient that overflows is nothing bad: it is how the scale is found."""
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

    # --- what a checkpoint holds: whole tensors, whatever the strategy

    def network_tensors(self) -> dict[str, torch.Tensor]:
        """The network's tensors by name; every rank must take part."""
        return self.network.state_dict()

    def local_tensors(self) -> list[torch.Tensor]:
        """The float32 tensors that this rank holds of the network: all of them, or its part of those that are cut up.

        The same objects throughout a run, in the order of `network_tensors`.
        """
        return [tensor for tensor in self.network.state_dict().values() if tensor.dtype == torch.float32]

    def partition(self, wholes: list[torch.Tensor]) -> list[torch.Tensor]:
        """Whole tensors like the network's -> what this rank would hold of them, see `held`."""
        return wholes

    def gather(self, held: list[torch.Tensor]) -> list[torch.Tensor]:
        """The other way round; every rank must take part."""
        return held

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
        """Go on with an optimizer's state as `optimizer_tensors` gave it, under whatever strategy."""
        content = self.optimizer.state_dict()
        for index, parameter in enumerate(self._parameters):
            content["state"][index] = state_of(tensors, self._names[id(parameter)])
        self.optimizer.load_state_dict(content)
        for state in self.optimizer.state.values():
            if "mu_product" in state:  # NAdam reads it on the host in every step; torch has moved it to the device
                state["mu_product"] = state["mu_product"].cpu()
        if scale := state_of(tensors, SCALER):
            self._scaler.load_state_dict({key: value.item() for key, value in scale.items()})


def state_of(tensors: dict[str, torch.Tensor], parameter: str) -> dict[str, torch.Tensor]:
    """What `Engine.optimizer_tensors` holds of one parameter, by key."""
    prefix = f"{parameter}|"
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def batch_norm_statistics(network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """BatchNorm's running statistics by name; they differ between ranks, as each normalises its own batches."""
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            yield f"{name}.running_mean", module.running_mean
            yield f"{name}.running_var", module.running_var


def average_batch_norm_statistics(network: nn.Module, runtime: Runtime) -> None:
    """Average BatchNorm's running statistics over ranks, in place."""
    if runtime.ranks > 1:
        for _, statistic in batch_norm_statistics(network):
            statistic.copy_(runtime.mean(statistic))
