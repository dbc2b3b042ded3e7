"""Training steps and scoring on a GPU, stepped through without one: no mixed devices, and the host never waits."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_cuda import CUDA, CudaRuntime, HostWaits, MixedDevices, cuda_runtime, fake_copy, fake_gpu  # noqa: F401

from train.data.batches import Batch
from train.distributed.engine import Engine
from train.evaluation.scoring import _RankScorer
from train.finetuning import ema
from train.finetuning.ema import RunningAverage
from train.finetuning.loop import Training
from train.finetuning.setup import assembly
from train.models.losses import Correlation, SquaredError
from train.models.network import Network
from train.models.windows import gaussian_windows
from train.planning.step_cost import empty_batch, paper_manifest
from train.run.progress import Progress
from train.run.recipe import Recipe

SIDE, SITES, CLASSES, STIMULI = 32, 12, 5, 8
MANIFEST = paper_manifest(SITES, CLASSES, SIDE)
AUGMENT = {"shift": 0.1, "zoom": 0.1, "brightness": 0.2, "contrast": 0.2, "flip": True}
RECIPES = {
    "nadam": {},
    "adamw, clipping, average, augmentation": {
        "optimizer": {"name": "adamw", "clip_norm": 1.0},
        "ema": 0.99,
        "augment": AUGMENT,
    },
    "hybrid by uncertainty, accumulation": {
        "task": {"kind": "hybrid", "weighting": "uncertainty"},
        "batch": {"global_size": STIMULI, "per_device": STIMULI // 2},
    },
    "classification, adam, clipping": {
        "task": {"kind": "classification"},
        "optimizer": {"name": "adam", "clip_norm": 1.0},
    },
    "poisson, sgd, momentum that cycles": {
        "loss": {"responses": "poisson"},
        "optimizer": {"name": "sgd"},
        "schedule": {"cycle_momentum": True},
    },
    "correlation, lion": {"loss": {"responses": "correlation"}, "optimizer": {"name": "lion"}},
    "radam, flattened, frozen": {
        "optimizer": {"name": "radam"},
        "readout": {"kind": "flattened"},
        "backbone": {"trainable": "head"},
    },
    "fp16, nadam, clipping": {"precision": "fp16", "optimizer": {"clip_norm": 1.0}},
    "fp16, adamw, gaussian": {"precision": "fp16", "optimizer": {"name": "adamw"}, "readout": {"kind": "gaussian"}},
    "factorised, low rank": {"readout": {"kind": "factorised"}},
    "low rank, fp32": {"readout": {"kind": "low_rank", "rank": 4}, "precision": "fp32"},
}

SCORED = [name for name in RECIPES if name.startswith(("adamw", "hybrid", "poisson", "correlation"))]


def fill_gradients(engine: Engine, loss: torch.Tensor) -> None:
    """In place of a backward pass, which fake tensors cannot make on a GPU."""
    assert loss.device == CUDA
    for parameter in engine._parameters:
        gradient = torch.empty_like(parameter)
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


@pytest.fixture
def training_of(cuda_runtime, monkeypatch):  # noqa: F811
    """A function from the sections of a recipe to a training on the fake GPU."""
    monkeypatch.setattr(Engine, "backward", fill_gradients)
    monkeypatch.setattr(ema, "copy", SimpleNamespace(deepcopy=fake_copy))

    def make(sections: dict) -> Training:
        backbone = {"name": "test_resnet", "weights": "random", **sections.get("backbone", {})}
        recipe = Recipe.model_validate({**sections, "images": {"size": SIDE}, "backbone": backbone})
        network = fake_copy(Network(recipe, MANIFEST, SIDE))
        monkeypatch.setattr(assembly, "Network", lambda *_: network)
        part = SimpleNamespace(name="recording", columns=slice(0, SITES))
        fit = SimpleNamespace(size=SIDE, stimulus_ids=["stimulus"] * STIMULI, recordings=[part], labels=None)
        steps = STIMULI // (recipe.batch.per_device or STIMULI)
        run = SimpleNamespace(
            recipe=recipe,
            targets=SimpleNamespace(manifest=MANIFEST, site_weights=None),
            data=SimpleNamespace(fit=fit),
            loader=SimpleNamespace(
                accumulation_steps=steps, steps=10, global_size=STIMULI, smallest_micro_batch=STIMULI // steps
            ),
        )
        with fake_gpu(may_wait=True):
            assembly.build_network(run, cuda_runtime, first_weights=True)
            average = None if recipe.ema is None else RunningAverage(network, recipe.ema)
            engine = assembly.build_engine(run, network, cuda_runtime)
            if average is not None:
                average.follow(engine)
            return Training(
                recipe=recipe,
                folder=SimpleNamespace(checkpoints=Path("checkpoints")),
                runtime=cuda_runtime,
                engine=engine,
                network=network.train(),
                average=average,
                loader=run.loader,
                scoring=SimpleNamespace(fit=fit, selection=fit),
                monitor=SimpleNamespace(log=print),
                progress=Progress(
                    recording="",
                    selection_metric="r2",
                    selection_split="inner",
                    site_ids=[],
                    classes=None,
                    image_size=SIDE,
                ),
            )

    return make


def micro_batches(training: Training) -> list[Batch]:
    """A global batch on the host, as the loader delivers it."""
    count = training.loader.accumulation_steps
    return [empty_batch(training.recipe, MANIFEST, STIMULI // count) for _ in range(count)]


@pytest.mark.parametrize("name", RECIPES)
def test_a_training_step_stays_on_the_gpu_and_waits_for_nothing(training_of, name):
    training = training_of(RECIPES[name])
    with fake_gpu():
        for _ in range(2):  # the second step finds the optimizer's state
            losses = training.step(micro_batches(training), 0)
    assert {loss.device for loss in losses.values()} == {CUDA}
    state = [tensor for state in training.engine.optimizer.state.values() for tensor in state.values()]
    assert all(tensor.device == CUDA for tensor in state if isinstance(tensor, torch.Tensor) and tensor.ndim)


@pytest.mark.parametrize("name", SCORED)
def test_scoring_stays_on_the_gpu(training_of, cuda_runtime, name):  # noqa: F811
    """Predictions, moments and counts; only what is left of a split is copied to the host."""
    training = training_of(RECIPES[name])
    network = training.network.eval()
    stimuli = SimpleNamespace(
        columns=slice(0, SITES), rates=object(), labels=object(), split=SimpleNamespace(manifest=MANIFEST)
    )
    with fake_gpu(may_wait=True):
        batch = empty_batch(training.recipe, MANIFEST, STIMULI)
        scorer = _RankScorer(network, stimuli, cuda_runtime, keep_predictions=False)
    with fake_gpu():
        batch = batch.to(CUDA)
        for _ in range(2):
            scorer.add(network(batch.images), batch, STIMULI)
        if scorer._moments is not None:
            moments = scorer._moments.over_ranks(cuda_runtime)
            assert moments.products.device == CUDA
            responses = network.objective.responses
            if isinstance(responses, Correlation):
                responses.reset()
                responses.calibrate(moments.least_squares_lines())
        if scorer._counts is not None:
            assert scorer._counts.over_ranks(cuda_runtime).top5.device == CUDA
        training._charts.keep_predictions(network(batch.images), batch)
    with fake_gpu(may_wait=True):
        if scorer._moments is not None:
            assert scorer._moments.only(MANIFEST.rates.fitted_sites()).count.device == CUDA
        if training.average is not None:
            training.average.gather()


@pytest.mark.parametrize("kind", ["factorised", "gaussian"])
def test_a_readout_moves_to_its_windows_on_the_gpu(training_of, kind):
    readout = training_of({"readout": {"kind": kind}}).network.site_readout
    windows = gaussian_windows()[:SITES]
    with fake_gpu(may_wait=True):
        readout.set_windows(windows)
        features = torch.zeros(STIMULI, readout.sites.in_features, 4, 4, device=CUDA)
        assert readout.windowed_start_features(features, windows).device == CUDA


def test_good_statistics_are_kept_on_the_gpu(training_of):
    """The statistics that are restored after a bad step are kept where the network is."""
    training = training_of({})
    with fake_gpu():
        statistics = training._non_finite._copy_of_statistics()
    assert {statistic.device for statistic in statistics.values()} == {CUDA}


# ---- what these tests would find -----------------------------------------------------------------------------------


def left_on_the_host(monkeypatch, training: Training) -> None:
    monkeypatch.setattr(Batch, "to", lambda self, device: self)


def weights_left_on_the_host(monkeypatch, training: Training) -> None:
    buffers = training.network.objective.responses._buffers
    buffers["rate_mean"] = torch.zeros(SITES, dtype=torch.float64)


def scale_left_on_the_host(monkeypatch, training: Training) -> None:
    training.engine._scale_of_one = torch.ones(())


def reads_the_loss(monkeypatch, training: Training) -> None:
    contribution = SquaredError.contribution
    monkeypatch.setattr(
        SquaredError, "contribution", lambda *args: contribution(*args) * 0 + contribution(*args).item()
    )


def looks_for_what_is_recorded(monkeypatch, training: Training) -> None:
    monkeypatch.setattr(SquaredError, "target", lambda self, rates: rates[rates.isfinite()])


def copies_a_number(monkeypatch, training: Training) -> None:
    backward = Engine.backward
    monkeypatch.setattr(Engine, "backward", lambda self, loss: backward(self, loss * torch.ones(1).to(CUDA)))


def steps_if_finite(monkeypatch, training: Training) -> None:
    monkeypatch.setattr(Engine, "_step_unless", lambda self, skip, step: None if skip else step())


@pytest.mark.parametrize(
    ("mistake", "found"),
    [
        (left_on_the_host, "aten.sub.Tensor on"),
        (weights_left_on_the_host, "aten.sub.Tensor on"),
        (scale_left_on_the_host, "_amp_foreach_non_finite_check_and_unscale_"),
        (reads_the_loss, "_local_scalar_dense"),
        (looks_for_what_is_recorded, "aten.index.Tensor"),
        (copies_a_number, "blocks"),
        (steps_if_finite, "_local_scalar_dense"),
    ],
)
def test_a_mistake_is_found(training_of, monkeypatch, mistake, found):
    training = training_of({"precision": "fp32"})
    with fake_gpu():
        mistake(monkeypatch, training)
        with pytest.raises((HostWaits, MixedDevices, RuntimeError), match=found):
            training.step(micro_batches(training), 0)
