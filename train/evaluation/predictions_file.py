"""predictions.npz: the responses that a run, a probe or an ensemble predicts for the stimuli of a split."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.common.atomic_writes import write_npz
from data_prep.common.errors import BadInput
from data_prep.common.safe_reading import read_npz
from train.run.folder import LEFT_OUT, RunFolder

PREDICTIONS_FILE = "predictions.npz"


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
        row_of = {stimulus: row for row, stimulus in enumerate(self.stimulus_ids)}
        rows = np.array([row_of.get(stimulus, -1) for stimulus in stimulus_ids], np.int64)
        return np.where(rows[:, None] >= 0, self.rates[rows], np.nan)

    def write(self, folder: Path) -> None:
        """Write FOLDER/predictions.npz.

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
        write_npz(folder / PREDICTIONS_FILE, arrays)


def predictions_of(run: Path, split: str, recording: str) -> Predictions:
    """What a run, a probe or an ensemble predicts for a split of a recording.

    Raises:
        BadInput: it has not been scored on the split, or the file is damaged.
    """
    hint = f"score the run on {split} first"
    if split == LEFT_OUT:
        hint = "train/probe.py writes it with readout ridge and --split val, train/evaluate.py with --split left_out"
    return read_predictions(RunFolder(run).results_on(split, recording) / PREDICTIONS_FILE, hint)


def read_predictions(path: Path, hint: str = "score the run on that split first (train/evaluate.py)") -> Predictions:
    """Read a predictions.npz.

    Args:
        path: of the file.
        hint: what to do if it is missing.

    Raises:
        BadInput: it is missing, damaged, or has no predicted responses.
    """
    try:
        arrays = read_npz(path)
        if "prediction" not in arrays:
            raise BadInput(f"{path} contains no predicted responses: the run predicts classes only")
        stimulus_ids, site_ids, rates = arrays["stimulus_id"], arrays["site_id"], arrays["prediction"]
    except FileNotFoundError:
        raise BadInput(f"{path} is missing; {hint}") from None
    except KeyError as error:
        raise BadInput(f"{path} is damaged (it has no {error.args[0]}); score the run again") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} is damaged ({error}); score the run again") from None
    responses = arrays.get("target")
    predictions = Predictions(list(map(str, stimulus_ids.flat)), list(map(str, site_ids.flat)), rates, responses)
    shape = (*stimulus_ids.shape, *site_ids.shape)
    for values in (rates, responses):
        if values is not None and (stimulus_ids.ndim != 1 or values.shape != shape or values.dtype.kind != "f"):
            raise BadInput(f"{path} is damaged: its arrays do not fit its stimuli and sites; score the run again")
    return predictions
