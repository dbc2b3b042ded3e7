"""How long a probe takes and what it needs, against the formulas of train/planning/probe_costs.py."""

from dataclasses import replace

import pytest
from made_rates import MACHINE, ON_CPU, SIDE, made_features, made_rates, made_training

from train.models.windows import probe_windows
from train.planning.operations import Layer, ProbedNetwork, probed_network, speed_settings
from train.planning.probe_costs import ProbeCosts, ProbeSizes, decomposition_seconds, probe_space
from train.planning.probe_plan import probe_page
from train.planning.probe_time import ProbeWork, forward_pass, probe_time
from train.planning.rates import MachineRates
from train.probing.product_store import kind_of
from train.regression.inner_products import parts_of
from train.run.recipe import ProbeRecipe, Recipe

RATES = MachineRates(**MACHINE)
LAYERS = [Layer("layer1", [40_000], [49]), Layer("layer2", [10_000], [49])]
NETWORK = ProbedNetwork(LAYERS, features=50_000, flops=1e9, weights=10**7, activations=10**6)
SIZES = ProbeSizes(fit=[800], scored=[200], stimuli=1000, sites=100, processes=2)


def costs(recipe: ProbeRecipe, sizes: ProbeSizes = SIZES) -> ProbeCosts:
    return ProbeCosts(recipe, sizes, RATES)


def work_of(recipe: ProbeRecipe, **changed) -> ProbeWork:
    work = ProbeWork(
        recipe=recipe,
        settings=speed_settings(recipe, SIDE),
        network=NETWORK,
        sizes=SIZES,
        side=SIDE,
        image_bytes=20_000,
        recording="mine",
    )
    return replace(work, **changed)


def test_decompositions_follow_a_power_law_and_beyond_it_the_cube():
    assert decomposition_seconds(500, RATES.decompositions) == pytest.approx(0.1)
    assert decomposition_seconds(1000, RATES.decompositions) == pytest.approx(0.8)
    assert decomposition_seconds(700, RATES.decompositions) == pytest.approx(0.8 * 0.7**3)
    assert decomposition_seconds(10_000, RATES.decompositions) == pytest.approx(800)
    assert decomposition_seconds(2000, RATES.decompositions[:1]) == pytest.approx(6.4)


def test_products_and_traffic_of_a_whole_map():
    cost = costs(ProbeRecipe()).of_layer(LAYERS[0])
    assert cost.products == pytest.approx(1000**2 * 40_000 / 2 / 1e11)
    assert cost.reading == pytest.approx(4 * 1000 * 40_000 / 2 / 1e9)
    assert cost.exchange == pytest.approx(8 * 1000**2 / 2 / 1e9)
    between_machines = costs(ProbeRecipe(), replace(SIZES, machines=2)).of_layer(LAYERS[0])
    assert between_machines.exchange == pytest.approx((4 * 1000 * 40_000 / 2 / 2 + 8 * 1000**2 / 2) / 1e9)
    alone = costs(ProbeRecipe(), replace(SIZES, processes=1)).of_layer(LAYERS[0])
    assert (alone.exchange, alone.products) == (0, pytest.approx(2 * cost.products))


def test_a_matrix_that_exceeds_the_memory_is_summed_in_parts_and_features_are_read_again():
    large = replace(SIZES, fit=[16_000], scored=[4000], stimuli=20_000)
    little = costs(ProbeRecipe(memory=0.5), large).of_layer(LAYERS[0])
    plenty = costs(ProbeRecipe(memory=64), large).of_layer(LAYERS[0])
    parts = len(parts_of(20_000, 0.25 * 2**30))
    assert parts > 5
    assert little.reading / plenty.reading == pytest.approx((parts + 1) / 2)
    assert little.products == plenty.products


def test_windows_share_the_products_at_positions_unless_there_are_more_of_these():
    windows = len(probe_windows())
    windowed = costs(ProbeRecipe(field="gaussian"))
    mixing = 2 * windows * 49 * 1000**2 / 2 / 1e11
    assert windowed.of_layer(LAYERS[0]).products == pytest.approx(2 * 1000**2 * 40_000 / 2 / 1e11 + mixing)
    pixels = windowed.of_layer(Layer("pixels", [3 * SIDE**2], [SIDE**2]))
    assert pixels.products == pytest.approx(windows * 2 * 1000**2 * 3 * SIDE**2 / 2 / 1e11)
    assert pixels.regressions == pytest.approx(windows // 2 * windowed_regression(windows))


def windowed_regression(windows: int) -> float:
    """Of one window: 800 of 1,000 stimuli are fitted."""
    one = 26 * 8 * 1000**2 / 1e10 + 200**2 * 1e-7 / windows + decomposition_seconds(800, RATES.decompositions)
    return one + grid_seconds(800, 800)


def grid_seconds(stimuli: int, components: int, processes: int = 1) -> float:
    """Of all penalties for 100 sites, which the processes share out."""
    hat_diagonals = 2 * 49 * stimuli * components / 1e11 + 3 * 8 * stimuli * components / 1e10
    errors = 54 * (2 * stimuli * components * 100 / 1e11 + 2 * 8 * stimuli * 100 / 1e10)
    return hat_diagonals + errors / processes


def test_every_readout_costs_its_decompositions():
    ridge, ols = (ProbeRecipe(readout=readout, components=500) for readout in ("ridge", "ols"))
    pls = ProbeRecipe(readout="pls", latent=10)
    shared = 26 * 8 * 1000**2 / 1e10 + 200**2 * 1e-7
    product = 2 * 800 * 500 * 100 / 1e11
    whole, folds = (decomposition_seconds(count, RATES.decompositions) for count in (800, 640))

    def seconds(recipe: ProbeRecipe, sizes: ProbeSizes = SIZES) -> float:
        return costs(recipe, sizes).of_layer(LAYERS[0]).regressions

    assert seconds(ridge) == pytest.approx(shared + whole + grid_seconds(800, 500))
    assert seconds(ols) == pytest.approx(shared + whole + 3 * product + 5 * (folds + 3 * product * 640 / 800))
    responses = decomposition_seconds(100, RATES.decompositions)
    expected = shared
    for fit, times in ((800, 1), (640, 5)):
        dimension = 8 * fit**2 / 1e10 + 2 * fit * 100**2 / 1e11 + responses
        expected += times * (2 * fit**2 * 100 / 1e11 + 10 * dimension)
    assert seconds(pls) == pytest.approx(expected)
    cv = replace(SIZES, fit=[900] * 10, scored=[100] * 10)
    assert seconds(ridge, cv) > 9 * seconds(ridge)


def test_few_features_are_regressed_on_as_they_are():
    layer = Layer("layer4", [300], [1])
    assert kind_of(300, 1000) == "features"
    cost = costs(ProbeRecipe(components=None)).of_layer(layer)
    assert (cost.products, cost.exchange) == (0, 0)
    assert cost.reading == pytest.approx(5 * 4 * 1000 * 300 / 2 / 1e9)
    found = (800 * 300**2 / 2 + 2 * 800 * 300 * 300 / 2 + 6 * 800 * 300**2) / 1e11
    found += decomposition_seconds(300, RATES.decompositions)
    assert cost.regressions == pytest.approx(found + grid_seconds(800, 300, 2) + 200**2 * 1e-7)


def test_some_components_of_many_stimuli_cost_less_than_all():
    large = replace(SIZES, fit=[20_000], scored=[2248], stimuli=22_248)
    assert kind_of(40_000, 22_248) == "shared products"
    some, every = (
        costs(ProbeRecipe(components=count), large).of_layer(LAYERS[0]).regressions for count in (1000, None)
    )
    full = decomposition_seconds(20_000, RATES.decompositions)
    searched = (6 * 1000 * 20_000**2 + 36 * 1000**2 * 20_000) / 2 / 1e11
    assert every > full
    assert searched < some < full / 10


def test_scores_are_those_of_all_layers_and_with_folds_of_the_chosen_ones():
    """The chosen layer of a single fit is one of them."""
    assert costs(ProbeRecipe()).scoring(2) == pytest.approx(2 * 100 * (1e-3 + 200 * 1e-6))
    folds = replace(SIZES, fit=[900, 900], scored=[100, 100])
    assert costs(ProbeRecipe(), folds).scoring(2) == pytest.approx(3 * 100 * (1e-3 + 200 * 1e-6))


def test_a_measured_forward_pass_is_used_as_it_is():
    recipe = ProbeRecipe()
    forward = forward_pass(work_of(recipe), [made_rates(features=[made_features(recipe)])])
    time = probe_time(work_of(recipe), forward)
    assert forward.differences == []
    assert (time.activations, time.computing, time.start) == pytest.approx((5.0, 4.0, 25.0))
    assert time.whole == pytest.approx(25 + sum(time.parts().values()))
    assert "measured: this recipe" in probe_page(time)


def test_another_network_is_scaled_by_its_operations_and_bytes():
    measured, planned = ProbeRecipe(), ProbeRecipe(backbone={"name": "resnet50"})
    work = work_of(planned, network=replace(NETWORK, flops=4e9, features=90_000))
    forward = forward_pass(work, [made_rates(features=[made_features(measured)])])
    beside = 0.002 * (1e-3 + 4 * 90_000 / 1e9) / (1e-3 + 4 * 10_000 / 1e9)
    assert forward.computing == pytest.approx(0.032)
    assert forward.whole == pytest.approx(0.032 + beside)
    assert "EXTRAPOLATED" in probe_page(probe_time(work, forward))


def test_more_processes_on_a_cpu_share_its_cores():
    recipe = ProbeRecipe()
    work = work_of(recipe, sizes=replace(SIZES, processes=4))
    on_gpu, on_cpu = (
        forward_pass(work, [made_rates(features=[made_features(recipe)], **place)]) for place in ({}, ON_CPU)
    )
    assert on_cpu.computing == pytest.approx(2 * on_gpu.computing)


def test_more_decoding_processes_are_suggested_only_where_they_have_cores():
    recipe = ProbeRecipe(loader={"workers": 0})
    slow = made_features(recipe, image_seconds=1.0)
    for place, suggested in (({}, True), (ON_CPU, False)):
        page = probe_page(
            probe_time(work_of(recipe), forward_pass(work_of(recipe), [made_rates(features=[slow], **place)]))
        )
        assert "what limits: decoding and writing; what helps: " in page
        assert ("loader.workers" in page) == suggested
        assert max(len(line) for line in page.splitlines() if line.startswith("what limits")) < 130


def test_without_a_measured_probe_the_evaluation_of_a_training_tells():
    work = work_of(ProbeRecipe())
    forward = forward_pass(work, [made_rates([made_training(Recipe())], **ON_CPU)])
    assert forward.computing == pytest.approx(0.05 / 32 * 3)  # forward of 1e9 operations, a third of a step's
    assert forward.differences
    head = made_training(Recipe.model_validate({"backbone": {"trainable": "head"}}))  # a step is little but forward
    assert forward_pass(work, [made_rates([head], **ON_CPU)]).computing == pytest.approx(0.05 / 32)
    assert forward_pass(work, [made_rates()]) is None


def test_activations_that_exceed_the_memory_are_written_and_read_at_the_disks_speed():
    recipe = ProbeRecipe()
    work = work_of(recipe)
    small, large = (
        probe_time(work, forward_pass(work, [made_rates(features=[made_features(recipe)], host_bytes=host)]))
        for host in (2**40, 10**7)
    )
    assert large.reading == pytest.approx(5 * small.reading)
    assert large.activations == pytest.approx(max(5.0, 4 * 1000 * 50_000 / 2 / 1e8))


def test_space_is_bounded_by_memory_beside_owned_matrices_and_eigenvectors():
    recipe = ProbeRecipe(memory=0.001)
    space = probe_space(recipe, LAYERS, 50_000, SIZES)
    assert space.products == pytest.approx(0.001 * 2**30)
    assert space.regressions == pytest.approx(8 * (1000**2 + 4 * 800**2 + 800 * (2 * 800 + 6 * 100)))
    results = 12 * 800 * 100  # of a layer through a window
    assert space.disk == pytest.approx(4 * 1000 * 50_000 + 2 * 8 * 1000**2 + 2 * results)
    windowed = probe_space(ProbeRecipe(field="gaussian"), LAYERS, 50_000, SIZES)
    assert windowed.disk == pytest.approx(4 * 1000 * 50_000 + len(probe_windows()) * (4 * 1000**2 + 2 * results))
    exact = probe_space(ProbeRecipe(field="gaussian", products="float64"), LAYERS, 50_000, SIZES)
    assert exact.disk - windowed.disk == pytest.approx(len(probe_windows()) * 4 * 1000**2)
    one_layer = probe_space(recipe, [LAYERS[0], Layer("few", [300], [1])], 40_300, SIZES)
    assert one_layer.disk == pytest.approx(4 * 1000 * 40_300 + 8 * 1000**2 + 2 * results)


def test_many_stimuli_take_no_square_matrix_in_memory():
    large = replace(SIZES, fit=[20_000], scored=[2248], stimuli=22_248)
    some, every = (probe_space(ProbeRecipe(components=count), LAYERS, 50_000, large) for count in (1000, None))
    assert some.products <= 2**30
    assert some.regressions < 0.6 * 8 * 20_000**2
    assert every.regressions > 4 * 8 * 20_000**2


def test_a_network_is_counted_without_weights():
    recipe = ProbeRecipe(layers=["all"], backbone={"name": "resnet18", "weights": "pretrained"}, pool=None)
    network = probed_network(recipe, SIDE)
    assert [layer.name for layer in network.layers] == ["layer1", "layer2", "layer3", "layer4"]
    assert [layer.features for layer in network.layers] == [16_384, 8192, 4096, 2048]
    assert network.layers[0].positions == [256]
    # 1.8 billion multiply-adds at 224 px.
    assert network.flops == pytest.approx(2 * 1.82e9 * (64 / 224) ** 2, rel=0.05)
    assert probed_network(ProbeRecipe(layers=["pixels"]), SIDE).features == 3 * SIDE**2
