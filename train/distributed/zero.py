"""The engine under DeepSpeed, which gathers a checkpoint's tensors from what ZeRO partitions.

ZeRO-1 and -2 divide the optimizer's state into equal partitions, one per rank, ZeRO-3 the weights too (Rajbhandari et
al. 2020). A checkpoint knows nothing of ranks: this module turns partitions into named whole tensors, and back.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from train.distributed.engine import SHARED_STATE, Engine, StepOutcome, parameter_state
from train.distributed.runtime import Runtime

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class ZeroEngine(Engine):
    """Network and optimizer under DeepSpeed with ZeRO stage 0, 1, 2 or 3, offloaded or not.

    Args:
        runtime: this process.
        wrapped: DeepSpeed's engine.
        network: the network itself.
        optimizer: the torch optimizer.
        accumulation_steps: micro-batches per optimizer step.
        clip_norm: largest norm of the gradient, as in DeepSpeed's configuration.
    """

    def __init__(
        self,
        runtime: Runtime,
        wrapped: "DeepSpeedEngine",
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        accumulation_steps: int,
        clip_norm: float | None,
    ):
        super().__init__(
            runtime, wrapped, network, optimizer, accumulation_steps=accumulation_steps, clip_norm=clip_norm
        )
        self._deepspeed = wrapped
        self._stage: int = wrapped.zero_optimization_stage()
        for parameter in self._partitioned_parameters().values():
            if parameter.ds_persist:  # small ones stay whole; the losses' parameters are read outside of a forward pass
                parameter.all_gather([parameter])

    def compile(self) -> None:
        """Let torch compile the network, for training and scoring."""
        self._deepspeed.compile()

    def backward(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's gradients. `loss` is its part of the global batch's loss (`train/models/losses.py`).

        DeepSpeed averages over ranks and micro-batches, both of which are undone here.
        """
        parts = self.runtime.ranks * self._accumulation_steps
        scaled = loss * parts if parts > 1 else loss  # products with 1 would cost kernels too, here and in DeepSpeed
        self._deepspeed.backward(scaled, scale_wrt_gas=self._accumulation_steps > 1)
        if not self._deepspeed.is_gradient_accumulation_boundary():
            self._deepspeed.step()  # counts the micro-batch

    def step(self) -> StepOutcome:
        """One optimizer step with the gradients of a whole global batch; clears them. See `Engine.step`."""
        if self._stage == 0:
            outcome, micro_steps = self._check_gradient(), self._deepspeed.micro_steps
            self._step_unless(outcome.left_out, self._deepspeed.step)
            if self._deepspeed.micro_steps == micro_steps:
                self._deepspeed.zero_grad()
                self._deepspeed.micro_steps += 1  # all that is left of the step
            return outcome
        self._deepspeed.step()  # DeepSpeed checks the gradient's norm itself
        return StepOutcome(torch.tensor(self._deepspeed.optimizer.overflow), self._not_scaled)

    def network_tensors(self) -> dict[str, torch.Tensor]:
        """The network's tensors by name; every rank must take part."""
        tensors = self.network.state_dict()
        for name, parameter in self._partitioned_parameters().items():
            tensors[name] = self._gather_weight(parameter, parameter.ds_tensor)
        return tensors

    def local_tensors(self) -> list[torch.Tensor]:
        """The network's float32 tensors as this rank holds them, see `Engine.local_tensors`."""
        partitioned = self._partitioned_parameters()
        return [
            partitioned[name].ds_tensor if name in partitioned else tensor for name, tensor in self._float_tensors()
        ]

    def partition(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Whole tensors like the network's -> this rank's partitions of them, like `local_tensors`."""
        partitioned = self._partitioned_parameters()
        return [
            self._partition_weight(partitioned[name], tensor) if name in partitioned else tensor
            for (name, _), tensor in zip(self._float_tensors(), tensors, strict=True)
        ]

    def gather(self, local_tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """This rank's partitions, like `local_tensors` -> whole tensors; every rank must take part."""
        partitioned = self._partitioned_parameters()
        return [
            self._gather_weight(partitioned[name], tensor) if name in partitioned else tensor
            for (name, _), tensor in zip(self._float_tensors(), local_tensors, strict=True)
        ]

    def _float_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, x) for name, x in self.network.state_dict().items() if x.dtype == torch.float32)

    def _partitioned_parameters(self) -> dict[str, Any]:
        """The partitioned parameters by name: all under ZeRO-3, otherwise none."""
        return dict(self.network.named_parameters()) if self._stage == 3 else {}

    def _partition_weight(self, parameter: Any, weight: torch.Tensor) -> torch.Tensor:
        local = parameter.ds_tensor
        return _padded(weight.flatten(), local.numel(), self.runtime.ranks)[self.runtime.rank].to(local, copy=True)

    def _gather_weight(self, parameter: Any, local: torch.Tensor) -> torch.Tensor:
        flat = self.runtime.all_gather(local.to(self.runtime.device)).flatten()  # ends in padding
        return flat[: parameter.ds_numel].view(parameter.ds_shape)

    def optimizer_tensors(self) -> dict[str, torch.Tensor]:
        """The optimizer's state as `<parameter>|<key>`; every rank must take part."""
        if self._stage == 0:
            return super().optimizer_tensors()
        tensors: dict[str, torch.Tensor] = {}
        for group in self._flat_groups():
            names = [self._names[id(parameter)] for parameter in group.parameters]
            for key, value in self.optimizer.state[group.local].items():
                if key in SHARED_STATE:
                    wholes = [value.clone() for _ in names]
                else:
                    wholes = group.gather(self.runtime.all_gather(value.to(self.runtime.device)))
                tensors |= {f"{name}|{key}": whole for name, whole in zip(names, wholes, strict=True)}
        return tensors

    def load_optimizer(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore an optimizer's state from `optimizer_tensors`, which may come from another strategy."""
        if self._stage == 0:
            super().load_optimizer(tensors)
            return
        fused = any(group.get("fused") for group in self.optimizer.param_groups)
        for group in self._flat_groups():
            local_state = self.optimizer.state[group.local]
            states = [parameter_state(tensors, self._names[id(parameter)]) for parameter in group.parameters]
            for key in states[0]:
                wholes = [state[key] for state in states]
                if key in SHARED_STATE:
                    device = group.local.device if fused and key == "step" else "cpu"  # where torch keeps them
                    local_state[key] = wholes[0].to(device, copy=True)
                else:
                    local_state[key] = group.partition(wholes, self.runtime).to(group.local)

    def _flat_groups(self) -> "list[_FlatGroup]":
        zero = self._deepspeed.optimizer
        if self._stage == 3:
            return [
                _PartitionedOneByOne(
                    local, parameters, [zero.grad_position[zero.get_param_id(p)][1:] for p in parameters]
                )
                for local, parameters in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
            ]
        groups = zip(zero.single_partition_of_fp32_groups, zero.round_robin_bit16_groups, strict=True)
        return [_PartitionedTogether(local, parameters) for local, parameters in groups]


class _FlatGroup(Protocol):
    """Parameters whose values lie end to end in one flat tensor per rank.

    Attributes:
        local: this rank's flat tensor, which the optimizer steps.
        parameters: in their order in it.
    """

    local: torch.Tensor
    parameters: Sequence[nn.Parameter]

    def gather(self, partitions: torch.Tensor) -> list[torch.Tensor]:
        """The flat tensors of all ranks (ranks, length) -> a whole tensor per parameter."""

    def partition(self, wholes: list[torch.Tensor], runtime: Runtime) -> torch.Tensor:
        """A whole tensor per parameter -> this rank's flat tensor (length,)."""


class _PartitionedTogether:
    """ZeRO-1 and -2: the parameters of a group are laid end to end, padded, and divided into one partition per rank."""

    def __init__(self, local: torch.Tensor, parameters: Sequence[nn.Parameter]):
        self.local, self.parameters = local, parameters

    def gather(self, partitions: torch.Tensor) -> list[torch.Tensor]:
        sizes = [parameter.numel() for parameter in self.parameters]
        flat = partitions.flatten()[: sum(sizes)].split(sizes)
        return [values.view(p.shape).clone() for values, p in zip(flat, self.parameters, strict=True)]

    def partition(self, wholes: list[torch.Tensor], runtime: Runtime) -> torch.Tensor:
        flat = torch.cat([whole.flatten() for whole in wholes])
        return _padded(flat, len(self.local), runtime.ranks)[runtime.rank]


class _PartitionedOneByOne:
    """ZeRO-3: each parameter is padded and divided into one partition per rank; a rank's partitions lie end to end.

    Args:
        local: this rank's flat tensor.
        parameters: in their order in it.
        spans: start and length of each parameter's partition in it.
    """

    def __init__(self, local: torch.Tensor, parameters: Sequence[Any], spans: Sequence[tuple[int, int]]):
        self.local, self.parameters, self._spans = local, parameters, spans

    def gather(self, partitions: torch.Tensor) -> list[torch.Tensor]:
        return [
            partitions[:, start : start + length].flatten()[: parameter.ds_numel].view(parameter.ds_shape).clone()
            for parameter, (start, length) in zip(self.parameters, self._spans, strict=True)
        ]

    def partition(self, wholes: list[torch.Tensor], runtime: Runtime) -> torch.Tensor:
        local = torch.zeros_like(self.local, device="cpu")
        for whole, (start, length) in zip(wholes, self._spans, strict=True):
            local[start : start + length] = _padded(whole.flatten(), length, runtime.ranks)[runtime.rank]
        return local


def _padded(flat: torch.Tensor, length: int, ranks: int) -> torch.Tensor:
    """A flat tensor, padded with zeros, as (ranks, length)."""
    return nn.functional.pad(flat, (0, length * ranks - flat.numel())).view(ranks, length)
