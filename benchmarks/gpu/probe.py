"""Part `probe`: products of features in every precision, their decomposition, and features on their way to the host."""

import json
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from synthetic import finish

from data_prep.shards.folder import ShardFolder
from gpu.commands import start
from gpu.device import median_seconds
from gpu.entries import Entry, Part, Place
from gpu.forms import Form
from gpu.results import Finding
from train.data.image_cache import ImageCaches
from train.data.stimuli import RecordingStimuli
from train.distributed.runtime import start_runtime
from train.models.backbone import Backbone
from train.models.features import LayerFeatures
from train.regression.activations import activation_batches
from train.regression.decomposition import eigh_on
from train.regression.gram import GramMatrix
from train.regression.precision import COLUMNS_PER_PRODUCT, ROUNDING, ProductPrecision, SymmetricSum
from train.run.recipe import ProbeRecipe
from train.run.settings import Source

RANK = 200  # of the part of the features that varies most
EXACT = 1e-12  # relative error of sums of products in float64
LAYERS = {True: ("resnet50", ["layer2", "layer3"], 224), False: ("test_resnet", ["layer2"], 64)}
BATCH = {True: 128, False: 16}  # stimuli in a forward pass, on a GPU and without
READ = {True: 2048, False: 64}  # stimuli
SCORES = 5e-3  # difference of a score between a GPU and a CPU


def part(form: Form) -> Part:
    """The entries of this part."""
    entries = [
        Entry("products", 60, products),
        Entry("decomposition", 90, decomposition),
        Entry("features to the host", 90, features_to_host),
        Entry("a whole probe", 120, whole_probe),
    ]
    return Part("probe", [[entry] for entry in entries])


def made_up_features(stimuli: int, features: int, device: torch.device) -> torch.Tensor:
    """float32 (stimuli, features) whose variances fall off as in a network's layer, centred."""
    draw = torch.Generator(device).manual_seed(0)
    random = partial(torch.randn, generator=draw, device=device)
    rank = min(RANK, stimuli)
    strengths = torch.arange(1, rank + 1, device=device) ** -0.5
    whole = (random(stimuli, rank) * strengths) @ random(rank, features) + 0.3 * random(stimuli, features)
    return whole - whole.mean(0)


def gram_of(features: torch.Tensor, precision: ProductPrecision) -> torch.Tensor:
    """Inner products of features, float64 (stimuli, stimuli), block after block as a probe computes them."""
    products = SymmetricSum(len(features), precision, features.device)
    for columns in features.split(COLUMNS_PER_PRODUCT, dim=1):
        products.add(columns)
    return products.total()


def spectral_norm(symmetric: torch.Tensor) -> float:
    """The largest absolute eigenvalue of a symmetric matrix."""
    return float(torch.linalg.eigvalsh(symmetric).abs().max())


def products(place: Place) -> Finding:
    """Speed and error of the products in every precision; the error is that which the regressions count on."""
    form, device = place.form, torch.device(place.form.device)
    features = made_up_features(form.probed, form.features, device)
    exact = gram_of(features, "float64")
    largest = spectral_norm(exact)
    values: dict[str, float] = {"stimuli": form.probed, "features": form.features}
    faults = []
    for precision, most in ROUNDING.items():
        seconds = median_seconds(partial(gram_of, features, precision), device, repeats=3)
        error = spectral_norm(gram_of(features, precision) - exact) / largest
        values[f"{precision} s"] = seconds
        values[f"{precision} TFLOP/s"] = form.probed * (form.probed + 1) * form.features / seconds / 1e12
        values[f"{precision} error"] = error
        if error > max(most, EXACT):
            faults.append(
                f"{precision}: error {error:.1e} of the largest eigenvalue, but the regressions expect {most:.0e}"
            )
    return Finding(values, "errors as the regressions expect them", faults)


def decomposition(place: Place) -> Finding:
    """Seconds of an eigendecomposition in float64: by numpy, by torch on the device, and as a probe does it."""
    device = torch.device(place.form.device)
    gram = gram_of(made_up_features(place.form.probed, place.form.features // 4, device), "float64")
    on_host = gram.cpu().numpy()
    by_torch = median_seconds(lambda: torch.linalg.eigh(gram), device, repeats=2)
    started = time.perf_counter()
    spectrum = GramMatrix(fit=on_host, cross=on_host[:1], decompose=eigh_on(device)).spectrum
    as_probed = time.perf_counter() - started
    started = time.perf_counter()
    expected = np.linalg.eigh(on_host).eigenvalues
    by_numpy = time.perf_counter() - started
    found = torch.linalg.eigh(gram)
    restored = (found.eigenvectors * found.eigenvalues) @ found.eigenvectors.T
    errors = {
        "eigenvalues on the device": np.abs(found.eigenvalues.cpu().numpy() - expected).max() / expected[-1],
        "matrix restored on the device": float((restored - gram).abs().max() / gram.abs().max()),
        "eigenvalues of a probe": np.abs(spectrum.values - expected[::-1][: len(spectrum.values)]).max() / expected[-1],
    }
    values = {"stimuli": place.form.probed, "as a probe does it s": as_probed, "numpy s": by_numpy}
    values |= {"torch on the device s": by_torch, "CPU threads": torch.get_num_threads()}
    values |= {f"error of {name}": float(error) for name, error in errors.items()}
    faults = [f"{name}: relative error {error:.1e}" for name, error in errors.items() if not error < 1e-10]
    return Finding(values, "relative errors below 1e-10", faults)


def features_to_host(place: Place) -> Finding:
    """Whether the features of one batch leave the GPU while the next is loaded and computed: each alone, and together.

    The hidden part is 1 if all but the slowest is hidden behind it, and 0 if each waits for the others.
    """
    on_gpu = place.form.on_gpu
    network, layers, side = LAYERS[on_gpu]
    size = BATCH[on_gpu]
    with start_runtime(None, "fp32") as runtime, torch.no_grad():
        extractor = LayerFeatures(Backbone(Source(name=network, weights="random"), side).eval(), layers, None)
        extractor.to(runtime.device)
        split = ShardFolder(place.jpegs).split("train")
        few = np.arange(min(len(split), READ[on_gpu]))
        # Decoded images are kept, and no workers are started, whose start would be most of the time.
        stimuli = RecordingStimuli(split, side, few, caches=ImageCaches(ProbeRecipe().loader))
        every = partial(activation_batches, stimuli=stimuli, runtime=runtime, batch_size=size, workers=0, label="")
        drain(every(extractor), runtime.device)  # decodes the images, and lets cuDNN and the allocator settle
        together = min(drain(every(extractor), runtime.device) for _ in range(2))
        loading = drain(every(nothing), runtime.device)
        images = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, device=runtime.device)
        features, batches = extractor(images), -(-len(stimuli) // size)
        forward = batches * median_seconds(lambda: extractor(images), runtime.device, repeats=5)
        hosts = [torch.empty_like(rows, device="cpu", pin_memory=on_gpu) for rows in features.values()]
        pairs = list(zip(hosts, features.values(), strict=True))
        copies = batches * median_seconds(partial(copy_all, pairs), runtime.device, repeats=5)
    alone = {"loading": loading, "forward": forward, "copies": copies}
    hidden = (sum(alone.values()) - together) / (sum(alone.values()) - max(alone.values()))
    values = {"images/s": len(stimuli) / together, "together s": together, "hidden part": hidden}
    values |= {f"{name} alone s": seconds for name, seconds in alone.items()}
    return Finding(values | {"MB an image": sum(rows.nbytes for rows in features.values()) / size / 1e6})


def copy_all(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy to the first tensor of each pair from the second, without waiting where the memory allows."""
    for target, source in pairs:
        target.copy_(source, non_blocking=True)


def nothing(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """No features."""
    return {}


def drain(batches: Iterable[object], device: torch.device) -> float:
    """Read all batches and drop them; the seconds that it took."""
    started = time.perf_counter()
    for _ in batches:
        pass
    finish(device)
    return time.perf_counter() - started


def whole_probe(place: Place) -> Finding:
    """The command gives the same scores on the GPU as on the CPU."""
    words = ["train/probe.py", "--data", place.recording, "--layers", "stages.*", "--backbone.name", "test_convnext"]
    words += ["--backbone.weights", "random", "--loader.workers", 0]
    runs = {"device": place.folder / "probe_device", "CPU": place.folder / "probe_cpu"}
    environment = {"device": {}, "CPU": {"ACCELERATE_USE_CPU": "true"}}
    started = {
        name: start([*words, "--out", out], out.with_suffix(".log"), **environment[name]) for name, out in runs.items()
    }
    for command in started.values():
        command.must_succeed()
    scores = {name: scores_of(out) for name, out in runs.items()}
    differences = [abs(score - scores["CPU"][layer]) for layer, score in scores["device"].items()]
    values = {"largest difference of R2": max(differences), "layers": len(differences)}
    values |= {f"seconds on the {name}": command.seconds for name, command in started.items()}
    faults = [] if max(differences) <= SCORES else [f"R2 differs by {max(differences):.1e} from the CPU's"]
    return Finding(values, f"R2 of every layer within {SCORES} of the CPU's", faults)


def scores_of(run: Path) -> dict[str, float]:
    """The mean R2 over sites of each layer of a probe."""
    layers = json.loads((run / "eval" / "val" / "metrics.json").read_text())["layers"]
    return {name: block["regression"]["r2"]["mean"] for name, block in layers.items()}
