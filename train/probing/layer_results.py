"""The results of a probe's regressions, kept on the leading rank's disk, from where a killed probe resumes.

SCRATCH/0_of_<ranks>/results-<digest>/<name>/    of a layer through a window:
    facts.json, numbers.npz             what else is known
    prediction.npy                      float32 (scored, sites)
    left_out_<partition>.npy            float32 (sites, stimuli to fit); only for ridge
    dual_<partition>.npy                float64 (sites, stimuli to fit)
"""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from data_prep.common.errors import RunFailed
from data_prep.common.safe_reading import map_npy, parse_json, read_npz, read_regular_file
from train.probing.layer_window import LayerWindow
from train.regression.rows import RowFile, Rows
from train.regression.spectrum import SpectrumFacts

FACTS, NUMBERS, PREDICTION = "facts.json", "numbers.npz", "prediction.npy"


@dataclass(frozen=True)
class Similarity:
    """Similarity of a layer and the responses, over the held-out stimuli and the sites recorded for all of them.

    Attributes:
        rsa, cka: see `train/evaluation/similarity.py`; NaN where there is no such site.
    """

    rsa: float = math.nan
    cka: float = math.nan


@dataclass
class LayerResult:
    """The regressions on a layer.

    Attributes:
        features: number of features of an image.
        prediction: float32 (scored, sites), of the stimuli that a partition holds out, by position.
        similarity: of layer and responses.
        inner_r2: of each partition, the mean over sites on stimuli left out of the fit.
        penalty: of each partition, float64 (sites,); only for ridge on the whole map.
        left_out: of each partition, float32 (sites, stimuli to fit), each predicted from the others; only for ridge.
        dual: of each partition, float64 (sites, stimuli to fit), see `train/regression/fit.py`.
        mean: of each partition, float64 (sites,), likewise.
        window_centre: of each partition, float64 (2, sites), the mean centre of the windows that a site reads through:
            right and down from the image's middle, in half sides; NaN for a site that reads the whole map. Only with
            windows.
        components: how principal components were found (`train/regression/spectrum.py`), of the least exact of the
            regressions; None if none were needed.
    """

    features: int
    prediction: np.ndarray
    similarity: Similarity
    inner_r2: list[float] = field(default_factory=list)
    penalty: list[np.ndarray] = field(default_factory=list)
    left_out: list[Rows] = field(default_factory=list)
    dual: list[Rows] = field(default_factory=list)
    mean: list[np.ndarray] = field(default_factory=list)
    window_centre: list[np.ndarray] = field(default_factory=list)
    components: SpectrumFacts | None = None


class ResultFiles:
    """The results of layers through windows, on disk.

    Args:
        folder: of all of them.
    """

    def __init__(self, folder: Path):
        self._folder = folder

    def existing(self, keys: Sequence[LayerWindow]) -> list[LayerWindow]:
        """Those that are complete."""
        return [key for key in keys if (self._of(key) / FACTS).is_file()]

    def save(self, key: LayerWindow, result: LayerResult) -> None:
        """Keep the result of a regression on a layer through one window.

        Raises:
            RunFailed: the disk is full.
        """
        try:
            self._save(self._of(key), result)
        except OSError as error:
            raise RunFailed(
                f"{self._folder} has no room for the results ({error.strerror}); make room and continue with --resume"
            ) from None

    def _save(self, folder: Path, result: LayerResult) -> None:
        temporary = folder.with_name(f"{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        np.save(temporary / PREDICTION, result.prediction)
        for partition, left_out in enumerate(result.left_out):
            np.save(temporary / _left_out_name(partition), left_out[:])
        for partition, dual in enumerate(result.dual):
            np.save(temporary / _dual_name(partition), dual[:])
        similarity = [result.similarity.rsa, result.similarity.cka]
        penalty = np.array(result.penalty) if result.penalty else np.empty((0, 0))
        mean = np.array(result.mean) if result.mean else np.empty((0, 0))
        np.savez(temporary / NUMBERS, similarity=similarity, inner_r2=result.inner_r2, penalty=penalty, mean=mean)
        components = result.components and asdict(result.components)
        facts = {"features": result.features, "left_out": len(result.left_out), "components": components}
        (temporary / FACTS).write_text(json.dumps(facts))
        temporary.replace(folder)

    def load(self, key: LayerWindow) -> LayerResult:
        """A result; what was left out stays on disk, and is read some sites at a time."""
        folder = self._of(key)
        facts, numbers = parse_json(read_regular_file(folder / FACTS)), read_npz(folder / NUMBERS)
        return LayerResult(
            features=facts["features"],
            prediction=np.array(map_npy(folder / PREDICTION)),
            similarity=Similarity(*numbers["similarity"].tolist()),
            inner_r2=numbers["inner_r2"].tolist(),
            penalty=list(numbers["penalty"]),
            left_out=[RowFile(folder / _left_out_name(partition)) for partition in range(facts["left_out"])],
            dual=[RowFile(folder / _dual_name(partition)) for partition in range(len(numbers["mean"]))],
            mean=list(numbers["mean"]),
            components=facts["components"] and SpectrumFacts(**facts["components"]),
        )

    def _of(self, key: LayerWindow) -> Path:
        return self._folder / key.file_name


def _left_out_name(partition: int) -> str:
    return f"left_out_{partition}.npy"


def _dual_name(partition: int) -> str:
    return f"dual_{partition}.npy"
