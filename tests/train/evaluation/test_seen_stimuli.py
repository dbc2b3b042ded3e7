"""A score on what was fitted is refused or marked, wherever the shards, the weights or the predictions come from."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_refused, run_here, succeed_here
from launching import SMALL, metrics, predictions
from make_sources import make_folder, write_csv
from PIL import Image
from sklearn.metrics import r2_score

from data_prep.common.errors import BadInput
from data_prep.shards.folder import ShardFolder
from data_prep.shards.image_identity import ImageIdentities, image_identities
from data_prep.shards.packing import pack
from data_prep.sources.folder import Folder
from train.data.seen import FITTED, SELECTED, TAUGHT, SeenImages, SeenRecord, is_among, record_of
from train.evaluation.seen_stimuli import SeenRule
from train.finetuning.setup.preparation import prepare
from train.finetuning.setup.resume import StartingPoint
from train.finetuning.setup.seen_record import notes_on_seen, record_of_run
from train.models.inherited_record import record_of_weights
from train.probing.layer_regressions import Partition
from train.probing.seen_check import ProbeCheck
from train.run.progress import Progress
from train.run.recipe import Recipe
from train.run.settings import Source

N = 60
PIXELS = ["--layers", "pixels", "--images.size", "16", "--loader.workers", "0"]
NETWORK = ["--backbone.name", "test_convnext", "--layers", "stages.1", "--images.size", "32", "--loader.workers", "0"]


def splits_of(seed: int) -> list[str]:
    """36 stimuli to train on, 12 for val, 12 for test."""
    return np.random.default_rng(seed).permutation(["train"] * 36 + ["val"] * 12 + ["test"] * 12).tolist()


def pack_anew(path: Path, seed: int, scale: float = 1.0, name: str = "mine") -> Path:
    """The same 60 images and responses, split by a seed; under other ids and in other bytes for other seeds."""
    source = path / f"source_{seed}"
    written = make_folder(source, n=N, sites=4, noise=0.5)
    ids = [f"s{seed}_{number:02d}" for number in range(N)]
    images = [f"images/{old}.png" for old in written.ids]
    for file in images:
        image = Image.open(source / file)
        image.load()
        image.save(source / file, compress_level=seed % 9)
    write_csv(source / "stimuli.csv", {"stimulus_id": ids, "image": images, "split": splits_of(seed)})
    np.save(source / "rates.npy", written.rates * np.float32(scale))
    return pack(Folder(source=source, name=name).open(), path / "shards", stimuli_per_shard=20, workers=1).folder


def numbers(ids) -> set[int]:
    """The images that stimuli show, whatever the stimuli are called."""
    return {int(str(stimulus).rpartition("_")[2]) for stimulus in ids}


def of_role(record: SeenRecord, role: str) -> set[int]:
    return numbers(stimulus for part in record.of_role(role) for stimulus in part.stimulus_ids)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return pack_anew(tmp_path_factory.mktemp("first"), 1)


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """The recording packed with another seed."""
    return pack_anew(tmp_path_factory.mktemp("second"), 2)


@pytest.fixture(scope="module")
def run(first, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    succeed_here("train/finetune.py", "--data", first, "--out", out, *SMALL)
    return out


@pytest.fixture(scope="module")
def record(run):
    return record_of(run)


@pytest.fixture
def scored(run, tmp_path):
    """A copy of the run to score."""
    return shutil.copytree(run, tmp_path / "run", symlinks=True)


def in_split(shards: Path, split: str) -> set[int]:
    return numbers(ShardFolder(shards).split(split).stimulus_ids)


# ---- what a run keeps ----------------------------------------------------------------------------------------------


def test_a_run_keeps_what_it_fits_and_selects_on(first, run, record):
    fitted, selected = of_role(record, FITTED), of_role(record, SELECTED)
    assert fitted | selected == in_split(first, "train")
    assert not fitted & selected
    log = (run / "log.txt").read_text()
    assert f"{len(fitted)} stimuli to train on, {len(selected)} training stimuli held back" in log


def prepared(data: list[Path], out: Path, **settings):
    recipe = Recipe.model_validate(
        {"images": {"size": 32}, "backbone": {"name": "test_convnext", "weights": "random"}} | settings
    )
    run = prepare(recipe, data, out, False)
    progress = Progress(
        recording="", selection_metric="r2", selection_split="inner", site_ids=[], classes=None, image_size=32
    )
    record = record_of_run(run, StartingPoint(None, progress, []))
    return run, record, notes_on_seen(run, record)


def test_the_record_of_a_subset_has_the_subset(first, tmp_path):
    run, record, _ = prepared([first], tmp_path / "run", subset=20)
    assert record.count(FITTED) + record.count(SELECTED) == 20
    assert of_role(record, FITTED) == numbers(run.data.fit.stimulus_ids)


def test_the_record_of_several_recordings_has_all_of_them(first, second, tmp_path):
    other = pack_anew(tmp_path / "other", 3, name="other")
    run, record, _ = prepared([first, other], tmp_path / "run")
    by_recording = {part.recording: len(part.stimulus_ids) for part in record.of_role(FITTED)}
    assert by_recording == {part.name: len(part) for part in run.data.fit.recordings}
    assert len(by_recording) == 2


def test_a_run_inherits_what_its_weights_and_teacher_have_seen(run, second, record, tmp_path):
    probe = tmp_path / "teacher"
    succeed_here("train/probe.py", "--data", second, "--out", probe, *PIXELS)
    settings = {"backbone": {"name": "test_convnext", "weights": str(run)}, "distill": {"teacher": str(probe)}}
    _, inherited, notes = prepared([second], tmp_path / "run", **settings)
    assert of_role(inherited, FITTED) >= of_role(record, FITTED)
    assert of_role(inherited, TAUGHT) == in_split(second, "train")
    leaks = len((of_role(record, FITTED) | in_split(second, "train")) & in_split(second, "val"))
    assert any(f"warning: {leaks} of the 12 stimuli of mine, val show images that are fitted" in note for note in notes)


def test_weights_without_a_record_are_unknown_and_published_ones_are_named(run, tmp_path):
    assert record_of_weights(Source(weights="random")) == SeenRecord()
    assert record_of_weights(Source(name="resnet50")).pretrained == ("resnet50",)
    shutil.copy(run / "checkpoints" / "best" / "network.safetensors", tmp_path / "alone.safetensors")
    assert record_of_weights(Source(weights=str(tmp_path / "alone.safetensors"))).unknown
    checkpoint = run / "checkpoints" / "last" / "network.safetensors"
    assert of_role(record_of_weights(Source(weights=str(checkpoint))), FITTED) == of_role(record_of(run), FITTED)


def test_exported_weights_carry_the_record_on(run, record, tmp_path):
    succeed_here("train/export.py", run, "--out", tmp_path / "out", "--format", "timm", "predictor")
    carried = record_of_weights(Source(weights=str(tmp_path / "out" / "model.safetensors")))
    assert of_role(carried, FITTED) == of_role(record, FITTED)
    assert not carried.unknown
    beside = record_of(tmp_path / "out")
    assert beside is not None
    assert of_role(beside, SELECTED) == of_role(record, SELECTED)


def test_a_run_whose_stimuli_are_divided_anew_does_not_resume(scored, first, record):
    fitted, selected = record.of_role(FITTED)[0], record.of_role(SELECTED)[0]
    swapped = [
        part.__class__(role, part.recording, "", part.images, part.stimulus_ids)
        for role, part in ((SELECTED, fitted), (FITTED, selected))
    ]
    SeenRecord(tuple(swapped)).write(scored)
    done = run_here("train/finetune.py", "--data", first, "--out", scored, "--resume")
    assert_refused(done, "would be fitted", "divided differently")


# ---- scoring -------------------------------------------------------------------------------------------------------


def test_a_recording_packed_with_another_seed_is_refused_dropped_or_kept(scored, second, record):
    """This is how R2 rose from 0.070 to 0.476 without a word."""
    fitted, val = of_role(record, FITTED), in_split(second, "val")
    count = len(fitted & val)
    assert 0 < count < len(val)
    first_id = next(name for name in ShardFolder(second).split("val").stimulus_ids if numbers([name]) & fitted)
    done = run_here("train/evaluate.py", scored, "--data", second)
    assert_refused(done, f"{count} of the 12 stimuli of val were fitted before", first_id, "--seen drop", "--seen keep")
    assert not (scored / "eval").exists()

    done = succeed_here("train/evaluate.py", scored, "--data", second, "--seen", "drop")
    assert f"seen before: {count} dropped" in done.stdout
    arrays, block = predictions(scored), metrics(scored)
    assert numbers(arrays["stimulus_id"]) == val - fitted
    assert block["seen"]["dropped"] == count
    assert block["seen"]["fitted"] == 0
    assert block["stimuli"] == len(val - fitted)
    assert block["regression"]["r2"]["mean"] == pytest.approx(
        r2_score(arrays["target"], arrays["prediction"]), rel=1e-6
    )
    selected = len(of_role(record, SELECTED) & val)
    assert block["seen"]["selected"] == selected
    assert block["selected_on"] == (["inner", "val"] if selected else ["inner"])

    succeed_here("train/evaluate.py", scored, "--data", second, "--seen", "keep")
    assert numbers(predictions(scored)["stimulus_id"]) == val
    assert metrics(scored)["seen"]["fitted"] == count
    done = succeed_here("train/report.py", scored, "--out", scored.parent / "report")
    page = (scored.parent / "report" / "report.html").read_text()
    for text in (done.stdout, (scored.parent / "report" / "table.md").read_text(), page):
        assert f"{count} KEPT" in text
        assert f"run (SEEN: {count} of 12)" in text
        assert f"was fitted on {count} of the 12 stimuli" in text
    with (scored.parent / "report" / "table.csv").open(newline="") as file:
        (line,) = csv.DictReader(file)
    assert (line["seen"], line["seen_stimuli"], line["seen_dropped"]) == (f"{count} KEPT", str(count), "0")


def test_held_out_and_training_stimuli_of_the_run_s_own_shards_are_marked(scored):
    done = succeed_here("train/evaluate.py", scored)
    assert "seen before" not in done.stdout
    assert metrics(scored)["seen"] == {"fitted": 0, "taught": 0, "selected": 0, "dropped": 0}
    succeed_here("train/evaluate.py", scored, "--split", "train")
    assert metrics(scored, "train")["seen"]["fitted"] == record_of(scored).count(FITTED)
    assert metrics(scored, "train")["seen"]["part"] == "train"
    done = succeed_here("train/evaluate.py", scored, "--split", "train", "--seen", "drop")
    assert f"train: 0 fitted, {record_of(scored).count(FITTED)} dropped" in done.stdout


def test_what_is_left_out_comes_from_the_record(scored, second, record):
    """A new deal of the new shards would hand out stimuli that were fitted."""
    succeed_here("train/evaluate.py", scored, "--split", "left_out")
    assert numbers(predictions(scored, "left_out")["stimulus_id"]) == of_role(record, SELECTED)
    succeed_here("train/evaluate.py", scored, "--split", "left_out", "--data", second)
    expected = of_role(record, SELECTED) & in_split(second, "train")
    assert numbers(predictions(scored, "left_out")["stimulus_id"]) == expected
    assert metrics(scored, "left_out")["seen"]["part"] == "left_out"


def test_a_run_without_a_record_is_unknown(scored, tmp_path):
    (scored / "seen.npz").unlink()
    succeed_here("train/evaluate.py", scored)
    assert "earlier version" in metrics(scored)["seen"]["unknown"][0]
    done = succeed_here("train/report.py", scored, "--out", tmp_path / "report")
    assert "| unknown |" in (tmp_path / "report" / "table.md").read_text()
    assert "Not known whether stimuli were fitted" in done.stdout
    assert_refused(run_here("train/evaluate.py", scored, "--split", "left_out"), "no record", "train it again")


def test_a_probe_of_a_network_that_was_fitted_on_its_held_out_stimuli(run, second, record, tmp_path):
    words = ["train/probe.py", "--data", second, *NETWORK, "--backbone.weights", run]
    fitted, val = of_role(record, FITTED), in_split(second, "val")
    count = len(fitted & val)
    done = run_here(*words, "--out", tmp_path / "refused")
    assert_refused(done, f"{count} of the 12 stimuli of val were fitted before by weights {run}")
    assert not (tmp_path / "refused").exists()
    succeed_here(*words, "--out", tmp_path / "probe", "--seen", "drop")
    assert numbers(predictions(tmp_path / "probe")["stimulus_id"]) == val - fitted
    assert metrics(tmp_path / "probe")["seen"]["dropped"] == count
    assert f"{count} dropped" in (tmp_path / "probe" / "eval" / "val" / "table.md").read_text()
    left_out = numbers(predictions(tmp_path / "probe", "left_out")["stimulus_id"])
    assert left_out == in_split(second, "train") - fitted
    assert of_role(record_of(tmp_path / "probe"), FITTED) == fitted | in_split(second, "train")


def test_copies_of_fitted_images_are_found_among_held_out_stimuli(tmp_path):
    """As in v4_we_190925, where 300 images were shown twice under two ids."""
    source = tmp_path / "source"
    written = make_folder(source, n=40, sites=4)
    splits = ["train"] * 30 + ["val"] * 10
    images = [f"images/{name}.png" for name in written.ids]
    images[30:34] = images[:4]
    write_csv(source / "stimuli.csv", {"stimulus_id": written.ids, "image": images, "split": splits})
    shards = pack(Folder(source=source).open(), tmp_path / "shards", stimuli_per_shard=20, workers=1).folder
    words = ["train/probe.py", "--data", shards, *PIXELS]
    assert_refused(run_here(*words, "--out", tmp_path / "no"), "4 of the 10 stimuli of val", "stim0030")
    succeed_here(*words, "--out", tmp_path / "drop", "--seen", "drop")
    assert predictions(tmp_path / "drop")["stimulus_id"].tolist() == written.ids[34:]
    assert metrics(tmp_path / "drop")["seen"]["dropped"] == 4


def test_folds_that_separate_copies_are_refused_or_thinned_out():
    hashes = np.zeros((6, 16), np.uint8)
    hashes[:, 0] = [1, 2, 3, 4, 1, 4]  # 0 and 4 are copies, on two sides; so are 3 and 5, on one
    ids, images = list("abcdef"), ImageIdentities(hashes, hashes + np.uint8(9))
    partitions = [Partition(np.arange(3, 6), np.arange(3), []), Partition(np.arange(3), np.arange(3, 6), [])]

    def check(policy):
        rule = SeenRule("probes/a", "cv", policy, "folds")
        return ProbeCheck(SeenRecord(), images, ids, rule).compare(partitions)

    with pytest.raises(BadInput, match=r"2 of the 6 stimuli of cv were fitted before.*\(a, e\)"):
        check("refuse")
    thinned, seen = check("drop")
    assert [part.held_out.tolist() for part in thinned] == [[1, 2], [3, 5]]
    assert seen.mark == "2 dropped, out of fold"
    assert check("keep")[1].mark == "2 KEPT, out of fold"


# ---- predictions that do not belong together ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def probe(first, tmp_path_factory):
    out = tmp_path_factory.mktemp("probe") / "probe"
    succeed_here("train/probe.py", "--data", first, "--out", out, *PIXELS)
    return out


def test_members_that_were_scored_on_other_responses_are_refused(first, probe, tmp_path):
    scaled = pack_anew(tmp_path / "scaled", 1, scale=50.0)
    succeed_here("train/probe.py", "--data", scaled, "--out", tmp_path / "other", *PIXELS)
    done = run_here("train/evaluate.py", probe, tmp_path / "other", "--out", tmp_path / "out")
    first_id = ShardFolder(first).split("val").stimulus_ids[0]
    assert_refused(done, str(tmp_path / "other"), "other responses", f"stimulus {first_id} at site")
    assert not (tmp_path / "out").exists()
    words = ["--data", first, "--out", tmp_path / "run", *SMALL, "--distill.teacher", tmp_path / "other"]
    assert_refused(run_here("train/finetune.py", *words), "other responses")
    assert not (tmp_path / "run").exists()


def test_predictions_of_other_scores_are_refused(run, probe, tmp_path):
    copy = shutil.copytree(probe, tmp_path / "probe")
    file = copy / "eval" / "val" / "predictions.npz"
    with np.load(file) as arrays:
        content = dict(arrays)
    content["prediction"] = content["prediction"] + 1
    np.savez(file, **content)
    words = ("does not belong to the metrics.json beside it", "score the run again")
    assert_refused(run_here("train/report.py", copy, "--out", tmp_path / "report"), *words)
    assert_refused(run_here("train/evaluate.py", copy, "--out", tmp_path / "out"), *words)
    assert not (tmp_path / "report").exists()


def test_runs_that_left_nothing_out_have_a_mean_but_no_stack(scored, probe, first, record, tmp_path):
    """Their weights were fitted on all of train; what an earlier version took for left out is not used."""
    succeed_here("train/evaluate.py", scored, "--split", "left_out")
    images, ids = image_identities(ShardFolder(first), "train"), ShardFolder(first).split("train").stimulus_ids
    ancestor = SeenRecord((SeenImages(FITTED, "mine", "weights elsewhere", images, ids),))
    record.inheriting(ancestor, "weights elsewhere").write(scored)
    succeed_here("train/evaluate.py", scored, probe, "--out", tmp_path / "mean")
    assert not (tmp_path / "mean" / "eval" / "left_out").exists()
    done = run_here("train/evaluate.py", scored, probe, "--combine", "stack", "--out", tmp_path / "stack")
    assert_refused(done, "left out none of these training stimuli")


def test_an_ensemble_has_seen_what_its_members_have(run, probe, first, second, record, tmp_path):
    member = shutil.copytree(run, tmp_path / "run", symlinks=True)
    succeed_here("train/evaluate.py", member, probe, "--out", tmp_path / "ensemble")
    joined = record_of(tmp_path / "ensemble")
    assert of_role(joined, FITTED) == in_split(first, "train")
    assert metrics(tmp_path / "ensemble")["seen"] == {"fitted": 0, "taught": 0, "selected": 0, "dropped": 0}
    assert "target" in predictions(tmp_path / "ensemble", "left_out")
    images = image_identities(ShardFolder(second), "val")
    np.testing.assert_array_equal(
        joined.overlap(images).fitted,
        is_among(images, image_identities(ShardFolder(first), "train")),
    )
    done = run_here("train/evaluate.py", member, "--data", second, "--out", tmp_path / "again")
    assert_refused(done, "were fitted before")
    succeed_here("train/evaluate.py", member, "--data", second, "--out", tmp_path / "again", "--seen", "drop")
    expected = in_split(second, "val") - of_role(record, FITTED)
    assert numbers(predictions(tmp_path / "again")["stimulus_id"]) == expected
