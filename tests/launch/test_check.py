"""launch/check.sh: each line says what is true of the machines, and a stage that fails costs only itself."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, run_here, slow
from made_rates import MACHINE

sys.path.insert(0, str(ROOT / "benchmarks"))
import check
from checking import machine_rates, rate_stages, run_rates, stages
from checking.verdicts import BEGAN, FAILED, OK, RECIPE_FILE, SKIPPED, SLOW, Verdict, listing, read_verdicts

from data_prep.common.errors import BadInput
from data_prep.common.process_identity import ADDRESS_VARIABLES, RANK_VARIABLES, ProcessIdentity
from data_prep.shards.folder import ShardFolder
from train.distributed.launch_environment import MPI_VARIABLES, PROCESS_COUNTS
from train.planning.operations import speed_settings
from train.planning.rates import FeatureRates, MachineRates, TrainingRates, load_rates
from train.regression.feature_store import FeatureStore
from train.run.recipe import Recipe

CNN2 = ("--backbone.name", "cnn2", "--backbone.weights", "random", "--images.size", "32", "--precision", "fp32")
CPU = {"host": "a", "versions": {"torch": "2.15.0", "timm": "1.0"}, "cores": 8}
GPU = CPU | {"device": "H100", "id": "GPU-1", "GiB": 80.0}


def test_another_version_on_one_machine_is_named():
    other = CPU | {"host": "b", "versions": {"torch": "2.15.0", "timm": "1.1"}}
    verdict = stages.same_versions([CPU, CPU, other])
    assert verdict.outcome == FAILED
    assert "timm is 1.0 on rank 0 and 1.1 on rank 2 (b)" in verdict.finding
    assert stages.same_versions([CPU, CPU]).outcome == OK


def test_two_processes_on_one_gpu_are_named():
    verdict = stages.own_devices([GPU, GPU | {"id": "GPU-2"}, GPU])
    assert verdict.outcome == FAILED
    assert "ranks 0 and 2 use the same GPU" in verdict.finding
    assert "each with its own GPU (H100, 80 GiB)" in stages.own_devices([GPU, GPU | {"id": "GPU-2"}]).finding
    assert "on the CPU, 8 cores" in stages.own_devices([CPU]).finding


def test_losses_that_differ_from_those_of_one_process_fail(tmp_path, monkeypatch):
    (tmp_path / "alone.json").write_text(json.dumps([1.0, 0.5]))
    for losses, outcome in (([1.0, 0.5], OK), ([1.0, 0.6], FAILED), ([1.0, float("nan")], FAILED)):
        monkeypatch.setattr(stages, "train_small", lambda *_, losses=losses: losses)
        (verdict,) = stages.losses_of("zero2", tmp_path)
        assert verdict.outcome == outcome


def test_slow_feeding_and_a_slow_network_count_on_gpus_only(monkeypatch):
    network = Verdict("network", OK, "", values={"bus bandwidth GB/s": 1.0})
    values = {"processes": 2, "gradient bytes": 1e8, "batch": 10, "images/s per process": 100.0}
    step = Verdict("step, DDP", OK, "", values=values)
    for gpu, outcome in ((True, SLOW), (False, OK)):
        monkeypatch.setattr(stages, "uses_gpu", lambda gpu=gpu: gpu)
        assert stages.feeding("ddp", 100.0, 60.0, 8).outcome == outcome
        values["gradient bytes"] = 1e8  # 0.1 s over the network, as long as the step
        (verdict,) = stages.gradients_against_network([network, step])
        assert verdict.outcome == outcome
        assert verdict.values["share"] == pytest.approx(1.0)
    assert stages.gradients_against_network([step]) == []  # one process


def test_a_stage_that_crashes_or_hangs_costs_only_itself(tmp_path, monkeypatch):
    script = tmp_path / "stage.py"
    monkeypatch.setattr(check, "__file__", str(script))
    script.write_text("import sys; print('error: no peers'); print('more'); sys.exit(3)")
    crashed = check.run_stage("losses, DDP", 30, tmp_path, {})
    assert crashed.outcome == FAILED
    assert "exit code 3" in crashed.finding
    assert crashed.advice == "error: no peers"
    script.write_text("import time; time.sleep(60)")
    assert "no end after 1 s" in check.run_stage("step, DDP", 1, tmp_path, {}).finding
    script.write_text("")
    assert check.run_stage("step, DDP", 30, tmp_path, {}) is None


def test_a_stage_without_deepspeed_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr("gpu.deepspeed_ops.importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(stages, "own_identity", ProcessIdentity)
    stages.run_stage("losses, ZeRO-2", tmp_path)
    (verdict,) = read_verdicts(tmp_path)
    assert verdict.outcome == SKIPPED
    assert "deepspeed is not installed" in listing([verdict])


def test_each_stage_meets_at_a_port_of_its_own(monkeypatch):
    for first in ("29500", "65530", "1024"):
        monkeypatch.setenv("MASTER_PORT", first)
        ports = {int(check.with_peers(stage)["MASTER_PORT"]) for stage in range(len(stages.STAGES))} | {int(first)}
        assert len(ports) == len(stages.STAGES) + 1
        assert all(1024 <= port < 65536 for port in ports)


def test_recordings_of_a_check_that_was_killed_do_not_count(tmp_path):
    packed = tmp_path / check.PACKED
    assert not check.is_packed(tmp_path)
    packed.write_text(str(os.getpid()))
    assert check.is_packed(tmp_path)
    os.utime(packed, (0, 0))  # written before this process began: by another that had its number
    assert not check.is_packed(tmp_path)
    ended = subprocess.Popen(["true"])
    ended.wait()
    packed.write_text(str(ended.pid))
    assert not check.is_packed(tmp_path)


def test_the_process_that_runs_alone_knows_of_no_launcher(monkeypatch):
    traces = {*RANK_VARIABLES, *ADDRESS_VARIABLES, *PROCESS_COUNTS, *MPI_VARIABLES, "TORCHELASTIC_RUN_ID"}
    for name in traces:
        monkeypatch.setenv(name, "2")
    assert not traces & check.without_peers().keys()


def measured_here(words: list, folder: Path, monkeypatch) -> dict:
    """What the stage of a recipe finds, run in this process on the user's recording."""
    (folder / RECIPE_FILE).write_text(json.dumps([str(word) for word in words]))
    monkeypatch.setenv(BEGAN, str(time.time()))
    monkeypatch.setattr(rate_stages, "SECONDS", {True: 0.1, False: 0.1})
    (verdict,) = rate_stages.recipe_rates(folder)
    assert verdict.outcome == OK
    return verdict.values


def test_a_recipe_is_measured_as_it_trains(recording, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    words = [*CNN2, "--data", recording, "--loader.workers", 0]
    rates = TrainingRates(**measured_here(words, tmp_path, monkeypatch)["training"])
    assert (rates.side, rates.share, rates.processes, rates.workers) == (32, 32, 1, 0)
    assert rates.recording == ShardFolder(recording).manifest.name
    assert rates.step_seconds <= rates.cached_seconds
    assert rates.step_seconds <= rates.decoded_seconds
    assert rates.step_seconds < rates.first_step_seconds < rates.start_seconds
    files = sum(file.stat().st_size for file in (tmp_path / "run_recipe/checkpoints/last/").iterdir())
    assert rates.checkpoint_bytes == files
    recipe = Recipe.model_validate({"images": {"size": 32}, "precision": "fp32"})
    named = recipe.model_copy(update={"backbone": recipe.backbone.model_copy(update={"name": "cnn2"})})
    settings = speed_settings(named, 32) | {"loader.workers": "0"}
    assert rates.settings == settings


def test_a_probe_is_measured_up_to_its_activations(recording, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    words = ["--layers", "pixels", "--data", recording, "--batch-size", 16, "--loader.workers", 0]
    rates = FeatureRates(**measured_here(words, tmp_path, monkeypatch)["features"])
    assert (rates.side, rates.features) == (48, 3 * 48**2)
    assert 0 < rates.forward_seconds <= rates.image_seconds


def test_measured_activations_fill_no_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(run_rates, "MOST_STORED", 4 * 10 * 5)
    store = FeatureStore(tmp_path, {"layer": 5})
    store.truncate(0)
    sizes = []
    for rows in run_rates.stored_batches(store, iter([{"layer": torch.ones(4, 5)}] * 5)):
        assert rows == 4
        sizes.append(sum(file.stat().st_size for file in tmp_path.iterdir()))
    assert sizes == [80, 160, 80, 160, 80]


def test_what_a_machine_reaches_is_measured_for_the_plan(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for name, small in {"PRODUCT": (64, 256), "DECOMPOSED": (32, 64), "WRITTEN": 2**21}.items():
        monkeypatch.setattr(machine_rates, name, {False: small})
    monkeypatch.setattr(machine_rates, "LEAST_SECONDS", 0.001)
    network = Verdict("network", OK, "", values={"bus bandwidth GB/s": 2.0, "latency s": 1e-5})
    network.append_to(tmp_path)
    (verdict,) = rate_stages.machine_rates(tmp_path)
    rates = MachineRates(**verdict.values["machine"])
    assert rates.bandwidth == 2e9
    assert rates.decoding.side == rate_stages.DECODED_SIDE
    assert [one.stimuli for one in rates.decompositions] == [32, 64]


def test_rates_are_written_unless_their_stage_failed(tmp_path):
    devices = stages.own_devices([CPU, CPU])
    rates = Verdict("rates", OK, "", values={"machine": MACHINE, "host GiB": 24.0})
    ending = Verdict(check.ENDING, OK, "", values={"seconds": 1.5})
    verdicts = [stages.same_versions([CPU, CPU]), devices, ending, rates]
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(check.rates_of(verdicts, 3.0)))
    place = load_rates(path).place
    assert (place.processes, place.cores, place.device, place.launch_seconds) == (2, 4, "CPU", 3.0)
    verdicts[-1] = Verdict("rates", FAILED, "no end after 150 s")
    path.write_text(json.dumps(check.rates_of(verdicts, None)))
    with pytest.raises(BadInput, match="because the check failed: rates"):
        load_rates(path)


def test_a_mistake_in_the_recipe_ends_the_check_at_once(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check.py", "--recipe", "--optimizer.lrr", "1"])
    assert check.main() == 2
    assert "optimizer.lr" in capsys.readouterr().err


@slow
def test_two_processes_pass_every_stage(tmp_path, recording):
    words = ["launch/check.sh", "-n", "2", "--json", tmp_path / "check.json", "--recipe", *CNN2, "--data", recording]
    done = subprocess.run(["bash", *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "this setup is ready" in done.stdout
    rates = load_rates(tmp_path / "check.json")
    assert [(run.strategy, run.processes) for run in rates.training] == [("ddp", 2), ("zero2", 2), ("ddp", 2)]
    assert rates.machine.bandwidth is not None
    assert rates.place.launch_seconds is not None
    done = run_here("train/plan.py", *CNN2, "--gpus", 2, "--data", recording, "--rates", tmp_path / "check.json")
    assert "measured: this recipe on this many processes" in done.stdout
    verdicts = [Verdict(**verdict) for verdict in rates.verdicts]
    assert {verdict.outcome for verdict in verdicts} == {OK}
    assert {"versions", "devices", "network", "losses, DDP", "losses, ZeRO-2", "step, DDP", "gradients"} <= {
        verdict.subject for verdict in verdicts
    }
