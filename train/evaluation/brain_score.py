"""Brain-Score's score of predicted responses, in the three forms that it has had.

Brain-Score (Schrimpf et al. 2018, 2020) relates r, the median over sites of Pearson's correlation, to c, the median
over sites of the split-half reliability with Spearman and Brown's correction. How it does so has changed (the
repository brain-score/vision, `explained_variance` in `benchmark_helpers/neural_common.py`):

    since January 2026 (commit e376e306)            r^2 / c
    from July 2019 on (commit 65064366)             (r / c)^2
    before                                          r / c

c is a reliability, which bounds r^2. A perfect model, whose r is sqrt(c), scores 1 in the current form, and 1 / c and
1 / sqrt(c) in the earlier ones, which are therefore too high.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from data_prep.confidence_interval import percentile_interval
from data_prep.shards.manifest import to_json_list
from train.evaluation.metrics import median_score

Values = float | np.ndarray
CEILING = "median over sites of the split-half reliability (Spearman-Brown)"
EARLIER_FORMS: dict[str, Callable[[Values, float], Values]] = {
    "before_2026_01": lambda r, ceiling: (r / ceiling) ** 2,
    "before_2019_07": lambda r, ceiling: r / ceiling,
}


def brain_score(
    pearson_r: np.ndarray, resampled_medians: np.ndarray, split_half: np.ndarray, stimuli: int
) -> dict[str, Any]:
    """The `brain_score` block of metrics.json; scores are None where r or the ceiling has no median above 0.

    Sites without r, and in the ceiling sites without a reliability, are left out of the medians. As for other scores
    relative to a ceiling, the intervals take the ceiling as known.

    Args:
        pearson_r: (sites,), NaN for a site without one.
        resampled_medians: of r over sites on bootstrap resamples of the stimuli, (resamples,).
        split_half: reliability of the trial average, (sites,).
        stimuli: number of stimuli scored.
    """
    scored = ~np.isnan(pearson_r)
    r, ceiling = median_score(pearson_r), median_score(split_half[scored])
    if not ceiling > 0:
        ceiling = float("nan")

    def entry(form: Callable[[Values, float], Values]) -> dict[str, Any]:
        score = float(form(r, ceiling))
        interval = percentile_interval(np.asarray(form(resampled_medians, ceiling)), stimuli)
        return {"score": to_json_list([score])[0], "ci95": interval and list(interval)}

    median_r, median_ceiling = to_json_list([r, ceiling])
    return (
        entry(lambda r, ceiling: r**2 / ceiling)
        | {"median_pearson_r": median_r, "median_ceiling": median_ceiling, "ceiling": CEILING}
        | {name: entry(form) for name, form in EARLIER_FORMS.items()}
    )
