"""Backbones: timm networks without their classifier, whole or cut; weights random, pretrained or from a file."""

import copy
import math
from collections import Counter
from pathlib import Path

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn

from data_prep.common.errors import BadInput
from train.models.batch_norm import BATCH_NORMS
from train.models.joined_layers import JoinedMap, LayerOutputs
from train.models.timm_networks import TimmNetwork, create_network
from train.models.tracing import ForwardPass
from train.models.truncation import truncate
from train.models.weights import fits, load_into, read_weights
from train.run.layer_names import modules_of
from train.run.recipe import Source


class Backbone(nn.Module):
    """A timm network without its classifier, which may end earlier.

    Args:
        source: the network's name, its weights, and where it is cut.
        image_size: side in pixels of the images.
        pools: whether pooled features will be read (`pool`); otherwise modules that only they need are dropped.
        maps: whether maps will be read (`map`).

    Attributes:
        net: the network.
        name, cut: of the source.
        join: joins the layers that `cut` names together; None where it names at most one.
        features: number of pooled features; None unless `pools`.
        map_shape: (channels, rows, columns) of a map; None unless `maps`.
        mean, std: per channel, of the pixels (0..255) that the network expects, float32 (1, 3, 1, 1).
        weights_from: where the weights come from, for the log.

    Raises:
        BadInput: the name, weights, cut or size do not fit the network.
    """

    net: TimmNetwork
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, source: Source, image_size: int, *, pools: bool = True, maps: bool = False):
        super().__init__()
        self.name, self.cut = source.name, source.cut
        self._trains, self._batch_norm_trains = True, True
        created = create_network(source.name, pretrained=source.weights == "pretrained")
        self.net, self.weights_from = created.net, created.weights_from
        tensors = None if source.weights in ("pretrained", "random") else read_weights(Path(source.weights))
        # Weights of the whole network are resized with it; those of a cut one fit only when it is cut.
        if tensors is not None and fits(self.net, tensors):
            self.weights_from = load_into(self.net, tensors, source.weights)
            tensors = None
        if hasattr(self.net, "set_input_size"):  # networks of a fixed size: position embeddings are resampled
            self.net.set_input_size(img_size=image_size)
        for name in ("mean", "std"):
            pixels = torch.tensor(self.net.pretrained_cfg[name]).view(1, 3, 1, 1) * 255
            self.register_buffer(name, pixels, persistent=False)
        self.net.eval()
        self.join: JoinedMap | None = None
        self._layers: LayerOutputs | None = None
        output = self._set_up_forward_pass(image_size, keep_head=pools and source.cut is None)
        if tensors is not None:
            self.weights_from = load_into(self.net, tensors, source.weights)
        with torch.no_grad():
            self.features: int | None = self.pool(output).shape[1] if pools else None
            self.map_shape: tuple[int, ...] | None = tuple(self.map(output).shape[1:]) if maps else None
        self.net.train()

    def _set_up_forward_pass(self, image_size: int, keep_head: bool) -> torch.Tensor:
        """Cut the network, trying it on images of this size.

        Returns:
            The output for an example, for `pool` and `map`.
        """
        # Two images where it is cut: a module may have split them into windows, which then count as images.
        images = 1 if self.cut is None else 2
        example = torch.rand(images, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)) * 255
        try:
            self._forward_pass = self._cut(example, keep_head)
            if self._layers is not None:
                self.join = JoinedMap(self._maps(self._layers, example))
            with torch.no_grad():
                output = self(example)
        except (RuntimeError, AssertionError, ValueError) as error:  # raised by networks at sizes they cannot take
            raise BadInput(
                f"images.size: {self.name} cannot take images of {image_size} px ({' '.join(str(error).split())})"
            ) from None
        if len(output) != images:
            raise BadInput(f"backbone.cut: {self.cut} does not give one output per image; cut at another module")
        return output

    def _cut(self, example: torch.Tensor, keep_head: bool) -> ForwardPass:
        """Drop what comes after `cut`; the forward pass from normalised images to its output, or its last layer's."""
        modules = [] if self.cut is None else modules_of(self.cut)
        if len(modules) > 1:
            self._layers = LayerOutputs(self.net, modules, example)
            return self._layers.forward_pass
        return truncate(self.net, self.cut, example, keep_head)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (b, 3, size, size), uint8 or float in 0..255 -> the network's last output, for `pool` and `map`."""
        if self._layers is not None and self.join is not None:
            return self.join(self._maps(self._layers, images))
        return self._forward_pass(self._normalised(images))

    def _normalised(self, images: torch.Tensor) -> torch.Tensor:
        return ((images.float() - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def _maps(self, layers: LayerOutputs, images: torch.Tensor) -> list[torch.Tensor]:
        """The maps of the layers that `cut` joins."""
        return [self.map(output) for output in layers(self._normalised(images))]

    def pool(self, output: torch.Tensor) -> torch.Tensor:
        """The network's output -> features (b, features): as its classifier would get them, or a cut map's mean."""
        if self.cut is None:
            return self.net.forward_head(output, pre_logits=True)
        return output if output.ndim == 2 else self._tokens(output).mean(1)

    def map(self, output: torch.Tensor) -> torch.Tensor:
        """The network's output -> maps (b, channels, rows, columns); class tokens are left out, vectors are 1 x 1.

        Raises:
            BadInput: tokens that do not fill a square.
        """
        if output.ndim == 4:
            return channels_first(output, self.net)
        tokens = output[:, None] if output.ndim == 2 else self._tokens(output)
        if not _is_square(tokens.shape[1]):
            raise BadInput(
                f"readout.kind: the network ends in {output.shape[1]} tokens, which are not a square map; use linear"
            )
        return tokens.transpose(1, 2).unflatten(2, (math.isqrt(tokens.shape[1]), -1))

    def _tokens(self, output: torch.Tensor) -> torch.Tensor:
        """Maps and tokens -> (b, positions, channels), without the tokens that stand before those of the map."""
        if output.ndim == 4:
            return channels_first(output, self.net).flatten(2).transpose(1, 2)
        grid = getattr(getattr(self.net, "patch_embed", None), "grid_size", None)
        prefix: int = getattr(self.net, "num_prefix_tokens", 0)
        tokens = output.shape[1]
        # A network may add its class token and registers only after its cut.
        has_prefix = tokens == math.prod(grid) + prefix if grid is not None else not _is_square(tokens)
        return output[:, prefix:] if has_prefix else output

    def freeze(self) -> None:
        """Train nothing: no gradients, and BatchNorm and dropout in evaluation mode."""
        self.requires_grad_(False)
        self._trains = False
        self.eval()

    def freeze_batch_norm(self) -> None:
        """Normalise by the statistics that came with the weights, also in training; scale and shift are trained."""
        self._batch_norm_trains = False
        self.train(self.training)

    def sync_batch_norm(self) -> None:
        """Normalise by the whole batch over all processes; this works on GPUs only."""
        convert_sync_batchnorm(self.net)

    @property
    def has_batch_norm(self) -> bool:
        """Whether the network has BatchNorm."""
        return any(isinstance(module, BATCH_NORMS) for module in self.modules())

    @property
    def normalises_by_batch(self) -> bool:
        """Whether features in training differ from those in evaluation because of BatchNorm."""
        return self._trains and self._batch_norm_trains and self.has_batch_norm

    def train(self, mode: bool = True) -> "Backbone":
        """Set training or evaluation mode, except for what is frozen."""
        super().train(mode and self._trains)
        if not self._batch_norm_trains:
            for module in self.modules():
                if isinstance(module, BATCH_NORMS):
                    module.eval()
        return self

    def checkpoint_gradients(self, image_size: int) -> None:
        """Recompute activations in the backward pass instead of keeping them.

        BatchNorm then sees each batch twice. Its momentum m becomes 1 - sqrt(1 - m), so that two updates with the same
        batch move the running statistics as far as one did.

        Args:
            image_size: side in pixels of the images.

        Raises:
            BadInput: the network cannot.
        """
        if self._layers is not None or self._forward_pass != self.net.forward_features:
            raise BadInput(
                f"backbone.gradient_checkpointing needs a single cut between stages or blocks, not {self.cut}"
            )
        try:
            self.net.set_grad_checkpointing(True)
        except (AssertionError, AttributeError):
            raise BadInput(
                f"backbone.gradient_checkpointing: {type(self.net).__name__} does not support it; turn it off"
            ) from None
        for name, calls in self._batch_norm_calls(image_size).items():
            module = self.net.get_submodule(name)
            if isinstance(module, BATCH_NORMS) and module.momentum is not None:
                module.momentum = 1 - (1 - module.momentum) ** (1 / calls)

    def _batch_norm_calls(self, image_size: int) -> Counter[str]:
        """The number of runs of each BatchNorm in a forward and a backward pass, counted on a copy without data."""
        calls: Counter[str] = Counter()
        trial = copy.deepcopy(self.net).to("meta").train()
        for name, module in trial.named_modules():
            if isinstance(module, BATCH_NORMS):
                module.register_forward_pre_hook(lambda _module, _inputs, name=name: calls.update([name]))
        trial.forward_features(torch.zeros(2, 3, image_size, image_size, device="meta")).sum().backward()
        return calls


def channels_first(output: torch.Tensor, net: nn.Module) -> torch.Tensor:
    """A module's map as (b, channels, rows, columns).

    Images are square, and so are maps: the two sides that are equal are rows and columns. Where all three are equal,
    the network's `output_fmt` decides.
    """
    _, a, b, c = output.shape
    channels_last = getattr(net, "output_fmt", "NCHW") == "NHWC" if a == b == c else a == b
    return output.permute(0, 3, 1, 2) if channels_last else output


def _is_square(number: int) -> bool:
    return math.isqrt(number) ** 2 == number
