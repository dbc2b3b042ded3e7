"""Power agrees with tables, with what is simulated, and designs are the cheapest."""

from dataclasses import dataclass

import numpy as np
import pytest
from scipy.stats import nct, t

from train.evaluation.power.components import Components, Design
from train.evaluation.power.planning import Budget, Question, Shifted, best_offer, fewest, need, offers, power

HUNDRED = Design(100, 20)


@dataclass
class Known:
    """Components whose noise is known: 0.04 + 0.2 / n for stimuli, and as much between sites."""

    value: float = 0.05
    repetitions: float | None = 4
    design: Design = HUNDRED

    def components(self, repetitions=None):
        noise = 0.2 / (repetitions or 4)
        return Components(self.value, stimulus=0.04 + noise, site=0.01, rest=0.3 + noise)

    def shrinkage(self, repetitions):
        return 1.0


@pytest.mark.parametrize(
    ("effect", "count", "expected"),
    [(0.5, 34, 0.8078), (0.2, 199, 0.8017), (0.8, 15, 0.8213), (0.5, 10, 0.2932)],
)
def test_power_is_that_of_the_paired_t_test(effect, count, expected):
    """Tables of Cohen (1988), as G*Power gives them."""
    assert power(effect, 1 / np.sqrt(count), count - 1, 0.95) == pytest.approx(expected, abs=5e-4)


def test_power_without_a_difference_is_the_level():
    for freedom in (1, 2.5, 30, 1e7):
        assert power(0, 0.1, freedom, 0.95) == pytest.approx(0.05, abs=1e-5)
        assert power(0, 0.1, freedom, 0.99) == pytest.approx(0.01, abs=1e-5)
    assert power(0.1, 0, 30, 0.95) == 1


@pytest.mark.parametrize("freedom", [1, 4, 39, 399, 1e6])
def test_power_is_that_of_the_noncentral_t_distribution_and_defined_where_scipys_is_not(freedom):
    shifts = np.array([0.5, 2, 4, 8])
    critical = t.ppf(0.975, freedom)
    expected = nct.sf(critical, freedom, shifts) + nct.cdf(-critical, freedom, shifts)
    found = [power(shift, 1, freedom, 0.95) for shift in shifts]
    known = np.isfinite(expected)
    assert known[:2].all()
    np.testing.assert_allclose(np.array(found)[known], expected[known], atol=2e-5)
    assert power(60, 1, 399, 0.95) == pytest.approx(1)


@pytest.mark.parametrize("population", ["stimuli", "both"])
def test_intervals_exclude_zero_as_often_as_power_says(population):
    rng, known, design, trials = np.random.default_rng(0), Known(0.12), Design(60, 10), 1500
    components, found = known.components(), 0
    for _ in range(trials):
        effects = np.sqrt(components.stimulus) * rng.normal(size=(60, 1))
        sites = np.sqrt(components.site) * rng.normal(size=10)
        values = components.value + effects + np.sqrt(components.rest) * rng.normal(size=(60, 10))
        values += sites - (sites.mean() if population == "stimuli" else 0)
        psi = values - values.mean(axis=0)
        drawn = Components.of(
            values.mean(axis=0), psi.mean(axis=1).var(ddof=1), psi.var(axis=0, ddof=1).mean(), len(values)
        )
        low, high = drawn.interval(design, population)
        found += low > 0 or high < 0
    expected = Question(population).power_of(known, design)
    assert 0.3 < expected < 0.97
    assert found / trials == pytest.approx(expected, abs=0.05)


def test_what_is_needed_is_the_least_that_is_enough():
    known, question = Known(), Question()
    needed = need(known, known.design, question)
    for name, count in vars(needed).items():
        if count is None:
            continue
        designs = [Design(**(vars(known.design) | {name: number})) for number in (count - 1, count)]
        powers = [question.power_of(known, design) for design in designs]
        assert powers[0] < 0.8 <= powers[1], name
    assert needed.stimuli > 100
    assert needed.repetitions is None  # what stimuli add without noise is too much
    assert needed.sites is None


def test_a_larger_difference_needs_less_and_more_comparisons_need_more():
    known = Known()
    numbers = [
        need(known, known.design, question).stimuli
        for question in (Question(), Question(difference=0.1), Question(comparisons=28), Question("both"))
    ]
    assert numbers[1] < numbers[0] < numbers[2]
    assert numbers[3] is None or numbers[3] > numbers[0]


def test_the_smallest_difference_is_found_with_the_power_that_is_wanted():
    known, question = Known(), Question(power=0.9)
    smallest = question.smallest_difference(known, known.design)
    assert Question(power=0.9, difference=smallest).power_of(known, known.design) == pytest.approx(0.9, abs=1e-6)
    expected = (t.ppf(0.975, 99) + t.ppf(0.9, 99)) * known.components().standard_error(known.design, "stimuli")
    assert smallest == pytest.approx(expected, rel=0.01)


def offered(known, budget, question, trained=None):
    return list(offers(known, trained or (lambda _: known), budget, question, is_difference=True))


def test_the_cheapest_design_is_the_best_of_all():
    """With stimulus 0.04 + 0.2 / n, rest 0.3 + 0.2 / n and 20 sites, few repetitions of many stimuli."""
    known, question = Known(), Question()
    all_offers = offered(known, Budget(1200, 1.0, 20), question)
    assert all(offer.shown * offer.design.repetitions <= 1200 for offer in all_offers)
    best = best_offer(all_offers)
    assert best.design == Design(1200, 20, 1)
    assert best.power == max(offer.power for offer in all_offers)
    by_hand = (0.24 + 0.5 / 20) / 1200
    assert best.half_width == pytest.approx(t.ppf(0.975, 1199) * np.sqrt(by_hand))
    assert offered(known, Budget(1200, 0.5, 20), question)[0].design.stimuli == 600
    assert best_offer([]) is None
    assert offered(Known(repetitions=None), Budget(1200, 1.0, 20), question) == []


def test_training_stimuli_that_raise_the_difference_count():
    known, question = Known(), Question()
    by_share = {
        share: best_offer(
            offered(known, Budget(1200, share, 20), question, lambda stimuli: Shifted(known, 0.04 * stimuli / 1200))
        )
        for share in (0.1, 0.5, 0.9)
    }
    for share, offer in by_share.items():
        assert offer.value == pytest.approx(0.05 + 0.04 * (offer.shown - offer.design.stimuli) / 1200)
        assert offer.design.stimuli == pytest.approx(share * offer.shown, abs=1)


def test_fewest_is_the_border():
    assert fewest(lambda count: count >= 7, 1, 100) == 7
    assert fewest(lambda count: count >= 1, 1, 100) == 1
    assert fewest(lambda count: count >= 100, 2, 100) == 100
    assert fewest(lambda count: count >= 101, 1, 100) is None
