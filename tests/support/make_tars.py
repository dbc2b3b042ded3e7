"""Make plain tars with an image and responses per stimulus, without manifest or index."""

import io
import tarfile
from pathlib import Path

import numpy as np
from make_sources import encode, make_images

IMAGES, OBJECTS = make_images(20, size=24)
RATES = np.random.default_rng(0).normal(10, 2, (20, 5)).astype(np.float32)
RATES[3, 1] = np.nan


def npy(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def sample(row: int, **members: bytes) -> dict[str, bytes]:
    """The encoded members of a stimulus, by kind."""
    return {"png": encode(IMAGES[row], "png"), "rates.npy": npy(RATES[row])} | members


def write_tar(path: Path, members: list[tuple[str, bytes]], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def members_of(samples: dict[str, dict[str, bytes]]) -> list[tuple[str, bytes]]:
    return [(f"{key}.{kind}", data) for key, kinds in samples.items() for kind, data in kinds.items()]


def write_samples(path: Path, rows, prefix="s", **options) -> Path:
    return write_tar(path, members_of({f"{prefix}{row:02d}": sample(row) for row in rows}), **options)
