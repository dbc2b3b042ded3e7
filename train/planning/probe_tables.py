"""What train/plan.py prints of a probe: what it reads, memory and disk space, and how long it takes."""

from collections.abc import Sequence

from data_prep.common.errors import BadInput
from train.planning.operations import ProbedNetwork, probed_network, speed_settings
from train.planning.options import ProbePlan
from train.planning.probe_costs import ProbeSizes, probe_space, windows_of
from train.planning.probe_time import ProbeWork, forward_pass, probe_time
from train.planning.rates import Rates, load_rates
from train.planning.recording_sizes import ProbedStimuli, manifest_of, probed_stimuli
from train.planning.time_tables import lines_of, probe_page
from train.planning.training_time import GIB
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
        raise BadInput("rates: neither a probe nor a training was measured; run launch/check.sh --json again")
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
        "disk": f"{space.disk / GIB:.2f} GiB in --scratch on each machine, until the layers are done",
    }
    lines = ["Estimates of each process's memory, and of disk space", *lines_of(rows)]
    lines.append(f"the most: {most / GIB:.2f} GiB a process, {per_machine * most / GIB:.2f} GiB a machine")
    if rates and not rates[0].place.on_gpu and per_machine * most > rates[0].place.host_bytes:
        lines.append(
            f"TOO MUCH for {rates[0].place.hosts[0]}, which has {rates[0].place.host_bytes / GIB:.1f} GiB; what would "
            "help: fewer processes a machine, a smaller subset, --memory or batch_size"
        )
    return "\n".join(lines)
