"""How long a training takes: the measured step where nothing differs, counted operations and bytes where it does."""

from dataclasses import replace

import pytest
from made_rates import ON_CPU, SIDE, made_rates, made_training

from train.planning.operations import speed_settings
from train.planning.step_cost import StepCost
from train.planning.training_plan import training_page
from train.planning.training_time import TrainingWork, nearest, training_time
from train.planning.wording import duration
from train.run.recipe import Recipe

WEIGHTS = 10_000_000  # bytes, whose exchange takes 0.01 s between two processes at 1 GB/s
COST = StepCost(WEIGHTS, 0, 0, 2 * WEIGHTS, 0, 0, 0.0, 0.0)


def recipe_of(**sections) -> Recipe:
    return Recipe.model_validate({"epochs": 5, "batch": {"global_size": 32}} | sections)


def work_of(recipe: Recipe, **changed) -> TrainingWork:
    work = TrainingWork(
        recipe=recipe,
        settings=speed_settings(recipe, SIDE),
        fit=3200,
        selection=640,
        side=SIDE,
        image_bytes=20_000,
        flops=1e9,
        cost=COST,
        strategy="ddp",
        processes=2,
        machines=1,
        recording="mine",
    )
    return replace(work, **changed)


def time_of(work: TrainingWork, measured: Recipe | None = None, run=None, **place):
    rates = made_rates([made_training(measured or work.recipe, **run or {})], **place)
    return training_time(work, nearest(work, [rates]))


def test_what_was_measured_is_used_as_it_is():
    time = time_of(work_of(recipe_of()))
    assert time.measurement.differences == []
    assert (time.computing, time.exchange, time.start) == pytest.approx((0.09, 0.01, 25.0))
    assert time.first_evaluation == pytest.approx(10 * 0.05 + 0.3 + 320 * 1e-3 / 7)
    assert time.warm_up == pytest.approx(3.0)
    first = 3.0 + 100 * 0.12 + time.first_evaluation + 0.5
    later = 100 * 0.101 + 10 * 0.05 + 0.3 + 0.5
    assert (time.first_epoch, time.later_epoch) == pytest.approx((first, later))
    assert time.whole == pytest.approx(25 + first - 3.12 + 4 * later + 2)  # the first step counts once
    assert sum(time.parts().values()) == pytest.approx(time.later_epoch)


def test_a_start_in_closed_form_decodes_all_images_and_is_scored_and_saved_too():
    usual, ridge = (time_of(work_of(recipe_of(readout={"start": start}))) for start in ("zero", "ridge"))
    assert ridge.later_epoch == usual.later_epoch
    assert ridge.first_epoch == pytest.approx(3.0 + ridge.later_epoch)
    assert ridge.after(1) == pytest.approx(25 - 3.12 + ridge.first_evaluation + 0.5 + ridge.first_epoch + 2)


def test_the_best_match_of_several_files_counts():
    one, other = recipe_of(), recipe_of(precision="fp32")
    files = [made_rates([made_training(other, step_seconds=9.0)]), made_rates([made_training(one)])]
    found = nearest(work_of(one), files)
    assert found.rates is files[1]
    assert found.differences == []


def test_more_images_a_process_compute_longer_and_exchange_as_much():
    recipe = recipe_of(batch={"global_size": 64})
    time = time_of(work_of(recipe))
    assert (time.computing, time.exchange) == pytest.approx((0.18, 0.01))
    assert time.measurement.differences == ["images of a process in a step 16 -> 32"]
    assert "EXTRAPOLATED" in training_page(time, None)


def test_another_network_is_scaled_by_its_operations_and_bytes():
    recipe = recipe_of(backbone={"name": "resnet50"})
    work = work_of(recipe, flops=3e9, cost=replace(COST, trainable=4 * WEIGHTS, optimizer_state=8 * WEIGHTS))
    time = time_of(work, measured=recipe_of())
    assert (time.computing, time.exchange) == pytest.approx((0.27, 0.04))
    assert time.evaluation == pytest.approx(10 * 0.05 * 3 + 0.3)
    assert time.checkpoint == pytest.approx(0.5 * 12 / 3)


@pytest.mark.parametrize("place", [{}, ON_CPU], ids=["GPUs", "CPU"])
def test_more_processes_share_a_step_and_on_a_cpu_its_cores(place):
    work = work_of(recipe_of(), processes=4)
    time = time_of(work, **place)
    assert time.computing == pytest.approx(0.09 / 2 * (2 if place else 1))
    assert time.exchange == pytest.approx(2 * 3 / 4 * WEIGHTS / 1e9)


@pytest.mark.parametrize(("strategy", "times"), [("zero1", 3), ("zero2", 3), ("zero3", 3), ("ddp", 2)])
def test_another_strategy_sends_what_it_sends(strategy, times):
    time = time_of(work_of(recipe_of(), strategy=strategy))
    assert time.exchange == pytest.approx(times / 2 * WEIGHTS / 1e9)


def test_an_exchange_that_hides_behind_computing_stays_hidden():
    hidden = {"trainable": 100 * WEIGHTS, "step_seconds": 0.1}  # its bytes would take 1 s
    cost = replace(COST, trainable=100 * WEIGHTS)
    same = time_of(work_of(recipe_of(), cost=cost, recording="other"), run=hidden)
    assert (same.step, same.exchange) == pytest.approx((0.1, 0.05))
    four = time_of(work_of(recipe_of(), cost=cost, processes=4), run=hidden)
    assert four.exchange == pytest.approx(0.05 * 1.5)


def test_without_a_measured_network_its_part_is_named_and_not_counted():
    recipe = recipe_of()
    rates = made_rates([made_training(recipe, processes=1, share=32)])
    alone = rates.model_copy(update={"machine": rates.machine.model_copy(update={"bandwidth": None})})
    work = work_of(recipe)
    time = training_time(work, nearest(work, [alone]))
    assert time.exchange == 0
    assert "the exchange of gradients" in training_page(time, None)


def test_decoding_limits_the_first_epoch_only_if_the_images_fit_into_the_cache():
    slow = {"decoded_seconds": 0.4}
    kept = time_of(work_of(recipe_of()), run=slow)
    assert kept.images == pytest.approx(0.001)
    assert "decoding, in the first epoch only" in training_page(kept, None)
    uncached = recipe_of(loader={"cache": "off"})
    never = time_of(work_of(uncached), run=slow)
    assert never.images == pytest.approx(0.3)
    assert "what limits: images" in training_page(never, None)
    half = recipe_of(loader={"cache_gib": 3840 * SIDE**2 * 3 / 2 / 2**30})
    partly = time_of(work_of(half), run=slow)
    assert partly.images == pytest.approx((0.001 + 0.3) / 2)
    assert "50% of the images are kept decoded" in training_page(partly, None)


def test_more_decoding_processes_decode_more():
    slow = {"decoded_seconds": 0.1 + 16e-3, "workers": 0}
    few, many = (recipe_of(loader={"cache": "off", "workers": workers}) for workers in (0, 8))
    assert time_of(work_of(few), run=slow).images == pytest.approx(0.016)
    assert time_of(work_of(many), measured=few, run=slow).images == 0


def test_larger_images_take_longer_to_decode():
    recipe = recipe_of(loader={"cache": "off", "workers": 0})
    work = work_of(recipe, side=2 * SIDE, settings=speed_settings(recipe, 2 * SIDE))
    time = time_of(work, measured=recipe, run={"workers": 0})
    assert time.decoding == pytest.approx(0.02 * (1 + 4) / 2)


def test_a_correlation_loss_scores_the_training_stimuli_as_well():
    time = time_of(work_of(recipe_of(loss={"responses": "correlation"})))
    assert time.evaluation == pytest.approx((10 + 50) * 0.05 + 2 * 0.3)
    assert time.fit_decoding == pytest.approx(3200 / 2 * 1e-3 / 7)
    uncached = time_of(work_of(recipe_of(loss={"responses": "correlation"}, loader={"cache": "off"})))
    assert uncached.first_evaluation - time.first_evaluation == pytest.approx(time.fit_decoding)


def test_early_stopping_is_named_where_it_can_end_the_run():
    patient, impatient = (recipe_of(epochs=30, early_stopping={"patience": patience}) for patience in (29, 3))
    assert "early stopping" not in training_page(time_of(work_of(patient)), None)
    time = time_of(work_of(impatient))
    assert time.soonest == pytest.approx(time.after(4))
    assert f"early stopping ends it after {duration(time.soonest)}" in training_page(time, None)
    ridge = time_of(work_of(recipe_of(epochs=30, early_stopping={"patience": 3}, readout={"start": "ridge"})))
    assert ridge.soonest == pytest.approx(ridge.after(3))  # none improves on the start


def test_what_limits_is_named_with_what_helps():
    page = training_page(time_of(work_of(recipe_of(precision="fp32"))), largest_batch=512)
    assert "what limits: computing; what helps: precision bf16" in page
    assert "larger passes (512 images fit, 16 now)" in page
    slow_network = time_of(work_of(recipe_of()), run={"trainable": 1e12})
    assert "exchange of gradients; what helps: a larger batch.global_size" in training_page(slow_network, None)
    large_selection = time_of(work_of(recipe_of(), selection=64_000))
    assert "evaluation of 64,000 stimuli" in training_page(large_selection, None)
    slow_disk = time_of(work_of(recipe_of()), run={"checkpoint_seconds": 60})
    assert "checkpoints of" in training_page(slow_disk, None)
    often = time_of(work_of(recipe_of(checkpoint={"every_steps": 10})), run={"checkpoint_seconds": 60})
    assert "a larger checkpoint.every_steps" in training_page(often, None)
    pages = (page, *(training_page(time, 512) for time in (large_selection, often)))
    assert max(len(line) for shown in pages for line in shown.splitlines() if line.startswith("what limits")) < 130


def test_decoding_processes_are_suggested_only_where_they_have_cores():
    slow = {"decoded_seconds": 0.4, "workers": 0}
    recipe = recipe_of(loader={"cache": "off", "workers": 0})
    for place, suggested in (({}, True), ({**ON_CPU, "cores": 4}, True), (ON_CPU, False)):
        page = training_page(time_of(work_of(recipe), run=slow, **place), None)
        assert ("loader.workers" in page) == suggested
        assert "for decoded ones (loader.cache_gib)" in page
    kept = time_of(work_of(recipe_of(loader={"workers": 0})), run={"cached_seconds": 0.4, "workers": 0}, **ON_CPU)
    assert "on the cores that compute; what helps: a smaller images.size" in training_page(kept, None)


def test_checkpoints_within_an_epoch_are_counted():
    time = time_of(work_of(recipe_of(checkpoint={"every_steps": 30})))
    assert time.saving == pytest.approx(4 * 0.5)


def test_rates_of_another_machine_are_said_to_be():
    assert "they hold for machines like node1" in training_page(time_of(work_of(recipe_of())), None)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.123, "0.12 s"),
        (42.4, "42 s"),
        (125, "2 min 5 s"),
        (12_000, "3 h 20 min"),
        (7200, "2 h"),
        (360_000, "4 d 4 h"),
    ],
)
def test_durations_are_words(seconds, words):
    assert duration(seconds) == words
