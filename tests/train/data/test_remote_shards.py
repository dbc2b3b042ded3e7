"""Remote shards are fetched once, ahead of the reader, within the budget of the cache."""

import json
import shutil
import time

import pytest
import torch
import yaml
from helpers import assert_refused, run_here, succeed_here, wait_for
from launching import SMALL, kill_after_an_epoch, launch, losses
from remote_shards import assert_same, cached_files, loader_of, opened, read
from web_server import serve

from data_prep.remote.cache import GIB
from data_prep.remote.url import (
    SIGNED,
)
from data_prep.shards.folder import ShardFolder
from train.data.image_cache import ImageCaches
from train.data.loader import evaluation_loader
from train.data.recordings import Recordings
from train.data.stimuli import RecordingStimuli
from train.finetuning.setup.data_notes import notes_on_remote_shards
from train.finetuning.setup.preparation import training_stimuli
from train.run.checkpoint import load_progress
from train.run.recipe import Loader, Recipe

pytestmark = pytest.mark.usefixtures("fast_retries")


def test_kept_images_need_no_shard(web, cache):
    shards = opened(web.url, cache)
    loader = loader_of(shards, caches=ImageCaches(Loader(cache="ram")))
    before = [read(loader, epoch) for epoch in range(2)]
    shutil.rmtree(cache)
    requests_before = len(web.asked)
    assert_same(read(loader, 1), before[1])
    assert len(web.asked) == requests_before


def test_the_order_by_blocks_fetches_each_shard_once_an_epoch(web, packed, cache):
    """With at most five of the ten shards in the cache."""
    size = max(path.stat().st_size for path in packed.glob("train-*.tar"))
    loader = loader_of(opened(web.url, cache, 5.2 * size / GIB), block_shards=3)
    local = loader_of(ShardFolder(packed), block_shards=3)
    for epoch in range(3):
        assert_same(read(loader, epoch), read(local, epoch))
        times = web.times()
        assert sum(times.values()) <= 10 * (epoch + 1)
        assert max(times.values()) <= epoch + 1
        assert sum(cached_files(cache).values()) <= 5.2 * size


def test_shards_are_fetched_before_they_are_needed(web, cache):
    loader = loader_of(opened(web.url, cache), block_shards=1)
    steps = loader.epoch(0)
    next(steps)
    wait_for(lambda: len(web.times()) == 10)
    requests_before = len(web.asked)
    list(steps)
    assert len(web.asked) == requests_before


def test_fetching_ahead_ends_with_the_reader(web, cache):
    web.pace = 0.02
    steps = loader_of(opened(web.url, cache), block_shards=1).epoch(0)
    next(steps)
    steps.close()
    time.sleep(0.3)
    requests_before = len(web.asked)
    time.sleep(0.5)
    assert len(web.asked) == requests_before < 13


def test_an_evaluation_reads_each_shard_once_however_little_is_kept(web, packed, cache):
    size = max(path.stat().st_size for path in packed.glob("*.tar"))
    stimuli = RecordingStimuli(opened(web.url, cache, 2.5 * size / GIB).split("train"), 32)
    list(evaluation_loader(stimuli, size=7, rank=0, ranks=1, workers=0, pin=False))
    assert sorted(web.times().values()) == [1] * 10


def test_an_order_that_does_not_fit_the_cache_is_noted(web, packed, cache):
    size = max(path.stat().st_size for path in packed.glob("*.tar"))
    small, large = (opened(web.url, cache, shards * size / GIB) for shards in (5, 11))
    (note,) = notes_on_remote_shards([small], Loader())
    assert "loader.order shuffled needs" in note
    assert "loader.order blocks" in note
    (note,) = notes_on_remote_shards([small], Loader(order="blocks", block_shards=5))
    assert "lower loader.block_shards" in note
    assert (
        notes_on_remote_shards([small], Loader(order="blocks", block_shards=4))
        == notes_on_remote_shards([large], Loader())
        == []
    )
    assert notes_on_remote_shards([ShardFolder(packed)], Loader()) == []


def test_the_inner_part_is_read_once_where_all_images_do_not_fit(web, cache):
    """Under order blocks: it lies in all shards, and memory holds it and little more."""
    settings = {"order": "blocks", "block_shards": 2, "shard_cache": str(cache), "cache": "ram"}
    recipe = Recipe.model_validate({"loader": settings | {"cache_gib": 9 * 32 * 32 * 3 / GIB}, "images": {"size": 32}})
    recordings = Recordings([opened(web.url, cache)])
    divided = recordings.divide(recipe)
    fit, inner = training_stimuli(recordings, divided, recipe)
    assert (len(fit), len(inner)) == (54, 6)
    plain = training_stimuli(recordings, divided, recipe.model_copy(update={"loader": Loader(cache="off")}))
    images = []
    for stimuli in (inner, inner, plain[1]):
        if stimuli is inner and images:
            shutil.rmtree(cache)
            requests_before = len(web.asked)
        batches = evaluation_loader(stimuli, size=4, rank=0, ranks=1, workers=0, pin=False)
        images.append(torch.cat([batch.images.clone() for batch in batches]))
        if len(images) == 2:
            assert len(web.asked) == requests_before
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])


# ---- commands -------------------------------------------------------------------------------------------------------


def test_the_streaming_engine_needs_local_folders(web, tmp_path):
    stream = ["--loader.engine", "webdataset"]
    refused = run_here("train/finetune.py", "--out", tmp_path / "out", *SMALL, *stream, "--data", web.url)
    assert_refused(refused, "loader.engine", web.url, "blocks")
    blocks = ["--loader.order", "blocks"]
    refused = run_here("train/finetune.py", "--out", tmp_path / "out", *SMALL, *stream, *blocks, "--data", web.url)
    assert_refused(refused, "loader.order (blocks)", "loader.engine indexed")


COMMANDS = {
    "finetune": ["train/finetune.py", "--out", "OUT", *SMALL],
    "probe": ["train/probe.py", "--out", "OUT", "--layers", "pixels"],
    "sweep": ["train/sweep.py", "train/recipes/sweeps/lr_x_optimizer.yaml", "--out", "OUT"],
    "plan": ["train/plan.py", "--gpus", "1", "--memory", "8"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_a_url_and_says_what_is_wrong_with_it(web, tmp_path, command):
    web.always["manifest.json"] = ("status", 404)
    words = [tmp_path / "out" if word == "OUT" else word for word in COMMANDS[command]]
    assert_refused(run_here(*words, "--data", web.url), f"{web.url}/manifest.json does not exist")
    assert not (tmp_path / "out").exists()


def test_a_run_on_a_bad_network_equals_one_on_the_folder(recording, trained, tmp_path, monkeypatch):
    """Two processes, killed in the middle and resumed at the URL of the run's own recipe."""
    with serve(recording) as web:
        web.query = "signature=hush"
        web.faults["train-000000.tar"].extend([("cut", 3000), ("wrong",), ("status", 503)])
        web.faults["train-000001.tar"].extend([("slow", 3.0), ("cut", 9000)])
        where = ["--loader.shard-cache", tmp_path / "cache", "--loader.fetch-timeout", "1", "--loader.cache", "off"]
        command = ["train/finetune.py", "--out", tmp_path / "run"]
        data = ["--data", f"{web.url}?signature=hush"]
        kill_after_an_epoch(2, tmp_path / "run", *data, *SMALL, *where, "--checkpoint.every-steps", "1")
        assert load_progress(tmp_path / "run" / "checkpoints" / "last").epoch < 2, (
            "it was over before it could be killed"
        )
        done = launch(2, *command, "--resume", **{SIGNED: f"{web.url}?signature=hush"})
        assert done.returncode == 0, done.stderr
        monkeypatch.setenv(SIGNED, f"{web.url}?signature=hush")
        succeed_here("train/evaluate.py", tmp_path / "run", "--workers", "0")
    assert losses(tmp_path / "run") == pytest.approx(losses(trained), rel=1e-5)
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["data"] == web.url
    assert json.loads((tmp_path / "run" / "env.json").read_text())["data"] == web.url
    texts = [path.read_text(errors="replace") for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any("hush" in text for text in texts)
