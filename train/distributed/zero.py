"""The engine under DeepSpeed, and where ZeRO keeps its parts of weights and optimizer state.

ZeRO-1 and -2 cut the optimizer's state into equal parts, one per rank, ZeRO-3 the weights too (Rajbhandari et al.
2020). A checkpoint knows nothing of ranks: here parts become whole tensors with names, and whole tensors parts.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from train.distributed.engine import SHARED_STATE, Engine, state_of
from train.distributed.runtime import Runtime


class ZeroEngine(Engine):
    """Network and optimizer under DeepSpeed with ZeRO stage 0, 1, 2 or 3, offloaded or not.

    Args:
        runtime: this process.
        wrapped: DeepSpeed's engine.
        network: the network itself.
        optimizer: the torch optimizer.
        accumulation_steps: micro-batches per optimizer step.
        clip_norm: largest norm of the gradient, which DeepSpeed has been told.
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
    ):
        super().__init__(
            runtime, wrapped, network, optimizer, accumulation_steps=accumulation_steps, clip_norm=clip_norm
        )
        self._stage: int = wrapped.zero_optimization_stage()
        if self._stage == 3:
            for parameter in network.parameters():
                if parameter.ds_persist:  # small ones stay whole; the losses' own are read outside of a forward pass
                    parameter.all_gather([parameter])

    def compile(self) -> None:
        """Let torch compile the network, for training and scoring."""
        self._wrapped.compile()

    def backward(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's gradients. `loss` is its part of the global batch's loss (`train/models/losses.py`).

        DeepSpeed averages over ranks and micro-batches, both of which are undone here.
        """
        self._wrapped.backward(loss * (self.runtime.ranks * self._accumulation_steps))
        if not self._wrapped.is_gradient_accumulation_boundary():
            self._wrapped.step()  # counts the micro-batch

    def step(self) -> torch.Tensor:
        """One optimizer step with the gradients of a whole global batch; clears them. See `Engine.step`."""
        if self._stage == 0:
            left_out = self._gradient_is_not_finite()
            if left_out:
                self._wrapped.zero_grad()
                self._wrapped.micro_steps += 1  # all that is left of the step
            else:
                self._wrapped.step()
            return left_out
        self._wrapped.step()  # DeepSpeed looks at the gradient's norm itself
        return torch.tensor(self._wrapped.optimizer.overflow)

    def network_tensors(self) -> dict[str, torch.Tensor]:
        """The network's tensors by name; every rank must take part."""
        tensors = self.network.state_dict()
        for name, parameter in self._cut_parameters().items():
            tensors[name] = self._whole_weight(parameter, parameter.ds_tensor)
        return tensors

    def local_tensors(self) -> list[torch.Tensor]:
        """The float32 tensors that this rank holds of the network, see `Engine.held`."""
        cut = self._cut_parameters()
        return [cut[name].ds_tensor if name in cut else x for name, x in self._float_tensors()]

    def partition(self, wholes: list[torch.Tensor]) -> list[torch.Tensor]:
        """Whole tensors like the network's -> what this rank would hold of them, see `held`."""
        cut = self._cut_parameters()
        return [
            self._part_of(cut[name], tensor) if name in cut else tensor
            for (name, _), tensor in zip(self._float_tensors(), wholes, strict=True)
        ]

    def gather(self, held: list[torch.Tensor]) -> list[torch.Tensor]:
        """The other way round; every rank must take part."""
        cut = self._cut_parameters()
        return [
            self._whole_weight(cut[name], tensor) if name in cut else tensor
            for (name, _), tensor in zip(self._float_tensors(), held, strict=True)
        ]

    def _float_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, x) for name, x in self.network.state_dict().items() if x.dtype == torch.float32)

    def _cut_parameters(self) -> dict[str, Any]:
        """The parameters of which each rank holds a part, by name: none before ZeRO-3, then all."""
        return dict(self.network.named_parameters()) if self._stage == 3 else {}

    def _part_of(self, parameter: Any, whole: torch.Tensor) -> torch.Tensor:
        part = parameter.ds_tensor
        return _padded(whole.flatten(), part.numel(), self.runtime.ranks)[self.runtime.rank].to(part, copy=True)

    def _whole_weight(self, parameter: Any, part: torch.Tensor) -> torch.Tensor:
        flat = self.runtime.all_gather(part.to(self.runtime.device)).flatten()  # ends in padding
        return flat[: parameter.ds_numel].view(parameter.ds_shape)

    def optimizer_tensors(self) -> dict[str, torch.Tensor]:
        """The optimizer's state as `<parameter>|<key>`; every rank must take part."""
        if self._stage == 0:
            return super().optimizer_tensors()
        tensors = {}
        for flat in self._flats():
            names = [self._names[id(parameter)] for parameter in flat.parameters]
            for key, value in self.optimizer.state[flat.part].items():
                if key in SHARED_STATE:
                    wholes = [value.clone() for _ in names]
                else:
                    wholes = flat.whole(self.runtime.all_gather(value.to(self.runtime.device)))
                tensors |= {f"{name}|{key}": whole for name, whole in zip(names, wholes, strict=True)}
        return tensors

    def load_optimizer(self, tensors: dict[str, torch.Tensor]) -> None:
        """Go on with an optimizer's state as `optimizer_tensors` gave it, under whatever strategy."""
        if self._stage == 0:
            super().load_optimizer(tensors)
            return
        fused = any(group.get("fused") for group in self.optimizer.param_groups)
        for flat in self._flats():
            states = [state_of(tensors, self._names[id(parameter)]) for parameter in flat.parameters]
            for key in states[0]:
                wholes = [state[key] for state in states]
                if key in SHARED_STATE:
                    where = flat.part.device if fused and key == "step" else "cpu"  # where torch keeps them
                    self.optimizer.state[flat.part][key] = wholes[0].to(where, copy=True)
                else:
                    self.optimizer.state[flat.part][key] = flat.cut(wholes, self.runtime).to(flat.part)

    def _flats(self) -> "list[_Flat]":
        zero = self._wrapped.optimizer
        if self._stage == 3:
            return [
                _CutOneByOne(part, parameters, [zero.grad_position[zero.get_param_id(p)][1:] for p in parameters])
                for part, parameters in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
            ]
        groups = zip(zero.single_partition_of_fp32_groups, zero.round_robin_bit16_groups, strict=True)
        return [_CutTogether(part, parameters) for part, parameters in groups]


class _Flat(Protocol):
    """Parameters whose values lie one after the other in one flat tensor per rank.

    Attributes:
        part: this rank's, which the optimizer steps.
        parameters: in their order there.
    """

    part: torch.Tensor
    parameters: Sequence[nn.Parameter]

    def whole(self, parts: torch.Tensor) -> list[torch.Tensor]:
        """The parts of all ranks (ranks, length) -> a tensor per parameter."""

    def cut(self, wholes: list[torch.Tensor], runtime: Runtime) -> torch.Tensor:
        """A tensor per parameter -> this rank's part (length,)."""


class _CutTogether:
    """ZeRO-1 and -2: the parameters of a group are laid end to end, padded, and cut into one part per rank."""

    def __init__(self, part: torch.Tensor, parameters: Sequence[nn.Parameter]):
        self.part, self.parameters = part, parameters

    def whole(self, parts: torch.Tensor) -> list[torch.Tensor]:
        sizes = [parameter.numel() for parameter in self.parameters]
        flat = parts.flatten()[: sum(sizes)].split(sizes)
        return [whole.view(p.shape).clone() for whole, p in zip(flat, self.parameters, strict=True)]

    def cut(self, wholes: list[torch.Tensor], runtime: Runtime) -> torch.Tensor:
        return _padded(torch.cat([whole.flatten() for whole in wholes]), len(self.part), runtime.ranks)[runtime.rank]


class _CutOneByOne:
    """ZeRO-3: each parameter is padded and cut into one part per rank; a rank's parts are laid end to end.

    Args:
        part: this rank's.
        parameters: in their order there.
        places: where each begins in the part, and how long its part is.
    """

    def __init__(self, part: torch.Tensor, parameters: Sequence[Any], places: Sequence[tuple[int, int]]):
        self.part, self.parameters, self._places = part, parameters, places

    def whole(self, parts: torch.Tensor) -> list[torch.Tensor]:
        return [
            parts[:, start : start + length].flatten()[: parameter.ds_numel].view(parameter.ds_shape).clone()
            for parameter, (start, length) in zip(self.parameters, self._places, strict=True)
        ]

    def cut(self, wholes: list[torch.Tensor], runtime: Runtime) -> torch.Tensor:
        part = torch.zeros_like(self.part, device="cpu")
        for whole, (start, length) in zip(wholes, self._places, strict=True):
            part[start : start + length] = _padded(whole.flatten(), length, runtime.ranks)[runtime.rank]
        return part


def _padded(flat: torch.Tensor, length: int, ranks: int) -> torch.Tensor:
    """A flat tensor, padded with zeros, as (ranks, length)."""
    return nn.functional.pad(flat, (0, length * ranks - flat.numel())).view(ranks, length)
