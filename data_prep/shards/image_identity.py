"""What the images of a split are, by content: two stimuli with the same image are one, whatever they are called."""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np

from data_prep.common import locks
from data_prep.common.atomic_writes import write_npz
from data_prep.common.errors import BadInput, CannotWrite
from data_prep.common.image_decoding import DECODER
from data_prep.common.progress import Progress
from data_prep.common.safe_reading import read_npz
from data_prep.common.worker_processes import usable_cores
from data_prep.remote.cache import user_cache
from data_prep.shards.folder import ShardFolder, ShardSplit
from data_prep.shards.image_hashes import HASH_BYTES, encoded_hash, first_equal, pixel_hash_of


@dataclass(frozen=True)
class ImageIdentities:
    """The hashes of a split's images, in the order of its stimuli.

    Attributes:
        encoded: of the encoded bytes, uint8 (stimuli, 16).
        pixels: of the pixels as a network is shown them, uint8 (stimuli, 16).
    """

    encoded: np.ndarray
    pixels: np.ndarray

    def at(self, positions: np.ndarray) -> "ImageIdentities":
        """Those of the stimuli at these positions."""
        return ImageIdentities(self.encoded[positions], self.pixels[positions])

    def names(self) -> Iterator[tuple[bytes, bytes]]:
        """Two names of each image; stimuli that have one of them in common show the same image."""
        for encoded, pixels in zip(self.encoded, self.pixels, strict=True):
            yield b"encoded " + encoded.tobytes(), b"pixels " + pixels.tobytes()

    @classmethod
    def joined(cls, parts: "Sequence[ImageIdentities]") -> "ImageIdentities":
        """Those of several sets of stimuli, one after the other."""
        return cls(np.concatenate([part.encoded for part in parts]), np.concatenate([part.pixels for part in parts]))


_computed: WeakKeyDictionary[ShardFolder, dict[str, ImageIdentities]] = WeakKeyDictionary()


def image_identities(folder: ShardFolder, split: str, silent: bool = False) -> ImageIdentities:
    """What the images of a split are: as its index says, else by reading and decoding each once.

    What had to be computed is kept in the user's cache folder. Images of a remote folder are fetched for it.

    Args:
        folder: opened.
        split: its name.
        silent: show no progress, as on all ranks but the first.

    Raises:
        BadInput: the folder has no such split, or a remote shard is damaged.
        RunFailed: a shard cannot be fetched.
    """
    opened = folder.split(split)
    if opened.encoded_hash is not None and opened.pixel_hash is not None:
        return ImageIdentities(opened.encoded_hash, opened.pixel_hash)
    known = _computed.setdefault(folder, {})
    if split not in known:
        known[split] = _from_cache(opened, silent)
    return known[split]


def first_copies(identities: ImageIdentities) -> np.ndarray:
    """For each stimulus, the position of the first one with the same image (its own, if there is none before it).

    Images are the same if their bytes or their pixels are; int64 (stimuli,).
    """
    return first_equal(identities.encoded, identities.pixels)


# ------------------------------------------------------------------------- folders whose index does not hold the hashes


def _from_cache(split: ShardSplit, silent: bool) -> ImageIdentities:
    """The hashes as kept by an earlier call, else computed and kept; without a cache folder, computed."""
    path = _cache_path(split)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = locks.exclusive(path.with_suffix(".lock"), required=False)
            stack.enter_context(lock)  # the first process computes, the others read its result
        identities = _load(path, len(split))
        if identities is None:
            identities = compute_identities(split, silent)
            with contextlib.suppress(CannotWrite):
                write_npz(path, {"encoded": identities.encoded, "pixels": identities.pixels})
        return identities


def _cache_path(split: ShardSplit) -> Path:
    shards = [shard.sha256 for shard in split.shards]
    key = hashlib.sha256("\n".join([DECODER, *shards]).encode()).hexdigest()[:32]
    return user_cache() / "images" / f"{key}.npz"


def _load(path: Path, stimuli: int) -> ImageIdentities | None:
    try:
        arrays = read_npz(path)
        identities = ImageIdentities(arrays["encoded"], arrays["pixels"])
    except (OSError, ValueError, KeyError):
        return None
    shapes = {(array.dtype, array.shape) for array in (identities.encoded, identities.pixels)}
    return identities if shapes == {(np.dtype(np.uint8), (stimuli, HASH_BYTES))} else None


def compute_identities(split: ShardSplit, silent: bool = False) -> ImageIdentities:
    """Read and decode every image of a split; see `image_identities`."""
    encoded = np.empty((len(split), HASH_BYTES), np.uint8)
    pixels = np.empty((len(split), HASH_BYTES), np.uint8)

    def hash_image(position: int) -> None:
        try:
            data, encoding = split.image(position)
        except BadInput:
            if split.is_remote:
                raise
            data, encoding = memoryview(split.location(position).encode()), "jpg"  # damaged: it equals no other
        encoded[position], pixels[position] = encoded_hash(data), pixel_hash_of(data, encoding)

    label = f"comparing the images of {split.manifest.name}, {split.name}"
    with Progress(len(split), label, silent=silent) as progress, ThreadPoolExecutor(usable_cores()) as pool:
        for _ in pool.map(hash_image, range(len(split))):
            progress.advance()
    return ImageIdentities(encoded, pixels)
