"""Other libraries' loaders for benchmarks/loader.py, each as its documentation shows it, in one process.

None of them is needed for anything else. They ask for older numpy and transformers than the project has been tested
with, and FFCV is built with the headers of OpenCV 4 and libjpeg-turbo (Debian: libopencv-dev libturbojpeg0-dev
pkg-config), so give them an environment of their own:

    python -m venv rivals && rivals/bin/pip install . mosaicml-streaming litdata ffcv
    PYTHONPATH=. rivals/bin/python benchmarks/loader.py
"""

import importlib.util
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import torchvision
import webdataset
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

DEFAULT = "WebDataset, its default (pil)"
TO_NETWORK = transforms.Compose(
    [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
)

Read = Callable[[], int]
Decode = Callable[[bytes], torch.Tensor]
Prepare = Callable[[list[Path], Path, int, Any], Read]
"""Of the images' files, a folder for what the library writes, the batch, and what the variant needs."""


def by_pillow(data: bytes) -> torch.Tensor:
    """float32 (3, H, W), normalised, as everyone does it."""
    return TO_NETWORK(Image.open(io.BytesIO(data)).convert("RGB"))


def by_simplejpeg(data: bytes) -> torch.Tensor:
    """uint8 (H, W, 3), by the decoder that ours uses."""
    return torch.from_numpy(simplejpeg.decode_jpeg(data))


DECODERS = {"PIL": by_pillow, "simplejpeg": by_simplejpeg}


def count(batches: Iterable[torch.Tensor]) -> int:
    """Read everything; returns how many images there were."""
    return sum(len(images) for images in batches)


def of_webdataset(tars: list[Path], batch: int, *decoders) -> Read:
    """WebDataset's pipeline as in its documentation: float32, normalised, from `pil`; uint8 from one's own decoder."""
    urls = [str(tar) for tar in tars]
    change = TO_NETWORK if decoders == ("pil",) else torch.from_numpy

    def read() -> int:
        dataset = webdataset.WebDataset(urls, shardshuffle=False).decode(*decoders).to_tuple("jpg").map_tuple(change)
        return count(images for (images,) in dataset.batched(batch))

    return read


def quick_decoder(key: str, data: bytes) -> np.ndarray | None:
    """A decoder for WebDataset."""
    return simplejpeg.decode_jpeg(data) if key.endswith("jpg") else None


def of_torchvision(images: Path, batch: int) -> Read:
    """A folder of files, read by PIL."""
    files = torchvision.datasets.ImageFolder(images, TO_NETWORK)
    return lambda: count(images for images, _ in DataLoader(files, batch))


def of_mosaicml(files: list[Path], folder: Path, batch: int, decode: Decode) -> Read:
    """MosaicML streaming: encoded images in MDS shards of this machine."""
    from streaming import MDSWriter, StreamingDataset

    if not folder.exists():
        with MDSWriter(out=str(folder), columns={"image": "bytes"}) as writer:
            for file in files:
                writer.write({"image": file.read_bytes()})

    class Images(StreamingDataset):
        def __getitem__(self, index):
            return decode(super().__getitem__(index)["image"])

    dataset = Images(local=str(folder), batch_size=batch, shuffle=False)
    return lambda: count(DataLoader(dataset, batch))


def as_it_is(file: str) -> dict[str, bytes]:
    """What LitData stores of an image."""
    return {"image": Path(file).read_bytes()}


def of_litdata(files: list[Path], folder: Path, batch: int, decode: Decode) -> Read:
    """LitData: encoded images in chunks of this machine."""
    import litdata

    if not folder.exists():
        names = [str(file) for file in files]
        litdata.optimize(fn=as_it_is, inputs=names, output_dir=str(folder), chunk_bytes="64MB", num_workers=1)

    class Images(litdata.StreamingDataset):
        def __getitem__(self, index):
            return decode(super().__getitem__(index)["image"])

    dataset = Images(str(folder), shuffle=False)
    return lambda: count(litdata.StreamingDataLoader(dataset, batch_size=batch))


@dataclass
class Pillows:
    """The images as FFCV's writer asks for them, which may send them to another process."""

    files: list[Path]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image]:
        return (Image.open(self.files[index]).convert("RGB"),)


def of_ffcv(files: list[Path], folder: Path, batch: int, mode: str) -> Read:
    """FFCV, which re-encodes images (`jpg`, at the same quality) or keeps their pixels (`raw`)."""
    from ffcv.fields import RGBImageField
    from ffcv.fields.decoders import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import ToTensor
    from ffcv.writer import DatasetWriter

    file = folder.with_name(f"{folder.name}_{mode}.beton")
    writer = DatasetWriter(str(file), {"image": RGBImageField(mode, jpeg_quality=90)}, num_workers=1)
    writer.from_indexed_dataset(Pillows(files))
    order, pipeline = OrderOption.SEQUENTIAL, {"image": [SimpleRGBImageDecoder(), ToTensor()]}
    loader = Loader(str(file), batch, num_workers=1, os_cache=True, order=order, pipelines=pipeline)
    return lambda: count(images for (images,) in loader)


LIBRARIES: dict[str, tuple[str, Prepare, dict[str, Any]]] = {  # module, how to read, variants
    "MosaicML streaming": ("streaming", of_mosaicml, DECODERS),
    "LitData": ("litdata", of_litdata, DECODERS),
    "FFCV": ("ffcv", of_ffcv, {"jpg": "jpg", "raw": "raw"}),
}


def rivals(images: Path, tars: list[Path], folder: Path, batch: int) -> tuple[dict[str, Read], dict[str, str]]:
    """The installed libraries to compare with, and the missing ones with the reason.

    Args:
        images: folder of classes with JPEGs.
        tars: the same images as shards.
        folder: for what the libraries write.
        batch: images at a time.
    """
    files = sorted(images.rglob("*.jpg"))
    measured = {
        DEFAULT: of_webdataset(tars, batch, "pil"),
        "WebDataset + simplejpeg": of_webdataset(tars, batch, quick_decoder),
        "torchvision ImageFolder (PIL)": of_torchvision(images, batch),
    }
    missing = {}
    for name, (module, prepare, variants) in LIBRARIES.items():
        if importlib.util.find_spec(module) is None:
            missing[name] = "not installed"
            continue
        for variant, settings in variants.items():
            measured[f"{name} ({variant})"] = prepare(files, folder / module, batch, settings)
    return measured, missing
