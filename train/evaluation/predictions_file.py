"""predictions.npz: the responses and classes that a run, a probe or an ensemble predicts for a split."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.common.atomic_writes import write_npz
from data_prep.common.errors import BadInput
from data_prep.common.safe_reading import parse_json, read_npz, read_regular_file
from train.evaluation.metrics_file import METRICS_FILE
from train.run.folder import LEFT_OUT, RunFolder

PREDICTIONS_FILE = "predictions.npz"
SCORE_FIRST = "score the run on that split first (train/evaluate.py)"


class ForeignPredictions(BadInput):
    """Predictions that are not those whose scores lie beside them."""


@dataclass(frozen=True)
class Predictions:
    """Predicted responses, with the ids of their stimuli and sites.

    Attributes:
        stimulus_ids, site_ids: of the rows and the columns.
        rates: predictions in the recording's units, float32 (stimuli, sites).
        responses: recorded responses, likewise; None where they are unknown.
    """

    stimulus_ids: list[str]
    site_ids: list[str]
    rates: np.ndarray
    responses: np.ndarray | None = None

    def rows(self, stimulus_ids: Sequence[str]) -> np.ndarray:
        """The predictions for these stimuli, in this order; NaN for stimuli without any."""
        return self._rows_of(self.rates, stimulus_ids)

    def _rows_of(self, values: np.ndarray, stimulus_ids: Sequence[str]) -> np.ndarray:
        """The rows of `values` for these stimuli; NaN for stimuli without any."""
        row_of = {stimulus: row for row, stimulus in enumerate(self.stimulus_ids)}
        found = np.full((len(stimulus_ids), values.shape[1]), np.nan, values.dtype)
        for position, stimulus in enumerate(stimulus_ids):
            if stimulus in row_of:
                found[position] = values[row_of[stimulus]]
        return found

    def check_responses(self, run: Path, stimulus_ids: Sequence[str], rates: np.ndarray, where: str) -> None:
        """Refuse predictions that were made for other responses under the same ids: another window, another scale ...

        Args:
            run: that made them, for the message.
            stimulus_ids: of a recording.
            rates: its responses to these stimuli, float32 (stimuli, sites).
            where: the recording is, for the message.

        Raises:
            BadInput: naming the first stimulus and site that differ.
        """
        if self.responses is None:
            raise BadInput(f"{run}: its predictions are without responses, but {where} has some; score it again")
        theirs, known = self._rows_of(self.responses, stimulus_ids), np.isin(stimulus_ids, self.stimulus_ids)
        differs = known[:, None] & ~((theirs == rates) | (np.isnan(theirs) & np.isnan(rates)))
        for stimulus, site in np.argwhere(differs)[:1]:
            raise BadInput(
                f"{run} was scored on other responses than those of {where}: {theirs[stimulus, site]:.6g} instead of "
                f"{rates[stimulus, site]:.6g} for stimulus {stimulus_ids[stimulus]} at site {self.site_ids[site]}; "
                "score it on the same recording, with the same response window and scale"
            )

    def write(self, folder: Path) -> str:
        """Write FOLDER/predictions.npz; returns the digest that metrics.json beside it keeps.

        Raises:
            CannotWrite: the disk is full, the folder read-only ...
        """
        arrays = {
            "stimulus_id": np.array(self.stimulus_ids),
            "site_id": np.array(self.site_ids),
            "prediction": self.rates,
        }
        if self.responses is not None:
            arrays["target"] = self.responses
        return write_predictions(folder, arrays)


@dataclass(frozen=True)
class ClassPredictions:
    """Predicted classes, with the true ones.

    Attributes:
        names: of the classes, in label order.
        shown, predicted: int (stimuli,), labels.
    """

    names: list[str]
    shown: np.ndarray
    predicted: np.ndarray


def predictions_of(run: Path, split: str, recording: str) -> Predictions:
    """What a run, a probe or an ensemble predicts for a split of a recording.

    Raises:
        BadInput: it has not been scored on the split, or the file is damaged.
    """
    hint = f"score the run on {split} first"
    if split == LEFT_OUT:
        hint = "train/probe.py writes it with readout ridge and --split val, train/evaluate.py with --split left_out"
    return read_predictions(RunFolder(run).results_on(split, recording) / PREDICTIONS_FILE, hint)


def read_predictions(path: Path, hint: str = SCORE_FIRST) -> Predictions:
    """Read the predicted responses of a predictions.npz.

    Args:
        path: of the file.
        hint: what to do if it is missing.

    Raises:
        BadInput: it is missing, damaged, or has no predicted responses.
    """
    arrays = _read_arrays(path, hint)
    if "prediction" not in arrays:
        raise BadInput(f"{path} contains no predicted responses: the run predicts classes only")
    for name in ("stimulus_id", "site_id"):
        if name not in arrays:
            raise BadInput(f"{path} is damaged (it has no {name}); score the run again")
    stimulus_ids, site_ids, rates = arrays["stimulus_id"], arrays["site_id"], arrays["prediction"]
    responses = arrays.get("target")
    shape = (*stimulus_ids.shape, *site_ids.shape)
    for values in (rates, responses):
        if values is not None and (stimulus_ids.ndim != 1 or values.shape != shape or values.dtype.kind != "f"):
            raise BadInput(f"{path} is damaged: its arrays do not fit its stimuli and sites; score the run again")
    return Predictions(list(map(str, stimulus_ids)), list(map(str, site_ids)), rates, responses)


def read_class_predictions(path: Path) -> ClassPredictions | None:
    """Read the predicted classes of a predictions.npz; None if it has none, or the true classes are unknown.

    Raises:
        BadInput: it is missing or damaged.
    """
    arrays = _read_arrays(path, SCORE_FIRST)
    if not {"class_id", "class", "predicted_class"} <= arrays.keys():
        return None
    names, shown, predicted = arrays["class_id"], arrays["class"], arrays["predicted_class"]
    for labels in (shown, predicted):
        are_labels = labels.ndim == 1 and len(labels) and labels.dtype.kind == "i" and len(labels) == shown.size
        if not are_labels or labels.min() < 0 or labels.max() >= names.size:
            raise BadInput(f"{path} is damaged: its labels do not fit its stimuli and classes; score the run again")
    return ClassPredictions(list(map(str, names.flat)), shown, predicted)


def write_predictions(folder: Path, arrays: Mapping[str, np.ndarray]) -> str:
    """Write FOLDER/predictions.npz; returns a digest, by which a metrics.json knows the predictions that it scores.

    Raises:
        CannotWrite: the disk is full, the folder read-only ...
    """
    write_npz(folder / PREDICTIONS_FILE, arrays)
    return _digest(arrays)


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _read_arrays(path: Path, hint: str) -> dict[str, np.ndarray]:
    try:
        arrays = read_npz(path)
    except FileNotFoundError:
        raise BadInput(f"{path} is missing; {hint}") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} is damaged ({error}); score the run again") from None
    _check_belongs(path, arrays)
    return arrays


def _check_belongs(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Refuse predictions that are not those whose scores lie beside them; earlier versions kept no digest.

    Raises:
        ForeignPredictions: they are not.
    """
    try:
        metrics = parse_json(read_regular_file(path.with_name(METRICS_FILE)))
    except (OSError, ValueError):
        return  # there are no scores, or reading them reports what is wrong
    expected = metrics.get("predictions") if isinstance(metrics, dict) else None
    if expected is not None and expected != _digest(arrays):
        raise ForeignPredictions(f"{path} does not belong to the {METRICS_FILE} beside it; score the run again")
