"""The memory that one training step of a recipe needs, measured without a GPU, without data and without that memory.

The recipe's network, loss and backward pass run on torch's fake tensors, which have shapes and no content, while the
bytes of all live storages are counted. Optimizers are measured in a real step on a small tensor.
"""

import copy
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from data_prep.shards.manifest import Image, Manifest, Rates, Shard, Split
from train.data.augment import KINDS, augment
from train.data.batches import Batch
from train.finetuning.optimizer import build_optimizer
from train.models.network import Network
from train.run import recipe as recipe_settings
from train.run.recipe import Recipe

MEASURED = (2, 64)  # stimuli; far apart, as in small batches the weights' own gradients can be what peaks
TINY = 2**14  # elements of the tensor that optimizers are tried on
FLOAT32_ON_CUDA = (F.layer_norm, F.group_norm, F.softmax, torch.softmax, torch.Tensor.softmax)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that were allocated while it was on and are still alive.

    torch.distributed's MemTracker counts the same, module by module, and takes tens of times longer.

    Args:
        uncounted: tensors that are left out.

    Attributes:
        live: bytes, now.
        peak: bytes, the most so far.
    """

    def __init__(self, uncounted: Iterable[torch.Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self._alive: dict[int, Any] = {
            id(storage): storage for storage in (tensor.untyped_storage() for tensor in uncounted)
        }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operation and count what it allocates."""
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return

        def forget(_: Any) -> None:
            del self._alive[key]
            self.live -= size

        self._alive[key] = weakref.ref(storage, forget)
        self.live += size


class AutocastAsOnCuda(TorchFunctionMode):
    """Computes in float32 what autocast computes in float32 on a GPU and not on a CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Run a function, its input in float32 where CUDA's autocast would."""
        if func in FLOAT32_ON_CUDA and torch.is_autocast_enabled("cpu"):
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class OptimizerCost:
    """The memory of an optimizer, in bytes.

    Attributes:
        state: kept per element of a trained tensor.
        scalars: kept per tensor.
        temporary: allocated and freed within a step, per element of all trained tensors together.
    """

    state: int
    scalars: int
    temporary: int


def optimizer_cost(settings: recipe_settings.Optimizer) -> OptimizerCost:
    """Take real steps with a recipe's optimizer on a small tensor and measure what it holds."""
    weight = nn.Parameter(torch.zeros(TINY))
    weight.grad = torch.ones_like(weight)
    optimizer = build_optimizer(settings, [{"params": [weight]}], weight.device)
    optimizer.step()
    state = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor)]
    with LiveBytes([weight, weight.grad, *state]) as counted:
        optimizer.step()
    state_bytes = sum(tensor.nbytes for tensor in state)
    return OptimizerCost(state=state_bytes // TINY, scalars=state_bytes % TINY, temporary=counted.peak // TINY)


@dataclass(frozen=True)
class StepCost:
    """The memory of one process in a step while nothing is partitioned, in bytes.

    Attributes:
        trainable: weights that are trained, and the same again for their gradients; float32 in every precision.
        frozen: other weights, and running statistics.
        largest_tensor: that is trained.
        optimizer_state: kept between steps.
        optimizer_temporary: allocated and freed within the optimizer's step.
        running_average: of the weights, 0 without one.
        fixed, per_stimulus: the most that forward and backward hold beyond weights and gradients, for a batch of b:
            fixed + per_stimulus * b. Images, and the lower-precision copies of weights that autocast keeps, included.
    """

    trainable: int
    frozen: int
    largest_tensor: int
    optimizer_state: int
    optimizer_temporary: int
    running_average: int
    fixed: float
    per_stimulus: float

    @property
    def weights(self) -> int:
        """All that the network holds."""
        return self.trainable + self.frozen

    def activations(self, batch: int) -> float:
        """The most that forward and backward of `batch` stimuli hold beyond weights and gradients."""
        return self.fixed + self.per_stimulus * batch


def measure_step(recipe: Recipe, manifest: Manifest) -> StepCost:
    """The cost of a step of a recipe; its weights are neither read nor downloaded.

    Args:
        recipe: with `images.size`, or the manifest's is used.
        manifest: gives the numbers of sites and classes.

    Raises:
        BadInput: a network that cannot be built as the recipe says.
    """
    side = recipe.images.size or manifest.image.side
    network = Network(recipe.for_checkpoint(), manifest, side).train()
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    trainable = sum(parameter.nbytes for parameter in trained)
    held = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    optimizer = optimizer_cost(recipe.optimizer)
    elements = sum(parameter.numel() for parameter in trained)
    few, many = (activation_bytes(network, recipe, manifest, batch) for batch in MEASURED)
    per_stimulus = (many - few) / (MEASURED[1] - MEASURED[0])
    return StepCost(
        trainable=trainable,
        frozen=held - trainable,
        largest_tensor=max(parameter.nbytes for parameter in trained),
        optimizer_state=optimizer.state * elements + optimizer.scalars * len(trained),
        optimizer_temporary=optimizer.temporary * elements,
        running_average=0 if recipe.ema is None else held,
        fixed=few - per_stimulus * MEASURED[0],
        per_stimulus=per_stimulus,
    )


def activation_bytes(network: Network, recipe: Recipe, manifest: Manifest, batch: int) -> int:
    """The most bytes that forward, loss and backward of `batch` stimuli hold beyond weights and gradients.

    The gradients exist from the start, as in all micro-batches of a step but the first.

    Args:
        network: in training mode; it is copied without its data.
        recipe, manifest: what the network was built of.
        batch: stimuli.
    """
    fake = FakeTensorMode()
    with FakeCopyMode(fake):
        network = copy.deepcopy(network)
    with fake:
        uncounted = [*network.parameters(), *network.buffers()]
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
                uncounted.append(parameter.grad)
        with LiveBytes(uncounted) as counted, AutocastAsOnCuda():
            forward_and_backward(network, recipe, empty_batch(recipe, manifest, batch))
    return counted.peak


def forward_and_backward(network: Network, recipe: Recipe, batch: Batch) -> None:
    """One micro-batch as in the training loop."""
    images = batch.images if batch.draws is None else augment(batch.images, batch.draws, recipe.augment)
    network.objective.losses(network(images), batch, lambda share: share)["loss"].backward()


def empty_batch(recipe: Recipe, manifest: Manifest, size: int) -> Batch:
    """A batch of `size` stimuli without content, with all the tensors that a recipe's loss reads."""
    side = recipe.images.size or manifest.image.side
    return Batch(
        images=torch.zeros(size, 3, side, side, dtype=torch.uint8).contiguous(memory_format=torch.channels_last),
        positions=torch.zeros(size, dtype=torch.int64),
        weight=torch.ones(size),
        rates=torch.zeros(size, len(manifest.sites)) if recipe.task.predicts_responses else None,
        labels=torch.zeros(size, dtype=torch.int64) if recipe.task.predicts_classes else None,
        draws=torch.zeros(size, KINDS) if recipe.augment.is_on else None,
        global_stimuli=size,
        global_observed=size * len(manifest.sites),
    )


def paper_manifest(sites: int, classes: int, side: int) -> Manifest:
    """A made-up recording, of which only the numbers matter.

    Args:
        sites, classes: their numbers.
        side: of its images, in pixels.
    """
    shard = Shard(file="train-000000.tar", stimuli=1, bytes=1, sha256="0" * 64)
    return Manifest(
        name="on paper",
        simulated=True,
        provenance={},
        splits={"train": Split(stimuli=1, responses=True, shards=[shard])},
        sites=[{"id": str(site)} for site in range(sites)],
        classes=[str(name) for name in range(classes)],
        image=Image(width=side, height=side, mode="RGB"),
        rates=Rates(units="1", mean=[0.0] * sites, std=[1.0] * sites),
        response_window_ms=None,
    )
