"""What a run can be told, section by section; `train/run/recipe.py` puts the sections together.

Every field's docstring is its help text on the command line.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field, field_validator

from data_prep.common.option_fields import OFTEN_CHANGED
from data_prep.remote.cache import FetchSettings

LARGEST_SEED = 2**63 - 1  # that every generator takes
WEEK = 7 * 86400.0  # seconds

Text = Annotated[str, Field(max_length=4096, pattern=r"^[^\x00-\x1f]*$")]


class Settings(BaseModel):
    """Base of all settings: unknown names are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Task(Settings):
    """What the network learns to predict."""

    kind: Annotated[Literal["regression", "classification", "hybrid"], OFTEN_CHANGED] = "regression"
    """Responses, the object shown, or both from one backbone."""
    regression_weight: float = Field(1.0, ge=0, le=1e6)
    """Weight of the response loss in the hybrid sum."""
    classification_weight: float = Field(1.0, ge=0, le=1e6)
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

    name: Annotated[Text, OFTEN_CHANGED] = "tf_efficientnet_lite0"
    """Any timm model name, or our small `cnn2` and `cnn3`."""
    weights: Annotated[Text, OFTEN_CHANGED] = "pretrained"
    """`pretrained` (an installed package, else timm's hub), `random`, a .safetensors/.pth file, or a run folder."""
    cut: Text | None = None
    """End the network after this stage or module, e.g. layer3 or blocks.4, or read several together, as
    blocks.3+blocks.4; by default it is whole."""


class Backbone(Source):
    """The network that turns an image into features, and what of it is trained."""

    trainable: Annotated[Literal["all", "head"], OFTEN_CHANGED] = "all"
    """Train everything, or the readout alone on a frozen backbone."""
    batch_norm: Literal["live", "frozen", "synced"] = "live"
    """Normalise by each process's own share of the batch; by the statistics that came with the weights (a frozen
    backbone always does); or, on GPUs, by the whole batch over all processes."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, about a third more time."""


class Readout(Settings):
    """From the backbone's features to the sites; docs/recipes.md has the formulas."""

    kind: Annotated[Literal["linear", "flattened", "low_rank", "factorised", "gaussian"], OFTEN_CHANGED] = "linear"
    """On pooled features; on the whole map; through shared dimensions; mask x channels; a Gaussian position."""
    rank: int = Field(32, ge=1, le=65_536)
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

    teacher: Text | None = None
    """Folder of a probe, a run or an ensemble with predictions of training stimuli that were left out of its fit."""
    weight: float = Field(0.5, gt=0, le=1)
    """Share of the teacher's prediction in what is to be learned; the rest is the response itself."""


class Augment(Settings):
    """Random changes of the training images, other ones in each epoch. Sites code position: keep them small."""

    shift: float = Field(0.0, ge=0, le=0.5)
    """Largest shift up, down, left and right, as a part of the image's side."""
    zoom: float = Field(0.0, ge=0, le=0.5)
    """Largest change of size, as a part: 0.05 shows the image between 5 % smaller and 5 % larger."""
    brightness: float = Field(0.0, ge=0, le=1)
    """Largest change of brightness, as a part."""
    contrast: float = Field(0.0, ge=0, le=1)
    """Largest change of contrast around the image's mean, as a part."""
    flip: bool = False
    """Mirror half of the images. Off: a site that codes the left answers otherwise to the mirrored image."""

    @property
    def is_on(self) -> bool:
        """Whether anything is changed."""
        return any(bool(value) for value in self.model_dump().values())


class Images(Settings):
    """How images reach the network."""

    size: int | None = Field(None, ge=16, le=4096)
    """Side in pixels of the square image the network sees; by default the size of the packed images."""


class Optimizer(Settings):
    """How gradients become steps."""

    name: Literal["nadam", "adam", "adamw", "radam", "lion", "sgd"] = "nadam"
    """The optimizer; weight decay is decoupled for all but sgd and adam."""
    lr: Annotated[float, OFTEN_CHANGED] = Field(1e-3, gt=0, le=1000)
    """Peak learning rate."""
    backbone_lr_factor: float = Field(1.0, gt=0, le=1000)
    """The backbone's learning rate as a part of `lr`, which the readout has."""
    weight_decay: float = Field(0.01, ge=0, le=1000)
    """Weight decay, not applied to norms and biases."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of sgd; the first beta of the others."""
    clip_norm: float | None = Field(None, gt=0, le=1e6)
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
    plateau_patience: int = Field(5, ge=1, le=1_000_000)
    """... after so many epochs in a row without improvement of the selection metric."""


class Batch(Settings):
    """How many stimuli make an optimizer step."""

    global_size: Annotated[int, OFTEN_CHANGED] = Field(32, ge=1, le=1_000_000)
    """Stimuli per optimizer step, over all processes together."""
    per_device: int | None = Field(None, ge=1, le=1_000_000)
    """The most stimuli in one forward pass of one process; gradient accumulation follows from it."""


class EarlyStopping(Settings):
    """When to stop, and which stimuli decide it."""

    split: Literal["inner", "val"] = "inner"
    """`inner` holds out a part of train; `val` is the published protocol, and the metrics then say so."""
    inner_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of train that is held out as the inner split."""
    folds: int | None = Field(None, ge=2, le=10_000)
    """Instead of a share drawn by the seed: deal train out to so many folds, the same ones for all seeds ..."""
    fold: int = Field(1, ge=1, le=10_000)
    """... of which this one, counted from 1, is the inner split. All folds together leave each stimulus out once."""
    metric: Literal["r2", "explained_variance", "mse", "pearson_r", "top1"] | None = None
    """What must improve; by default r2, or top1 for classification."""
    patience: int = Field(20, ge=1, le=1_000_000)
    """Stop after this many epochs in a row without improvement."""


class Checkpoint(Settings):
    """When a run is saved, and what of it is kept."""

    every_steps: int | None = Field(None, ge=1, le=10**9)
    """Save after every so many optimizer steps as well as after each epoch."""
    keep: int = Field(2, ge=1, le=10_000)
    """How many of the last checkpoints to keep, beside the best: a damaged one is passed over for the one before."""


class Faults(Settings):
    """What a run puts up with."""

    timeout: float = Field(300.0, ge=1, le=WEEK)
    """Seconds that processes wait for each other, from the second step on, before they give one up as lost."""
    start_timeout: float = Field(1800.0, ge=1, le=WEEK)
    """The same for joining and for the first step, which may compile, or read weights from far away."""
    bad_steps: int = Field(10, ge=1, le=1_000_000)
    """A step whose loss or gradient is not finite is left out; after so many in a row the run ends."""

    @property
    def timeouts(self) -> tuple[float, float]:
        """Seconds, until the first step is done and from then on."""
        return self.start_timeout, self.timeout


class Loader(Settings):
    """How images are read."""

    engine: Literal["indexed", "webdataset"] = "indexed"
    """`indexed` reads any stimulus from its tar; `webdataset` streams whole tars to train, drawn with replacement, and
    promises less (see docs/loading.md). Scores are always taken with `indexed`."""
    workers: int | None = Field(None, ge=0, le=256)
    """Decoding processes per rank; by default the cores a rank has beyond its first, at most 8."""
    cache: Literal["off", "ram", "disk", "auto"] = "auto"
    """Keep decoded images for the next epoch, once per machine for all its processes: in memory, in a nameless file
    in the temporary folder (TMPDIR), or nowhere; auto is ram unless images are read only once."""
    cache_gib: float | None = Field(None, ge=0, le=1e6)
    """Most that is kept of them on a machine; by default half of the memory (disk: space) that is free at the start.
    What does not fit is decoded each time."""
    order: Literal["shuffled", "blocks"] = "shuffled"
    """Of the training stimuli: any after any; or, for data larger than memory or than the copies of remote shards, the
    stimuli of a few shards mixed at a time, so that each shard is read in one stretch."""
    block_shards: int = Field(16, ge=1, le=1_000_000)
    """Of order blocks: shards that are mixed at a time. More mix better, and need more room."""
    shard_cache: Text | None = None
    """Of remote shards: folder for copies, shared by all runs on the machine; by default in ~/.cache."""
    shard_cache_gib: float | None = Field(None, gt=0, le=1e6)
    """Of remote shards: the most that is kept in that folder; by default half of what is free on its disk."""
    fetch_timeout: float = Field(30.0, gt=0, le=WEEK)
    """Of remote shards: seconds without an answer after which a connection is given up and made anew."""
    on_bad_sample: Annotated[Literal["stop", "skip"], tyro.conf.arg(aliases=("--on-bad-sample",))] = "stop"
    """A stimulus that cannot be read stops the run; or all are looked at before the first step, and the bad ones are
    left out, counted and named (see docs/security.md)."""

    @property
    def fetch(self) -> FetchSettings:
        """How remote shards are fetched and kept."""
        folder = None if self.shard_cache is None else Path(self.shard_cache).expanduser()
        return FetchSettings(folder, self.shard_cache_gib, self.fetch_timeout)

    @field_validator("cache", mode="before")
    @classmethod
    def _as_written(cls, value: Any) -> Any:
        return "off" if value is False else value  # which is what YAML makes of a bare off
