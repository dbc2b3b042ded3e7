"""Read recordings as packing does, and compare packed shards with the source."""

import io
import pickle
from pathlib import Path

import numpy as np
from helpers import assert_refused, run_here, succeed_here
from make_field_files import Written
from PIL import Image

from data_prep.recording import Recording, Stimulus, trial_average
from data_prep.shards.folder import ShardFolder
from data_prep.sources.files.ids import safe_ids

PACK = "data_prep/pack.py"


def read_all(recording: Recording) -> list[Stimulus]:
    """All stimuli in order, from a pickled copy of the recording."""
    recording = pickle.loads(pickle.dumps(recording))
    return list(recording.read(range(len(recording.stimulus_ids))))


def read_by_id(recording: Recording) -> dict[str, Stimulus]:
    """All stimuli by id, read from a pickled copy of the recording in random order."""
    recording = pickle.loads(pickle.dumps(recording))
    order = np.random.default_rng(0).permutation(len(recording.stimulus_ids))
    return {stimulus.id: stimulus for stimulus in recording.read(order.tolist())}


def pixels(image) -> np.ndarray:
    """An encoded image as uint8 (H, W, 3)."""
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))


def order_free(trials: np.ndarray) -> np.ndarray:
    """The repetitions of a stimulus, sorted, missing ones last."""
    return np.sort(trials, axis=-2)


def packed(tmp_path: Path, *args) -> ShardFolder:
    """Pack with the real command."""
    out = tmp_path / "packed"
    succeed_here(PACK, *args, "--out", out, "--workers", 1)
    return ShardFolder(out)


def refused(tmp_path: Path, words: tuple[str, ...], *args) -> None:
    """The real command ends with one error message and leaves no files behind."""
    out = tmp_path / "refused"
    assert_refused(run_here(PACK, *args, "--out", out, "--workers", 1), *words)
    assert not list(tmp_path.glob("*refused*"))


def check_packed(folder: ShardFolder, written: Written, columns=slice(None), scale: float = 1.0) -> None:
    """The shards hold the images, averages and (if there are several) trials of the source."""
    row_of = {name: row for row, name in enumerate(safe_ids(written.ids))}
    seen = set()
    for name in folder.manifest.splits:
        split = folder.split(name)
        for position, stimulus in enumerate(split.stimulus_ids):
            row = row_of[stimulus]
            assert np.array_equal(pixels(split.image(position)[0]), written.images[row])
            trials = written.trials[row][:, columns] * np.float32(scale)
            np.testing.assert_allclose(split.array(position, "rates.npy"), trial_average(trials), rtol=1e-5)
            if written.trials.shape[1] > 1:
                np.testing.assert_allclose(split.array(position, "trials.npy"), trials, rtol=1e-5)
            seen.add(stimulus)
    assert seen == set(row_of)
