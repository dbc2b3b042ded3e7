"""Makes a population of the saved probes of several recordings (`train/models/population.py`)."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.common.atomic_writes import write_bytes, write_json
from data_prep.common.errors import BadInput
from data_prep.common.markdown import markdown_table
from train.data.seen import FITTED, SeenRecord, inherited_record
from train.evaluation.metrics_file import METRICS_FILE, metrics_content
from train.models.features import PIXELS
from train.models.population import POPULATION_FILE, PopulationFacts, PopulationRecording, write_population
from train.models.probe_network import load_probe_network
from train.models.saved_probe import SavedProbe, read_saved_probe
from train.run.folder import check_writable, open_probe
from train.run.recipe import ProbeRecipe

CARD, CARD_FILE = "card.md", "card.json"
PROBE_AGAIN = "probe again"
NO_LICENCE = "not stated; ask those who recorded the data"


@dataclass(frozen=True)
class ReadProbe:
    """A saved probe of a recording.

    Attributes:
        folder: of the probe.
        recipe: its settings.
        facts: what it predicts, and from what.
        weights: by module, float32 (sites, features).
        bias: float64 (sites,).
    """

    folder: Path
    recipe: ProbeRecipe
    facts: SavedProbe
    weights: Mapping[str, torch.Tensor]
    bias: np.ndarray

    @property
    def usable(self) -> np.ndarray:
        """Which sites were fitted to responses that vary, bool (sites,)."""
        spread = np.array([np.nan if std is None else std for std in self.facts.rate_std])
        return np.isfinite(self.bias) & (np.nan_to_num(spread) > 0)

    def summed(self, positions: Mapping[str, int]) -> list[np.ndarray]:
        """The weights of the usable sites, summed over the positions of each module's map.

        Args:
            positions: of each module's map, which vary fastest among its features.

        Returns:
            Of each module, float32 (sites, channels): the responses, in standard deviations, to a map that is 1 in a
            channel at every position.
        """
        usable = torch.from_numpy(self.usable)
        spread = torch.tensor([std or 1.0 for std in self.facts.rate_std], dtype=torch.float64)[usable, None]
        return [
            (of_module[usable].double().unflatten(1, (-1, positions[module])).sum(2) / spread).float().numpy()
            for module, of_module in self.weights.items()
        ]


def make_population(probes: Sequence[Path], out: Path, licence: str | None) -> PopulationFacts:
    """Read probes and write a population that can be handed on.

    Args:
        probes: folders of probes of several recordings, all of the same network, modules and image size.
        out: folder to make.
        licence: of the recordings, for the card.

    Raises:
        BadInput: a folder is not that of such a probe, or they do not fit together.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out} exists and is not an empty folder; choose another --out")
    check_writable(out)
    read = [_read(probe) for probe in probes]
    for other in read[1:]:
        _check_alike(read[0], other)
    _check_apart(read)
    network, facts = load_probe_network(read[0].folder, read[0].recipe)
    image = torch.zeros(1, 3, facts.image_size, facts.image_size, dtype=torch.uint8)
    with torch.no_grad():
        positions = {name: rows * columns for name, (rows, columns) in network.features.map_sizes(image).items()}
    population = PopulationFacts(
        backbone=read[0].recipe.backbone.name,
        network=str(facts.network),
        modules=list(read[0].weights),
        pool=read[0].recipe.pool,
        image_size=facts.image_size,
        recordings=[_recording(probe) for probe in read],
    )
    record = SeenRecord()
    for probe in read:
        record = record.inheriting(inherited_record(probe.folder), f"probe {probe.folder}")
    summed = [probe.summed(positions) for probe in read]
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write_population(temporary, population, [np.concatenate(of_module) for of_module in zip(*summed, strict=True)])
        record.write(temporary)
        card = _card(population, record, licence)
        write_json(temporary / CARD_FILE, card)
        write_bytes(temporary / CARD, _card_text(population, card).encode())
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return population


def _read(folder: Path) -> ReadProbe:
    recipe = open_probe(folder)
    facts, tensors = read_saved_probe(folder)
    if facts.modules == [PIXELS]:
        raise BadInput(f"{folder} reads pixels; a population is made of probes of a network")
    if recipe.shuffle_responses:
        raise BadInput(f"{folder} is a control, fitted to shuffled responses; leave this probe out")
    weights: dict[str, torch.Tensor] = {}
    for number, module in enumerate(facts.modules):  # folds that chose different layers may share a module
        of_module = tensors[f"weight.{number}"]
        weights[module] = weights[module] + of_module if module in weights else of_module
    probe = ReadProbe(folder, recipe, facts, weights, tensors["bias"].numpy())
    if not probe.usable.any():
        raise BadInput(f"{folder}: none of its sites could be fitted; leave this probe out")
    return probe


def _check_alike(first: ReadProbe, other: ReadProbe) -> None:
    """Refuse probes that do not read the same."""
    both = f"{first.folder} and {other.folder}"
    if first.facts.network != other.facts.network:
        names = dict.fromkeys(probe.recipe.backbone.name for probe in (first, other))
        raise BadInput(f"{both} read networks with different weights ({', '.join(names)}); probe one network")
    if list(first.weights) != list(other.weights):
        raise BadInput(f"{both} read different modules of the network; probe them with the same --layers")
    for what, ours, theirs in (
        ("images.size", first.facts.image_size, other.facts.image_size),
        ("pool", first.recipe.pool, other.recipe.pool),
    ):
        if ours != theirs:
            raise BadInput(f"{both} were probed with {what} {ours} and {theirs}; probe them with the same")


def _check_apart(probes: Sequence[ReadProbe]) -> None:
    """Refuse two probes of the same recording: its sites would count twice."""
    known: dict[tuple[str, ...], ReadProbe] = {}
    for probe in probes:
        sites = (probe.facts.recording, *probe.facts.site_ids)
        if sites in known:
            raise BadInput(f"{known[sites].folder} and {probe.folder} are of the same recording; name one of them")
        known[sites] = probe


def _recording(probe: ReadProbe) -> PopulationRecording:
    """What the card says of a recording."""
    metrics = _metrics(probe.folder)
    try:
        inner_r2 = metrics["layers"][metrics["chosen"]]["inner_r2"]
        stimuli = metrics.get("training_stimuli", metrics["stimuli"])
    except (KeyError, TypeError, AttributeError):
        raise BadInput(f"{probe.folder} has damaged results; {PROBE_AGAIN}") from None
    site_ids = [site for site, usable in zip(probe.facts.site_ids, probe.usable.tolist(), strict=True) if usable]
    return PopulationRecording(
        name=probe.facts.recording,
        simulated=probe.facts.simulated,
        site_ids=site_ids,
        stimuli=stimuli,
        inner_r2=inner_r2,
    )


def _metrics(folder: Path) -> Mapping[str, Any]:
    """The results of a probe's own split."""
    for path in sorted((folder / "eval").glob(f"*/{METRICS_FILE}")):
        metrics = metrics_content(path, PROBE_AGAIN)
        if "layers" in metrics:
            return metrics
    raise BadInput(f"{folder} has no results of a probe; {PROBE_AGAIN}")


def _card(facts: PopulationFacts, record: SeenRecord, licence: str | None) -> dict[str, Any]:
    return facts.model_dump() | {
        "simulated": facts.simulated,
        "sites": facts.sites,
        "images": record.count(FITTED),
        "licence": licence or NO_LICENCE,
        "seen": {"unknown": list(record.unknown), "pretrained": list(record.pretrained)},
    }


def _card_text(facts: PopulationFacts, card: Mapping[str, Any]) -> str:
    """The card for people."""
    titles = ["recording", "sites", "stimuli", "inner R2"]
    rows = [
        [
            f"{recording.name}{' (SIMULATED)' if recording.simulated else ''}",
            f"{len(recording.site_ids):,}",
            f"{recording.stimuli:,}",
            "-" if recording.inner_r2 is None else f"{recording.inner_r2:.3f}",
        ]
        for recording in facts.recordings
    ]
    pooled = "whole maps" if facts.pool is None else f"maps of at most {facts.pool} x {facts.pool}"
    unknown = "\nWhat these have seen is not on record: {}.\n".format(", ".join(card["seen"]["unknown"]))
    return f"""# What {facts.sites:,} recorded sites read from {facts.backbone}

{markdown_table(titles, rows)}

- Network: {facts.backbone}, sha256 of its weights {facts.network}
- Read: {", ".join(facts.modules)}; {pooled}; images of {facts.image_size} px
- Licence: {card["licence"]}

`{POPULATION_FILE}` has one weight for each site and channel of the network. Weights that were derived from recordings
are all there is: no responses, no images, and no weights of the network. `seen.npz` has the stimulus ids and 16 bytes
of a hash of each of the {card["images"]:,} images that the sites were fitted on, so that scores on these are refused.
{unknown if card["seen"]["unknown"] else ""}
Use: `train/probe.py ... --population FOLDER`, with the same network, modules and image size (docs/foundation.md).
"""
