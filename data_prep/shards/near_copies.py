"""Images that look alike without being the same: scaled, compressed again, a little brighter.

A small perceptual hash finds the candidates: the lowest frequencies of a thumbnail, as in pHash, but not reduced to
their signs, which are chance in smooth images. The correlation of their thumbnails confirms them. What is found is told
and not acted on.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from data_prep.common.image_decoding import DIRECT_COLOURS, rgb_image
from data_prep.common.progress import Progress
from data_prep.common.worker_processes import usable_cores
from data_prep.shards.folder import ShardFolder, ShardSplit
from data_prep.shards.image_identity import ImageIdentities, first_copies, image_identities

SIDE = 32  # pixels of a thumbnail
FREQUENCIES = 8  # along each axis, in the hash
LEAST_CORRELATION = 0.98  # of the hashes, and of the thumbnails, of images that look alike
LEAST_CONTRAST = 1.0  # grey levels, standard deviation: flat images look alike by nothing that could be seen
BLOCK = 1024  # images compared with all others at a time
SHOWN = 3  # pairs that are named


@dataclass(frozen=True)
class NearCopies:
    """Pairs of images that look alike and are not the same, those in train and held out first.

    Attributes:
        images: number of images that were compared.
        pairs: of "id (split)".
        across: how many of the pairs are in train and held out.
    """

    images: int
    pairs: list[tuple[str, str]]
    across: int

    def __str__(self) -> str:
        if not self.pairs:
            return f"near-copies: none among {self.images:,} images"
        examples = "; ".join(" and ".join(pair) for pair in self.pairs[:SHOWN])
        return (
            f"near-copies: {len(self.pairs):,} pairs among {self.images:,} images look alike without being the same, "
            f"{self.across:,} of them in train and held out, such as {examples}; look at them, and keep those that "
            "show the same in one split (a column that groups them, and --split grouped --split-by COLUMN)"
        )


def near_copies(folder: ShardFolder) -> NearCopies:
    """Compare all images of a folder; images of a remote one are fetched.

    Raises:
        BadInput: a shard is damaged.
        RunFailed: a shard cannot be fetched.
    """
    splits = [folder.split(name) for name in folder.manifest.splits]
    names = [f"{stimulus} ({split.name})" for split in splits for stimulus in split.stimulus_ids]
    is_train = np.concatenate([np.full(len(split), split.name == "train") for split in splits])
    same = first_copies(ImageIdentities.joined([image_identities(folder, split.name) for split in splits]))
    pairs = np.array(list(find_pairs(_thumbnails(splits))), np.int64).reshape(-1, 2)
    pairs = pairs[same[pairs[:, 0]] != same[pairs[:, 1]]]
    across = is_train[pairs[:, 0]] != is_train[pairs[:, 1]]
    ordered = pairs[np.argsort(~across, kind="stable")].tolist()
    return NearCopies(len(names), [(names[a], names[b]) for a, b in ordered], int(across.sum()))


def _thumbnails(splits: Sequence[ShardSplit]) -> np.ndarray:
    """Grey thumbnails of all images, float32 (stimuli, SIDE, SIDE); of zeros where one cannot be decoded."""
    wanted = [(split, position) for split in splits for position in range(len(split))]
    thumbnails = np.zeros((len(wanted), SIDE, SIDE), np.float32)

    def read(row: int) -> None:
        split, position = wanted[row]
        thumbnails[row] = thumbnail(*split.image(position))

    with Progress(len(wanted), "looking for near-copies") as progress, ThreadPoolExecutor(usable_cores()) as pool:
        for _ in pool.map(read, range(len(wanted))):
            progress.advance()
    return thumbnails


def thumbnail(data: memoryview, encoding: str) -> np.ndarray:
    """A grey thumbnail of an image, float32 (SIDE, SIDE); zeros if it cannot be decoded."""
    try:
        if encoding == "jpg" and simplejpeg.decode_jpeg_header(data)[2] in DIRECT_COLOURS:
            grey = simplejpeg.decode_jpeg(data, colorspace="GRAY", min_height=SIDE, min_width=SIDE, min_factor=1)
            image = Image.fromarray(grey[..., 0])
        else:
            image = rgb_image(data, encoding).convert("L")
    except ValueError:
        return np.zeros((SIDE, SIDE), np.float32)
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)


def find_pairs(thumbnails: np.ndarray) -> Iterator[tuple[int, int]]:
    """The positions of images that look alike, the lower one first.

    Args:
        thumbnails: float32 (stimuli, SIDE, SIDE).
    """
    spectra, standard = _spectra(thumbnails), _standardised(thumbnails)
    for start in range(0, len(spectra), BLOCK):
        rows, columns = np.nonzero(spectra[start : start + BLOCK] @ spectra[start:].T >= LEAST_CORRELATION)
        rows, columns = rows[columns > rows] + start, columns[columns > rows] + start
        for first in range(0, len(rows), BLOCK):
            a, b = rows[first : first + BLOCK], columns[first : first + BLOCK]
            alike = np.einsum("np,np->n", standard[a], standard[b]) >= LEAST_CORRELATION
            yield from zip(a[alike].tolist(), b[alike].tolist(), strict=True)


def _spectra(thumbnails: np.ndarray) -> np.ndarray:
    """The lowest frequencies of each thumbnail without its mean, of length 1: float32 (stimuli, frequencies)."""
    angles = np.pi / SIDE * (np.arange(SIDE) + 0.5) * np.arange(FREQUENCIES)[:, None]
    cosines = np.cos(angles).astype(np.float32)  # of the discrete cosine transform
    spectra = (cosines @ thumbnails @ cosines.T).reshape(len(thumbnails), -1)[:, 1:]
    return spectra / np.maximum(np.linalg.norm(spectra, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def _standardised(thumbnails: np.ndarray) -> np.ndarray:
    """Thumbnails of mean 0, whose products are correlations, float32 (stimuli, SIDE * SIDE); about 0 for flat ones."""
    flat = thumbnails.reshape(len(thumbnails), -1)
    centred = flat - flat.mean(axis=1, keepdims=True)
    spread = np.maximum(centred.std(axis=1, keepdims=True), LEAST_CONTRAST)
    return centred / (spread * SIDE)
