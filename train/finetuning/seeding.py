"""Random numbers within a training step."""

import torch

from train.data.order import stream_seed

# Steps whose seeds are made together: between two steps, code that has left the caches takes ten times as long.
BLOCK = 64


class StepSeeds:
    """Seeds what is random in a network (dropout, drop path) for each step, differently on every rank.

    The seed depends on the step's number alone, so that a run can resume at any step without the state of the
    generators.

    Args:
        seed: of the run.
        rank: of this process.
        device: where the network computes.
    """

    def __init__(self, seed: int, rank: int, device: torch.device):
        self._seed, self._rank = seed, rank
        self._seeds: dict[int, int] = {}  # of the steps of a block
        self._generators = [torch.default_generator]  # `torch.manual_seed` would take a millisecond of each step
        if device.type == "cuda":
            self._generators.append(torch.cuda.default_generators[torch.cuda.current_device()])

    def begin(self, step: int) -> None:
        """Seed the generators for step `step`, counted from 0."""
        if step not in self._seeds:
            self._seeds = {number: stream_seed(self._seed, number, self._rank) for number in range(step, step + BLOCK)}
        for generator in self._generators:
            generator.manual_seed(self._seeds[step])
