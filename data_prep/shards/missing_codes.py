"""Finds numbers that stand for a missing response, such as -999, 9999 or -1, among responses.

Such a code lies apart from all responses, and nearly always occurs more than once. Only the two lowest and the two
highest numbers are looked at, so notes on single stimuli can be merged into those on a recording.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

USUAL_CODES = (99.0, 999.0, 9999.0, 99999.0, 32767.0, 32768.0, 65535.0)  # or minus these; one is enough
LEAST_REPEATS = 2
LEAST_REPEATS_BELOW_ZERO = 3

Ends = Counter[float]  # the two lowest and the two highest numbers, and how often each occurs


def ends_of(responses: np.ndarray) -> Ends:
    """Of an array of any shape; NaN is left out."""
    values, counts = np.unique(responses[~np.isnan(responses)], return_counts=True)
    outer = {*range(len(values))[:2], *range(len(values))[-2:]}
    return Counter({float(values[k]): int(counts[k]) for k in outer})


def merged_ends(parts: Iterable[Ends]) -> Ends:
    """Of all responses together."""
    together: Ends = Counter()
    for part in parts:
        together.update(part)
    ordered = sorted(together)
    return Counter({value: together[value] for value in {*ordered[:2], *ordered[-2:]}})


def code_warnings(name: str, ends: Ends) -> Iterator[str]:
    """Warnings of numbers that may stand for missing responses.

    A number is one if it is further from all others than they are from each other, and repeats or is a usual code; or
    if it repeats and is the only one below zero.

    Args:
        name: of the responses, "rates" or "trials".
        ends: of all of them.
    """
    if len(ends) < 4:
        return
    lowest, low, high, highest = sorted(ends)
    for code, gap in ((lowest, low - lowest), (highest, highest - high)):
        is_far = gap > high - low and (ends[code] >= LEAST_REPEATS or abs(code) in USUAL_CODES)
        is_lone_negative = code < 0 <= low and ends[code] >= LEAST_REPEATS_BELOW_ZERO
        if is_far or is_lone_negative:
            times = "once" if ends[code] == 1 else f"{ends[code]:,} times"
            yield (
                f"{code:g} occurs {times} among the {name}, apart from all others ({low:g} to {high:g}); if it stands "
                "for a missing response, write NaN instead and pack again: now models are fitted to it and scored on it"
            )
