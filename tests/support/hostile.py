"""Building blocks for malicious inputs: code that must never run, false claims, matching checksums."""

import hashlib
import io
import json
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from make_tars import npy

from data_prep.shards.index import SplitIndex, index_shard, write_index
from data_prep.shards.manifest import Shard, load_manifest

FINETUNE, EVALUATE, PROBE, EXPORT = "train/finetune.py", "train/evaluate.py", "train/probe.py", "train/export.py"
PACK, SHOW, SWEEP, PLAN = "data_prep/pack.py", "data_prep/show.py", "train/sweep.py", "train/plan.py"
FIRST = "train-000000.tar"


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "executed")


@dataclass
class Kit:
    """The materials of a case.

    Attributes:
        folder: of the case alone.
        packed, run: a shard folder and a run on it, to copy.
    """

    folder: Path
    packed: Path
    run: Path

    @property
    def canary(self) -> Path:
        """The file that exists only if code was executed."""
        return self.folder / "canary"

    def code(self) -> bytes:
        """A pickle that creates the canary."""
        return pickle.dumps(Canary(self.canary))

    def objects(self) -> np.ndarray:
        """An object array that creates the canary."""
        return np.array([Canary(self.canary)], dtype=object)

    def shards(self) -> Path:
        """A copy of the shard folder, to be damaged."""
        return shutil.copytree(self.packed, self.folder / "shards")

    def trained(self) -> Path:
        """A copy of the run, to be damaged."""
        return shutil.copytree(self.run, self.folder / "run", symlinks=True)

    def write(self, name: str, content: bytes | str) -> Path:
        """A file."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path


Make = Callable[[Kit], list[Any]]  # from a kit to the words of a command line
Case = tuple[Make, tuple[str, ...]]  # with the words that the error must have


# ---- shard folders -------------------------------------------------------------------------------------------------


def set_in(document: Any, key: str, value: Any) -> None:
    """Set `a.b.0.c` in a JSON document."""
    *parents, last = (int(part) if part.isdigit() else part for part in key.split("."))
    for part in parents:
        document = document[part]
    document[last] = value


def edit(path: Path, change: Callable[[dict], None], **dump: Any) -> None:
    """Change a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, **dump))


def with_manifest(**changes: Any) -> Make:
    """Show a folder whose manifest has other values (keys with __ for dots) and a matching checksum."""

    def make(kit: Kit) -> list[Any]:
        folder = kit.shards()

        def change(content: dict) -> None:
            content["checksum"] = None
            for key, value in changes.items():
                set_in(content, key.replace("__", "."), value)

        edit(folder / "manifest.json", change)
        return [SHOW, folder]

    return make


def with_manifest_bytes(content: bytes | Callable[[bytes], bytes]) -> Make:
    """Show a folder whose manifest.json has other bytes."""

    def make(kit: Kit) -> list[Any]:
        path = kit.shards() / "manifest.json"
        path.write_bytes(content if isinstance(content, bytes) else content(path.read_bytes()))
        return [SHOW, path.parent]

    return make


def with_index(change: Callable[[dict[str, np.ndarray]], Any], save: Callable = np.savez) -> Make:
    """Show a folder whose index has other arrays and matching checksums."""

    def make(kit: Kit) -> list[Any]:
        folder = kit.shards()
        with np.load(folder / "index.npz") as index:
            arrays = dict(index)
        change(arrays)
        save(folder / "index.npz", **arrays)
        return [SHOW, sealed(folder)]

    return make


def with_index_file(spoil: Callable[[Path, Kit], Any], seal: bool = True) -> Make:
    """Show a folder whose index is another file."""

    def make(kit: Kit) -> list[Any]:
        folder = kit.shards()
        spoil(folder / "index.npz", kit)
        return [SHOW, sealed(folder) if seal else folder]

    return make


def sealed(folder: Path) -> Path:
    """Remove the checksums of the tables and of the manifest from the manifest."""
    edit(folder / "manifest.json", lambda content: content.update(files={}, checksum=None))
    return folder


def reindexed(folder: Path) -> Path:
    """Rebuild manifest and index for tars that were changed."""
    manifest = load_manifest(sealed(folder))
    index: dict[str, list[SplitIndex]] = {}
    for name, split in manifest.splits.items():
        for number, shard in enumerate(split.shards):
            path = folder / shard.file
            split.shards[number] = Shard(
                file=shard.file,
                stimuli=shard.stimuli,
                bytes=path.stat().st_size,
                sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            )
            index.setdefault(name, []).append(index_shard(path, decode=True))
    write_index(folder, {name: SplitIndex.joined(tars) for name, tars in index.items()})
    manifest.save(folder / "manifest.json")
    return folder


def rewritten(folder: Path, kind: str, data: bytes, tar: str = FIRST) -> Path:
    """Replace a member of the first stimulus of a tar."""
    with tarfile.open(folder / tar) as old:
        members = [(member.name, old.extractfile(member).read()) for member in old]
    key = members[0][0].partition(".")[0]
    with tarfile.open(folder / tar, "w") as new:
        for name, content in members:
            content = data if name == f"{key}.{kind}" else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            new.addfile(info, io.BytesIO(content))
    return reindexed(folder)


def place_in(folder: Path, kind: str, row: int = 0) -> tuple[int, int]:
    """Offset and size of a member of a training stimulus."""
    with np.load(folder / "index.npz") as index:
        column = index["members"].tolist().index(kind)
        return int(index["train.offset"][row, column]), int(index["train.size"][row, column])


def flip(path: Path, offset: int) -> None:
    """Flip a bit."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)


# ---- arrays, images, archives ------------------------------------------------------------------------------------


def claiming(shape: str, descr: str = "<f4", data: bytes = b"") -> bytes:
    """A .npy file whose header claims this shape."""
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + data


def large_png(side: int) -> bytes:
    """A PNG whose header claims this side, with hardly any pixels."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(1000))), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def large_jpeg(jpeg: bytes, side: int = 65_500) -> bytes:
    """A JPEG whose header claims this side, at most 65,535."""
    start = next(place for marker in (b"\xff\xc0", b"\xff\xc2") if (place := jpeg.find(marker)) >= 0)
    return jpeg[: start + 5] + side.to_bytes(2, "big") * 2 + jpeg[start + 9 :]


def many_scans(jpeg: bytes, scans: int = 20_000) -> bytes:
    """A large progressive JPEG that repeats its last scan many times."""
    last = jpeg.rfind(b"\xff\xda")
    return jpeg[:last] + jpeg[last:-2] * scans + jpeg[-2:]


def zipped(path: Path, members: dict[str, bytes], **attributes: Any) -> Path:
    """A zip archive; `attributes` are set on every member's entry."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            for attribute, value in attributes.items():
                setattr(info, attribute, value)
            archive.writestr(info, data)
    return path


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    """A header block of a tar; a negative size is written in base 256."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info.tobuf(tarfile.GNU_FORMAT)


def tars(blocks: bytes, name: str = "a.tar") -> Make:
    """Show a folder with one tar, written block by block."""
    return lambda kit: [SHOW, kit.write(f"tars/{name}", blocks).parent]


END = bytes(1024)
RATES = npy(np.zeros(3, np.float32))
