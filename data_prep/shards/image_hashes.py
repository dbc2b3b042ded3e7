"""Hashes that tell what an image is, whatever its stimulus is called: one of its bytes, one of its pixels."""

import hashlib
from collections.abc import Iterator

import numpy as np

from data_prep.common.image_decoding import decode
from data_prep.shards.members import IMAGE_MEMBERS, MEMBERS
from data_prep.splits import merged_groups

HASH_BYTES = 16  # of SHA-256's 32: enough that no two images of any recording have the same by chance
_IMAGE_COLUMNS = [MEMBERS.index(kind) for kind in IMAGE_MEMBERS]


def encoded_hash(data: bytes | memoryview) -> np.ndarray:
    """The hash of an image's encoded bytes, uint8 (16,)."""
    return _first_bytes(hashlib.sha256(data))


def pixel_hash(pixels: np.ndarray) -> np.ndarray:
    """The hash of an image as a network is shown it, before it is resized: uint8 (16,).

    Args:
        pixels: uint8 (H, W, 3).
    """
    digest = hashlib.sha256(f"{pixels.shape}".encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return _first_bytes(digest)


def pixel_hash_of(data: bytes | memoryview, encoding: str) -> np.ndarray:
    """`pixel_hash` of an encoded image; the hash of its bytes if it cannot be decoded, so that it equals no other's.

    Args:
        data: the encoded image.
        encoding: "jpg", "png" or "image.npy" (raw pixels).
    """
    try:
        return pixel_hash(decode(data, encoding))
    except ValueError:
        return encoded_hash(data)


def encoded_hashes(content: memoryview, extents: np.ndarray) -> np.ndarray:
    """`encoded_hash` of each image in a tar, uint8 (stimuli, 16).

    Args:
        content: of the tar.
        extents: offset and size of each member, int64 (stimuli, members, 2).
    """
    return _stacked([encoded_hash(data) for data, _ in _images(content, extents)])


def pixel_hashes(content: memoryview, extents: np.ndarray) -> np.ndarray:
    """`pixel_hash_of` each image in a tar, uint8 (stimuli, 16); arguments as for `encoded_hashes`."""
    return _stacked([pixel_hash_of(data, encoding) for data, encoding in _images(content, extents)])


def _images(content: memoryview, extents: np.ndarray) -> Iterator[tuple[memoryview, str]]:
    """The encoded image of each stimulus, empty if it has none, and its encoding."""
    for of_kind in extents[:, _IMAGE_COLUMNS].tolist():
        column = next((column for column, (offset, _) in enumerate(of_kind) if offset >= 0), 0)
        offset, size = of_kind[column]
        yield content[max(offset, 0) : max(offset, 0) + size], IMAGE_MEMBERS[column]


def first_equal(*hashes: np.ndarray) -> np.ndarray:
    """For each stimulus, the position of the first one that has a hash in common with it, directly or through others.

    Args:
        hashes: one or more arrays, uint8 (stimuli, 16).

    Returns:
        int64 (stimuli,).
    """
    numbers = [np.unique(of_kind.view(np.uint64), axis=0, return_inverse=True)[1].reshape(-1) for of_kind in hashes]
    return merged_groups(*numbers)


def _stacked(hashes: list[np.ndarray]) -> np.ndarray:
    return np.array(hashes, np.uint8).reshape(-1, HASH_BYTES)


def _first_bytes(digest: "hashlib._Hash") -> np.ndarray:
    return np.frombuffer(digest.digest()[:HASH_BYTES], np.uint8)
