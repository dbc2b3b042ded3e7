"""launch/check.sh: each line says what is true of the machines, and a stage that fails costs only itself."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT, slow

sys.path.insert(0, str(ROOT / "benchmarks"))
import check
from checking import stages
from checking.verdicts import FAILED, OK, SKIPPED, SLOW, Verdict, listing, read_verdicts

from data_prep.common.process_identity import ADDRESS_VARIABLES, RANK_VARIABLES, ProcessIdentity
from train.distributed.launch_environment import MPI_VARIABLES, PROCESS_COUNTS

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


@slow
def test_two_processes_pass_every_stage(tmp_path):
    words = ["launch/check.sh", "-n", "2", "--json", tmp_path / "check.json"]
    done = subprocess.run(["bash", *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "this setup is ready" in done.stdout
    verdicts = [Verdict(**verdict) for verdict in json.loads((tmp_path / "check.json").read_text())]
    assert {verdict.outcome for verdict in verdicts} == {OK}
    assert {"versions", "devices", "network", "losses, DDP", "losses, ZeRO-2", "step, DDP", "gradients"} <= {
        verdict.subject for verdict in verdicts
    }
