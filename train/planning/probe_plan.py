"""What train/plan.py prints of a probe: what it reads, memory and disk space, and how long it takes."""

from collections.abc import Sequence

from data_prep.common.errors import BadInput
from train.planning.memory import GIB
from train.planning.operations import ProbedNetwork, probed_network, speed_settings
from train.planning.options import ProbePlan
from train.planning.probe_costs import ProbeSizes, probe_space, windows_of
from train.planning.probe_time import ProbeTime, ProbeWork, forward_pass, probe_time
from train.planning.rates import Rates, load_rates
from train.planning.recording_sizes import ProbedStimuli, manifest_of, probed_stimuli
from train.planning.training_time import has_cores_to_decode
from train.planning.wording import LARGE, SMALL, duration, extrapolation, lines_of, origin
from train.run.recipe import ProbeRecipe

PROGRAM = 0.7 * GIB  # what Python, torch and timm take before the first image
SHOWN = 3  # layers that are named


def plan_probe(options: ProbePlan, recipe: ProbeRecipe) -> None:
    """Print what a probe needs, and with rates how long it takes.

    Raises:
        BadInput: the network has no such layers, or it is not known how many stimuli there are.
    """
    rates = [load_rates(path) for path in options.rates or []]
    manifest = manifest_of(options)
    stimuli = probed_stimuli(options, recipe, manifest)
    network = probed_network(recipe, stimuli.images.side)
    print(introduction(recipe, network, stimuli.sizes, stimuli.images.side), end="\n\n")
    print(needs(recipe, network, stimuli.sizes, rates))
    if not rates:
        return
    work = probe_work(recipe, network, stimuli)
    forward = forward_pass(work, rates)
    if forward is None:
        raise BadInput(
            "rates: neither a probe nor a training was measured; run launch/check.sh --json FILE --recipe RECIPE.yaml"
        )
    print(f"\n{probe_page(probe_time(work, forward))}")


def probe_work(recipe: ProbeRecipe, network: ProbedNetwork, stimuli: ProbedStimuli) -> ProbeWork:
    """The probe whose time is planned."""
    return ProbeWork(
        recipe=recipe,
        settings=speed_settings(recipe, stimuli.images.side),
        network=network,
        sizes=stimuli.sizes,
        side=stimuli.images.side,
        image_bytes=stimuli.images.bytes,
        recording=stimuli.name,
    )


def introduction(recipe: ProbeRecipe, network: ProbedNetwork, sizes: ProbeSizes, side: int) -> str:
    """What is probed."""
    layers = network.layers
    widest = sorted(layers, key=lambda layer: layer.features, reverse=True)[:SHOWN]
    shown = ", ".join(f"{layer.name} {layer.features:,}" for layer in widest)
    more = f"the widest of {len(layers)}: " if len(layers) > len(widest) else ""
    windows = f", each through {windows_of(recipe)} windows" if windows_of(recipe) > 1 else ""
    partitions = f" in each of {len(sizes.fit)} partitions" if len(sizes.fit) > 1 else ""
    source = "pixels" if recipe.layers == ["pixels"] else recipe.backbone.name
    return (
        f"{source}, images of {side} px, {recipe.readout}; {max(sizes.fit):,} stimuli to fit and {max(sizes.scored):,} "
        f"scored{partitions}, {sizes.sites:,} sites; {sizes.processes} process{'es' * (sizes.processes > 1)}\n"
        f"{network.features:,} features of an image ({more}{shown}){windows}"
    )


def needs(recipe: ProbeRecipe, network: ProbedNetwork, sizes: ProbeSizes, rates: Sequence[Rates]) -> str:
    """Memory and disk space."""
    space = probe_space(recipe, network.layers, network.features, sizes)
    forward = network.weights + recipe.batch_size * network.activations
    most = PROGRAM + max(forward, space.products, space.regressions)
    per_machine = sizes.processes // sizes.machines
    rows = {
        "forward passes": f"{(PROGRAM + forward) / GIB:.2f} GiB with a batch of {recipe.batch_size}",
        "inner products": f"{(PROGRAM + space.products) / GIB:.2f} GiB; --memory bounds the blocks of features",
        "regressions": f"{(PROGRAM + space.regressions) / GIB:.2f} GiB",
        "disk": f"{space.disk / GIB:.2f} GiB in --scratch on each machine, until the probe is done",
    }
    lines = ["Estimates of each process's memory, and of disk space", *lines_of(rows)]
    lines.append(f"the most: {most / GIB:.2f} GiB a process, {per_machine * most / GIB:.2f} GiB a machine")
    if rates and not rates[0].place.on_gpu and per_machine * most > rates[0].place.host_bytes:
        lines.append(
            f"TOO MUCH for {rates[0].place.hosts[0]}, which has {rates[0].place.host_bytes / GIB:.1f} GiB; what would "
            "help: fewer processes a machine, a smaller subset, --memory or batch_size"
        )
    return "\n".join(lines)


def probe_page(time: ProbeTime) -> str:
    """How long a probe takes."""
    parts = time.parts()
    rows = {"first batch after": duration(time.start)}
    rows |= {name: duration(seconds) for name, seconds in parts.items() if seconds > SMALL * time.whole}
    rows["whole probe"] = duration(time.whole)
    lines = [f"How long (rates of {origin(time.forward.rates.place)})", *lines_of(rows)]
    name, seconds = max(parts.items(), key=lambda part: part[1])
    if seconds > LARGE * time.whole:
        lines.append(f"what limits: {name}; what helps: {probe_remedies(time, name)}")
    lines += extrapolation(time.forward.differences)
    largest = max(one.stimuli for one in time.forward.rates.machine.decompositions)
    if max(time.work.sizes.fit) > 2 * largest:
        lines.append(f"decompositions are EXTRAPOLATED from one of {largest:,} stimuli")
    return "\n".join(lines)


def probe_remedies(time: ProbeTime, part: str) -> str:
    """What makes a part of a probe cheaper."""
    recipe = time.work.recipe
    match part:
        case "forward passes":
            return "a smaller images.size, more processes"
        case "decoding and writing":
            narrower = "a smaller pool, " if recipe.pool is None else ""
            sizes, place = time.work.sizes, time.forward.rates.place
            has_cores = has_cores_to_decode(recipe.loader.workers, place, sizes.processes, sizes.machines)
            return f"{'more loader.workers, ' * has_cores}{narrower}fewer layers, a faster disk for --scratch"
        case "reading features":
            return "a smaller pool, fewer layers, a larger --memory, a faster disk for --scratch"
        case "exchange":
            return "a smaller pool, fewer layers, a faster network between processes"
        case "inner products":
            return "a smaller pool, products tf32 or bf16, more processes"
        case "decompositions and regressions":
            return f"{_fewer_regressions(time)}more processes"
    return "fewer layers"


def _fewer_regressions(time: ProbeTime) -> str:
    """What a probe could leave out, each followed by a comma."""
    windows = "field whole, " if time.work.recipe.field != "whole" else ""
    return f"fewer layers, fewer components, a subset, {windows}"
