"""What a program gets from `spiketune.load` is what train/evaluate.py and train/probe.py have written."""

import io
import json
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_cuda import CUDA, cuda_runtime, fake_copy, fake_gpu  # noqa: F401
from helpers import succeed_here
from launching import SMALL, metrics, predictions
from make_recordings import pack_two
from PIL import Image

import spiketune
from data_prep.common.safe_reading import read_npz
from data_prep.shards.folder import ShardFolder
from train.data.image_files import as_pixels, read_image
from train.models.saved_probe import SAVED_PROBE

KINDS = ("run", "probe", "pixels", "mean", "stack")


@pytest.fixture(scope="module")
def files(recording, tmp_path_factory):
    """The images of val as files."""
    folder, val = tmp_path_factory.mktemp("files"), ShardFolder(recording).split("val")
    paths = []
    for position, stimulus in enumerate(val.stimulus_ids):
        data, encoding = val.image(position)
        paths.append(folder / f"{stimulus}.{encoding}")
        paths[-1].write_bytes(data)
    return paths


def same(found, expected):
    assert found.dtype == np.float32
    assert expected.std() > 0
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.std())


@pytest.mark.parametrize("kind", KINDS)
def test_it_predicts_what_was_scored(predictors, files, kind):
    predictor, written = spiketune.load(predictors / kind), predictions(predictors / kind)
    assert predictor.site_ids == written["site_id"].tolist()
    assert predictor.kind == {"pixels": "probe", "mean": "ensemble", "stack": "ensemble"}.get(kind, kind)
    assert predictor.units == "spikes/s (simulated)"
    same(predictor.predict(files, batch_size=64), written["prediction"])


def test_paths_pillow_and_arrays_are_the_same_images(predictors, files):
    predictor = spiketune.load(str(predictors / "stack"))
    expected = predictor.predict(files[:5])
    images = [Image.open(file) for file in files[:5]]
    arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])
    same(predictor.predict(images), expected)
    same(predictor.predict(arrays, batch_size=2), expected)
    same(predictor.predict(str(file) for file in files[:5]), expected)
    same(predictor.predict(np.array([str(file) for file in files[:5]])), expected)
    same(predictor.predict(files[0]), expected[:1])
    same(predictor.predict(arrays[0]), expected[:1])
    assert predictor.predict([]).shape == (0, 12)


def test_images_of_different_sizes_share_a_batch(predictors, files):
    predictor = spiketune.load(predictors / "mean")
    mixed = [Image.open(file).resize((40 + 9 * k, 70 - 5 * k)) for k, file in enumerate(files[:4])]
    one_by_one = np.concatenate([predictor.predict([image]) for image in mixed])
    same(predictor.predict(mixed), one_by_one)


def test_images_look_as_they_would_when_packed(tmp_path):
    """Turned, transparent, grey, CMYK: files and images of Pillow alike."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned to the right
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    clear = np.dstack([pixels, np.zeros((6, 4), np.uint8)])
    Image.fromarray(clear).save(tmp_path / "clear.png")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.bmp")
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "ink.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png"), np.rot90(pixels, -1))
    assert (read_image(tmp_path / "clear.png") == 128).all()
    for name in ("turned.png", "clear.png", "grey.bmp", "ink.tif"):
        np.testing.assert_array_equal(as_pixels(Image.open(tmp_path / name)), read_image(tmp_path / name))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("missing.png", "cannot be read"),
        (np.zeros((4, 4, 3)), "uint8"),
        (np.zeros((4, 4, 4), np.uint8), "(height, width, 3)"),
        (Image.new("I;16", (4, 4)), "I;16"),
        (Path(__file__).parent, "is a folder"),
        (3, "array, not int"),
    ],
)
def test_what_is_no_image_is_refused(predictors, image, words):
    for images in ([image], image):
        with pytest.raises(spiketune.BadInput) as refusal:
            spiketune.load(predictors / "pixels").predict(images)
        assert words in str(refusal.value)


def test_a_damaged_image_of_pillow_is_refused(predictors, files):
    cut = files[0].read_bytes()
    image = Image.open(io.BytesIO(cut[: len(cut) // 2]))  # Pillow notices when it decodes
    with pytest.raises(spiketune.BadInput, match="cannot be decoded"):
        spiketune.load(predictors / "pixels").predict(image)


def test_the_scores_are_those_of_the_report(predictors, monkeypatch):
    block = metrics(predictors / "probe")["regression"]
    table = spiketune.load(predictors / "probe").scores("val")
    monkeypatch.setitem(sys.modules, "pandas", None)
    rows = spiketune.load(predictors / "probe").scores()
    assert isinstance(rows, list)
    assert [row["r2"] for row in rows] == block["r2"]["per_site"]
    if not isinstance(table, list):
        assert table["r2"].tolist() == block["r2"]["per_site"]
        assert list(table.columns) == list(rows[0])
    with pytest.raises(spiketune.BadInput, match="score the split first"):
        spiketune.load(predictors / "probe").scores("test")


def test_the_scores_are_those_of_the_checkpoint(predictors, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(predictors / "run", run, symlinks=True)
    predictor = spiketune.load(run, checkpoint="last")
    with pytest.raises(spiketune.BadInput, match="--split val --checkpoint last"):
        predictor.scores("val")
    shutil.copytree(run / "eval/val", run / "eval/val_last")
    assert len(predictor.scores("val")) == 12


def test_features_are_the_activations_of_a_layer(predictors, files):
    """A probe's predictions follow from them."""
    predictor = spiketune.load(predictors / "probe")
    features = predictor.features("stages.0", files[:6], pool=7, batch_size=4)
    module = predictor._opened.network.networks[0]
    by_hand = (features - module.centre_0.numpy()) @ module.weight_0.numpy().T + module.bias.numpy()
    low, high, constant, slope, bend = module.curve.numpy()
    within = np.clip(by_hand, low, high)
    by_hand = by_hand + constant + within * (slope + within * bend)
    same(by_hand.astype(np.float32), predictor.predict(files[:6]))
    whole = predictor.features("stages.0", files[:6])
    assert whole.shape[1] >= features.shape[1]
    pixels = predictor.features("pixels", files[:1])
    assert pixels.shape == (1, 3 * 48 * 48)
    with pytest.raises(spiketune.BadInput, match="nearest are"):
        predictor.features("stage.0", files[:1])
    ensemble = spiketune.load(predictors / "mean")
    assert ensemble.layers == []
    with pytest.raises(spiketune.BadInput, match="ensemble"):
        ensemble.features("stages.0", files[:1])


def test_a_program_keeps_its_random_numbers_and_its_settings(predictors, files):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    predictor = spiketune.load(predictors / "probe")  # its network has random weights of a seed of its own
    assert torch.equal(torch.rand(3), expected)
    rounded = []
    predictor._opened.network.register_forward_hook(lambda *_: rounded.append(torch.backends.cudnn.allow_tf32))
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, True
    try:
        predictor.predict(files[:3], batch_size=2)
        assert rounded == [False, False], "convolutions must not be rounded to TF32, as in train/evaluate.py"
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_a_recording_is_chosen_by_name(tmp_path):
    one, two = pack_two(tmp_path)
    run = tmp_path / "run"
    succeed_here("train/finetune.py", "--data", one, two, "--out", run, *SMALL, "--epochs", "1")
    succeed_here("train/evaluate.py", run)
    succeed_here("train/evaluate.py", run, "--out", tmp_path / "ensemble")
    shutil.rmtree(one)  # it is not needed
    val = ShardFolder(two).split("val")
    images = [Image.open(io.BytesIO(val.image(k)[0])) for k in range(len(val))]
    expected = np.load(run / "eval/val/two/predictions.npz")
    for path in (run, tmp_path / "ensemble"):
        with pytest.raises(spiketune.BadInput, match="one, two"):
            spiketune.load(path)
        predictor = spiketune.load(path, "two")
        assert predictor.recording == "two"
        assert predictor.site_ids == expected["site_id"].tolist()
        same(predictor.predict(images), expected["prediction"])
        assert len(predictor.scores("val")) == 7
    with pytest.raises(spiketune.BadInput, match="three"):
        spiketune.load(run, "three")


def test_missing_responses_do_not_matter(holey, tmp_path):
    """Sites recorded for different stimuli are centred on different ones; one that was never recorded is NaN."""
    options = ["--layers", "pixels", "--field", "gaussian", "--memory", "0.003"]
    succeed_here("train/probe.py", "--data", holey, "--out", tmp_path / "run", *options)
    val, written = ShardFolder(holey).split("val"), predictions(tmp_path / "run")["prediction"]
    images = [Image.open(io.BytesIO(val.image(k)[0])) for k in range(len(val))]
    predicted = spiketune.load(tmp_path / "run").predict(images)
    np.testing.assert_array_equal(np.isnan(predicted).all(0), [False, False, False, False, True, False])
    same(predicted[:, :4], written[:, :4])
    same(predicted[:, 5:], written[:, 5:])


def test_an_ensemble_moves_with_its_members_and_notices_when_one_changes(predictors, files, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(predictors, moved, symlinks=True)
    expected = spiketune.load(predictors / "stack").predict(files[:3])
    same(spiketune.load(moved / "stack").predict(files[:3]), expected)
    record = json.loads((moved / "stack/ensemble.json").read_text())
    record["fingerprints"][str(predictors / "probe")] = "0" * 64
    (moved / "stack/ensemble.json").write_text(json.dumps(record))
    with pytest.raises(spiketune.BadInput, match="has changed since the ensemble"):
        spiketune.load(moved / "stack")
    shutil.rmtree(moved / "probe")
    del record["fingerprints"], record["members"][0]
    (moved / "mean/ensemble.json").write_text(json.dumps(record | {"members": [{"runs": ["nowhere"]}]}))
    with pytest.raises(spiketune.BadInput, match="nowhere, which is not there"):
        spiketune.load(moved / "mean")


def test_an_ensemble_of_itself_ends(predictors, tmp_path):
    loop = tmp_path / "loop"
    loop.mkdir()
    record = {"combine": "mean", "members": [{"runs": [str(loop)]}], "data": "x", "recordings": ["a"]}
    (loop / "ensemble.json").write_text(json.dumps(record))
    with pytest.raises(spiketune.BadInput, match="deeper"):
        spiketune.load(loop)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (None, "an earlier version made this ensemble"),
        ({"recording": np.array(["another"])}, "is damaged"),
        ({"0.weights": np.ones((3, 12))}, "other members or sites"),
        ({"0.weights": np.ones((2, 11))}, "do not fit"),
        ({"0.weights": np.full((2, 12), np.nan)}, "not finite"),
        ({"0.site_id": np.array([f"site {k}" for k in range(12)])}, "other members or sites"),
    ],
)
def test_weights_of_a_stack_that_do_not_fit_are_refused(predictors, tmp_path, change, words):
    shutil.copytree(predictors, tmp_path / "all", symlinks=True)
    file = tmp_path / "all/stack/weights.npz"
    arrays = read_npz(file)
    file.unlink()
    if change is not None:
        np.savez(file, **(arrays | change))
    with pytest.raises(spiketune.BadInput, match=words):
        spiketune.load(tmp_path / "all/stack")


def damaged(content: bytes, how: str) -> bytes:
    """A predictor.safetensors with one thing wrong."""
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    facts = json.loads(header["__metadata__"]["probe"])
    match how:
        case "cut":
            return content[:-5]
        case "no facts":
            header["__metadata__"] = {}
        case "other facts":
            facts["image_size"] = 10**9
        case "other sites":
            facts["site_ids"] = facts["site_ids"][1:]
        case "other network":
            facts["network"] = "0" * 64
        case "not finite":
            data = data[:-12] + np.full(3, np.nan, np.float32).tobytes()
    if how != "no facts":
        header["__metadata__"]["probe"] = json.dumps(facts)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize("how", ["cut", "no facts", "other facts", "other sites", "other network", "not finite"])
def test_a_damaged_probe_is_refused(predictors, tmp_path, how):
    shutil.copytree(predictors / "probe", tmp_path / "probe")
    file = tmp_path / "probe" / SAVED_PROBE
    file.write_bytes(damaged(file.read_bytes(), how))
    with pytest.raises(spiketune.BadInput, match=r"predictor\.safetensors|not those that were"):
        spiketune.load(tmp_path / "probe")


def test_other_folders_are_refused(tmp_path, predictors):
    with pytest.raises(spiketune.BadInput, match="not the folder of a run, a probe or an ensemble"):
        spiketune.load(tmp_path)
    with pytest.raises(spiketune.BadInput, match="there is no such folder"):
        spiketune.load(tmp_path / "nowhere")
    with pytest.raises(spiketune.BadInput, match="it holds mean, pixels, probe, run, stack, of which"):
        spiketune.load(predictors)
    with pytest.raises(spiketune.BadInput, match="no last checkpoint"):
        spiketune.load(predictors / "probe", checkpoint="last")
    with pytest.raises(spiketune.BadInput, match="predicts the recording"):
        spiketune.load(predictors / "run", "another")


def test_predictions_are_computed_on_the_device_that_is_given(predictors, cuda_runtime):  # noqa: F811
    """A GPU without data; mixing it with tensors on the CPU is an error."""
    network = fake_copy(spiketune.load(predictors / "stack", device="cpu")._opened.network)
    with fake_gpu(may_wait=True):
        network.to(CUDA)
    with fake_gpu(), torch.no_grad():
        rates = network([torch.zeros(2, 3, size, size, dtype=torch.uint8, device=CUDA) for size in (32, 48)])["rates"]
    assert rates.shape == (2, 12)
    assert rates.device.type == "cuda"
