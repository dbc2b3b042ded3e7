"""Several ranks in one process, a thread each, for code that takes its runtime as an argument."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from train.distributed.roll_call import check_agreement


class Meeting:
    """Where the ranks leave values for each other."""

    def __init__(self, ranks: int):
        self.ranks = ranks
        self._barrier, self._values = threading.Barrier(ranks, timeout=60), [None] * ranks

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """The values of all ranks, in their order."""
        self._values[rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values


class ThreadRuntime:
    """What `Runtime` offers to regressions."""

    device = torch.device("cpu")

    def __init__(self, meeting: Meeting, rank: int):
        self._meeting, self.rank, self.ranks = meeting, rank, meeting.ranks
        self.is_main, self.hosts = rank == 0, ["here"] * meeting.ranks

    def barrier(self) -> None:
        self._meeting.exchange(self.rank, None)

    def gather_objects(self, value: Any) -> list[Any]:
        return self._meeting.exchange(self.rank, value)

    def check_agreement(self, plan: Mapping[str, str]) -> None:
        check_agreement(self.gather_objects(dict(plan)), [f"rank {rank}" for rank in range(self.ranks)])

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._meeting.exchange(self.rank, tensor)).sum(0)

    def reduce_to(self, tensor: torch.Tensor, rank: int) -> torch.Tensor | None:
        """As gloo does, leaves nothing of use in the tensors that were sent."""
        total = torch.stack(self._meeting.exchange(self.rank, tensor.clone())).sum(0)
        tensor.fill_(float("nan"))
        if rank != self.rank:
            return None
        return tensor.copy_(total)

    def all_to_all(self, parts: list[torch.Tensor], sizes: list[int]) -> torch.Tensor:
        received = [sent[self.rank] for sent in self._meeting.exchange(self.rank, parts)]
        assert [len(part) for part in received] == list(sizes)
        return torch.cat(received)

    def gather_rows(self, rows: torch.Tensor) -> np.ndarray:
        return np.concatenate([part.numpy() for part in self._meeting.exchange(self.rank, rows)])


def on_ranks(ranks: int, work: Callable[[ThreadRuntime], Any]) -> list[Any]:
    """Call `work` on each of so many ranks; returns what they return."""
    meeting = Meeting(ranks)
    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(lambda rank: work(ThreadRuntime(meeting, rank)), range(ranks)))
