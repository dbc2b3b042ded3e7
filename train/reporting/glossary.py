"""What the metrics and columns of a report mean, in a sentence or two; docs/metrics.md has the formulas in full."""

from collections.abc import Iterable

from train.reporting.table import PAGE, Table

MEANINGS = {
    "R2": (
        "Share of a site's variance over stimuli that the predictions p of responses y account for: 1 - sum "
        "(y - p)² / sum (y - mean y)², mean over sites. 1 is perfect, 0 what the site's mean scores; below "
        "0 is worse than that mean."
    ),
    "MSE": (
        "Mean squared error in the recording's own units, squared, mean over sites. It compares models of "
        "one recording, not recordings."
    ),
    "EV": (
        "Explained variance: 1 - Var(y - p) / Var(y), mean over sites. R2 without the penalty for a constant offset."
    ),
    "Pearson r": (
        "Correlation of predictions and responses over stimuli, mean over sites. A wrong offset or scale costs nothing."
    ),
    "ceiled EV": (
        "EV over the ceiling: the explained share of what repeats from trial to trial. A perfect model scores 1."
    ),
    "r²": "Squared correlation. Unlike R2 it penalises no wrong mean, scale or sign.",
    "r²_ER": "r² with the noise-free responses, estimated from single trials (Pospisil and Bair 2021).",
    "Brain-Score": (
        "Squared median of r over the median split-half reliability, Brain-Score's form since January 2026. "
        "A perfect model scores 1."
    ),
    "Brain-Score before 2026": "(median of r / median split-half reliability)². A perfect model scores more than 1.",
    "ceiling": (
        "What a perfect model would score, given the noise of the trial averages: the reliability for R2 "
        "and EV, its square root for r."
    ),
    "[low, high]": (
        "95 % interval over stimuli: where the score would lie with endless stimuli of this kind. It does "
        "not cover other sites or seeds."
    ),
    "difference in R2": (
        "Lead of a model over the next best. Where its interval excludes 0, other stimuli would hardly "
        "reverse the order."
    ),
    "adjusted": (
        "The interval of a lead, widened so that those of all pairs of models hold together with 95 %: among many "
        "models some lead looks certain by chance."
    ),
    "possible ranks": (
        "The best and the worst rank that other stimuli would leave a model; those of all models hold together "
        "with 95 %."
    ),
    "per doubling": "R2 gained when the training stimuli are doubled.",
    "top-1": "Share of stimuli whose class the network names first.",
    "top-5": "Share of stimuli whose class is among the five likeliest to the network.",
    "balanced accuracy": "Top-1 within each class, mean over classes: rare classes count as much as frequent ones.",
    "selected on": "The stimuli that chose the epoch, the layer or the penalty. A score on these flatters.",
    "seen": (
        "How many of the scored stimuli show an image that the model, its weights, its teacher or its "
        "members were fitted on."
    ),
}
ALWAYS = ("[low, high]",)


def meaning_of(title: str) -> str:
    """What a column means; empty where its title says it."""
    return MEANINGS.get(_metric(title), "")


def glossary(tables: Iterable[Table]) -> dict[str, str]:
    """What the columns and footers of some tables mean, in a fixed order; empty without tables."""
    shown: set[str] = set()
    for table in (table.shown_in(PAGE) for table in tables):
        shown |= {*ALWAYS, *(_metric(column.title) for column in table.columns)}
        shown |= {table.footer[0].text} if table.footer else set()
    return {term: meaning for term, meaning in MEANINGS.items() if term in shown}


def _metric(title: str) -> str:
    """A column's title without how it is averaged over sites."""
    return title.removesuffix(", mean").removesuffix(", median")
