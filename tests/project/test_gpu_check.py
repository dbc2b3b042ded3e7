"""benchmarks/gpu_check.py keeps to its limits of time, tells failures apart, and loses no result."""

import json
import runpy
import sys
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from fake_cuda import CUDA, fake_gpu
from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_check
import training_speed
from gpu import device, gpu_memory, host_waits, step_plan, strategies
from gpu.deepspeed_ops import deepspeed_for
from gpu.entries import Entry, Part, Place
from gpu.forms import form_of
from gpu.results import (
    FAILED,
    MEASURED,
    OUT_OF_TIME,
    PASSED,
    SKIPPED,
    Finding,
    Result,
    ResultsFile,
    Skipped,
    read_results,
)
from gpu.running import OwnProcess, make_part, run_here, run_part
from gpu.table import page

CPU, GPU = form_of("cpu", 2), form_of("cuda", 16)


@pytest.fixture
def results(tmp_path) -> ResultsFile:
    return ResultsFile(tmp_path / "out" / "results.jsonl")


@pytest.fixture
def place(tmp_path, recording) -> Place:
    """A place whose small recording is packed already."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "recording").symlink_to(recording)
    return Place(CPU, tmp_path / "work")


def measure(place: Place) -> Finding:
    return Finding({"images/s": 12.5})


def skip(place: Place) -> Finding:
    raise Skipped("deepspeed is not installed")


def fail(place: Place) -> Finding:
    raise ValueError("no such kernel")


def outcomes(path) -> dict[str, str]:
    return {result.entry: result.outcome for result in read_results(path)}


def test_a_failing_entry_is_reported_and_the_others_still_run(place, results, monkeypatch, capsys):
    wrong = partial(lambda place: Finding({}, "it is so", ["it is not"]))
    stages = [
        [Entry("fails", 9, fail)],
        [Entry("skips", 9, skip), Entry("measures", 9, measure), Entry("wrong", 9, wrong)],
    ]
    monkeypatch.setattr(gpu_check, "load_part", lambda name, place: Part(name, stages if name == "faults" else []))
    gpu_check.Check(place, run_here, results).run(["faults"], 60)
    assert outcomes(results.path) == {"fails": FAILED, "skips": SKIPPED, "measures": MEASURED, "wrong": FAILED}
    messages = {result.entry: result.message for result in read_results(results.path)}
    assert messages["fails"] == "ValueError: no such kernel"
    assert messages["wrong"] == "it is not"
    assert results.failed
    assert "- faults: fails: ValueError: no such kernel" in page(results.results)


def test_the_command_ends_with_exit_code_1_if_an_entry_failed(tmp_path, monkeypatch, capsys):
    part = Part("faults", [[Entry("fails", 9, fail)]])
    monkeypatch.setattr(gpu_check, "load_part", lambda name, place: part if name == "faults" else Part(name, []))
    monkeypatch.setattr(gpu_check, "OwnProcess", lambda log: run_here)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu", "--parts", "faults", "--out", str(tmp_path)])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(SystemExit) as end:
        gpu_check.main()
    assert end.value.code == 1
    assert "no such kernel" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize("form", [CPU, GPU], ids=["CPU", "GPU"])
def test_without_time_every_entry_is_out_of_time_and_none_failed(form, tmp_path, results, capsys):
    place = Place(form, tmp_path)
    gpu_check.Check(place, run_here, results).run(list(gpu_check.SHARES), 0)
    assert set(outcomes(results.path).values()) == {OUT_OF_TIME}
    names = ["recordings", "plans", "device", *gpu_check.SHARES]
    assert len(results.results) == sum(len(gpu_check.load_part(name, place).entries) for name in names)
    assert not results.failed


def test_what_needs_an_entry_that_was_out_of_time_is_out_of_time_too(tmp_path, results, capsys):
    place = Place(CPU, tmp_path)
    run_part(gpu_check.load_part("recordings", place), place, run_here, results, 0)
    part = gpu_check.load_part("strategies", place).only(["ddp fp32 nadam"])
    run_part(replace(part, together=1), place, run_here, results, float("inf"))
    assert set(outcomes(results.path).values()) == {OUT_OF_TIME}
    messages = {result.entry: result.message for result in read_results(results.path)}
    assert messages["nadam in fp32 on the CPU"] == "there was no time for 'small recording', which this needs"
    assert messages["ddp fp32 nadam"] == "there was no time for 'nadam in fp32 on the CPU', which this needs"


def test_on_a_gpu_every_strategy_precision_and_network_is_measured(tmp_path):
    place = Place(GPU, tmp_path)
    entries = [entry.name for name in gpu_check.SHARES for entry in gpu_check.load_part(name, place).entries]
    assert len(entries) == len(set(entries))
    words = [
        "ddp fp16",
        "zero0 ",
        "zero1 ",
        "zero2 fp32",
        "zero3 bf16",
        "zero2_offload",
        "zero3_offload",
        "resnet152 224 px",
    ]
    words += ["densenet169 224 px", "tf_efficientnet_b6 528 px", "resnet50 224 px, tf32", "compiled", "nadam", "adamw"]
    words += ["decoding", "checkpoint and evaluation", "decomposition", "SIGTERM", "diverges in fp16"]
    assert [word for word in words if not any(word in entry for entry in entries)] == []


def test_a_part_of_the_entries_keeps_those_that_they_need(tmp_path):
    part = gpu_check.load_part("strategies", Place(CPU, tmp_path))
    chosen = [entry.name for entry in part.only(["lion"]).entries]
    assert chosen == ["nadam in fp32 on the CPU", "adamw in fp32 on the CPU", "lion, correlation loss"]
    assert part.only(["no such entry"]).entries == []


def test_strategies_write_their_lines_on_a_cpu(place, results, capsys):
    """In this process, so without DeepSpeed, which has to be alone in one."""
    part = gpu_check.load_part("strategies", place).only(["ddp fp32 nadam", "hybrid"])
    run_part(replace(part, together=1), place, run_here, results, float("inf"))
    found = outcomes(results.path)
    assert found["nadam in fp32 on the CPU"] == MEASURED
    assert found["ddp fp32 nadam"] == found["adamw, hybrid by uncertainty, accumulation"] == PASSED
    compared = next(result for result in read_results(results.path) if result.entry == "ddp fp32 nadam")
    assert compared.values["largest difference"] == 0
    assert len(compared.values["losses"]) == strategies.STEPS


def test_losses_that_differ_from_the_reference_fail(place, results, monkeypatch, capsys):
    steps = strategies.Steps([1.0, 0.5], 0.0, "")
    place.leave("nadam in fp32 on the CPU", [1.0, 0.502])
    monkeypatch.setattr(strategies, "train_small", lambda *args: steps)
    finding = strategies.compare_losses(strategies.Small("ddp", "fp32"), place)
    assert finding.faults == ["losses differ by 4.0e-03 from nadam in fp32 on the CPU"]
    with pytest.raises(LookupError, match="'nadam in bf16 on the CPU' is missing"):
        strategies.compare_losses(strategies.Small("ddp", "bf16"), place)


def test_each_entry_runs_in_a_process_of_its_own_and_a_hang_or_a_crash_costs_one_entry(tmp_path, results, monkeypatch):
    """A part with entries that hang, crash and answer; its module imports nothing heavy."""
    module = tmp_path / "modules" / "gpu_trial.py"
    module.parent.mkdir()
    module.write_text(
        "import os, time\n"
        "from gpu.entries import Entry, Part\n"
        "from gpu.results import Finding\n"
        "def answer(place): print('words'); return Finding({'process': os.getpid()})\n"
        "def part(form): return Part('trial', made_by='gpu_trial:part', stages=[[\n"
        "    Entry('hangs', 1, lambda place: time.sleep(600)), Entry('crashes', 60, lambda place: os._exit(3)),\n"
        "    Entry('answers', 60, answer)]])\n"
    )
    monkeypatch.syspath_prepend(module.parent)
    monkeypatch.setattr("gpu.running.PRELOADED", [])
    place = Place(CPU, tmp_path)
    runner = OwnProcess(tmp_path / "log.txt")
    run_part(make_part("gpu_trial:part", place), place, runner, results, float("inf"))
    assert outcomes(results.path) == {"hangs": OUT_OF_TIME, "crashes": FAILED, "answers": MEASURED}
    assert "exit code 3" in results.results[1].message
    assert "words" in (tmp_path / "log.txt").read_text()


def test_the_table_of_a_check_that_was_killed_has_all_that_was_written(results, monkeypatch, capsys):
    results.add(Result("device", "facts", MEASURED, values={"device": "NVIDIA H100", "torch": "2.11.0"}))
    results.add(Result("speed", "resnet50 224 px, fed", PASSED, values={"images/s": 2743.21, "losses": [1.0]}))
    results.path.write_text(results.path.read_text() + '{"part": "speed", "ent')
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--table", str(results.path)])
    runpy.run_path(str(ROOT / "benchmarks" / "gpu_check.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "NVIDIA H100, torch 2.11.0" in printed
    assert "2 entries: 1 passed, 1 measured" in printed
    assert "images/s 2,743" in printed
    assert "losses" not in printed


# ---- what only a GPU reaches, on stand-ins -------------------------------------------------------------------------


def test_deepspeed_is_skipped_where_it_is_missing_or_cannot_be_built(monkeypatch):
    with deepspeed_for("ddp"):
        pass
    with pytest.raises(Skipped, match=r"cannot be built here .*CUDA_HOME does not exist"), deepspeed_for("zero2"):
        raise OSError("CUDA_HOME does not exist, unable to compile CUDA op(s)")
    with pytest.raises(ValueError, match="wrong"), deepspeed_for("zero2"):
        raise ValueError("wrong")
    monkeypatch.setattr("gpu.deepspeed_ops.importlib.util.find_spec", lambda name: None)
    with pytest.raises(Skipped, match="deepspeed is not installed"), deepspeed_for("zero3"):
        pass


def test_waits_are_counted_and_named(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step():
        warnings.warn(host_waits.WARNING, UserWarning, stacklevel=1)
        warnings.warn("another warning", UserWarning, stacklevel=1)

    waits, places = host_waits.waits_of(3, step, torch.device("cuda"))
    assert waits == 1
    assert places.startswith("tests/project/test_gpu_check.py:")
    assert places.endswith(" x1")
    assert modes == ["warn", "default"]
    assert host_waits.waits_of(3, lambda: None, torch.device("cpu")) == (0, "")


def test_peaks_of_a_gpu_are_those_of_torch_and_of_the_whole_device(monkeypatch):
    stand_ins = {
        "max_memory_allocated": 5,
        "max_memory_reserved": 8,
        "mem_get_info": (70, 80),
        "synchronize": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    gpu_memory.start_peak(torch.device("cuda"))
    assert gpu_memory.peak_of(torch.device("cuda")) == gpu_memory.Peak(5, 8, 10)
    assert gpu_memory.peak_of(torch.device("cpu")).reserved is None


class Event:
    """Stands for an event of CUDA."""

    def __init__(self, enable_timing: bool):
        self.enable_timing = enable_timing

    def record(self) -> None:
        """Everything is over at once."""

    def synchronize(self) -> None:
        """As `record`."""

    def elapsed_time(self, other: "Event") -> float:
        """In milliseconds, if both were made to measure it."""
        assert self.enable_timing
        assert other.enable_timing
        return 2.0


def test_rates_of_a_gpu_are_measured_by_its_events(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(device, "WARM_UP_SECONDS", 0.0)
    with fake_gpu(may_wait=True):
        copies = device.copy_rates(CUDA, 8000)
        rates = {precision: device.product_rate(100, precision, CUDA) for precision in ("bf16", "tf32", "float64")}
    assert copies["device to device GB/s"] == pytest.approx(2 * 8000 / 0.002 / 1e9)
    assert copies["pinned host to device GB/s"] == pytest.approx(2000 / 0.002 / 1e9)
    assert len(copies) == 5
    assert set(rates.values()) == {2 * 100**3 / 0.002}
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_batch_that_stays_on_the_gpu_leaves_on_the_host_what_the_loop_reads_there(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    with fake_gpu(may_wait=True):
        batch = training_speed.resident_batch(4, 32, 12, CUDA)
    assert {batch.images.device, batch.rates.device} == {CUDA}
    assert {batch.positions.device.type, batch.weight.device.type} == {"cpu"}


def test_operations_of_a_step_are_those_of_the_literature():
    """ResNet-50 at 224 px: 4.1 billion multiply-adds forward, and twice as many backward."""
    from synthetic import recipe_of

    from train.planning.operations import training_flops
    from train.planning.step_cost import paper_manifest

    flops = training_flops(recipe_of("resnet50", 224, 2), paper_manifest(12, 8, 224))
    assert flops == pytest.approx(2 * 3 * 4.09e9, rel=0.03)
    assert step_plan.data_sheet_rate("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert step_plan.data_sheet_rate("NVIDIA H100 PCIe", "bf16") == 756e12
    assert step_plan.data_sheet_rate("Unknown", "bf16") is None


def test_results_are_lines_of_json(results, capsys):
    results.add(Result("device", "facts", MEASURED, values={"cores": 16}))
    assert json.loads(results.path.read_text())["values"] == {"cores": 16}
