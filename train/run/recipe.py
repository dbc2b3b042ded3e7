"""Recipes: all settings of a run or a probe, read from YAML. A field's docstring is its help text."""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError

from data_prep.common.atomic_writes import write_bytes
from data_prep.common.errors import BadInput
from data_prep.common.option_fields import OFTEN_CHANGED
from train.run.field_rules import FREE_ON_RESUME, check_no_training_settings, check_nothing_is_ignored, used_when
from train.run.layer_names import JOIN
from train.run.settings import (
    LARGEST_SEED,
    WEEK,
    Augment,
    Backbone,
    Batch,
    Checkpoint,
    Distill,
    EarlyStopping,
    Faults,
    Images,
    Loader,
    Loss,
    Optimizer,
    Readout,
    Schedule,
    Settings,
    Source,
    Task,
    Text,
    Tracking,
)
from train.run.yaml_files import describe_error, read_yaml

LEAST_CORRELATED = 3  # stimuli in a batch for a correlation over it
LEAST_SUBSET = 20  # training stimuli, part of which are held back
MOST_STIMULI = 10**9
MOST_RECORDINGS = 1000  # of one run
# Settings of the loader that no other process depends on, and that a machine's disks, cores and network decide.
OF_A_MACHINE = {"workers", "shard_cache", "shard_cache_gib", "fetch_timeout"}


class Recipe(Settings):
    """All settings of a run; a YAML file gives the defaults and flags override it."""

    task: Task = Task()
    backbone: Backbone = Backbone()
    readout: Readout = Readout()
    loss: Loss = Loss()
    distill: Distill = Distill()
    augment: Augment = Augment()
    images: Images = Images()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    batch: Batch = Batch()
    early_stopping: EarlyStopping = EarlyStopping()
    checkpoint: Checkpoint = Checkpoint()
    faults: Faults = Faults()
    loader: Loader = Loader()
    data: Annotated[
        Text | Annotated[list[Text], Field(min_length=1, max_length=MOST_RECORDINGS)] | None, FREE_ON_RESUME
    ] = None
    """Shard folder made by data_prep/pack.py, or its URL (https://, s3://, gs://, hf://, ...). Several folders train
    one backbone on several recordings, with a readout for each."""
    mix: Literal["proportional", "equal"] = "proportional"
    """How several recordings share the steps. proportional: every stimulus once per epoch, loss averaged over all
    responses. equal: the same number of stimuli of each until the smallest runs out, loss averaged over recordings."""
    precision: Annotated[Literal["fp32", "bf16", "fp16"], OFTEN_CHANGED] = "bf16"
    """Precision of the forward pass in training: float32, or autocast with float32 weights. fp16 scales the loss and
    needs a GPU and ddp. Evaluation is always float32."""
    subset: int | None = Field(None, ge=LEAST_SUBSET, le=MOST_STIMULI)
    """Number of training stimuli to use of each recording, drawn by `seed`; a smaller subset is part of a larger one.
    """
    strategy: Annotated[Text | None, FREE_ON_RESUME] = None
    """`ddp`, or a DeepSpeed configuration such as ds_configs/zero2.json; by default what the launcher set, else ddp."""
    compile: bool = False
    """Compile the network with torch.compile: minutes at the start, then shorter steps. Not with ZeRO-3."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay per step of a running average of the weights, e.g. 0.99; the average is what is scored and saved."""
    deterministic: bool = False
    """Use only kernels that are reproducible bit for bit on a GPU (slower); on a CPU runs always are."""
    epochs: Annotated[int, OFTEN_CHANGED] = Field(30, ge=1, le=1_000_000)
    """Maximum passes over the training stimuli; the schedule spans all of them."""
    trackers: Annotated[list[Tracking], FREE_ON_RESUME] = Field(["tensorboard"], max_length=2)
    """Where curves are shown: `tensorboard` (files in the run folder), `wandb` (Weights & Biases, an extra package),
    both, or none (no name)."""
    seed: Annotated[int, OFTEN_CHANGED] = Field(0, ge=0, le=LARGEST_SEED)
    """Seed of the initial weights, the order of the stimuli, the subset and the inner split."""

    @property
    def selection_metric(self) -> str:
        """The metric that decides on early stopping and the best checkpoint."""
        if self.early_stopping.metric is not None:
            return self.early_stopping.metric
        if not self.task.predicts_responses:
            return "top1"
        return "pearson_r" if self.loss.responses == "correlation" else "r2"

    @property
    def evaluation_batch_size(self) -> int:
        """Stimuli per forward pass in evaluation; it does not depend on the number of ranks."""
        return self.batch.per_device or min(self.batch.global_size, 64)

    def for_checkpoint(self) -> "Recipe":
        """The same recipe for a network that takes its weights from a checkpoint."""
        return self.model_copy(update={"backbone": self.backbone.model_copy(update={"weights": "random"})})

    def for_evaluation(self) -> "Recipe":
        """`for_checkpoint`, for a network that is not trained."""
        recipe = self.for_checkpoint()
        backbone = recipe.backbone.model_copy(update={"gradient_checkpointing": False})
        return recipe.model_copy(update={"backbone": backbone})

    def check(self) -> None:
        """Refuse settings that contradict each other.

        Raises:
            BadInput: naming both settings.
        """
        metric = self.early_stopping.metric
        if metric == "top1" and not self.task.predicts_classes:
            raise BadInput("early_stopping.metric: top1 needs task.kind classification or hybrid, not regression")
        if metric not in (None, "top1") and not self.task.predicts_responses:
            raise BadInput(f"early_stopping.metric: {metric} needs responses; task.kind classification has only top1")
        if self.early_stopping.folds is not None and self.early_stopping.fold > self.early_stopping.folds:
            raise BadInput(
                f"early_stopping.fold ({self.early_stopping.fold}) must be at most early_stopping.folds "
                f"({self.early_stopping.folds})"
            )
        if self.readout.start == "field" and self.readout.kind not in ("factorised", "gaussian"):
            raise BadInput(f"readout.start: field needs readout.kind factorised or gaussian, not {self.readout.kind}")
        if (self.batch.per_device or 0) > self.batch.global_size:
            raise BadInput(
                f"batch.per_device ({self.batch.per_device}) is more than batch.global_size ({self.batch.global_size})"
            )
        if self.task.kind == "hybrid" and self.task.regression_weight == self.task.classification_weight == 0:
            raise BadInput(
                "task.regression_weight and task.classification_weight are both 0; the network would learn nothing"
            )
        if self.loss.responses == "correlation" and self.batch.global_size < LEAST_CORRELATED:
            raise BadInput(
                f"batch.global_size ({self.batch.global_size}) must be at least {LEAST_CORRELATED} for loss.responses "
                "correlation"
            )
        check_nothing_is_ignored(self)


class CrossValidation(Settings):
    """How `--split cv` divides the stimuli of all splits into folds; each fold is predicted from the others."""

    folds: int = Field(10, ge=2, le=10_000)
    """Number of folds; ten are the 90/10 splits of Brain-Score."""
    by: Literal["random", "stratified", "grouped"] = "random"
    """At random, with every object in every fold (stratified), or with all stimuli of an object in one fold (grouped).
    """
    key: Text = "object"
    """Column of the stimulus table that names the object."""


class ProbeRecipe(Settings):
    """All settings of a probe."""

    layers: Annotated[list[Text], OFTEN_CHANGED] = Field(["all"], min_length=1, max_length=10_000)
    """`pixels`, `all` (every stage), or names of the network's modules, also with wildcards; `a+b` reads two together.
    """
    joined: Annotated[Literal["alike", "by_channels"], OFTEN_CHANGED] = "alike"
    """How much each of the modules that `+` joins counts: all alike, which predicts best, or each as many times as it
    has channels, which is better for the probes that a population is made of."""
    pool: int | None = Field(7, ge=1, le=4096)
    """Average-pool each layer's map to at most this many rows and columns; None keeps it whole."""
    field: Annotated[Literal["whole", "gaussian"], OFTEN_CHANGED] = "whole"
    """Read from the whole map, or let each site find its receptive field among Gaussian windows (ridge only)."""
    readout: Annotated[Literal["ridge", "ols", "pls"], OFTEN_CHANGED] = "ridge"
    """Ridge regression with a penalty per site, chosen by leave-one-out, or least squares, both on principal
    components; or partial least squares (pls)."""
    sites_learn: Annotated[Literal["apart", "together"], OFTEN_CHANGED, used_when("readout", "ridge")] = "apart"
    """How the penalty and the windows of a site are chosen: by its own responses alone, or together with what suits
    the other sites as the prior, which helps most where stimuli are few (ridge only)."""
    population: Annotated[Text | None, OFTEN_CHANGED] = None
    """Folder that train/population.py made of probes of other recordings: the layer is read together with maps of what
    their sites respond to. It needs one layer, of the modules that those probes read."""
    response: Annotated[Literal["linear", "curved"], OFTEN_CHANGED, used_when("readout", "ridge")] = "linear"
    """What the prediction of a site is of its features: linear, or a quadratic curve of that, learned on left-out
    predictions (ridge only)."""
    components: Annotated[int | None, OFTEN_CHANGED, used_when("readout", "ridge", "ols")] = Field(
        1000, ge=1, le=1_000_000
    )
    """Principal components for ridge and ols; None uses all, and ridge is then ridge on the features themselves."""
    latent: Annotated[int, used_when("readout", "pls")] = Field(25, ge=1, le=100_000)
    """Latent dimensions of pls."""
    inner_folds: int = Field(5, ge=2, le=10_000)
    """Folds of the training stimuli that choose the layer for ols and pls; ridge uses leave-one-out."""
    cross_validation: CrossValidation = CrossValidation()
    products: Literal["float64", "float32", "tf32", "bf16"] = "float32"
    """Precision of the inner products of features: their factors are rounded to 1e-16, 1e-7, and where the hardware
    multiplies such numbers faster, to 1e-3 and 4e-3."""
    memory: Annotated[float, OFTEN_CHANGED, FREE_ON_RESUME] = Field(1.0, gt=0, le=1e6)
    """GiB that a process takes for features and their products; the rest waits on disk."""
    backbone: Source = Source()
    images: Images = Images()
    batch_size: int = Field(64, ge=1, le=100_000)
    """Stimuli per forward pass."""
    subset: int | None = Field(None, ge=LEAST_SUBSET, le=MOST_STIMULI)
    """Number of training stimuli to fit on, drawn by `seed`; a smaller subset is part of a larger one."""
    shuffle_responses: bool = False
    """Control: shuffle the training responses over stimuli. Scores must then be at chance."""
    data: Annotated[Text | None, FREE_ON_RESUME] = None
    """Shard folder made by data_prep/pack.py, or its URL (https://, s3://, gs://, hf://, ...)."""
    loader: Loader = Loader()
    timeout: Annotated[float, FREE_ON_RESUME] = Field(1800.0, ge=1, le=WEEK)
    """Seconds that processes wait for each other: one decomposes a matrix while the others are idle."""
    trackers: Annotated[list[Tracking], FREE_ON_RESUME] = Field(["tensorboard"], max_length=2)
    """Where scores are shown: `tensorboard`, `wandb` (Weights & Biases, an extra package), both, or none."""
    seed: Annotated[int, OFTEN_CHANGED] = Field(0, ge=0, le=LARGEST_SEED)
    """Seed of random weights, the subset and shuffled responses."""

    def check(self) -> None:
        """Refuse settings that contradict each other.

        Raises:
            BadInput: naming what is wrong.
        """
        if "pixels" in self.layers and len(self.layers) > 1:
            raise BadInput("layers: pixels are not a layer of a network; probe them in a run of their own")
        if "pixels" in self.layers and self.population is not None:
            raise BadInput("population: its sites read a network, not pixels; name the layer that they read (--layers)")
        if self.joined != "alike" and not any(JOIN in layer for layer in self.layers):
            raise BadInput(f"joined: {self.joined} weighs modules that are read together (--layers a{JOIN}b)")
        if self.field != "whole" and self.readout != "ridge":
            raise BadInput(f"field: {self.field} weighs windows by leave-one-out, which only readout ridge has")
        check_no_training_settings(self)
        check_nothing_is_ignored(self)


AnyRecipe = TypeVar("AnyRecipe", bound=Recipe | ProbeRecipe)
Model = TypeVar("Model", bound=BaseModel)


def load_recipe(path: Path, kind: type[Model]) -> Model:
    """Read a recipe, or other settings, from YAML.

    Raises:
        BadInput: the file is missing or not a YAML mapping, or a name in it is unknown or a value bad.
    """
    try:
        content = read_yaml(path)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such recipe{nearest_recipe(path)}") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(content, dict | None):
        raise BadInput(f"{path} must contain sections such as `optimizer:`, not a {type(content).__name__}")
    try:
        return kind.model_validate(content or {})
    except ValidationError as error:
        raise BadInput(f"{path}: {describe_error(error, kind)}") from None


def nearest_recipe(path: Path) -> str:
    """The end of a sentence about a recipe that does not exist: the one that was probably meant."""
    shipped = Path(__file__).resolve().parents[1] / "recipes"
    folders = (shipped / "probes", shipped, path.parent)  # of recipes with the same name, the last counts
    recipes = {file.stem: file for folder in folders for file in folder.glob("*.yaml")}
    near = difflib.get_close_matches(path.stem, recipes, n=1)
    return f"; did you mean {os.path.relpath(recipes[near[0]])}?" if near else ""


def flat_settings(recipe: Recipe | ProbeRecipe) -> dict[str, str]:
    """Settings as `section.key` and text, without those that may differ between machines that train together."""

    def flat(prefix: str, values: Mapping[str, Any]) -> dict[str, str]:
        settings: dict[str, str] = {}
        for name, value in values.items():
            settings |= flat(f"{prefix}{name}.", value) if isinstance(value, dict) else {f"{prefix}{name}": str(value)}
        return settings

    return flat("", recipe.model_dump(exclude={"data": True, "loader": OF_A_MACHINE}))


def save_recipe(recipe: Recipe | ProbeRecipe, path: Path) -> None:
    """Write a recipe with all its settings as YAML.

    Raises:
        CannotWrite: the disk is full, the folder read-only ...
    """
    write_bytes(path, yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False).encode())
