"""The plan: estimated against allocated memory, its division by strategies, and the recommendation."""

import shlex
from pathlib import Path

import pytest
import torch
from helpers import ROOT, assert_refused, run_here, slow
from made_rates import ON_CPU, made_features, made_rates, made_training
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from data_prep.common.errors import BadInput
from data_prep.shards.folder import ShardFolder
from train import finetune
from train.data.order import accumulation
from train.data.recordings import Recordings
from train.finetuning.optimizer import build_optimizer
from train.models.network import Network, parameter_groups
from train.planning.memory import GIB, NAMES, Strategy, bytes_sent, estimate_memory, read_strategy, usable_memory
from train.planning.operations import speed_settings
from train.planning.rates import Rates
from train.planning.recommendation import SIMPLEST_FIRST, estimate_strategies, recommend
from train.planning.step_cost import (
    MEASURED,
    AutocastAsOnCuda,
    StepCost,
    activation_bytes,
    empty_batch,
    forward_and_backward,
    measure_step,
    optimizer_cost,
    paper_manifest,
)
from train.planning.wording import duration
from train.run.recipe import Optimizer, ProbeRecipe, Recipe

SITES, CLASSES, SIDE, BATCH = 12, 5, 64, 16
CONVOLUTIONS = ("aten::convolution", "aten::convolution_backward")
DDP, ZERO0, ZERO1, ZERO2, ZERO3 = (read_strategy(name) for name in NAMES[:5])
ZERO2_OFFLOAD, ZERO3_OFFLOAD = (read_strategy(name) for name in NAMES[5:])
COST = StepCost(
    trainable=GIB,
    frozen=0,
    largest_tensor=2**20,
    optimizer_state=2 * GIB,
    optimizer_temporary=0,
    running_average=0,
    fixed=0,
    per_stimulus=GIB / 4,
)
CNN2 = ("--backbone.name", "cnn2", "--backbone.weights", "random", "--images.size", "32")


def made(settings: dict) -> tuple[Recipe, Network]:
    """A recipe for images of 64 px, and its network as it trains, with gradients."""
    backbone = {"weights": "random"} | settings.pop("backbone")
    recipe = Recipe.model_validate({"backbone": backbone, "images": {"size": SIDE}} | settings)
    network = Network(recipe, paper_manifest(SITES, CLASSES, SIDE), SIDE).train()
    network = network.to(memory_format=torch.channels_last)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    return recipe, network


def allocated_peak(work) -> int:
    """The most bytes that torch's CPU allocator had given out during `work`, by its own profiler.

    What a convolution allocates and frees within itself is left out: it is the kernel's, and a GPU has other kernels.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    changes = []

    def visit(event, convolution):
        if event.tag == _EventType.TorchOp and event.name in CONVOLUTIONS:
            convolution = event.id
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            changes.append((event.start_time_ns, fields.ptr, fields.alloc_size, convolution))
        for child in event.children:
            visit(child, convolution)

    for root in profiled.profiler.kineto_results.experimental_event_tree():
        visit(root, None)
    changes.sort(key=lambda change: change[0])
    born, workspaces = {}, set()
    for number, (_, address, size, convolution) in enumerate(changes):
        if size > 0:
            born[address] = (number, convolution)
        elif address in born:
            first, where = born.pop(address)
            if where is not None and where == convolution:
                workspaces |= {first, number}
    held = peak = 0
    for number, (_, _, size, _) in enumerate(changes):
        held += 0 if number in workspaces else size
        peak = max(peak, held)
    return peak


LITE0 = "tf_efficientnet_lite0"
STEPS = {
    "bf16": {"backbone": {"name": "resnet18"}},
    "fp32": {"backbone": {"name": "resnet18"}, "precision": "fp32"},
    "bf16 recomputed": {"backbone": {"name": LITE0, "gradient_checkpointing": True}},
    "fp32 recomputed": {"backbone": {"name": LITE0, "gradient_checkpointing": True}, "precision": "fp32"},
    "transformer": {"backbone": {"name": "vit_tiny_patch16_224"}},
    "norms in float32": {"backbone": {"name": "convnext_atto"}},
    "head": {"backbone": {"name": LITE0, "trainable": "head"}},
    "hybrid, augmented": {
        "backbone": {"name": "cnn3"},
        "task": {"kind": "hybrid", "weighting": "uncertainty"},
        "readout": {"kind": "flattened"},
        "augment": {"shift": 0.1, "zoom": 0.1, "contrast": 0.2},
    },
}


@pytest.mark.parametrize("name", STEPS)
def test_activations_are_what_a_real_step_allocates(name):
    recipe, network = made(dict(STEPS[name]))
    manifest = paper_manifest(SITES, CLASSES, SIDE)

    def step():
        with AutocastAsOnCuda():
            forward_and_backward(network, recipe, empty_batch(recipe, manifest, BATCH))

    assert activation_bytes(network, recipe, manifest, BATCH) == pytest.approx(allocated_peak(step), rel=0.01)


def test_norms_keep_more_on_a_gpu_than_under_cpu_autocast():
    recipe, network = made({"backbone": {"name": "convnext_atto"}})
    manifest = paper_manifest(SITES, CLASSES, SIDE)
    on_cpu = allocated_peak(lambda: forward_and_backward(network, recipe, empty_batch(recipe, manifest, BATCH)))
    assert activation_bytes(network, recipe, manifest, BATCH) > 1.05 * on_cpu


def test_batches_between_those_measured_are_not_underestimated():
    recipe, network = made({"backbone": {"name": "resnet18"}})
    manifest = paper_manifest(SITES, CLASSES, SIDE)
    cost = measure_step(recipe, manifest)
    for batch in (*MEASURED, BATCH):
        direct = activation_bytes(network, recipe, manifest, batch)
        assert direct <= cost.activations(batch) * 1.0001
        assert cost.activations(batch) <= 1.25 * direct


def test_recomputing_activations_needs_fewer_and_adds_no_weights():
    manifest = paper_manifest(SITES, CLASSES, SIDE)
    kept, recomputed = (
        measure_step(made({"backbone": {"name": "resnet18", "gradient_checkpointing": on}})[0], manifest)
        for on in (False, True)
    )
    assert recomputed.per_stimulus < 0.7 * kept.per_stimulus
    assert (recomputed.weights, recomputed.optimizer_state) == (kept.weights, kept.optimizer_state)


@pytest.mark.parametrize("name", ["nadam", "adam", "adamw", "radam", "lion", "sgd"])
@pytest.mark.parametrize("trainable", ["all", "head"])
def test_weights_gradients_and_optimizer_state_are_exact(name, trainable):
    recipe, network = made({"backbone": {"name": "cnn2", "trainable": trainable}, "optimizer": {"name": name}})
    optimizer = build_optimizer(recipe.optimizer, parameter_groups(network, recipe), torch.device("cpu"))
    optimizer.step()
    cost = measure_step(recipe, paper_manifest(SITES, CLASSES, SIDE))
    assert cost.trainable == sum(p.grad.nbytes for p in network.parameters() if p.grad is not None)
    assert cost.weights == sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    state = [value for values in optimizer.state.values() for value in values.values()]
    assert cost.optimizer_state == sum(value.nbytes for value in state if isinstance(value, torch.Tensor))


def test_optimizers_keep_what_they_are_known_to_keep():
    bytes_kept = {name: optimizer_cost(Optimizer(name=name)).state for name in ("nadam", "adamw", "lion", "sgd")}
    assert bytes_kept == {"nadam": 8, "adamw": 8, "lion": 4, "sgd": 4}
    assert optimizer_cost(Optimizer(name="sgd", momentum=0)).state == 0


def test_an_optimizers_step_is_counted_where_it_needs_more_than_the_activations():
    recipe, network = made({"backbone": {"name": "resnet18"}})
    optimizer = build_optimizer(recipe.optimizer, parameter_groups(network, recipe), torch.device("cpu"))
    optimizer.step()
    cost = measure_step(recipe, paper_manifest(SITES, CLASSES, SIDE))
    assert cost.optimizer_temporary == pytest.approx(allocated_peak(optimizer.step), rel=0.05)
    small = StepCost(**(vars(cost) | {"fixed": 0, "per_stimulus": 1}))
    assert estimate_memory(DDP, small, 1, 1, 1).buffers == cost.optimizer_temporary - 1


@pytest.mark.parametrize(
    "name", ["bf16", pytest.param("fp32", marks=slow), pytest.param("bf16 recomputed", marks=slow)]
)
def test_the_total_is_the_peak_of_whole_steps_from_an_empty_memory(name):
    recipe, _ = made(dict(STEPS[name]))
    manifest = paper_manifest(SITES, CLASSES, SIDE)

    def steps():
        network = Network(recipe, manifest, SIDE).train().to(memory_format=torch.channels_last)
        optimizer = build_optimizer(recipe.optimizer, parameter_groups(network, recipe), torch.device("cpu"))
        for _ in range(2):
            for _ in range(2):
                forward_and_backward(network, recipe, empty_batch(recipe, manifest, BATCH))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    cost = measure_step(recipe, manifest)
    assert estimate_memory(DDP, cost, 1, BATCH, 2).total == pytest.approx(allocated_peak(steps), rel=0.1)


def test_a_running_average_is_one_more_copy_and_zero3_also_keeps_its_part():
    averaged = StepCost(**(vars(COST) | {"running_average": GIB}))
    assert estimate_memory(DDP, averaged, 4, 1, 1).weights == 2 * GIB
    assert estimate_memory(ZERO3, averaged, 4, 1, 1).weights == GIB / 4 + GIB + GIB / 4


@pytest.mark.parametrize(
    ("strategy", "weights", "gradients", "optimizer"),
    [
        (DDP, 1, 1, 2),
        (ZERO0, 1, 1, 2),
        (ZERO1, 1, 1, 3 / 8),
        (ZERO2, 1, 1 / 8, 3 / 8),
        (ZERO3, 1 / 8, 1 / 8, 3 / 8),
        (ZERO2_OFFLOAD, 1, 0, 0),
        (ZERO3_OFFLOAD, 0, 0, 0),
    ],
    ids=NAMES,
)
def test_strategies_divide_memory_as_the_zero_paper_says(strategy, weights, gradients, optimizer):
    held = estimate_memory(strategy, COST, 8, 1, 1)
    expected = [weights * GIB, gradients * GIB, optimizer * GIB]
    assert [held.weights, held.gradients, held.optimizer] == expected
    assert held.activations == GIB / 4
    assert held.total == sum(expected) + held.activations + held.buffers


def test_offloaded_memory_is_counted_on_the_host():
    assert estimate_memory(ZERO2, COST, 8, 1, 1).host == 0
    assert estimate_memory(ZERO2_OFFLOAD, COST, 8, 1, 1).host == pytest.approx(GIB * (3 + 1 + 1) / 8)
    assert estimate_memory(ZERO3_OFFLOAD, COST, 8, 1, 1).host == pytest.approx(GIB * (3 + 1 + 1 + 1) / 8)


def test_more_gpus_mean_less_each_under_zero_and_not_under_ddp():
    for strategy in (ZERO1, ZERO2, ZERO3):
        totals = [estimate_memory(strategy, COST, gpus, 1, 1).total for gpus in (2, 4, 8, 64)]
        assert totals == sorted(set(totals), reverse=True)
    assert len({estimate_memory(DDP, COST, gpus, 1, 1).total for gpus in (2, 8, 64)}) == 1


def test_ddp_holds_accumulating_gradients_beside_its_buckets():
    assert estimate_memory(DDP, COST, 8, 1, 1).buffers == estimate_memory(DDP, COST, 1, 1, 4).buffers == 0
    assert estimate_memory(DDP, COST, 8, 1, 4).buffers == GIB


def test_communication_is_what_links_have_counted():
    for gpus in (2, 8):
        ring = GIB * (gpus - 1) / gpus
        for strategy, times in {DDP: 2, ZERO0: 2, ZERO1: 3, ZERO2: 3, ZERO2_OFFLOAD: 3, ZERO3: 3}.items():
            assert bytes_sent(strategy, COST, gpus, 1) == times * ring
        assert bytes_sent(DDP, COST, gpus, 4) == 2 * ring
        assert bytes_sent(ZERO1, COST, gpus, 4) == 3 * ring
        assert bytes_sent(ZERO2, COST, gpus, 4) == 9 * ring
        assert bytes_sent(ZERO3, COST, gpus, 4) == 3 * 4 * ring
    assert all(bytes_sent(read_strategy(name), COST, 1, 4) == 0 for name in NAMES)


def test_bucket_sizes_come_from_the_strategys_file(tmp_path, monkeypatch):
    assert ZERO2.reduce_bytes == 2 * 50_000_000 * 4
    monkeypatch.setattr("train.planning.memory.CONFIGS", tmp_path)
    (tmp_path / "zero2.json").write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}}')
    assert read_strategy("zero2") == Strategy("zero2", 2, reduce_bytes=4000)
    for content in (None, "no JSON", "[]", '{"zero_optimization": {}}'):
        if content is not None:
            (tmp_path / "zero3.json").write_text(content)
        with pytest.raises(BadInput, match=r"zero3\.json"):
            read_strategy("zero3")


def plan(gib: float, gpus: int = 8, cost: StepCost = COST, **settings):
    return estimate_strategies(Recipe.model_validate(settings), cost, gpus, gib * GIB)


def test_the_recommendation_goes_from_ddp_over_zero_to_nothing_as_memory_shrinks():
    names = []
    for tenths in range(80, 5, -1):
        best = recommend(plan(tenths / 10))
        names.append(best.strategy if best else None)
    assert list(dict.fromkeys(names)) == [*SIMPLEST_FIRST, None]


def test_the_largest_batch_that_fits_is_taken_and_one_more_would_not_fit():
    for gib in (5, 7, 9, 60):
        for estimate in plan(gib, batch={"global_size": 100}):
            strategy = read_strategy(estimate.strategy)
            if not estimate.fits:
                assert estimate_memory(strategy, COST, 8, 1, 100).total > usable_memory(gib * GIB)
                continue
            assert estimate.accumulation_steps == accumulation(100, 8, estimate.per_device)
            assert estimate.memory.total <= usable_memory(gib * GIB)
            assert estimate_memory(strategy, COST, 8, estimate.largest_batch, 1).total <= usable_memory(gib * GIB)
            assert estimate_memory(strategy, COST, 8, estimate.largest_batch + 1, 1).total > usable_memory(gib * GIB)
            larger = [
                batch
                for batch in range(estimate.per_device + 1, 14)
                if accumulation(100, 8, batch) < estimate.accumulation_steps
            ]
            for batch in larger:
                assert estimate_memory(strategy, COST, 8, batch, accumulation(100, 8, batch)).total > usable_memory(
                    gib * GIB
                )


def test_a_loss_of_the_whole_batch_is_not_divided():
    whole = {
        estimate.strategy: estimate
        for estimate in plan(7, loss={"responses": "correlation"}, batch={"global_size": 80})
    }
    parts = {estimate.strategy: estimate for estimate in plan(7, batch={"global_size": 80})}
    assert parts["ddp"].fits
    assert parts["ddp"].accumulation_steps > 1
    assert not whole["ddp"].fits
    assert whole["ddp"].per_device == 10


def test_strategies_that_cannot_run_a_recipe_are_left_out():
    assert [estimate.strategy for estimate in plan(24, precision="fp16")] == ["ddp"]
    assert {"zero3", "zero3_offload"}.isdisjoint(estimate.strategy for estimate in plan(24, compile=True))


def test_more_gpus_than_stimuli_are_refused():
    with pytest.raises(BadInput, match=r"batch\.global_size"):
        plan(24, gpus=33)


def recommendation(done) -> list[str]:
    """The words of the command that a plan ends with."""
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in NAMES)
    return shlex.split(done.stdout.splitlines()[-1])


def test_the_recommended_command_trains_what_was_planned(tmp_path):
    paper_manifest(SITES, CLASSES, SIDE).save(tmp_path / "manifest.json")
    recipe = ROOT / "train" / "recipes" / "cnn2.yaml"
    options = ["--gpus", "4", "--memory=8", "--optimizer.name", "lion", "--batch.per-device", "1", "--data", tmp_path]
    words = recommendation(run_here("train/plan.py", recipe, "--images.size", "32", *options))
    launcher, command = words[: words.index("train/finetune.py")], words[words.index("train/finetune.py") + 1 :]
    assert " ".join(launcher) == ("accelerate launch --config_file launch/accelerate/ddp.yaml --num_processes 4")
    trained, settings = finetune.parse_command_line(command)
    assert trained.data == [str(tmp_path)]
    assert (settings.backbone.name, settings.optimizer.name, settings.images.size) == ("cnn2", "lion", 32)
    assert settings.batch.per_device == 8


def test_one_gpu_needs_no_launcher_and_machines_need_names():
    alone = recommendation(run_here("train/plan.py", *CNN2, "--gpus", "1", "--memory", "8", "--sites", "3"))
    assert alone[:2] == ["python", "train/finetune.py"]
    machines = ("--gpus", "4", "--machines", "2", "--memory", "8", "--strategy", "ds_configs/zero2.json")
    words = " ".join(recommendation(run_here("train/plan.py", *CNN2, *machines)))
    assert "--num_processes 4 --num_machines 2 --machine_rank RANK --main_process_ip HOST" in words
    assert "--strategy ddp" in words


def written(rates: Rates, folder: Path) -> Path:
    """A file of rates."""
    folder.mkdir(exist_ok=True)
    (folder / "rates.json").write_text(rates.model_dump_json())
    return folder / "rates.json"


def test_with_rates_a_plan_says_how_long_and_what_memory_there_is(recording, tmp_path):
    measured = {"images": {"size": 32}, "backbone": {"name": "cnn2", "weights": "random"}}
    recipe = Recipe.model_validate(measured | {"epochs": 3})
    settings = speed_settings(recipe, 32)
    run = made_training(recipe, settings=settings, side=32, recording="simulated-hvm240")
    rates = written(made_rates([run], **ON_CPU), tmp_path)
    done = run_here("train/plan.py", *CNN2, "--gpus", 2, "--data", recording, "--rates", rates, "--epochs", 3)
    words = recommendation(done)
    assert words[:4] == ["launch/local.sh", "-n", "2", "train/finetune.py"]
    assert "2 x 32 GiB" in done.stdout  # half of the machine each
    assert "CUDA" not in done.stdout
    assert "first step after  25 s" in done.stdout
    assert "measured: this recipe on this many processes" in done.stdout
    (divided,) = Recordings([ShardFolder(recording)]).divide(recipe)
    decoding = 1e-3 * (1 + (32 / 64) ** 2) / 2
    first = 3.0 + 0.12 * (len(divided.fit) // 32) + 0.05 + 0.3 + len(divided.selection) / 2 * decoding + 0.5
    assert f"first epoch       {duration(first)}" in done.stdout
    on_paper = run_here("train/plan.py", *CNN2, "--gpus", 2, "--rates", rates)
    assert_refused(on_paper, "--data DIR or --stimuli N")
    assert not on_paper.stdout
    probed = written(made_rates(), tmp_path / "probed")
    assert_refused(run_here("train/plan.py", *CNN2, "--gpus", 2, "--rates", probed), "no training was measured")
    many = run_here("train/plan.py", *CNN2, "--gpus", 4, "--rates", rates, "--stimuli", 3000)
    assert "EXTRAPOLATED" in many.stdout
    assert "processes 2 -> 4" in many.stdout


def test_a_probes_recipe_is_planned_with_its_memory_disk_and_time(recording, tmp_path):
    recipe = ROOT / "train" / "recipes" / "probes" / "pixels_ridge.yaml"
    done = run_here("train/plan.py", recipe, "--gpus", 2, "--data", recording)
    assert done.returncode == 0, done.stderr
    assert "6,912 features of an image (pixels 6,912)" in done.stdout
    assert "How long" not in done.stdout
    stimuli = sum(ShardFolder(recording).manifest.splits[name].stimuli for name in ("train", "val"))
    assert f"disk            {(4 * stimuli * 6912 + 8 * stimuli**2) / GIB:.2f} GiB" in done.stdout
    probe = ProbeRecipe.model_validate({"layers": ["pixels"], "readout": "ridge", "components": 1000})
    rates = written(made_rates(features=[made_features(probe, recording="simulated-hvm240")]), tmp_path)
    timed = run_here("train/plan.py", recipe, "--gpus", 2, "--data", recording, "--rates", rates)
    assert "first batch after" in timed.stdout
    assert "whole probe" in timed.stdout
    large = run_here("train/plan.py", recipe, "--stimuli", 20_000, "--sites", 1000, "--rates", rates)
    assert "decompositions are EXTRAPOLATED from one of 1,000 stimuli" in large.stdout
    assert_refused(run_here("train/plan.py", recipe), "--stimuli N")
    assert_refused(run_here("train/plan.py", recipe, "--data", recording, "--stimuli", 5), "--stimuli")


def test_where_nothing_fits_the_table_is_shown_and_a_sentence_says_what_would_help():
    done = run_here("train/plan.py", *CNN2, "--gpus", "2", "--memory", "0.65", "--precision", "fp32")
    assert_refused(done, "nothing fits", "GiB", "backbone.gradient_checkpointing", "images.size", "precision bf16")
    assert "zero3_offload" in done.stdout
    assert "recommended" not in done.stdout


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--gpus", "0", "--memory", "24"), "gpus"),
        (("--gpus", "2", "--memory", "-1"), "memory"),
        (("--gpus", "2"), "memory"),
        (("--gpus", "2", "--memory", "24", "--machines", "4"), "machines"),
        (("--gpus", "64", "--memory", "24"), "batch.global_size"),
        (("--gpus", "2", "--memory", "24", "--data", ".", "--sites", "4"), "--sites"),
        (("--gpus", "2", "--memory", "24", "--data", "nowhere"), "nowhere"),
        (("--gpus", "2", "--memory", "24", "--optimizer.lrr", "1"), "optimizer.lr"),
        (("--gpus", "2", "--memory", "24", "--backbone.name", "resnet1"), "resnet1"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(words, named):
    backbone = () if "--backbone.name" in words else CNN2
    assert_refused(run_here("train/plan.py", *backbone, *words), named)
