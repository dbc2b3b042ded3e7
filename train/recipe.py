"""The typed settings of a run. Every field's docstring is its help text on the command line."""

import difflib
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from data_prep.errors import BadInput
from data_prep.remote import FetchSettings

LEAST_CORRELATED = 3  # stimuli in a batch, for a correlation to tell anything
LEAST_SUBSET = 20  # training stimuli, of which some select


class Settings(BaseModel):
    """Base of all settings: unknown names are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Task(Settings):
    """What the network learns to predict."""

    kind: Literal["regression", "classification", "hybrid"] = "regression"
    """Responses, the object shown, or both from one backbone."""
    regression_weight: float = Field(1.0, ge=0)
    """Weight of the response loss in the hybrid sum."""
    classification_weight: float = Field(1.0, ge=0)
    """Weight of the cross-entropy in the hybrid sum."""
    weighting: Literal["fixed", "uncertainty"] = "fixed"
    """The two weights above, or weights learned as the tasks' uncertainties (Kendall et al. 2018)."""
    shuffle_responses: bool = False
    """Control: pair the training stimuli with each other's responses. It must score at chance."""

    @property
    def predicts_responses(self) -> bool:
        """Whether the network has a readout to the sites."""
        return self.kind != "classification"

    @property
    def predicts_classes(self) -> bool:
        """Whether the network has a readout to the objects."""
        return self.kind != "regression"


class Source(Settings):
    """A network and where its weights come from."""

    name: str = "tf_efficientnet_lite0"
    """Any timm model name, or our small `cnn2` and `cnn3`."""
    weights: str = "pretrained"
    """`pretrained` (an installed package, else timm's hub), `random`, a .safetensors/.pth file, or a run folder."""
    cut: str | None = None
    """End the network after this stage or module, e.g. layer3 or blocks.4; by default it is whole."""


class Backbone(Source):
    """The network that turns a picture into features, and what of it is trained."""

    trainable: Literal["all", "head"] = "all"
    """Train everything, or the readout alone on a frozen backbone."""
    batch_norm: Literal["live", "frozen", "synced"] = "live"
    """Normalise by each process's own share of the batch; by the statistics that came with the weights (a frozen
    backbone always does); or, on GPUs, by the whole batch over all processes."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, about a third more time."""


class Readout(Settings):
    """From the backbone's features to the sites; docs/recipes.md has the formulas."""

    kind: Literal["linear", "flattened", "low_rank", "factorised", "gaussian"] = "linear"
    """On pooled features; on the whole map; through shared dimensions; mask x channels; a Gaussian position."""
    rank: int = Field(32, ge=1)
    """Dimensions that the sites share, of low_rank."""
    start: Literal["zero", "ridge", "field"] = "zero"
    """Begin at each site's mean; at the ridge solution on the frozen features (head first, then everything); or, of
    factorised and gaussian, at the ridge through the window that suits the site best."""


class Loss(Settings):
    """What is minimised."""

    responses: Literal["mse", "poisson", "correlation"] = "mse"
    """Squared error of z-scored rates; Poisson likelihood of raw rates; one minus the correlation over the batch."""
    site_weights: Literal["equal", "reliability"] = "equal"
    """What a site counts in the response loss: as much as any, or in proportion to its reliability over the training
    stimuli, which needs single trials."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the probability that is spread over all classes in the cross-entropy."""


class Distill(Settings):
    """A teacher whose predictions are learned beside the responses."""

    teacher: str | None = None
    """Folder of a probe, a run or an ensemble with predictions of training stimuli that were left out of its fit."""
    weight: float = Field(0.5, gt=0, le=1)
    """Share of the teacher's prediction in what is to be learned; the rest is the response itself."""


class Augment(Settings):
    """Random changes of the training pictures, other ones in each epoch. Sites code position: keep them small."""

    shift: float = Field(0.0, ge=0, le=0.5)
    """Largest shift up, down, left and right, as a part of the picture's side."""
    zoom: float = Field(0.0, ge=0, le=0.5)
    """Largest change of size, as a part: 0.05 shows the picture between 5 % smaller and 5 % larger."""
    brightness: float = Field(0.0, ge=0, le=1)
    """Largest change of brightness, as a part."""
    contrast: float = Field(0.0, ge=0, le=1)
    """Largest change of contrast around the picture's mean, as a part."""
    flip: bool = False
    """Mirror half of the pictures. Off: a site that codes the left answers otherwise to the mirrored picture."""

    @property
    def is_on(self) -> bool:
        """Whether anything is changed."""
        return any(bool(value) for value in self.model_dump().values())


class Images(Settings):
    """How pictures reach the network."""

    size: int | None = Field(None, ge=16)
    """Side in pixels of the square picture the network sees; by default the size of the packed pictures."""


class Optimizer(Settings):
    """How gradients become steps."""

    name: Literal["nadam", "adam", "adamw", "radam", "lion", "sgd"] = "nadam"
    """The optimizer; weight decay is decoupled for all but sgd and adam."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    backbone_lr_factor: float = Field(1.0, gt=0)
    """The backbone's learning rate as a part of `lr`, which the readout has."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay, not applied to norms and biases."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of sgd; the first beta of the others."""
    clip_norm: float | None = Field(None, gt=0)
    """Clip the gradient of the global batch to this norm."""


class Schedule(Settings):
    """The learning rate over the optimizer steps of the run."""

    kind: Literal["onecycle", "cosine", "plateau", "constant"] = "onecycle"
    """OneCycle (Smith 2018); or a linear warm-up and then a cosine, drops at plateaus, or nothing."""
    warmup: float = Field(0.3, ge=0, lt=1)
    """Share of all steps over which the rate rises."""
    cycle_momentum: bool = False
    """Of onecycle: let the momentum fall from 0.95 to 0.85 and rise again, against the rate, as torch does."""
    plateau_factor: float = Field(0.1, gt=0, lt=1)
    """Of plateau: the rate is multiplied by this ..."""
    plateau_patience: int = Field(5, ge=1)
    """... after so many epochs in a row without improvement of the selection metric."""


class Batch(Settings):
    """How many stimuli make an optimizer step."""

    global_size: int = Field(32, ge=1)
    """Stimuli per optimizer step, over all processes together."""
    per_device: int | None = Field(None, ge=1)
    """The most stimuli in one forward pass of one process; gradient accumulation follows from it."""


class EarlyStopping(Settings):
    """When to stop, and which stimuli decide it."""

    split: Literal["inner", "val"] = "inner"
    """`inner` holds out a part of train; `val` is the published protocol, and the metrics then say so."""
    inner_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of train that is held out as the inner split."""
    folds: int | None = Field(None, ge=2)
    """Instead of a share drawn by the seed: deal train out to so many folds, the same ones for all seeds ..."""
    fold: int = Field(1, ge=1)
    """... of which this one, counted from 1, is the inner split. All folds together leave each stimulus out once."""
    metric: Literal["r2", "explained_variance", "mse", "pearson_r", "top1"] | None = None
    """What must improve; by default r2, or top1 for classification."""
    patience: int = Field(20, ge=1)
    """Stop after this many epochs in a row without improvement."""


class Checkpoint(Settings):
    """When a run is saved, and what of it is kept."""

    every_steps: int | None = Field(None, ge=1)
    """Save after every so many optimizer steps as well as after each epoch."""
    keep: int = Field(2, ge=1)
    """How many of the last checkpoints to keep, beside the best: a damaged one is passed over for the one before."""


class Faults(Settings):
    """What a run puts up with."""

    timeout: float = Field(300.0, ge=1)
    """Seconds that processes wait for each other, from the second step on, before they give one up as lost."""
    start_timeout: float = Field(1800.0, ge=1)
    """The same for joining and for the first step, which may compile, or read weights from far away."""
    bad_steps: int = Field(10, ge=1)
    """A step whose loss or gradient is not finite is left out; after so many in a row the run ends."""

    @property
    def timeouts(self) -> tuple[float, float]:
        """Seconds, until the first step is done and from then on."""
        return self.start_timeout, self.timeout


class Loader(Settings):
    """How pictures are read."""

    engine: Literal["indexed", "webdataset"] = "indexed"
    """`indexed` reads any stimulus from its tar; `webdataset` streams whole tars to train, drawn with replacement, and
    promises less (see docs/data_format.md). Scores are always taken with `indexed`."""
    workers: int | None = Field(None, ge=0)
    """Decoding processes per rank; by default the cores a rank has beyond its first, at most 8."""
    cache: Literal["off", "ram", "disk", "auto"] = "auto"
    """Keep decoded pictures for the next epoch, once per machine for all its processes: in memory, in a nameless file
    in the temporary folder (TMPDIR), or nowhere; auto is ram unless pictures are read only once."""
    cache_gib: float | None = Field(None, ge=0)
    """Most that is kept of them on a machine; by default half of the memory (disk: space) that is free at the start.
    What does not fit is decoded each time."""
    order: Literal["shuffled", "blocks"] = "shuffled"
    """Of the training stimuli: any after any; or, for data larger than memory or than the copies of remote shards, the
    stimuli of a few shards mixed at a time, so that each shard is read in one stretch."""
    block_shards: int = Field(16, ge=1)
    """Of order blocks: shards that are mixed at a time. More mix better, and need more room."""
    shard_cache: str | None = None
    """Of remote shards: folder for copies, shared by all runs on the machine; by default in ~/.cache."""
    shard_cache_gib: float | None = Field(None, gt=0)
    """Of remote shards: the most that is kept in that folder; by default half of what is free on its disk."""
    fetch_timeout: float = Field(30.0, gt=0)
    """Of remote shards: seconds without an answer after which a connection is given up and made anew."""

    @property
    def fetch(self) -> FetchSettings:
        """How remote shards are fetched and kept."""
        folder = None if self.shard_cache is None else Path(self.shard_cache).expanduser()
        return FetchSettings(folder, self.shard_cache_gib, self.fetch_timeout)

    @field_validator("cache", mode="before")
    @classmethod
    def _as_written(cls, value: Any) -> Any:
        return "off" if value is False else value  # which is what YAML makes of a bare off


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
    data: str | None = None
    """Shard folder made by data_prep/pack.py, or its URL (https://, s3://, gs://, hf://, ...)."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Of the training forward pass: float32, or autocast over float32 weights, for fp16 (of a GPU, with ddp) with a
    scaled loss. Evaluation is float32."""
    subset: int | None = Field(None, ge=LEAST_SUBSET)
    """Use so many of the training stimuli, drawn by `seed`; of two numbers the smaller draws from the larger's."""
    strategy: str | None = None
    """`ddp`, or a DeepSpeed JSON such as ds_configs/zero2.json; by default what the launcher asked for, else ddp."""
    compile: bool = False
    """Let torch compile the network: minutes at the start, then shorter steps. Not with ZeRO-3."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay per step of a running average of the weights, which is then what is scored and saved (0.99, say)."""
    deterministic: bool = False
    """Use only kernels that repeat bitwise on a GPU (slower there); on a CPU runs repeat anyway."""
    epochs: int = Field(30, ge=1)
    """Passes over the training stimuli; the schedule is laid out for all of them."""
    seed: int = Field(0, ge=0)
    """Of the initial weights, the order of the stimuli, a subset of them and the inner split."""

    @property
    def selection_metric(self) -> str:
        """The metric that early stopping and the best checkpoint look at."""
        if self.early_stopping.metric is not None:
            return self.early_stopping.metric
        if not self.task.predicts_responses:
            return "top1"
        return "pearson_r" if self.loss.responses == "correlation" else "r2"

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
            ("early_stopping.inner_fraction", inner and not self.early_stopping.folds, "an inner split without folds"),
            ("early_stopping.folds", inner, "early_stopping.split inner"),
            ("early_stopping.fold", self.early_stopping.folds is not None, "early_stopping.folds"),
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

    folds: int = Field(10, ge=2)
    """Number of folds; ten are the 90/10 splits of Brain-Score."""
    by: Literal["random", "stratified", "grouped"] = "random"
    """At random; with every object in every fold; or with all stimuli of an object in one fold."""
    key: str = "object"
    """What the stimuli's tables call the object."""


class ProbeRecipe(Settings):
    """All settings of a probe."""

    layers: list[str] = Field(["all"], min_length=1)
    """`pixels`, `all` (every stage), or names of the network's modules, with globs; `a+b` reads both together."""
    pool: int | None = Field(7, ge=1)
    """Average-pool the maps of a layer to at most this many rows and columns; None keeps them whole."""
    field: Literal["whole", "gaussian"] = "whole"
    """Ridge reads from the whole map alike, or each site finds its receptive field among Gaussian windows over it."""
    readout: Literal["ridge", "ols", "pls"] = "ridge"
    """Ridge with a penalty per site by leave-one-out, or least squares, on principal components; or PLS."""
    components: int | None = Field(1000, ge=1)
    """Principal components for ridge and ols, all where None (ridge then is that on the features themselves)."""
    latent: int = Field(25, ge=1)
    """Latent dimensions of pls."""
    inner_folds: int = Field(5, ge=2)
    """Folds of the stimuli to fit that select the layer for ols and pls; ridge leaves out one at a time."""
    cross_validation: CrossValidation = CrossValidation()
    products: Literal["float64", "float32", "tf32", "bf16"] = "float32"
    """Of the inner products of features: rounding 1e-16, 1e-7, and where the hardware has them 1e-3, 4e-3."""
    memory: float = Field(1.0, gt=0)
    """GiB of features that a process holds at one time; the others wait on disk."""
    backbone: Source = Source()
    images: Images = Images()
    batch_size: int = Field(64, ge=1)
    """Stimuli in one forward pass."""
    subset: int | None = Field(None, ge=LEAST_SUBSET)
    """Fit on so many of the training stimuli, drawn by `seed`; of two numbers the smaller draws from the larger's."""
    shuffle_responses: bool = False
    """Control: pair the training stimuli with each other's responses. It must score at chance."""
    data: str | None = None
    """Shard folder made by data_prep/pack.py, or its URL (https://, s3://, gs://, hf://, ...)."""
    loader: Loader = Loader()
    timeout: float = Field(1800.0, ge=1)
    """Seconds that processes wait for each other: one decomposes a matrix while the others have nothing to do."""
    seed: int = Field(0, ge=0)
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
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such recipe") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInput(f"{path} is not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict | None):
        raise BadInput(f"{path} must hold sections such as `optimizer:`, not a {type(content).__name__}")
    try:
        return model.model_validate(content or {})
    except ValidationError as error:
        raise BadInput(f"{path}: {describe(error, model)}") from None


def leading_recipe(words: list[str], model: type[AnyRecipe]) -> tuple[AnyRecipe | None, list[str]]:
    """The recipe that a command line begins with, None where it begins with something else, and the other words."""
    if words and words[0].endswith((".yaml", ".yml")):
        return load_recipe(Path(words[0]), model), words[1:]
    return None, words


def save_recipe(recipe: Recipe | ProbeRecipe, path: Path) -> None:
    """Write a recipe with all its settings as YAML."""
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """The first fault that pydantic found, in a sentence with the nearest valid name."""
    fault = error.errors()[0]
    *sections, name = (str(part) for part in fault["loc"])
    where = ".".join((*sections, name))
    if fault["type"] != "extra_forbidden":
        return f"{where}: {fault['msg']} (not {fault.get('input')!r})"
    names = list(_fields_at(model, sections))
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
    return f"{where} is not a setting; {hint}"


def _fields_at(model: type[BaseModel], sections: list[str]) -> dict[str, Any]:
    for section in sections:
        model = model.model_fields[section].annotation
    return model.model_fields
