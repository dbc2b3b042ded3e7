"""The systems of the study (docs/study.md), each as a row of its table: the commands that train and score it."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from data_prep.common.errors import BadInput
from train.run.recipe import ProbeRecipe, Recipe, load_recipe
from train.sweeping.sweep_settings import SweepSettings

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
Script = Literal["finetune.py", "probe.py", "sweep.py"]

LINEAR, TASK_DRIVEN, DATA_DRIVEN, HYBRID, OURS = FAMILIES = (
    "Linear regression",
    "Task-driven",
    "Data-driven",
    "Hybrid",
    "Ours",  # as the study calls its two best
)
NETWORKS = {
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "resnet152": "ResNet-152",
    "densenet121": "DenseNet-121",
    "densenet169": "DenseNet-169",
    "vgg16": "VGG16",
    "efficientnet_b6": "EfficientNet-B6",
}
HEAD_ONLY = {"backbone.trainable": "head"}

# What --small changes, so that every row takes a minute of a CPU. fp32, because few CPUs compute in bf16.
SMALL_IMAGES = {"images.size": 64, "loader.workers": 0}
SMALL_TRAINING: dict[str, Any] = {**SMALL_IMAGES, "subset": 96, "epochs": 1, "precision": "fp32", "checkpoint.keep": 1}
SMALL_PROBE: dict[str, Any] = {**SMALL_IMAGES, "subset": 300, "components": 64}
SMALL_GRID: dict[str, list[Any]] = {"optimizer.lr": [1e-4, 1e-3], "optimizer.name": ["adam", "nadam"]}


@dataclass(frozen=True)
class Step:
    """A command of train/ with a recipe of ours.

    Attributes:
        script: the command.
        recipe: its file, below train/recipes.
        run: name of the folder it makes.
        settings: of the recipe, by dotted names, that the row changes.
        reads_network: whether it reads the network that the row's first step has trained.
    """

    script: Script
    recipe: str
    run: str
    settings: tuple[tuple[str, Any], ...] = ()
    reads_network: bool = False

    @property
    def path(self) -> Path:
        """The recipe's file."""
        return RECIPES / self.recipe

    @cached_property
    def network(self) -> str | None:
        """The network whose pretrained weights it begins with; None where it needs none."""
        if self.script == "probe.py":
            recipe: Recipe | ProbeRecipe = load_recipe(self.path, ProbeRecipe)
        elif self.script == "sweep.py":
            recipe = load_recipe(self.path.parent / load_recipe(self.path, SweepSettings).recipe, Recipe)
        else:
            recipe = load_recipe(self.path, Recipe)
        reads_pixels = isinstance(recipe, ProbeRecipe) and recipe.layers == ["pixels"]
        needs_weights = recipe.backbone.weights == "pretrained" and not reads_pixels
        return recipe.backbone.name if needs_weights else None

    def changed(
        self, small: bool, random_weights: Sequence[str], selects_on: str, training_stimuli: int
    ) -> dict[str, Any]:
        """The settings that differ from the recipe's.

        Args:
            small: whether the row runs at reduced size.
            random_weights: networks that begin with random weights, because theirs cannot be had.
            selects_on: the split that selects the epoch, inner or val.
            training_stimuli: that there are.
        """
        settings = dict(self.settings)
        if self.network in random_weights:
            settings["backbone.weights"] = "random"
        if self.script == "finetune.py" and selects_on != "inner":  # a search selects on inner in any case
            settings["early_stopping.split"] = selects_on
        if small:
            settings |= SMALL_PROBE if self.script == "probe.py" else SMALL_TRAINING
            if settings["subset"] >= training_stimuli:
                del settings["subset"]
        return settings


@dataclass(frozen=True)
class Row:
    """A system of the study.

    Attributes:
        name: of the row, which names it on the command line and in the queue.
        family, model: as in the study's table.
        steps: what makes it, in order; the last one is scored.
        layer: whose score is shown, where the study names one; else the one that the probe chooses.
        needs_classes: whether it learns the objects that the images show.
    """

    name: str
    family: str
    model: str
    steps: tuple[Step, ...]
    layer: str | None = None
    needs_classes: bool = False

    @property
    def networks(self) -> list[str]:
        """The networks whose pretrained weights it begins with."""
        return [step.network for step in self.steps if step.network is not None]


def _probe(name: str, recipe: str, family: str, model: str, layer: str | None = None) -> Row:
    return Row(name, family, model, (Step("probe.py", f"probes/{recipe}.yaml", name),), layer)


def _finetuned(name: str, recipe: str, family: str, model: str, settings: dict[str, Any] | None = None) -> Row:
    return Row(name, family, model, (Step("finetune.py", f"{recipe}.yaml", name, tuple((settings or {}).items())),))


def _whole(network: str) -> Row:
    family = OURS if network == "resnet152" else DATA_DRIVEN
    return _finetuned(f"{network}_whole", network, family, f"{NETWORKS[network]}, fine-tuned whole")


def _head(network: str) -> Row:
    return _finetuned(f"{network}_head", network, DATA_DRIVEN, f"{NETWORKS[network]}, output layer only", HEAD_ONLY)


def _retrained() -> Row:
    classifier = Step("finetune.py", "classifier_resnet50.yaml", "resnet50_classifier")
    probe = Step("probe.py", "probes/resnet50_classifier.yaml", "resnet50_retrained", reads_network=True)
    return Row(
        "resnet50_retrained",
        TASK_DRIVEN,
        "ResNet-50 re-trained on the objects",
        (classifier, probe),
        needs_classes=True,
    )


def _hybrid() -> Row:
    step = Step("finetune.py", "hybrid_resnet50.yaml", "resnet50_hybrid")
    return Row("resnet50_hybrid", HYBRID, "ResNet-50, objects and responses", (step,), needs_classes=True)


def _search() -> Row:
    step = Step("sweep.py", "sweeps/lr_x_optimizer.yaml", "lr_x_optimizer")
    return Row("lr_x_optimizer", DATA_DRIVEN, "DenseNet-169, best of learning rate x optimizer", (step,))


# The cheap ones come first; the last is a search over trainings.
ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        _probe("pixels_linear", "pixels_linear", LINEAR, "Linear regression + PCA"),
        _probe("pixels_ridge", "pixels_ridge", LINEAR, "Ridge regression + PCA"),
        _probe("resnet50_random", "resnet50_random", TASK_DRIVEN, "Random ResNet-50 - Layer 3", "layer3"),
        _probe("resnet50_frozen", "resnet50", TASK_DRIVEN, "Pre-trained ResNet-50 - Layer 3", "layer3"),
        _probe("densenet169_frozen", "densenet169", OURS, "DenseNet-169 (Task-Driven)"),
        _finetuned("cnn2", "cnn2", DATA_DRIVEN, "2-layers CNN"),
        _finetuned("cnn3", "cnn3", DATA_DRIVEN, "3-layers CNN"),
        *map(_head, NETWORKS),
        *map(_whole, NETWORKS),
        _retrained(),
        _hybrid(),
        _search(),
    )
}
FIGURE_ROW = "resnet50_frozen"  # whose layers are the study's Figure 1


def find_rows(names: Sequence[str]) -> list[Row]:
    """Rows by their names, in the table's order; all of them for none.

    Raises:
        BadInput: no such row; names the nearest.
    """
    for name in names:
        if name not in ROWS:
            near = difflib.get_close_matches(name, ROWS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(ROWS)}"
            raise BadInput(f"--rows: {name!r} is not a row of the study; {hint}")
    return [row for row in ROWS.values() if not names or row.name in names]
