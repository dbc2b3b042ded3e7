"""A network's predictions for a split and the metrics over all ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_prep.common.errors import BadInput
from data_prep.common.progress import Progress
from data_prep.shards.manifest import Manifest, from_json_list
from train.data.batches import StimulusSet
from train.data.loader import Stimuli, evaluation_loader, fingerprint, rank_positions
from train.distributed.runtime import Runtime
from train.evaluation.metrics import (
    ClassCounts,
    SiteMoments,
    classification_report,
    mean_score,
    merge_all,
    regression_report,
    site_scores,
)
from train.models.network import Network

NOISE_OF_SCORED = "noise variance of the scored stimuli's repetitions"


@dataclass
class Scored:
    """What an evaluation leaves, the same on every rank.

    Attributes:
        moments: merged over ranks, see `train/evaluation/metrics.py`; None where there is nothing to compare with.
        counts: right answers per class, summed over ranks; None for a network without classes.
        rates: predictions of all stimuli in order, float32 (stimuli, sites), in the recording's units; None where they
            were not kept or the network predicts none.
        named: the likeliest class of all stimuli in order, int64 (stimuli,); None as for `rates`.
    """

    moments: torch.Tensor | None
    counts: torch.Tensor | None
    rates: np.ndarray | None
    named: np.ndarray | None = None

    def value(self, metric: str) -> float:
        """The mean over sites of a metric, or "top1"."""
        if metric == "top1":
            return float(self.counts[1].sum() / self.counts[0].sum())
        return mean_score(site_scores(self.moments)[metric])

    def means(self) -> dict[str, float]:
        """All metrics there are, as means over sites."""
        found = {}
        if self.moments is not None:
            found |= {name: mean_score(scores) for name, scores in site_scores(self.moments).items()}
        return found | ({"top1": self.value("top1")} if self.counts is not None else {})


@dataclass
class Scores:
    """Of several recordings, or of one, each on its own stimuli.

    Attributes:
        of: by the name of the recording.
    """

    of: dict[str, Scored]

    def value(self, metric: str) -> float:
        """The mean over recordings of a metric; NaN where one has no value."""
        return float(np.mean([scored.value(metric) for scored in self.of.values()]))

    def means(self) -> dict[str, float]:
        """All metrics there are, as means over recordings."""
        return mean_over([scored.means() for scored in self.of.values()])

    def told(self) -> dict[str, float]:
        """`means`, and of several recordings each one's own."""
        return told({name: scored.means() for name, scored in self.of.items()})

    @property
    def moments(self) -> torch.Tensor | None:
        """Of the sites of all recordings, in order."""
        each = [scored.moments for scored in self.of.values()]
        return None if each[0] is None else torch.cat(each, dim=1)


def mean_over(each: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean over recordings of every metric that all of them have."""
    shared = [name for name in each[0] if all(name in means for means in each)]
    return {name: float(np.mean([means[name] for means in each])) for name in shared}


def told(each: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Metrics of recordings as charts have them: `r2` is the mean, and of several, `recording/r2` is each one's own."""
    own = {f"{recording}/{name}": value for recording, means in each.items() for name, value in means.items()}
    return mean_over(list(each.values())) | (own if len(each) > 1 else {})


def names_of(split: str, recordings: Sequence[str]) -> list[str]:
    """What a split of each recording is called: `split`, and of several recordings `split/recording`."""
    return [f"{split}/{recording}" if len(recordings) > 1 else split for recording in recordings]


def score_each(network: Network, stimuli: StimulusSet, runtime: Runtime, **options: Any) -> Scores:
    """`score` the stimuli of each recording."""
    return Scores({part.recording: score(network, part, runtime, **options) for part in stimuli.parts})


@torch.no_grad()
def score(
    network: Network, stimuli: Stimuli, runtime: Runtime, *, batch_size: int, workers: int, keep: bool, label: str = ""
) -> Scored:
    """Predict every stimulus once, over all ranks, in float32 and with the network in evaluation mode.

    Args:
        network: on the runtime's device.
        stimuli: of one recording, to predict; of the outputs, their `columns` are scored.
        runtime: this process.
        batch_size: stimuli per forward pass.
        workers: decoding processes.
        keep: whether to gather the predictions of all stimuli.
        label: of the progress bar; no bar without one.

    Raises:
        Stopped: a process was told to stop.
        RuntimeError: the ranks together did not see every stimulus once.
    """
    was_training = network.training
    network.eval()
    device, own = runtime.device, rank_positions(len(stimuli), runtime.rank, runtime.ranks)
    loader = evaluation_loader(
        stimuli, size=batch_size, rank=runtime.rank, ranks=runtime.ranks, workers=workers, pin=runtime.on_gpu
    )
    responses = network.objective.responses
    sites = 0 if responses is None else responses.rate_mean[stimuli.columns].numel()
    moments = SiteMoments(sites, device) if responses is not None and stimuli.rates is not None else None
    counts = (
        ClassCounts.zeros(network.heads["classes"].out_features, device)
        if "classes" in network.heads and stimuli.labels is not None
        else None
    )
    kept = torch.empty(len(own) if keep else 0, sites, device=device)
    named = torch.empty(len(own) if keep else 0, dtype=torch.int64, device=device)
    seen = 0
    with Progress(len(stimuli), label, silent=not (label and runtime.leads)) as progress:
        for batch in loader:
            runtime.beat()
            there = int(batch.weight.sum())
            batch = batch.to(device)
            outputs = network(batch.images)
            if "rates" in outputs:
                rates = responses.in_units(outputs["rates"])[:, stimuli.columns]
                if moments is not None:
                    moments.add(rates, batch.rates, batch.weight)
                if keep:
                    kept[seen : seen + there] = rates[:there]
            if counts is not None:
                counts.add(outputs["classes"], batch.labels, batch.weight)
            if keep and "classes" in outputs:
                named[seen : seen + there] = outputs["classes"][:there].argmax(1)
            seen += there
            progress.advance(min(there * runtime.ranks, len(stimuli) - progress.done))
    network.train(was_training)
    _check_count(runtime, seen, len(stimuli))
    return Scored(
        moments=None if moments is None else merge_all(runtime.all_gather(moments.state)),
        counts=None if counts is None else runtime.sum(counts.stacked()),
        rates=runtime.gather_rows(kept) if keep and responses is not None else None,
        named=runtime.gather_rows(named) if keep and "classes" in network.heads else None,
    )


def _check_count(runtime: Runtime, seen: int, expected: int) -> None:
    total = int(runtime.sum(torch.tensor(seen, device=runtime.device)))
    if total != expected:
        raise RuntimeError(f"the ranks evaluated {total} stimuli, but the split has {expected}")


def report(scored: Scored, stimuli: Stimuli, manifest: Manifest, split: str, ranks: int) -> dict[str, Any]:
    """The content of metrics.json."""
    metrics = report_head(stimuli.stimulus_ids, stimuli.rates, manifest, split, ranks)
    if scored.moments is not None:
        noise = stimuli.noise_of_rates()
        metrics["regression"] = regression_block(scored.moments, scored.rates, stimuli.rates, manifest, noise)
    if scored.counts is not None:
        metrics["classification"] = classification_report(scored.counts, manifest.classes or [])
    return metrics


def report_head(
    stimulus_ids: list[str], rates: np.ndarray | None, manifest: Manifest, split: str, ranks: int
) -> dict[str, Any]:
    """What every metrics.json begins with: what was scored, and by how many processes."""
    head = {"split": split, "stimuli": len(stimulus_ids), "world_size": ranks, "recording": manifest.name}
    head["fingerprint"] = fingerprint(stimulus_ids, rates)
    return head | ({"simulated": True} if manifest.simulated else {})


def regression_block(
    moments: torch.Tensor, prediction: np.ndarray, target: np.ndarray, manifest: Manifest, noise: np.ndarray | None
) -> dict[str, Any]:
    """The `regression` block of metrics.json; every score that rests on a ceiling names it.

    Args:
        moments: of responses and predictions, merged over ranks.
        prediction, target: (stimuli, sites).
        manifest: has the reliability of each site where there are single trials.
        noise: (stimuli, sites), noise variance of the targets, see `Stimuli.noise_of_rates`; or None.
    """
    ceiling = manifest.ceiling
    reliability = None if ceiling is None else from_json_list(ceiling.reliability)
    trained = np.array([mean is not None for mean in manifest.rates.mean])
    block = regression_report(moments, prediction, target, manifest.site_ids, reliability, trained, noise)
    if ceiling is not None:
        block["ceiling"] |= ceiling.facts()
        for name in ("ceiled_explained_variance", "ceiled_pearson_r"):
            block[name]["ceiling"] = ceiling.method
    if noise is not None:
        block["feve"]["ceiling"] = NOISE_OF_SCORED
    return block


def check_not_empty(stimuli: Stimuli, ranks: int, split: str) -> None:
    """Refuse more ranks than stimuli.

    Raises:
        BadInput: there are.
    """
    if len(stimuli) < ranks:
        raise BadInput(f"{ranks} processes cannot share the {len(stimuli)} stimuli of {split!r}; start fewer")
