"""evaluate.py PREDICTOR --images: every image once, whatever the number of processes."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import assert_refused, run_here, succeed_here
from launching import predictions, succeed_on
from make_recordings import pack_recording
from PIL import Image
from thread_ranks import on_ranks

from data_prep.common.errors import BadInput
from data_prep.common.safe_reading import read_npz
from data_prep.shards.folder import ShardFolder
from train.evaluation.options import Evaluate
from train.evaluation.predicting.images_job import prepare_images


@pytest.fixture(scope="module")
def images(recording, tmp_path_factory):
    """The images of val in two folders, beside files that are none."""
    folder, val = tmp_path_factory.mktemp("images"), ShardFolder(recording).split("val")
    (folder / "more").mkdir()
    for position, stimulus in enumerate(val.stimulus_ids):
        data, encoding = val.image(position)
        (folder / ("more" if position % 2 else "") / f"{stimulus}.{encoding}").write_bytes(data)
    (folder / "notes.txt").write_text("not an image")
    (folder / "._hidden.png").write_bytes(b"of macOS")
    return folder


@pytest.mark.parametrize("processes", [1, 2])
def test_the_images_of_a_folder_are_predicted_once(predictors, images, tmp_path, processes):
    command = ["train/evaluate.py", predictors / "stack", "--images", images, "--out", tmp_path / "out"]
    out = succeed_on(processes, *command, "--batch-size", "7", "--workers", "0")
    found, scored = read_npz(tmp_path / "out/predictions.npz"), predictions(predictors / "stack")
    names = [name.rpartition("/")[2].rpartition(".")[0] for name in found["stimulus_id"].tolist()]
    assert sorted(names) == sorted(scored["stimulus_id"].tolist())
    rows = [scored["stimulus_id"].tolist().index(name) for name in names]
    np.testing.assert_allclose(found["prediction"], scored["prediction"][rows], rtol=1e-4, atol=1e-5)
    assert found["site_id"].tolist() == scored["site_id"].tolist()
    assert str(found["units"]) == "spikes/s (simulated)"
    assert f"{len(names)} images, 12 sites: written to" in out


def test_the_images_of_another_recording_are_predicted(predictors, tmp_path):
    """Whatever its sites, and without its responses; xarray reads the file."""
    other, _ = pack_recording(tmp_path, "other", n=40, size=24, sites=3)
    command = ["train/evaluate.py", predictors / "pixels", "--images", other, "--split", "test"]
    succeed_here(*command, "--out", tmp_path / "npz")
    found = read_npz(tmp_path / "npz/predictions.npz")
    assert found["stimulus_id"].tolist() == ShardFolder(other).split("test").stimulus_ids
    assert found["prediction"].shape == (len(found["stimulus_id"]), 12)
    assert "target" not in found
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("h5netcdf")
    succeed_here(*command, "--out", tmp_path / "nc", "--format", "netcdf")
    with xarray.open_dataset(tmp_path / "nc/predictions.nc", engine="h5netcdf") as dataset:
        np.testing.assert_array_equal(dataset["prediction"], found["prediction"])
        assert dataset["prediction"].attrs["units"] == "spikes/s (simulated)"
        assert dataset["object"].dims == ("presentation",)
        assert dataset.attrs["recording"] == str(found["recording"])


def test_a_run_predicts_what_evaluate_scores(predictors, recording, tmp_path):
    succeed_here("train/evaluate.py", predictors / "run", "--images", recording, "--out", tmp_path / "out")
    found, scored = read_npz(tmp_path / "out/predictions.npz"), predictions(predictors / "run")
    assert found["stimulus_id"].tolist() == scored["stimulus_id"].tolist()
    np.testing.assert_allclose(found["prediction"], scored["prediction"], rtol=1e-5)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["{run}", "--images", "{images}"], ["--out"]),
        (["{run}", "{probe}", "--images", "{images}", "--out", "{new}"], ["one predictor"]),
        (["{run}", "--images", "{images}", "--out", "{run}"], ["already holds a run"]),
        (["{run}", "--images", "{run}", "--out", "{new}"], ["contains no images"]),
        (["{run}", "--images", "{new}", "--out", "{new}"], ["is not a folder"]),
        (["{run}", "--images", "{images}", "--out", "{new}", "--split", "test"], ["have no splits"]),
        (["{run}", "--images", "{images}", "--out", "{new}", "--data", "{data}"], ["--data"]),
        (["{run}", "--images", "{images}", "--out", "{new}", "--seen", "keep"], ["--seen", "nothing is scored"]),
        (["{run}", "--images", "{images}", "--out", "{new}", "--trackers", "wandb"], ["--trackers"]),
        (["{run}", "--images", "{images}", "--out", "{new}", "--combine", "stack"], ["--combine"]),
        (["{run}", "--images", "{images}", "--out", "{new}", "--on-bad-sample", "skip"], ["not skipped"]),
        (["{run}", "--images", "{images}", "--out", "{new}", "--recording", "else"], ["predicts the recording"]),
        (["{run}", "--images", "{data}", "--out", "{new}", "--split", "left_out"], ["left_out"]),
        (["{probe}", "--images", "{images}", "--out", "{new}", "--checkpoint", "last"], ["no last checkpoint"]),
        (["{run}", "--format", "netcdf"], ["--format needs --images"]),
        (["{run}", "--recording", "simulated"], ["--recording needs --images"]),
    ],
)
def test_what_does_not_go_together_is_refused(predictors, images, recording, tmp_path, words, expected):
    places = {"run": predictors / "run", "probe": predictors / "probe", "images": images, "data": recording}
    words = [word.format(**places, new=tmp_path / "new") for word in words]
    assert_refused(run_here("train/evaluate.py", *words), *expected)
    assert not (tmp_path / "new").exists()


def test_processes_that_opened_different_checkpoints_do_not_mix_them(predictors, images, tmp_path):
    """The best epoch of a run that is still training may change while they start."""
    job = prepare_images(Evaluate(runs=[predictors / "run"], images=str(images), out=tmp_path / "out"))
    assert job.predictor.checkpoint.startswith("step_")
    later = replace(job, predictor=replace(job.predictor, checkpoint="step_9999"))
    with pytest.raises(BadInput, match=r"the checkpoint of .*/run .*step_9999"):
        on_ranks(2, lambda runtime: (job, later)[runtime.rank].run(runtime))
    assert not (tmp_path / "out").exists()


def test_an_image_that_cannot_be_read_is_named(predictors, tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "in/good.png")
    (tmp_path / "in/bad.png").write_bytes((tmp_path / "in/good.png").read_bytes()[:40])
    command = ["train/evaluate.py", predictors / "pixels", "--images", tmp_path / "in", "--out", tmp_path / "out"]
    assert_refused(run_here(*command, "--workers", "0"), tmp_path / "in/bad.png")
    assert not (tmp_path / "out").exists()
