"""The sections of a recipe; `train/run/recipe.py` puts them together. A field's docstring is its help text."""

from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field, field_validator

from data_prep.common.option_fields import OFTEN_CHANGED
from data_prep.remote.cache import FetchSettings
from train.run.field_rules import FREE_ON_RESUME, TRAINING_ONLY, used_when

LARGEST_SEED = 2**63 - 1  # accepted by every random number generator
WEEK = 7 * 86400.0  # seconds

Tracking = Literal["tensorboard", "wandb"]
Text = Annotated[str, Field(max_length=4096, pattern=r"^[^\x00-\x1f]*$")]

WITH_RESPONSES = used_when("task.kind", "regression", "hybrid")
WITH_CLASSES = used_when("task.kind", "classification", "hybrid")
HYBRID = used_when("task.kind", "hybrid")
WHOLE_NETWORK = used_when("backbone.trainable", "all")


class Settings(BaseModel):
    """Base of all settings: unknown names are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Task(Settings):
    """What the network learns to predict."""

    kind: Annotated[Literal["regression", "classification", "hybrid"], OFTEN_CHANGED] = "regression"
    """Predict responses, the object shown, or both from one backbone."""
    regression_weight: Annotated[float, HYBRID, used_when("task.weighting", "fixed")] = Field(1.0, ge=0, le=1e6)
    """Weight of the response loss in a hybrid's loss."""
    classification_weight: Annotated[float, HYBRID, used_when("task.weighting", "fixed")] = Field(1.0, ge=0, le=1e6)
    """Weight of the cross-entropy in a hybrid's loss."""
    weighting: Annotated[Literal["fixed", "uncertainty"], HYBRID] = "fixed"
    """Use the two weights above, or learn them as the tasks' uncertainties (Kendall et al. 2018)."""
    shuffle_responses: Annotated[bool, WITH_RESPONSES] = False
    """Control: shuffle the training responses over stimuli. Scores must then be at chance."""

    @property
    def predicts_responses(self) -> bool:
        """Whether the network has a readout to the sites."""
        return self.kind != "classification"

    @property
    def predicts_classes(self) -> bool:
        """Whether the network has a readout to the objects."""
        return self.kind != "regression"


class Source(Settings):
    """A network and its weights."""

    name: Annotated[Text, OFTEN_CHANGED] = "tf_efficientnet_lite0"
    """Any timm model, or Spiketune's small `cnn2` and `cnn3`."""
    weights: Annotated[Text, OFTEN_CHANGED] = "pretrained"
    """`pretrained` (from an installed package, else from timm's hub), `random`, a .safetensors or .pth file, or a run
    folder."""
    cut: Text | None = None
    """Last stage or module to use, e.g. layer3 or blocks.4; several are read together, e.g. blocks.3+blocks.4. The
    whole network by default."""


class Backbone(Source):
    """The network that turns an image into features, and how much of it is trained."""

    trainable: Annotated[Literal["all", "head"], OFTEN_CHANGED] = "all"
    """Train everything, or only the readout on a frozen backbone."""
    batch_norm: Annotated[
        Literal["live", "frozen", "synced"], used_when("backbone.trainable", "all", harmless=("frozen",))
    ] = "live"
    """Statistics of BatchNorm: of each process's share of the batch (live), those that came with the weights (frozen;
    always so in a frozen backbone), or of the global batch (synced; GPUs only)."""
    gradient_checkpointing: Annotated[bool, WHOLE_NETWORK] = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


class Readout(Settings):
    """From the backbone's features to the sites; formulas in docs/recipes.md."""

    kind: Annotated[
        Literal["linear", "flattened", "low_rank", "factorised", "gaussian"], OFTEN_CHANGED, WITH_RESPONSES
    ] = "linear"
    """Linear on pooled features, or on the whole map; low_rank: through shared dimensions; factorised: a spatial mask
    times channel weights per site; gaussian: a Gaussian position per site."""
    rank: Annotated[int, used_when("readout.kind", "low_rank")] = Field(32, ge=1, le=65_536)
    """Number of shared dimensions of low_rank."""
    start: Literal["zero", "ridge", "field"] = "zero"
    """Initial readout: each site's mean (zero), the ridge solution on the frozen features (ridge), or for factorised
    and gaussian the ridge solution through each site's best window (field)."""


class Loss(Settings):
    """What is minimised."""

    responses: Annotated[Literal["mse", "poisson", "correlation"], WITH_RESPONSES] = "mse"
    """Squared error of z-scored rates, Poisson likelihood of raw rates, or one minus the correlation over the batch."""
    site_weights: Annotated[Literal["equal", "reliability"], WITH_RESPONSES] = "equal"
    """Weight of each site in the response loss: equal, or proportional to its reliability on the training stimuli
    (needs single trials)."""
    label_smoothing: Annotated[float, WITH_CLASSES] = Field(0.0, ge=0, lt=1)
    """Label smoothing of the cross-entropy."""


class Distill(Settings):
    """A teacher whose predictions are learned together with the responses."""

    teacher: Annotated[Text | None, WITH_RESPONSES] = None
    """Folder of a probe, run or ensemble that has predictions of training stimuli left out of its fit."""
    weight: Annotated[float, used_when("distill.teacher")] = Field(0.5, gt=0, le=1)
    """Share of the teacher's prediction in the training target; the rest is the response."""


class Augment(Settings):
    """Random changes of the training images, drawn again every epoch. Sites code position, so keep them small."""

    shift: float = Field(0.0, ge=0, le=0.5)
    """Largest shift in each direction, as a fraction of the image's side."""
    zoom: float = Field(0.0, ge=0, le=0.5)
    """Largest change of size: 0.05 is between 5 % smaller and 5 % larger."""
    brightness: float = Field(0.0, ge=0, le=1)
    """Largest relative change of brightness."""
    contrast: float = Field(0.0, ge=0, le=1)
    """Largest relative change of contrast around the image's mean."""
    flip: bool = False
    """Mirror half of the images. Off by default: a site that codes the left visual field responds differently to the
    mirrored image."""

    @property
    def is_on(self) -> bool:
        """Whether anything is changed."""
        return any(bool(value) for value in self.model_dump().values())


class Images(Settings):
    """How images reach the network."""

    size: int | None = Field(None, ge=16, le=4096)
    """Side in pixels of the square image the network sees; by default that of the packed images."""


class Optimizer(Settings):
    """How gradients become steps."""

    name: Literal["nadam", "adam", "adamw", "radam", "lion", "sgd"] = "nadam"
    """The optimizer; weight decay is decoupled except in sgd and adam."""
    lr: Annotated[float, OFTEN_CHANGED] = Field(1e-3, gt=0, le=1000)
    """Peak learning rate."""
    backbone_lr_factor: Annotated[float, WHOLE_NETWORK] = Field(1.0, gt=0, le=1000)
    """Learning rate of the backbone, relative to `lr`, which is that of the readout."""
    weight_decay: float = Field(0.01, ge=0, le=1000)
    """Weight decay; not applied to norms and biases."""
    momentum: Annotated[float, used_when("schedule.cycle_momentum", False)] = Field(0.9, ge=0, lt=1)
    """Momentum of sgd; the first beta of the others."""
    clip_norm: float | None = Field(None, gt=0, le=1e6)
    """Largest norm of the global batch's gradient; larger ones are clipped. No clipping by default."""


class Schedule(Settings):
    """The learning rate over the run's optimizer steps."""

    kind: Literal["onecycle", "cosine", "plateau", "constant"] = "onecycle"
    """OneCycle (Smith 2018), or after a linear warm-up a cosine, drops at plateaus, or a constant rate."""
    warmup: float = Field(0.3, ge=0, lt=1)
    """Fraction of all steps over which the rate rises."""
    cycle_momentum: Annotated[bool, used_when("schedule.kind", "onecycle")] = False
    """For onecycle: lower the momentum from 0.95 to 0.85 and raise it again, opposite to the rate, as torch does."""
    plateau_factor: Annotated[float, used_when("schedule.kind", "plateau")] = Field(0.1, gt=0, lt=1)
    """For plateau: factor by which each drop multiplies the rate."""
    plateau_patience: Annotated[int, used_when("schedule.kind", "plateau")] = Field(5, ge=1, le=1_000_000)
    """For plateau: drop the rate after this many epochs in a row without improvement of the selection metric."""


class Batch(Settings):
    """How many stimuli make an optimizer step."""

    global_size: Annotated[int, OFTEN_CHANGED] = Field(32, ge=1, le=1_000_000)
    """Stimuli per optimizer step, over all processes."""
    per_device: Annotated[int | None, FREE_ON_RESUME] = Field(None, ge=1, le=1_000_000)
    """Maximum stimuli per forward pass of a process; gradient accumulation follows from it."""


class EarlyStopping(Settings):
    """When to stop, and which stimuli decide."""

    split: Literal["inner", "val"] = "inner"
    """Choose the epoch on `inner`, training stimuli that are held back, or on `val` as published protocols do
    (metrics.json then says so)."""
    inner_fraction: Annotated[
        float, used_when("early_stopping.split", "inner"), used_when("early_stopping.folds", None)
    ] = Field(0.1, gt=0, lt=1)
    """Fraction of the training stimuli held back as the inner split."""
    folds: Annotated[int | None, used_when("early_stopping.split", "inner")] = Field(None, ge=2, le=10_000)
    """Divide train into this many folds, the same for all seeds, and hold back one of them in place of a fraction."""
    fold: Annotated[int, used_when("early_stopping.folds")] = Field(1, ge=1, le=10_000)
    """The fold to hold back, counted from 1. Over all folds each stimulus is held back once."""
    metric: Literal["r2", "explained_variance", "mse", "pearson_r", "top1"] | None = None
    """Metric that must improve; by default r2 (pearson_r for the correlation loss, top1 for classification)."""
    patience: int = Field(20, ge=1, le=1_000_000)
    """Stop after this many epochs in a row without improvement."""


class Checkpoint(Settings):
    """When a run is saved, and which checkpoints are kept."""

    every_steps: Annotated[int | None, FREE_ON_RESUME] = Field(None, ge=1, le=10**9)
    """Optimizer steps between checkpoints, in addition to one after each epoch."""
    keep: Annotated[int, FREE_ON_RESUME] = Field(2, ge=1, le=10_000)
    """Number of recent checkpoints to keep besides the best; if the last is damaged, a run resumes from an earlier one.
    """


class Faults(Settings):
    """How long processes wait for each other, and what they tolerate."""

    timeout: Annotated[float, FREE_ON_RESUME] = Field(300.0, ge=1, le=WEEK)
    """Seconds that processes wait for each other from the second step on before they give up."""
    start_timeout: Annotated[float, FREE_ON_RESUME] = Field(1800.0, ge=1, le=WEEK)
    """The same during start-up and the first step, which may compile."""
    bad_steps: Annotated[int, FREE_ON_RESUME] = Field(10, ge=1, le=1_000_000)
    """Steps whose loss or gradient is not finite are skipped; after this many in a row the run ends."""


class Loader(Settings):
    """How images are read."""

    engine: Annotated[Literal["indexed", "webdataset"], TRAINING_ONLY] = "indexed"
    """`indexed` reads any stimulus from its tar; `webdataset` trains on whole tars, streamed and drawn with
    replacement, and guarantees less (see docs/loading.md). Scores always use `indexed`."""
    workers: Annotated[int | None, FREE_ON_RESUME] = Field(None, ge=0, le=256)
    """Decoding processes per rank; by default one less than a rank's cores, at most 16."""
    cache: Annotated[Literal["off", "ram", "disk", "auto"], FREE_ON_RESUME] = "auto"
    """Where decoded images are kept for the next epoch, once per machine: nowhere, in memory, or in an unnamed file in
    TMPDIR. auto is ram, unless images are read only once."""
    cache_gib: Annotated[float | None, FREE_ON_RESUME] = Field(None, ge=0, le=1e6)
    """Maximum GiB of decoded images per machine; by default half of the memory (disk: space) that is free at the start.
    Images beyond that are decoded every time."""
    order: Annotated[Literal["shuffled", "blocks"], used_when("loader.engine", "indexed"), TRAINING_ONLY] = "shuffled"
    """Order of the training stimuli: fully shuffled; or shuffled within blocks of a few shards, so that each shard is
    read in one stretch, for data larger than memory or the cache of remote shards."""
    block_shards: Annotated[int, used_when("loader.order", "blocks"), TRAINING_ONLY] = Field(16, ge=1, le=1_000_000)
    """For blocks: shards per block. More shards shuffle better and need more space."""
    shard_cache: Annotated[Text | None, FREE_ON_RESUME] = None
    """Folder for copies of remote shards, shared by all runs on the machine; by default below ~/.cache."""
    shard_cache_gib: Annotated[float | None, FREE_ON_RESUME] = Field(None, gt=0, le=1e6)
    """Maximum GiB in that folder; by default half of the free space on its disk."""
    fetch_timeout: Annotated[float, FREE_ON_RESUME] = Field(30.0, gt=0, le=WEEK)
    """Seconds without an answer before a connection to remote shards is closed and opened again."""
    on_bad_sample: Annotated[Literal["stop", "skip"], tyro.conf.arg(aliases=("--on-bad-sample",))] = "stop"
    """What to do about stimuli that cannot be read: stop; or check all before the first step and leave out, count and
    name the bad ones (see docs/security.md)."""

    @property
    def fetch(self) -> FetchSettings:
        """How remote shards are fetched and kept."""
        folder = None if self.shard_cache is None else Path(self.shard_cache).expanduser()
        return FetchSettings(folder, self.shard_cache_gib, self.fetch_timeout)

    @field_validator("cache", mode="before")
    @classmethod
    def _off_in_yaml(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare off as false
