"""ensemble.json: the members of an ensemble, and how they are combined; weights.npz, what was learned; and what a
member is.

weights.npz, of an ensemble that was stacked:
recording        (recordings,) names
<k>.site_id      (sites,), <k>.mean float64 (sites,), <k>.weights float64 (members, sites)    of recording k, see
                 `train/regression/stacking.py`
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep.common.atomic_writes import write_npz
from data_prep.common.errors import BadInput
from data_prep.common.safe_reading import parse_json, read_npz, read_regular_file
from train.models.saved_probe import SAVED_PROBE
from train.run.checkpoint import checksum, network_checksum, resolve_checkpoint
from train.run.folder import RunFolder, is_probe

ENSEMBLE_FILE = "ensemble.json"
WEIGHTS_FILE = "weights.npz"
MOST_NAMED = 5  # predictors in a folder of them


def is_fine_tuned(run: Path) -> bool:
    """Whether a folder is a run of train/finetune.py, which has to be scored, rather than a probe or an ensemble.

    Raises:
        BadInput: it is none of these.
    """
    if (run / ENSEMBLE_FILE).is_file():
        return False
    if not RunFolder(run).recipe.is_file():
        raise BadInput(f"{run} is not the folder of a run, a probe or an ensemble{_what_it_is(run)}")
    return not is_probe(RunFolder(run))


def _what_it_is(folder: Path) -> str:
    """The end of a sentence about a folder that is no predictor."""
    if not folder.is_dir():
        return "; there is no such folder"
    within = sorted(path.name for path in folder.iterdir() if _is_predictor(path))
    more = ", ..." if len(within) > MOST_NAMED else ""
    return f"; it holds {', '.join(within[:MOST_NAMED])}{more}, of which you may name one" if within else ""


def _is_predictor(folder: Path) -> bool:
    return RunFolder(folder).recipe.is_file() or (folder / ENSEMBLE_FILE).is_file()


def shard_folders_of(run: Path) -> list[str]:
    """The shard folders, or their URLs, of a run, a probe or an ensemble.

    Raises:
        BadInput: they are not on record.
    """
    return read_record(run).data if (run / ENSEMBLE_FILE).is_file() else RunFolder(run).data_folders()


@dataclass(frozen=True)
class EnsembleRecord:
    """The content of ensemble.json, without the weights of the members.

    Attributes:
        combine: how the members are combined.
        members: the run folders of each member.
        data: the shard folder of each recording.
        recordings: their names; empty in files of earlier versions.
        relative: by run folder, its path from the ensemble's folder.
        fingerprints: by run folder, that of its predictor, see `fingerprint_of`.
    """

    combine: str
    members: list[list[str]]
    data: list[str]
    recordings: list[str] = field(default_factory=list)
    relative: Mapping[str, str] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    def is_same_ensemble(self, other: "EnsembleRecord") -> bool:
        """Whether the same runs are combined in the same way on as many recordings, wherever their shards are."""
        return (self.combine, self.members, len(self.data)) == (other.combine, other.members, len(other.data))


def read_record(ensemble: Path) -> EnsembleRecord:
    """Read the ensemble.json of a folder.

    Raises:
        BadInput: it is missing or damaged.
    """
    path = ensemble / ENSEMBLE_FILE
    try:
        content = parse_json(read_regular_file(path))
        data = content["data"] if isinstance(content["data"], list) else [content["data"]]
        members = [list(map(str, member["runs"])) for member in content["members"]]
        if not members or not all(members):
            raise ValueError("it has no members")
        return EnsembleRecord(
            combine=content["combine"],
            members=members,
            data=list(map(str, data)),
            recordings=list(map(str, content.get("recordings", []))),
            relative=_texts(content.get("relative", {})),
            fingerprints=_texts(content.get("fingerprints", {})),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(f"{path} is damaged; make the ensemble again in another folder") from None


def _texts(content: Mapping[str, str]) -> dict[str, str]:
    return {str(name): str(value) for name, value in content.items()}


# ----------------------------------------------------------------------------------------------------------- members


def facts_of_members(out: Path, members: Sequence[Sequence[str]]) -> dict[str, dict[str, str]]:
    """The entries of ensemble.json by which its members are found again, unchanged."""
    runs = [run for member in members for run in member]
    relative = {run: os.path.relpath(run, out) for run in runs}
    return {"relative": relative, "fingerprints": {run: fingerprint_of(Path(run)) for run in runs}}


def fingerprint_of(run: Path) -> str:
    """What changes when a run, a probe or an ensemble predicts otherwise; "" if that cannot be told."""
    if (run / ENSEMBLE_FILE).is_file():
        record = read_record(run)
        parts = [record.combine, *sorted(record.fingerprints.values())]
        if (run / WEIGHTS_FILE).is_file():
            parts.append(checksum(run / WEIGHTS_FILE))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
    if is_fine_tuned(run):
        return network_checksum(resolve_checkpoint(RunFolder(run).checkpoints, "best"))
    return checksum(run / SAVED_PROBE) if (run / SAVED_PROBE).is_file() else ""


def member_folder(ensemble: Path, record: EnsembleRecord, run: str) -> Path:
    """Where a member is: where it was as seen from the ensemble, or as it was called.

    Raises:
        BadInput: it is in neither place.
    """
    places = [ensemble / record.relative[run]] if run in record.relative else []
    for place in [*places, Path(run)]:
        if _is_predictor(place):
            return place
    raise BadInput(f"{ensemble} needs its member {run}, which is not there; copy it beside the ensemble as it was")


def check_unchanged(ensemble: Path, record: EnsembleRecord, run: str) -> None:
    """Refuse a member that does not predict what it did when the ensemble was made.

    Raises:
        BadInput: it has changed.
    """
    place, expected = member_folder(ensemble, record, run), record.fingerprints.get(run, "")
    if expected and fingerprint_of(place) != expected:
        raise BadInput(
            f"{place} has changed since the ensemble {ensemble} was made of it; make the ensemble again in another "
            "folder"
        )


# ----------------------------------------------------------------------------------------------------------- weights


@dataclass(frozen=True)
class StackWeights:
    """The learned weights of an ensemble for a recording.

    Attributes:
        recording: its name.
        site_ids: its sites.
        weights: float64 (members, sites).
        mean: float64 (sites,), of the responses; what is combined are deviations from it.
    """

    recording: str
    site_ids: list[str]
    weights: np.ndarray
    mean: np.ndarray


def write_stack_weights(ensemble: Path, of_recordings: Sequence[StackWeights]) -> None:
    """Write weights.npz.

    Raises:
        CannotWrite: the disk is full, the folder read-only ...
    """
    arrays = {"recording": np.array([weights.recording for weights in of_recordings])}
    for number, weights in enumerate(of_recordings):
        arrays |= {
            f"{number}.site_id": np.array(weights.site_ids),
            f"{number}.weights": weights.weights,
            f"{number}.mean": weights.mean,
        }
    write_npz(ensemble / WEIGHTS_FILE, arrays)


def read_stack_weights(ensemble: Path, recording: str | None) -> StackWeights:
    """The weights for a recording, by default the first.

    Raises:
        BadInput: they are missing or damaged.
    """
    path = ensemble / WEIGHTS_FILE
    try:
        arrays = read_npz(path)
        names = list(map(str, arrays["recording"]))
        number = 0 if recording is None else names.index(recording)
        site_ids, weights, mean = (arrays[f"{number}.{name}"] for name in ("site_id", "weights", "mean"))
        if weights.ndim != 2 or weights.shape[1:] != site_ids.shape or mean.shape != site_ids.shape:
            raise ValueError("its arrays do not fit its sites")
        if weights.dtype != np.float64 or mean.dtype != np.float64 or not np.isfinite(weights).all():
            raise ValueError("its weights are not finite numbers")
    except FileNotFoundError:
        raise BadInput(
            f"{path} is missing: an earlier version made this ensemble; make it again in another folder, with the same "
            "command"
        ) from None
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"{path} is damaged ({error}); make the ensemble again in another folder") from None
    return StackWeights(names[number], list(map(str, site_ids)), weights, mean)
