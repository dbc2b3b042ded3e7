"""A run, a probe or an ensemble that predicts responses to any images."""

import difflib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from data_prep.common.errors import BadInput
from data_prep.common.safe_reading import parse_json, read_regular_file
from spiketune.images import Images, batches
from train.evaluation.metrics_file import METRICS_FILE
from train.evaluation.predicting.image_predictor import ImagePredictor, NetworkInUnits
from train.evaluation.predicting.opening import open_predictor
from train.models.features import PIXELS, ImageFeatures, LayerFeatures, PixelFeatures
from train.models.layer_selection import readable_layers
from train.models.probe_network import ProbeNetwork
from train.run.folder import RunFolder
from train.run.predictor import float32_convolutions

if TYPE_CHECKING:
    from train.models.backbone import Backbone


def load(
    path: str | Path,
    recording: str | None = None,
    *,
    device: str | torch.device | None = None,
    checkpoint: Literal["best", "last"] = "best",
) -> "Predictor":
    """Load a run of train/finetune.py, a probe of train/probe.py, or an ensemble of train/evaluate.py.

    Nothing in the folder is executed, and the recording that it was fitted on is not needed.

    Args:
        path: folder.
        recording: for a run or an ensemble on several recordings: whose responses to predict.
        device: of torch, e.g. "cuda:1"; by default a GPU if there is one.
        checkpoint: of a fine-tuned run.

    Raises:
        BadInput: the folder is none of these or is damaged, or `recording` is missing or unknown.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.random.fork_rng(devices=[]):  # networks begin with random weights, which change no draw of the program
        opened = open_predictor(Path(path), recording, checkpoint)
    return Predictor(opened, torch.device(device), checkpoint)


class Predictor:
    """Predicts responses to images. `spiketune.load` makes it.

    Attributes:
        path: the folder that it was loaded from.
        kind: "run", "probe" or "ensemble".
        recording: whose responses it predicts.
        site_ids: in the order of the columns of `predict`; empty for a classifier.
        classes: in the order of the columns of `predict_classes`; empty for a network without.
        units: of `predict`, as in the recording.
        image_sizes: sides in pixels of what its networks see of an image.
        device: where it computes.
    """

    def __init__(self, opened: ImagePredictor, device: torch.device, checkpoint: str):
        self._opened, self._checkpoint = opened, checkpoint
        self.path, self.kind, self.recording, self.units = opened.path, opened.kind, opened.recording, opened.units
        self.site_ids, self.classes = list(opened.site_ids or []), list(opened.classes or [])
        self.image_sizes, self.device = opened.network.image_sizes, device
        opened.network.to(device)

    def __repr__(self) -> str:
        outputs = f"{len(self.site_ids)} sites" if self.site_ids else f"{len(self.classes)} classes"
        recording = f" of {self.recording}" if self.recording else ""
        return f"<spiketune.Predictor {self.path} ({self.kind}): {outputs}{recording}>"

    def predict(self, images: Images, batch_size: int = 32) -> np.ndarray:
        """Predict the responses of all sites.

        Images are prepared as data_prep/pack.py and the loader prepare them: turned as their EXIF data say,
        transparent parts on grey, the shorter side resized to `image_sizes` and the longer one cropped centrally.

        Args:
            images: paths, images of Pillow or uint8 arrays, of any sizes; or a single one.
            batch_size: images in one forward pass.

        Returns:
            float32 (images, sites), in `units`. NaN for a site that could not be fitted.

        Raises:
            BadInput: something is no image, or this is a classifier.
        """
        if not self.site_ids:
            raise BadInput(f"{self.path} predicts classes only; use predict_classes")
        rows = [np.empty((0, len(self.site_ids)), np.float32), *self._outputs(images, "rates", batch_size)]
        return np.concatenate(rows)

    def predict_classes(self, images: Images, batch_size: int = 32) -> np.ndarray:
        """Predict the probabilities of all `classes`, float32 (images, classes); arguments as for `predict`.

        Raises:
            BadInput: something is no image, or no classes were trained.
        """
        if not self.classes:
            raise BadInput(f"{self.path} predicts responses only; use predict")
        rows = [np.empty((0, len(self.classes)), np.float32)]
        for logits in self._outputs(images, "classes", batch_size):
            rows.append(torch.from_numpy(logits).softmax(1).numpy())
        return np.concatenate(rows)

    @torch.no_grad()
    def _outputs(self, images: Images, name: str, batch_size: int) -> Iterator[np.ndarray]:
        for batch in batches(images, self.image_sizes, batch_size):
            on_device = [pixels.to(self.device) for pixels in batch.values()]
            with float32_convolutions():
                outputs = self._opened.network(on_device)[name]
            yield outputs.cpu().numpy()

    # ------------------------------------------------------------------------------------------------------ features

    @property
    def layers(self) -> list[str]:
        """The modules of its network whose `features` can be read, and "pixels"; none for an ensemble."""
        if self.kind == "ensemble":
            return []
        backbone = self._backbone()
        return [PIXELS] if backbone is None else [PIXELS, *readable_layers(backbone, self.image_sizes[0])]

    @torch.no_grad()
    def features(self, layer: str, images: Images, *, pool: int | None = None, batch_size: int = 32) -> np.ndarray:
        """The activations of a layer of its network.

        Args:
            layer: one of `layers`.
            images: as for `predict`.
            pool: maps are averaged to at most pool x pool positions; by default they are kept whole.
            batch_size: images in one forward pass.

        Returns:
            float32 (images, features); those of a map channel after channel.

        Raises:
            BadInput: there is no such layer, or this is an ensemble.
        """
        extractor, rows = self._extractor(layer, pool), []
        for batch in batches(images, self.image_sizes, batch_size):
            pixels = batch[self.image_sizes[0]].to(self.device)
            with float32_convolutions():
                activations = extractor(pixels)[layer]
            rows.append(activations.cpu().numpy())
        if not rows:
            raise BadInput("no images are given")
        return np.concatenate(rows)

    def _extractor(self, layer: str, pool: int | None) -> ImageFeatures:
        if self.kind == "ensemble":
            raise BadInput(f"{self.path} is an ensemble of several networks; load one of its members to read features")
        if layer == PIXELS:
            return PixelFeatures()
        backbone = self._backbone()
        if backbone is None:
            raise BadInput(f"{self.path} reads the pixels; it has no layer {layer!r}")
        layers = self.layers
        if layer not in layers:
            near = difflib.get_close_matches(layer, layers, n=3) or layers[:3]
            raise BadInput(f"{self.path} has no layer {layer!r} with an output; nearest are {', '.join(near)}")
        return LayerFeatures(backbone, [layer], pool)

    def _backbone(self) -> "Backbone | None":
        match self._opened.network.networks[0]:
            case NetworkInUnits() as module:
                return module.network.backbone
            case ProbeNetwork() as module:
                return module.backbone
        return None

    # -------------------------------------------------------------------------------------------------------- scores

    def scores(self, split: str = "val") -> Any:
        """The scores of every site on a split, as train/evaluate.py or train/probe.py has written them.

        Args:
            split: val, test, train or cv; it must have been scored.

        Returns:
            A pandas DataFrame with a row for each site and a column for each metric (docs/metrics.md), NaN where a
            site has no value; without pandas a list of dicts, one for each site.

        Raises:
            BadInput: the split has not been scored.
        """
        path = RunFolder(self.path).results_on(split, self.recording, self._checkpoint) / METRICS_FILE
        try:
            regression = parse_json(read_regular_file(path))["regression"]
            rows = _rows(regression, self.site_ids)
        except FileNotFoundError:
            other = "" if self._checkpoint == "best" else f" --checkpoint {self._checkpoint}"
            raise BadInput(
                f"{path} is missing; score the split first (train/evaluate.py {self.path} --split {split}{other})"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{path} has no scores of its {len(self.site_ids)} sites ({error})") from None
        try:
            import pandas
        except ImportError:
            return rows
        return pandas.DataFrame(rows)


def _rows(regression: Mapping[str, Any], site_ids: list[str]) -> list[dict[str, Any]]:
    """The metrics of each site, by name."""
    columns = {
        name: block["per_site"] for name, block in regression.items() if isinstance(block, dict) and "per_site" in block
    }
    rows: list[dict[str, Any]] = [{"site_id": site} for site in site_ids]
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row[name] = math.nan if value is None else float(value)
    return rows
