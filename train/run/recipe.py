"""The typed settings of a run. Every field's docstring is its help text on the command line."""

import difflib
import os
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError

from data_prep.common.errors import BadInput
from data_prep.common.option_fields import OFTEN_CHANGED
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
)
from train.run.yaml_files import describe, read_yaml

LEAST_CORRELATED = 3  # stimuli in a batch, for a correlation to tell anything
LEAST_SUBSET = 20  # training stimuli, of which some select
MOST_STIMULI = 10**9
MOST_RECORDINGS = 1000  # of one run


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
    data: Text | Annotated[list[Text], Field(min_length=1, max_length=MOST_RECORDINGS)] | None = None
    """Shard folder made by data_prep/pack.py, or its URL (https://, s3://, gs://, hf://, ...); a list trains one
    backbone on several recordings, with a readout for each."""
    mix: Literal["proportional", "equal"] = "proportional"
    """Of several recordings: every stimulus once an epoch, and the mean over all responses; or equally many stimuli of
    each in a step, until the smallest has no more, and the mean over recordings of each one's mean."""
    precision: Annotated[Literal["fp32", "bf16", "fp16"], OFTEN_CHANGED] = "bf16"
    """Of the training forward pass: float32, or autocast over float32 weights, for fp16 (of a GPU, with ddp) with a
    scaled loss. Evaluation is float32."""
    subset: int | None = Field(None, ge=LEAST_SUBSET, le=MOST_STIMULI)
    """Use so many of the training stimuli (of several recordings: of each), drawn by `seed`; of two numbers the smaller
    draws from the larger's."""
    strategy: Text | None = None
    """`ddp`, or a DeepSpeed JSON such as ds_configs/zero2.json; by default what the launcher asked for, else ddp."""
    compile: bool = False
    """Let torch compile the network: minutes at the start, then shorter steps. Not with ZeRO-3."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay per step of a running average of the weights, which is then what is scored and saved (0.99, say)."""
    deterministic: bool = False
    """Use only kernels that repeat bitwise on a GPU (slower there); on a CPU runs repeat anyway."""
    epochs: Annotated[int, OFTEN_CHANGED] = Field(30, ge=1, le=1_000_000)
    """Passes over the training stimuli; the schedule is laid out for all of them."""
    seed: Annotated[int, OFTEN_CHANGED] = Field(0, ge=0, le=LARGEST_SEED)
    """Of the initial weights, the order of the stimuli, a subset of them and the inner split."""

    @property
    def places(self) -> list[str]:
        """The shard folders of `data`."""
        return [self.data] if isinstance(self.data, str) else self.data or []

    @property
    def selection_metric(self) -> str:
        """The metric that early stopping and the best checkpoint look at."""
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
        """Refuse settings that are fine one by one and contradict each other.

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
            raise BadInput("task.regression_weight and task.classification_weight are both 0; nothing would be learned")
        if self.loss.responses == "correlation" and self.batch.global_size < LEAST_CORRELATED:
            raise BadInput(
                f"batch.global_size ({self.batch.global_size}) must be at least {LEAST_CORRELATED} for loss.responses "
                "correlation"
            )
        self._check_nothing_is_ignored()

    def _check_nothing_is_ignored(self) -> None:
        """Refuse a setting that has been changed and would have no effect."""
        task, fixed = self.task, self.task.weighting == "fixed"
        responses, classes, hybrid = task.predicts_responses, task.predicts_classes, task.kind == "hybrid"
        whole, inner = self.backbone.trainable == "all", self.early_stopping.split == "inner"
        folds = self.early_stopping.folds
        for setting, has_effect, only_with in (
            ("task.regression_weight", hybrid and fixed, "task.kind hybrid and task.weighting fixed"),
            ("task.classification_weight", hybrid and fixed, "task.kind hybrid and task.weighting fixed"),
            ("task.weighting", hybrid, "task.kind hybrid"),
            ("task.shuffle_responses", responses, "task.kind regression or hybrid"),
            ("loss.responses", responses, "task.kind regression or hybrid"),
            ("loss.label_smoothing", classes, "task.kind classification or hybrid"),
            ("readout.kind", responses, "task.kind regression or hybrid"),
            ("readout.rank", self.readout.kind == "low_rank", "readout.kind low_rank"),
            ("loss.site_weights", responses, "task.kind regression or hybrid"),
            ("distill.teacher", responses, "task.kind regression or hybrid"),
            ("distill.weight", self.distill.teacher is not None, "distill.teacher"),
            (
                "early_stopping.inner_fraction",
                inner and not folds,
                "early_stopping.split inner without early_stopping.folds",
            ),
            ("early_stopping.folds", inner, "early_stopping.split inner"),
            ("early_stopping.fold", folds is not None, "early_stopping.folds"),
            ("optimizer.momentum", not self.schedule.cycle_momentum, "schedule.cycle_momentum false"),
            ("backbone.batch_norm", whole or self.backbone.batch_norm == "frozen", "backbone.trainable all"),
            ("backbone.gradient_checkpointing", whole, "backbone.trainable all"),
            ("optimizer.backbone_lr_factor", whole, "backbone.trainable all"),
            ("schedule.cycle_momentum", self.schedule.kind == "onecycle", "schedule.kind onecycle"),
            ("schedule.plateau_factor", self.schedule.kind == "plateau", "schedule.kind plateau"),
            ("schedule.plateau_patience", self.schedule.kind == "plateau", "schedule.kind plateau"),
            ("loader.order", self.loader.engine == "indexed", "loader.engine indexed"),
            ("loader.block_shards", self.loader.order == "blocks", "loader.order blocks"),
        ):
            section, name = setting.split(".")
            value = getattr(getattr(self, section), name)
            default = type(getattr(self, section)).model_fields[name].default
            if value != default and not has_effect:
                raise BadInput(f"{setting} ({value}) has an effect with {only_with} only; leave it at {default}")


class CrossValidation(Settings):
    """How `--split cv` deals the stimuli of all splits out to folds; each fold is predicted from the others."""

    folds: int = Field(10, ge=2, le=10_000)
    """Number of folds; ten are the 90/10 splits of Brain-Score."""
    by: Literal["random", "stratified", "grouped"] = "random"
    """At random; with every object in every fold; or with all stimuli of an object in one fold."""
    key: Text = "object"
    """What the stimuli's tables call the object."""


class ProbeRecipe(Settings):
    """All settings of a probe."""

    layers: Annotated[list[Text], OFTEN_CHANGED] = Field(["all"], min_length=1, max_length=10_000)
    """`pixels`, `all` (every stage), or names of the network's modules, with globs; `a+b` reads both together."""
    pool: int | None = Field(7, ge=1, le=4096)
    """Average-pool the maps of a layer to at most this many rows and columns; None keeps them whole."""
    field: Annotated[Literal["whole", "gaussian"], OFTEN_CHANGED] = "whole"
    """Ridge reads from the whole map alike, or each site finds its receptive field among Gaussian windows over it."""
    readout: Annotated[Literal["ridge", "ols", "pls"], OFTEN_CHANGED] = "ridge"
    """Ridge with a penalty per site by leave-one-out, or least squares, on principal components; or PLS."""
    components: Annotated[int | None, OFTEN_CHANGED] = Field(1000, ge=1, le=1_000_000)
    """Principal components for ridge and ols, all where None (ridge then is that on the features themselves)."""
    latent: int = Field(25, ge=1, le=100_000)
    """Latent dimensions of pls."""
    inner_folds: int = Field(5, ge=2, le=10_000)
    """Folds of the stimuli to fit that select the layer for ols and pls; ridge leaves out one at a time."""
    cross_validation: CrossValidation = CrossValidation()
    products: Literal["float64", "float32", "tf32", "bf16"] = "float32"
    """Of the inner products of features: rounding 1e-16, 1e-7, and where the hardware has them 1e-3, 4e-3."""
    memory: Annotated[float, OFTEN_CHANGED] = Field(1.0, gt=0, le=1e6)
    """GiB of features that a process holds at one time; the others wait on disk."""
    backbone: Source = Source()
    images: Images = Images()
    batch_size: int = Field(64, ge=1, le=100_000)
    """Stimuli in one forward pass."""
    subset: int | None = Field(None, ge=LEAST_SUBSET, le=MOST_STIMULI)
    """Fit on so many of the training stimuli, drawn by `seed`; of two numbers the smaller draws from the larger's."""
    shuffle_responses: bool = False
    """Control: pair the training stimuli with each other's responses. It must score at chance."""
    data: Text | None = None
    """Shard folder made by data_prep/pack.py, or its URL (https://, s3://, gs://, hf://, ...)."""
    loader: Loader = Loader()
    timeout: float = Field(1800.0, ge=1, le=WEEK)
    """Seconds that processes wait for each other: one decomposes a matrix while the others have nothing to do."""
    seed: Annotated[int, OFTEN_CHANGED] = Field(0, ge=0, le=LARGEST_SEED)
    """Of random weights, of a subset and of shuffled responses."""

    def check(self) -> None:
        """Refuse settings that are fine one by one and contradict each other.

        Raises:
            BadInput: naming what is wrong.
        """
        if "pixels" in self.layers and len(self.layers) > 1:
            raise BadInput("layers: pixels are no layer of a network; probe them in a run of their own")
        if self.readout == "pls" and self.components != type(self).model_fields["components"].default:
            raise BadInput("components has an effect with readout ridge and ols only; pls has `latent`")
        if self.field != "whole" and self.readout != "ridge":
            raise BadInput(f"field: {self.field} weighs windows by leave-one-out, which only readout ridge has")
        if self.readout != "pls" and self.latent != type(self).model_fields["latent"].default:
            raise BadInput(f"latent has an effect with readout pls only; {self.readout} has `components`")
        for name in ("engine", "order", "block_shards"):
            if getattr(self.loader, name) != (default := Loader.model_fields[name].default):
                raise BadInput(f"loader.{name} is for training only; a probe reads in order: leave it at {default}")


AnyRecipe = TypeVar("AnyRecipe", Recipe, ProbeRecipe)


def load_recipe(path: Path, model: type[AnyRecipe] = Recipe) -> AnyRecipe:
    """Read a recipe from YAML.

    Raises:
        BadInput: no such file, no YAML mapping, an unknown name (with the nearest valid one), or a bad value.
    """
    try:
        content = read_yaml(path)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such recipe{_did_you_mean(path)}") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} is not readable as YAML: {error}") from None
    if not isinstance(content, dict | None):
        raise BadInput(f"{path} must hold sections such as `optimizer:`, not a {type(content).__name__}")
    try:
        return model.model_validate(content or {})
    except ValidationError as error:
        raise BadInput(f"{path}: {describe(error, model)}") from None


def _did_you_mean(path: Path) -> str:
    shipped = Path(__file__).resolve().parents[1] / "recipes"
    folders = (shipped / "probes", shipped, path.parent)  # of recipes with the same name, the last counts
    recipes = {file.stem: file for folder in folders for file in folder.glob("*.yaml")}
    near = difflib.get_close_matches(path.stem, recipes, n=1)
    return f"; did you mean {os.path.relpath(recipes[near[0]])}?" if near else ""


def save_recipe(recipe: Recipe | ProbeRecipe, path: Path) -> None:
    """Write a recipe with all its settings as YAML."""
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
