"""Make small recordings for tests: smooth random images, and rates that depend linearly on them plus noise."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)
OBJECTS = ("apple", "bear", "café", "dog", "elephant", "face", "gull", "house")
GRID = 4  # the images are GRID x GRID colours, smoothly enlarged


@dataclass
class RecordingContent:
    """The content of a small recording that was written.

    Attributes:
        images: uint8 (stimuli, size, size, 3).
        objects: one name per stimulus.
        rates: float32 (stimuli, sites), the average over trials where there are trials.
        trials: float32 (stimuli, repetitions, sites) NaN-padded, or None.
        ids: stimulus ids.
        splits: split per stimulus, or None where none was written.
    """

    images: np.ndarray
    objects: list[str]
    rates: np.ndarray
    trials: np.ndarray | None
    ids: list[str]
    splits: list[str] | None


def make_images(n: int, size: int = 32, n_objects: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Smooth random images, alike for images of the same object.

    Returns:
        uint8 (n, size, size, 3), and the object's number int (n,); every object comes up when n >= n_objects.
    """
    rng = np.random.default_rng([seed, 1])
    prototypes = rng.uniform(size=(n_objects, GRID, GRID, 3))
    label = rng.permutation(np.arange(n) % n_objects)
    colours = 0.6 * prototypes[label] + 0.4 * rng.uniform(size=(n, GRID, GRID, 3))
    small = np.round(255 * colours).astype(np.uint8)
    large = [Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC) for image in small]
    return np.stack([np.asarray(image) for image in large]), label


def mean_rates(images: np.ndarray, sites: int, seed: int = 0) -> np.ndarray:
    """Noise-free rates float (n, sites): about 10 +- 2, linear in the images' coarse colours."""
    rng = np.random.default_rng([seed, 2])
    coarse = [Image.fromarray(image).resize((GRID, GRID), Image.Resampling.BOX) for image in images]
    colours = np.stack([np.asarray(image, np.float64).ravel() for image in coarse]) / 255 - 0.5
    weights = rng.normal(size=(colours.shape[1], sites))
    return 10 + 8 * colours @ weights / np.sqrt(len(weights))


def normalise(images: np.ndarray) -> np.ndarray:
    """Normalise images (n, H, W, 3) in 0..255 to float32 (n, 3, H, W) as torchvision does for ImageNet."""
    return ((images.astype(np.float32) / 255 - MEAN) / STD).transpose(0, 3, 1, 2)


def make_it_h5(
    path: Path,
    n_train: int = 24,
    n_val: int = 8,
    n_test: int = 8,
    size: int = 32,
    sites: int = 10,
    n_objects: int = 4,
    noise: float = 0.5,
    seed: int = 0,
    chunks: int | None = None,
) -> dict[str, RecordingContent]:
    """Write a small file with the schema of the course's IT_data.h5; returns its content by split."""
    n = {"train": n_train, "val": n_val, "test": n_test}
    images, label = make_images(sum(n.values()), size, n_objects, seed)
    rates = mean_rates(images, sites, seed)
    rates = (rates + noise * np.random.default_rng([seed, 3]).normal(size=rates.shape)).astype(np.float32)
    contents, start = {}, 0
    with h5py.File(path, "w") as file:
        for split, count in n.items():
            rows = slice(start, start + count)
            objects = [OBJECTS[k % len(OBJECTS)] for k in label[rows]]
            ids = [f"{split}_{i:05d}" for i in range(count)]
            chunked = None if chunks is None else (min(chunks, count), 3, size, size)
            file.create_dataset(f"stimulus_{split}", data=normalise(images[rows]), chunks=chunked)
            file[f"object_{split}"] = np.array([name.encode("latin-1") for name in objects])
            if split != "test":
                file[f"spikes_{split}"] = rates[rows]
            contents[split] = RecordingContent(images[rows], objects, rates[rows], None, ids, [split] * count)
            start += count
    return contents


def encode(image: np.ndarray, encoding: str) -> bytes:
    """Encode uint8 (H, W, 3) as png, jpg, bmp, tiff, gif ..."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format={"jpg": "JPEG"}.get(encoding, encoding.upper()))
    return file.getvalue()


def make_folder(
    path: Path,
    n: int = 40,
    size: int = 32,
    sites: int = 10,
    n_objects: int = 4,
    rates: str | None = "npy",
    trials: int = 0,
    encoding: str = "png",
    splits: bool = False,
    site_table: bool = False,
    noise: float = 0.5,
    seed: int = 0,
) -> RecordingContent:
    """Write a recording for the source `folder`.

    Args:
        path: the folder to make.
        n: number of stimuli.
        size: of the images, pixels.
        sites: number of sites.
        n_objects: number of different objects.
        rates: "npy", "csv", "parquet", or None to write none (then give `trials`).
        trials: repetitions; with more than one, every third stimulus lacks the last.
        encoding: of the images.
        splits: whether to write a column split (60 % train, 20 % val, 20 % test).
        site_table: whether to write sites.csv.
        noise: standard deviation of a single trial, or of the rates where there are no trials.
        seed: of everything.
    """
    path.mkdir(parents=True, exist_ok=True)
    (path / "images").mkdir(exist_ok=True)
    images, label = make_images(n, size, n_objects, seed)
    single = mean_rates(images, sites, seed)[:, None]
    single = single + noise * np.random.default_rng([seed, 3]).normal(size=(n, max(1, trials), sites))
    if trials > 1:
        single[::3, -1] = np.nan
    single = single.astype(np.float32)
    average = np.nanmean(single.astype(np.float64), axis=1).astype(np.float32)
    ids = [f"stim{i:04d}" for i in range(n)]
    objects = [OBJECTS[k % len(OBJECTS)] for k in label]
    split_names = [("train", "train", "train", "val", "test")[i % 5] for i in range(n)] if splits else None
    for name, image in zip(ids, images, strict=True):
        (path / "images" / f"{name}.{encoding}").write_bytes(encode(image, encoding))
    columns = {
        "stimulus_id": ids,
        "image": [f"images/{name}.{encoding}" for name in ids],
        "object": objects,
        "category": [("thing", "being")[k % 2] for k in label],
        "session": [i // 5 for i in range(n)],
    }
    if split_names:
        columns["split"] = split_names
    write_csv(path / "stimuli.csv", columns)
    site_ids = [f"n{k}" for k in range(sites)]
    if rates:
        write_rates(path / f"rates.{rates}", average, ids, site_ids)
    if trials:
        np.save(path / "trials.npy", single)
    if site_table:
        write_csv(
            path / "sites.csv", {"id": site_ids, "region": ["V4"] * sites, "depth": [0.5 + k for k in range(sites)]}
        )
    return RecordingContent(images, objects, average, single if trials else None, ids, split_names)


def write_rates(path: Path, rates: np.ndarray, ids: list[str], site_ids: list[str]) -> None:
    """Write rates (stimuli, sites) in the format of the file's suffix."""
    if path.suffix == ".npy":
        np.save(path, rates)
        return
    columns = {"stimulus_id": list(ids)} | {name: rates[:, k] for k, name in enumerate(site_ids)}
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    else:
        write_csv(path, columns)


def write_csv(path: Path, columns: dict[str, list]) -> None:
    """Write columns of equal length as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
