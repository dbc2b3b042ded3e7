"""What is random in a step depends on its number, the seed and the rank, and on nothing before it."""

import torch

from train.data.order import stream_seed
from train.finetuning.seeding import BLOCK, StepSeeds

CPU = torch.device("cpu")


def drawn(seeds: StepSeeds, step: int) -> float:
    seeds.begin(step)
    return float(torch.rand(()))


def test_a_step_draws_the_same_whenever_its_run_began():
    """A run that resumes makes the seeds of other steps together than the one that was stopped."""
    whole, resumed = StepSeeds(3, 1, CPU), StepSeeds(3, 1, CPU)
    steps = range(2 * BLOCK + 5)
    of_whole = [drawn(whole, step) for step in steps]
    begun = BLOCK // 2 + 1
    assert [drawn(resumed, step) for step in steps[begun:]] == of_whole[begun:]
    assert drawn(whole, 7) == of_whole[7]
    assert len(set(of_whole)) == len(of_whole)
    for other in (StepSeeds(3, 0, CPU), StepSeeds(4, 1, CPU)):  # another rank, another seed
        assert not {drawn(other, step) for step in steps} & set(of_whole)


def test_seeds_are_those_of_earlier_versions():
    """Runs that an earlier version began go on with the same random numbers."""
    StepSeeds(3, 1, CPU).begin(70)
    assert torch.initial_seed() == stream_seed(3, 70, 1)
