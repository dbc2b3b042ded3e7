"""Copies between host and GPU that do not wait for each other."""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch

from train.regression.reused_memory import ReusedMemory


def copied_to_host(
    batches: Iterable[Mapping[str, torch.Tensor]], device: torch.device
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of tensors on the CPU, in their order.

    From a GPU each is copied on a stream of its own, into page-locked memory, and yielded once the next batch is in the
    GPU's queue. So the GPU computes while the host uses a batch. Two sets of page-locked buffers take turns: what was
    yielded is overwritten after the next batch is asked for.

    Args:
        batches: by name (b, ...), computed as they are asked for.
        device: where they are.
    """
    if device.type != "cuda":
        yield from (dict(batch) for batch in batches)
        return
    stream, turns = torch.cuda.Stream(device), (_PinnedCopy(), _PinnedCopy())
    under_way: _PinnedCopy | None = None
    for number, batch in enumerate(batches):
        copy = turns[number % 2]
        copy.start(batch, stream)
        if under_way is not None:
            yield under_way.finish()
        under_way = copy
    if under_way is not None:
        yield under_way.finish()


class _PinnedCopy:
    """A copy of one batch after the other in page-locked buffers, which grow to the largest of them."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}
        self._source: Mapping[str, torch.Tensor] = {}
        self._copied = torch.cuda.Event()

    def start(self, batch: Mapping[str, torch.Tensor], stream: torch.cuda.Stream) -> None:
        """Put the copies in the queue of `stream`, after what was in that of the current stream."""
        self._source = batch  # until it is copied, its memory must not be given to other tensors
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for name, tensor in batch.items():
                self._rows(name, tensor).copy_(tensor, non_blocking=True)
            self._copied.record(stream)

    def finish(self) -> dict[str, torch.Tensor]:
        """Wait for the copies and return them."""
        self._copied.synchronize()
        copies = {name: self._rows(name, tensor) for name, tensor in self._source.items()}
        self._source = {}
        return copies

    def _rows(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < len(tensor) or buffer.shape[1:] != tensor.shape[1:]:
            buffer = self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return buffer[: len(tensor)]


class Uploads:
    """Moves blocks of rows that the host fills to where the process computes.

    A GPU copies them from page-locked memory while the host fills the next: two buffers take turns. On a CPU there is
    one buffer, and nothing is copied.

    Args:
        device: where the blocks are used.
    """

    def __init__(self, device: torch.device):
        self._device, self._number, self._block = device, 0, torch.empty(0)
        on_gpu = device.type == "cuda"
        self._memory = [ReusedMemory(torch.float32, torch.device("cpu"), on_gpu) for _ in range(2 if on_gpu else 1)]
        self._copied = [torch.cuda.Event() for _ in self._memory] if on_gpu else []

    def buffer(self, rows: int, columns: int) -> np.ndarray:
        """float32 (rows, columns) to fill; what was uploaded before the last block may be overwritten."""
        turn = self._number % len(self._memory)
        if self._number >= len(self._memory):
            self._copied[turn].synchronize()
        self._block = self._memory[turn].matrix(rows, columns)
        return self._block.numpy()

    def upload(self) -> torch.Tensor:
        """The block that `buffer` gave last, now filled, on the device."""
        if not self._copied:
            return self._block
        uploaded = self._block.to(self._device, non_blocking=True)
        self._copied[self._number % len(self._memory)].record()
        self._number += 1
        return uploaded
