"""Runs that can be compared because they were scored on the same stimuli and sites: leads, ceilings, notes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from train.evaluation.comparison import Lead, compared_models, leads
from train.evaluation.frozen_rivals import ADVICE, UNTUNED
from train.evaluation.metrics import TITLES
from train.evaluation.multiplicity import Standing
from train.reporting.data_efficiency import Curve, curves_of
from train.reporting.number_formats import interval, number
from train.reporting.reported_run import (
    DATA_DRIVEN,
    FAMILIES,
    HYBRID,
    TASK_DRIVEN,
    ReportedRun,
    ScoredRun,
    scored_runs,
)
from train.reporting.run_files import Metrics, Score

RESAMPLES = 2000


@dataclass(frozen=True)
class Metric:
    """A metric of responses.

    Attributes:
        key: its name in metrics.json.
        arrow: which way is better.
        ceiling: an ideal model's score of a site, from the site's reliability; None where it is not known.
        is_main: whether it is one of the study's metrics, or stands beside them on the page and in the terminal.
    """

    key: str
    arrow: str = "↑"
    ceiling: Callable[[float], float] | None = None
    is_main: bool = True

    @property
    def title(self) -> str:
        """Its name in tables."""
        return TITLES[self.key]


METRICS = (
    Metric("r2", ceiling=lambda reliability: reliability),
    Metric("mse", "↓"),
    Metric("explained_variance", ceiling=lambda reliability: reliability),
    Metric("pearson_r", ceiling=lambda reliability: math.sqrt(max(reliability, 0))),
    Metric("ceiled_explained_variance", ceiling=lambda _: 1.0),
    Metric("ceiled_pearson_r", ceiling=lambda _: 1.0, is_main=False),
    Metric("feve", ceiling=lambda _: 1.0, is_main=False),
)
R2 = METRICS[0]


@dataclass(frozen=True)
class Group:
    """Runs whose responses were scored on the same stimuli and sites.

    Attributes:
        runs: in the order of the study's families, and as they were named within one.
    """

    runs: list[ScoredRun]

    @property
    def recording(self) -> str:
        """The name of the recording."""
        return self.runs[0].metrics.recording

    @property
    def split(self) -> str:
        """The split that was scored."""
        return self.runs[0].metrics.split

    @property
    def stimuli(self) -> int:
        """The number of stimuli that were scored."""
        return self.runs[0].metrics.stimuli

    @property
    def sites(self) -> int:
        """The number of sites that were scored."""
        return self.runs[0].regression.sites

    @property
    def simulated(self) -> bool:
        """Whether the recording is simulated."""
        return any(scored.metrics.simulated for scored in self.runs)

    @property
    def title(self) -> str:
        """What was predicted, e.g. "v4_natural800: 67 sites, 160 stimuli of val"."""
        simulated = " (SIMULATED)" if self.simulated else ""
        return f"{self.recording}{simulated}: {self.sites} sites, {self.stimuli:,} stimuli of {self.split}"

    @property
    def metrics(self) -> list[Metric]:
        """The metrics that at least one of the runs has."""
        return [metric for metric in METRICS if any(scored.regression.score(metric.key) for scored in self.runs)]

    @cached_property
    def is_paired(self) -> list[bool]:
        """For each run, whether it has predictions, for the same stimuli and responses as the first that has any."""
        predictions = [scored.run.predictions for scored in self.runs]
        first = next(filter(None, predictions), None)
        return [
            scored is not None and first is not None and np.array_equal(scored.response, first.response, equal_nan=True)
            for scored in predictions
        ]

    @cached_property
    def _resampled(self) -> list[dict[str, np.ndarray] | None]:
        """Each run's scores on the same resamples of the stimuli, by metric; None without paired predictions."""
        return [
            scored.run.predictions.resampled(RESAMPLES) if scored.run.predictions and paired else None
            for scored, paired in zip(self.runs, self.is_paired, strict=True)
        ]

    @cached_property
    def standings(self) -> dict[int, Standing]:
        """How each run stands among the others by R2, by its index; none where fewer than two can be resampled."""
        scores = {index: scored.regression.r2.mean for index, scored in enumerate(self.runs)}
        known = {index: score for index, score in scores.items() if score is not None}
        resampled = {
            index: means[R2.key] for index, means in enumerate(self._resampled) if means is not None and index in known
        }
        models = compared_models(known, resampled, self.stimuli)
        return {} if models is None else dict(zip(resampled, models.standings(), strict=True))

    @cached_property
    def leads(self) -> dict[str, list[Lead]]:
        """By metric each run's lead over the next best, the best run first."""
        leads_by_metric = {}
        for metric in self.metrics:
            scores = [scored.regression.score(metric.key) for scored in self.runs]
            means = [score.mean if score else None for score in scores]
            leads_by_metric[metric.key] = leads(metric.key, means, self._resampled, self.stimuli)
        return leads_by_metric

    @cached_property
    def curves(self) -> list[Curve]:
        """Scores against training stimuli, of the systems that were trained on several numbers of stimuli."""
        return [] if self.split == "train" else curves_of(self.runs)

    @property
    def training_sizes(self) -> list[int]:
        """The numbers of training stimuli that the curves have, ascending."""
        return sorted({point.stimuli for curve in self.curves for point in curve.points})

    def is_best(self, index: int, metric: Metric) -> bool:
        """Whether a run is the best by a metric, and the interval of its lead excludes 0."""
        return any(lead.better == index and lead.is_certain for lead in self.leads.get(metric.key, [])[:1])

    @property
    def ranking(self) -> list[int]:
        """The indices of the runs by R2, the best first; those without one come last."""
        means = [scored.regression.r2.mean for scored in self.runs]
        keys = [math.inf if mean is None else -mean for mean in means]
        return sorted(range(len(keys)), key=keys.__getitem__)

    @property
    def ceiling(self) -> Score | None:
        """The sites' reliability, where it is known."""
        return next((scored.regression.ceiling for scored in self.runs if scored.regression.ceiling), None)

    def ceiling_of(self, metric: Metric) -> float | None:
        """An ideal model's score, mean over sites."""
        reliabilities = [value for value in self.ceiling.per_site if value is not None] if self.ceiling else []
        if metric.ceiling is None or not reliabilities:
            return None
        return float(np.mean([metric.ceiling(reliability) for reliability in reliabilities]))

    def ceilings_of(self, metric: Metric) -> tuple[str, ...]:
        """What a ceiled score is relative to; empty of a score that is not."""
        scores = [scored.regression.score(metric.key) for scored in self.runs]
        return tuple(sorted({score.ceiling for score in scores if score and score.ceiling}))

    @property
    def notes(self) -> list[str]:
        """How to read the scores, and what to beware of, in sentences."""
        regression = self.runs[0].regression
        notes = [
            f"Mean over {self.sites} sites on the {self.stimuli:,} stimuli of {self.split}; "
            "in brackets the 95 % interval over stimuli."
        ]
        if len(self.runs) > 1:
            notes.append(
                "Bold: the best, where the 95 % interval of its lead over the next best excludes 0, also when it is "
                f"adjusted for the number of models (paired bootstrap, {RESAMPLES:,} resamples of the stimuli, the "
                "same for all models)."
            )
        if self.ceiling:
            notes.append(f"Ceiling: {self.ceiling.method}; it bounds R2 and EV, its square root bounds r.")
        if unreliable := len(regression.unreliable_sites):
            notes.append(f"Ceiled scores leave out {unreliable} of the {self.sites} sites, which are too unreliable.")
        if constant := len(regression.sites_without_r2):
            notes.append(
                f"R2 leaves out {constant} of the {self.sites} sites, whose responses are constant or unknown, here or "
                "in train."
            )
        unpaired = [scored.run.title for scored, paired in zip(self.runs, self.is_paired, strict=True) if not paired]
        if unpaired:
            notes.append(f"No predictions.npz for the same stimuli, so not compared in pairs: {', '.join(unpaired)}.")
        return [*notes, *pretrained_notes(self._titled_metrics), *self.warnings]

    @property
    def warnings(self) -> list[str]:
        """What to beware of, in sentences."""
        warnings = []
        if any(self.split in scored.metrics.selected_on for scored in self.runs):
            warnings.append(f"A model selected on {self.split} is flattered by its score there.")
        warnings += seen_warnings(self._titled_metrics)
        if self.simulated:
            warnings.append("The recording is SIMULATED: no brain took part.")
        return warnings

    @property
    def _titled_metrics(self) -> list[tuple[str, Metrics]]:
        return [(scored.run.title, scored.metrics) for scored in self.runs]

    @property
    def verdict(self) -> str:
        """Which run is ahead of the next best in R2, and how surely; empty of a single run."""
        lead = next(iter(self.leads.get(R2.key, [])), None)
        if lead is None:
            return ""
        best, next_best = self.runs[lead.better].run.title, self.runs[lead.worse].run.title
        begin = f"{best} is ahead of {next_best} by {lead.difference:.3f} in R2"
        if lead.interval is None or lead.adjusted is None:
            return f"{begin}; there are no predictions to test that with."
        adjusted = f", adjusted for {len(self.standings)} models," if lead.adjusted != lead.interval else ""
        verdict = "excludes 0" if lead.is_certain else "includes 0, so other stimuli could reverse the order"
        return f"{begin}; its 95 % interval{adjusted} {interval(lead.adjusted)} {verdict}."

    @property
    def frozen_ahead(self) -> str:
        """That a frozen layer is ahead of every fine-tuned network, in a sentence; empty if none is."""
        frozen = self._best_of(lambda run: run.family == TASK_DRIVEN and run.setting("backbone.weights") in UNTUNED)
        tuned = self._best_of(lambda run: run.family in (DATA_DRIVEN, HYBRID))
        if frozen is None or tuned is None:
            return ""
        ahead, behind = frozen.regression.r2.mean, tuned.regression.r2.mean
        if ahead is None or behind is None or ahead <= behind:
            return ""
        return (
            f"A frozen layer is ahead of every fine-tuned network here: {frozen.run.title}, R2 {number(ahead)} against "
            f"{number(behind)} of {tuned.run.title}; {ADVICE}."
        )

    def _best_of(self, is_meant: Callable[[ReportedRun], bool]) -> ScoredRun | None:
        """The best of some runs by R2, controls and scores of seen stimuli apart."""
        runs = [self.runs[index] for index in self.ranking]
        return next(
            (
                scored
                for scored in runs
                if is_meant(scored.run)
                and scored.metrics.control is None
                and not (scored.metrics.seen and scored.metrics.seen.leaks)
            ),
            None,
        )

    @property
    def finding(self) -> str:
        """The best run's score and lead, in sentences."""
        best = self.runs[self.ranking[0]]
        r2 = best.regression.r2
        score = f"{self.recording}: R2 {number(r2.mean)} {interval(r2.ci95)} with {best.run.title}."
        return " ".join(sentence for sentence in (score, self.verdict, self.frozen_ahead) if sentence)


def seen_notes(runs: Sequence[tuple[str, Metrics]]) -> list[str]:
    """All notes on images that were seen before; of runs by title."""
    return [*pretrained_notes(runs), *seen_warnings(runs)]


def seen_warnings(runs: Sequence[tuple[str, Metrics]]) -> list[str]:
    """What to beware of: scores on stimuli that were fitted, and scores of which nobody knows it."""
    warnings = []
    for title, metrics in runs:
        seen = metrics.seen
        if seen is not None and seen.leaks:
            warnings.append(
                f"{title} was fitted on {seen.leaks:,} of the {metrics.stimuli:,} stimuli that it is scored on "
                f"(--seen keep; {', '.join(seen.stimuli)}{', ...' if seen.leaks > len(seen.stimuli) else ''}): its "
                "score tells of memory."
            )
        if seen is not None and seen.dropped:
            warnings.append(
                f"{title} was fitted on {seen.dropped:,} stimuli of {metrics.split}, which are not scored "
                "(--seen drop)."
            )
    unknown = [title for title, metrics in runs if metrics.seen is None or metrics.seen.unknown]
    if unknown:
        warnings.append(
            "Not known whether stimuli were fitted before they were scored, because runs or weights have no record of "
            f"it: {', '.join(unknown)}."
        )
    return warnings


def pretrained_notes(runs: Sequence[tuple[str, Metrics]]) -> list[str]:
    """What "seen" leaves out."""
    names = dict.fromkeys(name for _, metrics in runs if metrics.seen for name in metrics.seen.pretrained)
    if not names:
        return []
    return [
        "Seen: images that were fitted to responses or classes here; those that published weights were trained on "
        f"({', '.join(names)}) are not compared."
    ]


def groups_of(runs: Sequence[ReportedRun]) -> list[Group]:
    """The runs with scored responses, grouped by the stimuli and sites they were scored on."""
    groups: list[list[ScoredRun]] = []
    for scored in sorted(scored_runs(runs), key=lambda scored: FAMILIES.index(scored.run.family)):
        same = next((group for group in groups if _are_comparable(group[0], scored)), None)
        if same is None:
            groups.append([scored])
        else:
            same.append(scored)
    return [Group(group) for group in groups]


def _are_comparable(a: ScoredRun, b: ScoredRun) -> bool:
    fingerprints = {scored.metrics.fingerprint for scored in (a, b)} - {None}  # earlier versions wrote none
    return len(fingerprints) < 2 and _scored_on(a) == _scored_on(b)


def _scored_on(scored: ScoredRun) -> tuple[str, str, int, int]:
    metrics = scored.metrics
    return metrics.recording, metrics.split, metrics.stimuli, scored.regression.sites
