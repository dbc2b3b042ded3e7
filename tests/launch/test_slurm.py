"""The .sbatch files on a real Slurm; `launch/test.sh --slurm` runs this, the default test run does not."""

import json
import os
import sys

import pytest
from launching import SMALL, largest_difference, losses, succeed, wait_for_epochs, weights
from slurm_cluster import cluster, reason_against_slurm

pytestmark = [
    pytest.mark.skipif("SPIKETUNE_SLURM" not in os.environ, reason="takes minutes; launch/test.sh --slurm runs it"),
    pytest.mark.skipif(reason_against_slurm() is not None, reason=reason_against_slurm() or ""),
]

OPTIONS = [*SMALL, "--epochs", "12"]
SETTINGS = {"PYTHON": sys.executable, "PROCESSES": "1", "ACCELERATE_USE_CPU": "true"}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with cluster(tmp_path_factory.mktemp("slurm")) as cluster_of_two:
        yield cluster_of_two


@pytest.fixture(scope="module")
def undisturbed(recording, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    succeed(2, "train/finetune.py", "--data", recording, "--out", out, *OPTIONS)
    return out


@pytest.mark.parametrize("way", ["preempted", "near its limit"])
def test_a_stopped_job_is_requeued_and_resumes_bit_for_bit(slurm, recording, undisturbed, tmp_path, way):
    run, log = tmp_path / "run", tmp_path / "log"
    words = ["launch/slurm/finetune.sbatch", "--data", recording, "--out", run, *OPTIONS]
    job = slurm.submit("--nodes=2", f"--output={log}", *words, **SETTINGS)
    wait_for_epochs(run, 1)
    if way == "preempted":
        slurm.run("scontrol", "requeue", job)
    else:
        slurm.run("scancel", "--batch", "--signal=USR1", job)
    slurm.wait_for(job, "PENDING")
    slurm.run("scontrol", "update", f"jobid={job}", "StartTime=now")
    assert slurm.wait_for(job, "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", log.read_text()
    output = log.read_text()
    assert "resumed after epoch" in output
    assert "(step " in output
    assert losses(run) == losses(undisturbed)
    assert largest_difference(weights(run), weights(undisturbed)) == 0


def test_evaluations_and_probes_run(slurm, recording, undisturbed, tmp_path):
    evaluation = slurm.submit(
        "--nodes=2", f"--output={tmp_path / 'evaluation'}", "launch/slurm/evaluate.sbatch", undisturbed, **SETTINGS
    )
    probe = ["launch/slurm/probe.sbatch", "--data", recording, "--out", tmp_path / "probe", "--layers", "pixels"]
    assert slurm.wait_for(evaluation, "COMPLETED", "FAILED") == "COMPLETED", (tmp_path / "evaluation").read_text()
    job = slurm.submit(f"--output={tmp_path / 'probing'}", *probe, **SETTINGS)
    assert slurm.wait_for(job, "COMPLETED", "FAILED") == "COMPLETED", (tmp_path / "probing").read_text()
    assert (undisturbed / "eval" / "val" / "metrics.json").exists()
    assert (tmp_path / "probe" / "eval" / "val" / "metrics.json").exists()


def test_the_check_of_two_nodes_passes(slurm, tmp_path):
    log = tmp_path / "check"
    job = slurm.submit("--nodes=2", f"--output={log}", "launch/slurm/check.sbatch", **SETTINGS)
    assert slurm.wait_for(job, "COMPLETED", "FAILED", seconds=600) == "COMPLETED", log.read_text()
    assert "2 processes on" in log.read_text()
    assert "this setup is ready" in log.read_text()


def test_jobs_of_the_study_run_a_row_each(slurm, recording, tmp_path):
    study = tmp_path / "study"
    words = ["launch/slurm/study.sbatch", "--data", recording, "--out", study, "--small"]
    words += ["--rows", "pixels_linear", "pixels_ridge"]
    jobs = [slurm.submit(f"--output={tmp_path / name}", *words, **SETTINGS) for name in ("first", "second")]
    for job, name in zip(jobs, ("first", "second"), strict=True):
        assert slurm.wait_for(job, "COMPLETED", "FAILED") == "COMPLETED", (tmp_path / name).read_text()
        assert (tmp_path / name).read_text().count(" started ->") == 1
    states = json.loads((study / "rows.json").read_text())
    assert states == {"pixels_linear": ["done", ""], "pixels_ridge": ["done", ""]}
