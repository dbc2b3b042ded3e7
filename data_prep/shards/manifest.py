"""manifest.json, which describes a shard folder, as a typed and checked model."""

import hashlib
import json
import math
import shlex
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from data_prep.ceiling import RANDOM_SPLITS, SPLIT_SEED, CeilingEstimate
from data_prep.common.atomic_writes import write_bytes
from data_prep.common.errors import BadInput
from data_prep.common.safe_reading import LONGEST_NAME, is_name, parse_json, read_regular_file
from data_prep.common.validation_messages import first_fault
from data_prep.recording import varies

FORMAT_VERSION: Final = 1
MOST_STIMULI, MOST_BYTES = 10**9, 2**50  # of a split, of a shard; a manifest that claims more is damaged or malicious
STIMULUS_TABLE = "stimuli.csv"  # of a recording that is not packed yet
LARGEST_SIDE = 2**16  # pixels


def _named(text: str) -> str:
    if not is_name(text):
        raise ValueError(f"must be a printable line of at most {LONGEST_NAME} characters")
    return text


Name = Annotated[str, AfterValidator(_named)]
Count = Annotated[int, Field(ge=1, le=MOST_STIMULI)]
Bytes = Annotated[int, Field(ge=1, le=MOST_BYTES)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
SplitName = Annotated[str, Field(pattern="^(train|val|test)$")]
TableName = Annotated[str, Field(pattern=r"^(index|targets)\.npz$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Shard(_Strict):
    """One tar file of a split."""

    file: str = Field(pattern=r"^(?:[A-Za-z0-9_-][A-Za-z0-9_.-]*/)?[A-Za-z0-9_.-]+\.tar$")
    stimuli: Count
    bytes: Bytes
    sha256: Sha256


class Table(_Strict):
    """A table beside the shards: index.npz, targets.npz."""

    bytes: Bytes
    sha256: Sha256

    @classmethod
    def of(cls, path: Path) -> "Table":
        """The entry of a file."""
        with path.open("rb") as file:
            return cls(bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


class Split(_Strict):
    """The shards of one split; `responses`: whether its stimuli have rates."""

    stimuli: Count
    responses: bool
    shards: list[Shard] = Field(min_length=1)


class Image(_Strict):
    """Size in pixels and mode of the images; `mixed` if they differ (then width and height are the largest)."""

    width: int = Field(ge=1, le=LARGEST_SIDE)
    height: int = Field(ge=1, le=LARGEST_SIDE)
    mode: Name
    mixed: bool = False

    @property
    def side(self) -> int:
        """Side in pixels of the square that a network sees by default."""
        return min(self.width, self.height)

    @classmethod
    def of(cls, images: set[tuple[int, int, str]]) -> "Image":
        """The entry for images of these widths, heights and modes."""
        widths, heights, modes = zip(*images, strict=True)
        mode = modes[0] if len(set(modes)) == 1 else "mixed"
        return cls(width=max(widths), height=max(heights), mode=mode, mixed=len(images) > 1)


class Rates(_Strict):
    """Per-site mean and standard deviation over the train split; null for a site never recorded there."""

    units: Name
    mean: list[float | None]
    std: list[Annotated[float, Field(ge=0)] | None]

    @classmethod
    def of(cls, train: np.ndarray, units: str) -> "Rates":
        """The statistics of responses, float32 (stimuli, sites), NaN = not recorded."""
        present = ~np.isnan(train)
        count = present.sum(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.where(present, train, 0).sum(axis=0, dtype=np.float64) / count
            variance = np.square(np.where(present, train - mean, 0)).sum(axis=0) / count
        return cls(units=units, mean=to_json_list(mean), std=to_json_list(np.sqrt(variance)))

    def fitted_sites(self) -> np.ndarray:
        """Which sites a model can be fitted to, bool (sites,): those whose training responses vary.

        The others have no score, whatever a model predicts for them.
        """
        mean, std = from_json_list(self.mean), from_json_list(self.std)
        return varies(np.array(2), 2 * std**2, mean)


Interval = Annotated[list[float], Field(min_length=2, max_length=2)]


class Ceiling(_Strict):
    """Noise ceilings estimated from trials (see `data_prep/ceiling.py`); null where a site has no estimate.

    Attributes:
        method: by which `reliability` was estimated.
        random_splits, seed: of `split_half`.
        stimuli: number of stimuli with at least two repetitions.
        repetitions: "min", "mean" and "max" over these stimuli.
        reliability: of the trial average, per site; scores are compared with it.
        ci95: of the reliability, per site, over stimuli; `mean_ci95`: of its mean over sites. Older folders have
            neither, and their reliability is the split-half estimate.
        split_half: the Spearman-Brown estimate of the reliability.
        ncsnr, noise_ceiling: of Allen et al. 2022; the ceiling as a share, 0..1.
        explainable_share: of the variance of single trials, Cadena et al. 2019.
    """

    method: Name
    random_splits: int
    seed: int
    stimuli: int
    repetitions: dict[Literal["min", "mean", "max"], float]
    reliability: list[Annotated[float, Field(le=1)] | None]  # can be far below 0 where there is little signal
    ci95: list[Interval | None] | None = None
    mean_ci95: Interval | None = None
    split_half: list[float | None] | None = None
    ncsnr: list[float | None] | None = None
    noise_ceiling: list[float | None] | None = None
    explainable_share: list[float | None] | None = None

    @classmethod
    def from_estimate(cls, estimate: CeilingEstimate) -> "Ceiling":
        """The estimate for JSON: null for NaN."""
        repetitions = estimate.repetitions
        return cls(
            method="variance components of repetitions and stimuli, unbiased",
            random_splits=RANDOM_SPLITS,
            seed=SPLIT_SEED,
            stimuli=len(repetitions),
            repetitions={"min": repetitions.min(), "mean": repetitions.mean(), "max": repetitions.max()},
            reliability=to_json_list(estimate.reliability),
            ci95=estimate.ci95,
            mean_ci95=estimate.mean_ci95,
            split_half=to_json_list(estimate.split_half),
            ncsnr=to_json_list(estimate.ncsnr),
            noise_ceiling=to_json_list(estimate.noise_ceiling),
            explainable_share=to_json_list(estimate.explainable_share),
        )

    def facts(self) -> dict[str, Any]:
        """The facts to report beside a score that uses the reliability."""
        facts: dict[str, Any] = {"method": self.method}
        if self.mean_ci95 is not None:
            facts["ci95"] = self.mean_ci95
        return facts


class Manifest(_Strict):
    """The whole of manifest.json."""

    format: Literal["spiketune-shards"] = "spiketune-shards"
    format_version: Literal[1] = FORMAT_VERSION
    name: Name
    simulated: bool
    provenance: dict[str, Any]
    splits: dict[SplitName, Split]
    sites: list[dict[str, Any]]  # empty for a folder with labels only
    classes: list[Name] | None
    image: Image
    rates: Rates
    response_window_ms: tuple[float, float] | None
    group_by: Name | None = None
    ceiling: Ceiling | None = None
    truth: dict[str, Any] | None = None
    files: dict[TableName, Table] = {}
    checksum: Sha256 | None = None  # of everything else, so that a flipped digit is noticed; see `save`

    @field_validator("provenance")
    @classmethod
    def _check_shown_facts(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Check the entries that data_prep/shards/summary.py shows."""
        warnings, straddling = value.get("warnings", []), value.get("straddling", {})
        if not isinstance(warnings, list) or not all(isinstance(text, str) for text in warnings):
            raise ValueError("warnings must be a list of sentences")
        if not isinstance(straddling, dict) or not all(
            isinstance(counts, dict) and {"groups", "of"} <= counts.keys() for counts in straddling.values()
        ):
            raise ValueError("straddling must have groups and of for each fact")
        _check_copies(value.get("copies"))
        images = value.get("images") or {}
        if not isinstance(images, dict) or not all(isinstance(fact, bool | int | str) for fact in images.values()):
            raise ValueError("images must hold plain facts")
        return value

    @property
    def fingerprint(self) -> str:
        """A hash of all shards' hashes: the same for two folders with the same data."""
        shards = [shard.sha256 for split in self.splits.values() for shard in split.shards]
        return hashlib.sha256("".join(shards).encode()).hexdigest()

    @property
    def site_ids(self) -> list[str]:
        """The ids of the sites, in the order of the columns of every rates member."""
        return [str(site["id"]) for site in self.sites]

    def save(self, path: Path) -> None:
        """Write the manifest as JSON, with the checksum of its content."""
        content = self.model_dump(mode="json", exclude={"checksum"})
        content["checksum"] = _checksum(content)
        write_bytes(path, f"{json.dumps(content, indent=1, allow_nan=False)}\n".encode())


def _check_copies(facts: Any) -> None:
    """Check what data_prep/shards/copies.py wrote, as far as a summary shows it.

    Raises:
        ValueError: it is of another form.
    """
    if facts is None:
        return
    if not isinstance(facts, dict) or not {"stimuli", "images", "compared"} <= facts.keys():
        raise ValueError("copies must have stimuli, images and compared")
    counts = ("stimuli", "images", "in_several_splits", "in_train_and_held_out")
    if not all(isinstance(facts.get(name, 0), int) for name in counts):
        raise ValueError(f"copies: {', '.join(counts)} must be numbers of images or stimuli")
    examples = facts.get("examples", [])
    has_examples = isinstance(examples, list) and examples and all(isinstance(example, dict) for example in examples)
    if "in_several_splits" in facts and not ("in_train_and_held_out" in facts and has_examples):
        raise ValueError("copies in several splits need in_train_and_held_out and examples")


def _checksum(content: dict[str, Any]) -> str:
    """A hash of a manifest's content that does not depend on its layout."""
    rest = {name: value for name, value in content.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def load_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a shard folder.

    Raises:
        BadInput: no such folder, no manifest in it, or a manifest that is damaged or of another format version.
    """
    path = folder / "manifest.json"
    if not folder.is_dir():
        raise BadInput(f"{folder} is not a folder; give a shard folder made by data_prep/pack.py")
    if not path.is_file() and (folder / STIMULUS_TABLE).is_file():
        raise BadInput(
            f"{folder} is not packed yet (it has {STIMULUS_TABLE} and no manifest.json); pack it, and give the folder "
            f"that this makes: python data_prep/pack.py folder {shlex.quote(str(folder))} --out "
            f"{shlex.quote(f'{folder}_packed')}"
        )
    if not path.is_file():
        raise BadInput(
            f"{folder} has no manifest.json, so it is not a (finished) shard folder, and it contains no tars"
        )
    try:
        content = read_regular_file(path)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read ({error})") from None
    return parse_manifest(content, path)


def parse_manifest(content: bytes, path: Path | str) -> Manifest:
    """Check the content of a manifest.json.

    Args:
        content: of the file.
        path: of the file, for messages.

    Raises:
        BadInput: it is damaged or of another format version.
    """
    try:
        fields = parse_json(content)
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        raise BadInput(f"{path}: {first_fault(error)}; pack the recording again") from None
    except ValueError as error:
        raise BadInput(f"{path} is not readable as JSON ({error}); pack the recording again") from None
    _check_names(manifest, path)
    _check_lengths(manifest, path)
    if manifest.checksum not in (None, _checksum(fields)):
        raise BadInput(
            f"{path} is damaged or was edited (its checksum differs); copy it again, or, if you edited it, remove the "
            "line with the checksum"
        )
    return manifest


def _check_names(manifest: Manifest, path: Path | str) -> None:
    sites = len(manifest.sites)
    ids = [site.get("id") for site in manifest.sites]
    if None in ids or len(set(map(str, ids))) != sites:
        raise BadInput(f"{path}: sites: each of the {sites} sites needs its own id")
    for site_id in map(str, ids):
        if not is_name(site_id):
            raise BadInput(f"{path}: sites: the id {site_id[:100]!r} is not printable or too long")
    if manifest.classes is not None and len(set(manifest.classes)) != len(manifest.classes):
        raise BadInput(f"{path}: classes: two have the same name, so labels are ambiguous")
    count_of = Counter(shard.file for split in manifest.splits.values() for shard in split.shards)
    for file, count in count_of.items():
        if count > 1:
            raise BadInput(f"{path}: splits: {file} is listed twice; each tar belongs to one split, once")


def _check_lengths(manifest: Manifest, path: Path | str) -> None:
    sites, ceiling = len(manifest.sites), manifest.ceiling
    lists: dict[str, list | None] = {"rates.mean": manifest.rates.mean, "rates.std": manifest.rates.std}
    if ceiling is not None:
        names = ("reliability", "ci95", "split_half", "ncsnr", "noise_ceiling", "explainable_share")
        lists |= {f"ceiling.{name}": getattr(ceiling, name) for name in names}
    for name, values in lists.items():
        if values is not None and len(values) != sites:
            raise BadInput(f"{path}: {name} has {len(values)} values for {sites} sites; pack the recording again")
    unrecorded = [mean is None for mean in manifest.rates.mean]
    if unrecorded != [std is None for std in manifest.rates.std]:
        raise BadInput(f"{path}: rates: a site has a mean but no std, or the reverse; pack the recording again")
    for name, split in manifest.splits.items():
        counted = sum(shard.stimuli for shard in split.shards)
        if counted != split.stimuli:
            raise BadInput(f"{path}: splits.{name}.stimuli is {split.stimuli}, but its shards hold {counted}")


def to_json_list(values: Iterable[float]) -> list[float | None]:
    """Floats for JSON, which has no NaN: values that are not finite become null."""
    return [float(value) if math.isfinite(value) else None for value in values]


def from_json_list(values: Iterable[float | None]) -> np.ndarray:
    """The inverse of `to_json_list`: float64, null becomes NaN."""
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)
