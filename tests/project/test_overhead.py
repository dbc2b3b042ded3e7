"""The verdict of benchmarks/overhead.py says no more than its measurements do."""

import random
import sys

import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from harness import Estimate, Turns
from overhead import judged, verdict

SIDES = ("ours", "same", "same again", "bare", "unfused", "lean")


def turns(ours: float, noise: float, again: float = 10.0) -> Turns:
    """A hundred turns of a step of 10 ms, with normal noise, and the control beside it."""
    draw = random.Random(0)
    means = dict.fromkeys(SIDES, 10.0) | {"ours": ours, "same again": again, "unfused": 11.0}
    return Turns({side: [draw.gauss(mean, noise) for _ in range(100)] for side, mean in means.items()})


@pytest.mark.parametrize(
    ("measured", "outcome"),
    [
        (turns(10.2, 0.01), "reached"),
        (turns(10.5, 0.01), "MISSED"),
        (turns(10.2, 2.0), "not decided"),
        # The control differs by more than chance alone would let it: so may ours.
        (turns(10.2, 0.01, again=10.4), "not decided"),
        (turns(10.5, 0.01, again=10.4), "not decided"),
    ],
)
def test_an_aim_is_decided_only_outside_the_noise(measured, outcome):
    _, over_bare = verdict("plain", measured).split("ms over bare: ")
    assert over_bare.split("), ")[1].startswith(outcome)


def test_a_strategy_is_compared_with_the_same_strategy():
    times = {side: [10.0 + turn / 1000 for turn in range(50)] for side in SIDES}
    times["ours"] = [value * 1.04 for value in times["same"]]
    times["bare"] = [value / 2 for value in times["same"]]
    assert verdict("zero2", Turns(times)).endswith("1.040 (1.040 to 1.040), reached")
    assert judged(Estimate(1.06, 1.07, 1.08), 1.05, "times").endswith("MISSED")


def test_the_interval_of_a_median_holds_it_about_as_often_as_it_says():
    draw, held = random.Random(1), 0
    for _ in range(400):
        estimate = Estimate.of([draw.expovariate(1.0) for _ in range(60)])
        held += estimate.low <= 0.693147 <= estimate.high
    assert 0.92 <= held / 400 <= 0.99
