"""Random numbers within a training step."""

import torch

from train.data.order import stream_seed


def seed_step(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Seed what is random in a network (dropout, drop path), differently on every rank.

    Called before every step, so that a run can resume at any step without the state of the generators.
    """
    number = stream_seed(seed, step, rank)
    torch.default_generator.manual_seed(number)  # `torch.manual_seed` would take a millisecond of each step
    if device.type == "cuda":
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(number)
