"""What is exported predicts what train/evaluate.py predicts, in programs that know nothing of this project."""

import importlib.util
import io
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import scipy.io
import timm
import torch
from helpers import assert_refused, run_here, succeed_here
from launching import SMALL, predictions
from packaging.version import Version
from PIL import Image

from data_prep.shards.folder import ShardFolder
from train.data.decoding import fit

xarray = pytest.importorskip("xarray")
pytest.importorskip("h5netcdf")

SIZE = 32


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """A trained and scored run, and everything it can be exported to."""
    folder = tmp_path_factory.mktemp("exported")
    run = folder / "run"
    shutil.copytree(trained, run, symlinks=True)
    succeed_here("train/evaluate.py", run)
    succeed_here("train/export.py", run, "--out", folder / "out", "--format", "netcdf", "mat", "timm", "predictor")
    return run, folder / "out"


@pytest.fixture(scope="module")
def images(recording):
    """The images of val, uint8 (stimuli, SIZE, SIZE, 3)."""
    val = ShardFolder(recording).split("val")
    decoded = [Image.open(io.BytesIO(val.image(k)[0])).convert("RGB") for k in range(len(val))]
    return np.stack([fit(np.asarray(image), SIZE) for image in decoded])


def loaded(folder, **options):
    """The predictor of a folder, by the folder's own program."""
    spec = importlib.util.spec_from_file_location("exported_predictor", folder / "predictor.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Predictor(**options)


def same(exported, run):
    expected = predictions(run)["prediction"]
    assert expected.std() > 0
    np.testing.assert_allclose(exported, expected, rtol=1e-4, atol=1e-4 * expected.std())


def test_xarray_reads_the_predictions_with_their_coordinates(exported, recording):
    run, out = exported
    val = ShardFolder(recording).split("val")
    with xarray.open_dataset(out / "predictions_val.nc", engine="h5netcdf") as dataset:
        assembly = dataset["prediction"].load()
        np.testing.assert_array_equal(dataset["target"], val.rates())
    assert assembly.dims == ("presentation", "neuroid")
    np.testing.assert_array_equal(assembly, predictions(run)["prediction"])
    assert assembly["stimulus_id"].values.tolist() == val.stimulus_ids
    assert assembly["object"].values.tolist() == [val.meta(k)["object"] for k in range(len(val))]
    assert assembly["neuroid_id"].values.tolist() == val.manifest.site_ids
    assert set(assembly["region"].values) == {"IT (simulated)"}
    assert assembly["object"].dims == ("presentation",)
    np.testing.assert_allclose(assembly["size"], [val.meta(k)["size"] for k in range(len(val))])


def test_matlab_files_hold_the_same(exported, recording):
    run, out = exported
    loaded = scipy.io.loadmat(out / "predictions_val.mat", simplify_cells=True)
    np.testing.assert_array_equal(loaded["prediction"], predictions(run)["prediction"])
    assert loaded["stimuli"]["stimulus_id"].tolist() == ShardFolder(recording).split("val").stimulus_ids
    assert loaded["facts"]["split"] == "val"


def test_the_predictor_predicts_the_same(exported, images):
    run, out = exported
    predictor = loaded(out)
    assert predictor.site_ids == predictions(run)["site_id"].tolist()
    for batch_size in (1, 7, 64):
        same(predictor.predict(images, batch_size), run)


def test_the_predictor_needs_nothing_of_this_project(exported, images, tmp_path):
    run, out = exported
    np.save(tmp_path / "images.npy", images)
    program = (
        "import sys, numpy as np, predictor; "
        "np.save('found.npy', predictor.Predictor().predict(np.load('images.npy'))); "
        "alien = {'train', 'data_prep', 'accelerate', 'deepspeed', 'timm'} & set(sys.modules); assert not alien, alien"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(out), "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    same(np.load(tmp_path / "found.npy"), run)


@pytest.mark.skipif(
    Version(timm.__version__) < Version("1.0.26"), reason="this timm loads no safetensors from a folder"
)
def test_timm_loads_the_network_with_its_readout(exported, images):
    run, out = exported
    net = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    mean, std = (torch.tensor(net.pretrained_cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    images = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        same(net(images).numpy(), run)


@pytest.fixture(scope="module")
def cut_hybrid(recording, tmp_path_factory):
    """A hybrid, cut to two layers, with a readout that timm has no place for."""
    run = tmp_path_factory.mktemp("cut") / "run"
    settings = [
        "--backbone.cut",
        "stages.0+stages.1",
        "--task.kind",
        "hybrid",
        "--readout.kind",
        "gaussian",
        "--epochs",
        "1",
    ]
    succeed_here("train/finetune.py", "--data", recording, "--out", run, *SMALL, *settings)
    succeed_here("train/evaluate.py", run)
    return run


def test_a_cut_hybrid_is_exported_too(cut_hybrid, images, tmp_path):
    done = succeed_here("train/export.py", cut_hybrid, "--out", tmp_path, "--format", "predictor", "timm")
    assert "cut at stages.0+stages.1" in done.stdout
    predictor = loaded(tmp_path)
    same(predictor.predict(images), cut_hybrid)
    chances = predictor.predict_classes(images)
    assert chances.shape == (len(images), len(predictor.classes))
    np.testing.assert_allclose(chances.sum(1), 1, rtol=1e-5)


@pytest.fixture(scope="module")
def exported_all(predictors, tmp_path_factory):
    """A probe and a stack, exported."""
    out = tmp_path_factory.mktemp("exported_all")
    for kind in ("probe", "stack"):
        formats = ["predictor", "netcdf"] if kind == "probe" else ["predictor-zip", "netcdf"]
        succeed_here("train/export.py", predictors / kind, "--out", out / kind, "--format", *formats)
    return out


@pytest.fixture(scope="module")
def val_files(recording, tmp_path_factory):
    folder, val = tmp_path_factory.mktemp("val_files"), ShardFolder(recording).split("val")
    paths = [folder / f"{number:03}.{val.image(number)[1]}" for number in range(len(val))]
    for number, path in enumerate(paths):
        path.write_bytes(val.image(number)[0])
    return paths


def test_a_probe_is_exported_too(exported_all, predictors, val_files):
    predictor = loaded(exported_all / "probe")
    assert predictor.site_ids == predictions(predictors / "probe")["site_id"].tolist()
    same(predictor.predict(val_files, batch_size=7), predictors / "probe")


def test_an_exported_predictor_takes_what_spiketune_takes(exported_all, val_files, tmp_path):
    """Single images, grey ones, and nothing that would be clipped."""
    predictor = loaded(exported_all / "probe")
    expected = predictor.predict(val_files[:1])
    np.testing.assert_array_equal(predictor.predict(val_files[0]), expected)
    np.testing.assert_array_equal(predictor.predict(str(val_files[0])), expected)
    image = Image.open(val_files[0])
    np.testing.assert_array_equal(predictor.predict(image), expected)
    np.testing.assert_array_equal(predictor.predict(np.asarray(image.convert("RGB"))), expected)
    grey = image.convert("L")
    np.testing.assert_array_equal(predictor.predict(np.asarray(grey)), predictor.predict(grey))
    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((48, 48), 40_000, np.uint16)).save(deep)
    for refused in (deep, Image.open(deep)):
        with pytest.raises(ValueError, match="8 bits a channel"):
            predictor.predict([refused])


@pytest.mark.parametrize("kind", ["probe", "stack"])
def test_an_exported_predictor_runs_on_another_device(exported_all, tmp_path, kind):
    """torch.export writes down the device of many tensors, which a GPU's would be compared with; `meta`'s are not."""
    folder = exported_all / kind
    if kind == "stack":
        with zipfile.ZipFile(folder / "predictor.zip") as archive:
            archive.extractall(tmp_path)
        folder = tmp_path
    predictor = loaded(folder, device="meta")
    images = [torch.zeros(2, 3, size, size, dtype=torch.uint8, device="meta") for size in predictor.image_sizes]
    rates = predictor._network(images)["rates"]
    assert rates.device.type == "meta"
    nodes = predictor._network.graph.nodes
    assert {torch.device(node.kwargs["device"]).type for node in nodes if node.kwargs.get("device")} <= {"meta"}
    assert rates.shape == (2, len(predictor.site_ids))


def test_an_ensemble_is_one_file(exported_all, predictors, val_files, tmp_path):
    """Its members take images of different sizes; a program without this project imports it from the archive."""
    assert {path.name for path in (exported_all / "stack").iterdir()} == {"predictor.zip", "predictions_val.nc"}
    program = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import numpy as np, predictor; "
        "np.save('found.npy', predictor.Predictor().predict(sys.argv[1:])); "
        "alien = {'train', 'data_prep', 'spiketune', 'timm'} & set(sys.modules); assert not alien, alien"
    )
    environment = {"PATH": "", "HOME": str(tmp_path)}
    words = [sys.executable, "-c", program, str(exported_all / "stack/predictor.zip"), *map(str, val_files)]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    same(np.load(tmp_path / "found.npy"), predictors / "stack")


def test_only_a_run_becomes_a_timm_checkpoint(predictors, tmp_path):
    done = run_here("train/export.py", predictors / "mean", "--out", tmp_path, "--format", "timm")
    assert_refused(done, "no network of its own", "--format predictor")


def test_nothing_is_overwritten(exported):
    run, out = exported
    assert_refused(run_here("train/export.py", run, "--out", out, "--format", "mat"), "already exists")


def test_predictions_have_to_be_there(exported, tmp_path):
    run, _ = exported
    done = run_here("train/export.py", run, "--out", tmp_path / "x", "--format", "mat", "--split", "test")
    assert_refused(done, "train/evaluate.py")
    done = run_here("train/export.py", tmp_path, "--out", tmp_path / "x", "--format", "timm")
    assert_refused(done, "not the folder of a run")
