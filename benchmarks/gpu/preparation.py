"""Parts `recordings`, which the others train on, and `plans`, of each network's step.

They need no GPU and run in the background while the first parts run.
"""

from functools import partial

from synthetic import GIB, pack_jpegs, pack_simulated, recipe_of

from gpu.entries import MANY_JPEGS, SMALL_RECORDING, Entry, Part, Place
from gpu.forms import Case, Form
from gpu.results import Finding
from gpu.step_plan import TERA, StepPlan
from train.planning.step_cost import paper_manifest

SIDE = 64  # of the small recording's images
SITES = 12  # of both recordings, see `synthetic`
CLASSES = 8


def recordings(form: Form) -> Part:
    """The recordings."""
    entries = [Entry(SMALL_RECORDING, 120, pack_small, needed=True), Entry(MANY_JPEGS, 180, pack_many, needed=True)]
    return Part("recordings", [entries], together=2, made_by="gpu.preparation:recordings")


def plans(form: Form) -> Part:
    """The plans."""
    entries = [Entry(plan_name(case), 180, partial(plan, case), needed=True) for case in form.cases]
    return Part("plans", [entries], together=form.together, made_by="gpu.preparation:plans")


def pack_small(place: Place) -> Finding:
    """A simulated recording."""
    pack_simulated(place.recording, SIDE)
    return Finding({"MiB": sum(file.stat().st_size for file in place.recording.iterdir()) / 2**20})


def pack_many(place: Place) -> Finding:
    """JPEGs of 256 px; on a CPU of the network's size."""
    side = 256 if place.form.on_gpu else place.form.cases[0].side
    pack_jpegs(place.jpegs, place.form.images, place.form.stimuli, side)
    return Finding({"stimuli": place.form.stimuli, "MiB": sum(f.stat().st_size for f in place.jpegs.iterdir()) / 2**20})


def plan_name(case: Case) -> str:
    """Of the entry that plans a case, and of the plan that it leaves."""
    return f"plan of {case.name}"


def plan(case: Case, place: Place) -> Finding:
    """What a step of a network should cost."""
    recipe = recipe_of(case.network, case.side, case.batch, optimizer={"name": "adamw"})
    planned = StepPlan.of(recipe, paper_manifest(SITES, CLASSES, case.side))
    place.leave(plan_name(case), planned.to_json())
    return Finding(
        {
            "GFLOP an image": 1000 * planned.flops / TERA,
            f"GiB at batch {case.batch}": planned.bytes("ddp", case.batch) / GIB,
        }
    )
