"""Damaged and malicious recordings for every source of data_prep/pack.py."""

import io
import os
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hostile import PACK, Case, Kit, Make, claiming, large_jpeg, large_png, many_scans, zipped
from make_field_files import make_assembly, make_mbs, make_nwb
from make_sources import encode, make_folder, make_images, make_it_h5
from make_tars import npy

IMAGE = make_images(1)[0][0]


def _folder(spoil: Callable[[Path, Kit], Any], *flags: Any, **made: Any) -> Make:
    """Pack a faulty folder."""

    def make(kit: Kit) -> list:
        source = kit.folder / "src"
        make_folder(source, n=10, sites=3, size=16, **made)
        spoil(source, kit)
        return [PACK, "folder", source, "--out", kit.folder / "out", "--workers", 1, *flags]

    return make


def _rates(data: bytes | Callable[[Kit], bytes]) -> Make:
    return _folder(lambda source, kit: (source / "rates.npy").write_bytes(data(kit) if callable(data) else data))


def _image(data: bytes) -> Make:
    return _folder(lambda source, _: (source / "images" / "stim0000.png").write_bytes(data))


def _cell(old: str, new: str) -> Make:
    def spoil(source: Path, _: Kit) -> None:
        path = source / "stimuli.csv"
        path.write_text(path.read_text().replace(old, new, 1))

    return _folder(spoil)


def _parquet_bomb(source: Path, _: Kit) -> None:
    """A million empty rows in a few bytes."""
    (source / "rates.npy").unlink()
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(20_000_000, np.int8)), pa.array([1.0]))
    pq.write_table(pa.table({"n0": column}), source / "rates.parquet")


def _archived_rates(source: Path, _: Kit) -> None:
    with (source / "rates.npy").open("wb") as file:
        np.savez(file, np.zeros((10, 3)))


def _piped_rates(source: Path, _: Kit) -> None:
    (source / "rates.npy").unlink()
    os.mkfifo(source / "rates.csv")


def _piped_image(source: Path, _: Kit) -> None:
    (source / "images" / "stim0003.png").unlink()
    os.mkfifo(source / "images" / "stim0003.png")


def _endless_image(source: Path, _: Kit) -> None:
    (source / "images" / "stim0003.png").unlink()
    (source / "images" / "stim0003.png").symlink_to("/dev/zero")


def _jpeg(**how: Any) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (2048, 2048)).save(file, format="JPEG", **how)
    return file.getvalue()


FOLDERS: dict[str, Case] = {
    "rates that are a pickle": (_rates(lambda kit: kit.code()), ("rates.npy", "plain numbers")),
    "rates that are objects": (
        _rates(lambda kit: npy(kit.objects(), allow_pickle=True)),
        ("rates.npy", "plain numbers"),
    ),
    "rates that claim a terabyte": (_rates(claiming("(10, 100000000000)")), ("rates.npy",)),
    "rates that claim beyond all numbers": (_rates(claiming(f"(10, {10**40})")), ("rates.npy",)),
    "rates whose header is code": (_rates(claiming("__import__('os')")), ("rates.npy",)),
    "rates whose length is true": (_rates(claiming("(True,)", data=bytes(4))), ("rates.npy", "claims the shape")),
    "rates that are a pipe": (_folder(_piped_rates), ("no responses",)),
    "rates whose header is nested": (_rates(claiming("(" * 5000)), ("rates.npy",)),
    "rates cut short": (_rates(npy(np.zeros((10, 3)))[:-9]), ("rates.npy",)),
    "rates that are infinite": (_rates(npy(np.full((10, 3), np.inf))), ("rates.npy", "infinite")),
    "rates that are all NaN": (_rates(npy(np.full((10, 3), np.nan))), ("rates.npy", "NaN")),
    "rates that are transposed": (_rates(npy(np.zeros((3, 10)))), ("rates.npy", "transposed")),
    "rates of more numbers than a float": (_rates(npy(np.full((10, 3), 1e300))), ("rates.npy", "infinite")),
    "rates as an archive": (_folder(_archived_rates), ("rates.npy", ".npz archive")),
    "a parquet bomb": (_folder(_parquet_bomb), ("rates.parquet",)),
    "an absolute image": (_cell("images/stim0000.png", "/etc/passwd"), ("line 2", "inside")),
    "an image outside": (_cell("images/stim0000.png", "images/../../x.png"), ("line 2", "inside")),
    "an image that is a pipe": (_folder(_piped_image), ("stim0003.png", "regular file")),
    "an image that is a device": (_folder(_endless_image), ("stim0003.png", "regular file")),
    "a huge PNG": (_image(large_png(100_000)), ("stim0000", "megapixels")),
    "a huge JPEG": (_image(large_jpeg(_jpeg())), ("stim0000", "megapixels")),
    "a JPEG of endless scans": (_image(many_scans(_jpeg(progressive=True))), ("stim0000", "scans")),
    "a program as an image": (_image(b"%!PS-Adobe-3.0 EPSF\n(touch canary) run"), ("stim0000", "readable image")),
    "an id that steers the terminal": (_cell("stim0000,", "\x1b[2J,"), ("line 2", "stimulus_id")),
    "an object that steers the terminal": (_cell("apple", "\x1b[2J"), ("an object", "printable")),
    "a name that steers the terminal": (
        _folder(lambda source, _: None, "--name", "\x1b[2J"),
        ("the name of the recording", "printable"),
    ),
    "an id twice": (_cell("stim0000,", "stim0001,"), ("line 3", "must be unique")),
    "a table with a broken quote": (_cell("stim0004", '"stim0004'), ("stimuli.csv",)),
    "a table that is no text": (
        _folder(lambda source, kit: (source / "stimuli.csv").write_bytes(b"\xff\xfe\x00" + kit.code())),
        ("stimuli.csv", "UTF-8"),
    ),
    "a table with a cell too many": (_cell("stim0004,", "stim0004,,"), ("stimuli.csv, line 6",)),
}

# ---- zip archives --------------------------------------------------------------------------------------------------


def _zip(members: Callable[[dict[str, bytes]], dict[str, bytes]], spoil=lambda path: None, **attributes: Any) -> Make:
    """Pack a comparison file whose images are in a faulty archive."""

    def make(kit: Kit) -> list:
        written = make_mbs(kit.folder / "a.h5", with_images=False)
        whole = {name: encode(IMAGE, "png") for name in written.ids}
        archive = zipped(kit.folder / "images.zip", members(whole), **attributes)
        spoil(archive)
        return [PACK, "mbs-h5", kit.folder / "a.h5", "--images", archive, "--out", kit.folder / "out", "--workers", 1]

    return make


def _first(data: bytes) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    return lambda whole: whole | {next(iter(whole)): data}


def _claims(path: Path) -> None:
    """Make the directory of the archive claim a terabyte for its first member."""
    data = bytearray(path.read_bytes())
    place = data.find(b"PK\x01\x02") + 24
    data[place : place + 4] = (2**32 - 2).to_bytes(4, "little")
    path.write_bytes(data)


def _damage(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        info = archive.infolist()[0]
    data = bytearray(path.read_bytes())
    start = info.header_offset + 30 + len(info.filename)
    data[start : start + 20] = bytes(range(100, 120))
    path.write_bytes(data)


def _same(whole: dict[str, bytes]) -> dict[str, bytes]:
    return whole


ARCHIVES: dict[str, Case] = {
    "an absolute name": (_zip(lambda whole: whole | {"/etc/x.png": b""}), ("/etc/x.png", "points outside")),
    "a name that leads out": (_zip(lambda whole: whole | {"a/../../x.png": b""}), ("a/../../x.png", "points outside")),
    "a name that steers the terminal": (_zip(lambda whole: whole | {"\x1b[2J.png": b""}), ("not printable",)),
    "a symbolic link": (_zip(_same, external_attr=(stat.S_IFLNK | 0o777) << 16), ("link or a device",)),
    "a device": (_zip(_same, external_attr=(stat.S_IFCHR | 0o777) << 16), ("link or a device",)),
    "a member that claims four gigabytes": (_zip(_same, _claims), ("images.zip",)),
    "a damaged member": (_zip(_same, _damage), ("images.zip", "cannot be read")),
    "cut short": (_zip(_same, lambda path: os.truncate(path, path.stat().st_size - 30)), ("images.zip",)),
    "an image that is a pickle": (
        lambda kit: _zip(_first(kit.code()))(kit),
        ("images.zip", "readable image"),
    ),
    "a huge image": (_zip(_first(large_png(100_000))), ("images.zip", "megapixels")),
    "images missing": (_zip(lambda whole: dict(list(whole.items())[:2])), ("have no image",)),
}

# ---- HDF5 and NetCDF -----------------------------------------------------------------------------------------------


def _hdf5(kind: str, spoil: Callable[[h5py.File, Kit], Any]) -> Make:
    """Pack a faulty HDF5 file."""

    def make(kit: Kit) -> list:
        path = kit.folder / f"a.{kind}"
        words = {"it-h5": [], "mbs-h5": [], "nwb": ["--images", kit.folder / "stimuli"]}[kind]
        if kind == "nwb":
            make_nwb(path)
        else:
            {"it-h5": make_it_h5, "mbs-h5": make_mbs}[kind](path)
        with h5py.File(path, "r+") as file:
            spoil(file, kit)
        return [PACK, kind, path, "--out", kit.folder / "out", "--workers", 1, *words]

    return make


def _put(name: str, value: Callable[[Kit], Any]) -> Callable[[h5py.File, Kit], None]:
    def spoil(file: h5py.File, kit: Kit) -> None:
        del file[name]
        found = value(kit)
        if isinstance(found, dict):
            file.create_dataset(name, **found)
        else:
            file[name] = found

    return spoil


def _outside(file: h5py.File, kit: Kit) -> None:
    """Store the responses in another file through HDF5's external storage."""
    del file["spikes_train"]
    kit.write("secret", bytes(10_000))
    file.create_dataset("spikes_train", (24, 10), "f4", external=[(str(kit.folder / "secret"), 0, 960)])


def _virtual(file: h5py.File, kit: Kit) -> None:
    del file["spikes_train"]
    layout = h5py.VirtualLayout((24, 10), "f4")
    layout[:] = h5py.VirtualSource(str(kit.folder / "secret.h5"), "x", (24, 10))
    file.create_virtual_dataset("spikes_train", layout)


def _file(kind: str, content: bytes | Callable[[Kit], bytes], *flags: str) -> Make:
    """Pack a file of another kind."""

    def make(kit: Kit) -> list:
        path = kit.write(f"a.{kind}", content(kit) if callable(content) else content)
        kit.write("stimuli.csv", "stimulus_id\na\n")
        (kit.folder / "images").mkdir()
        return [PACK, kind, path, "--out", kit.folder / "out", *(word.format(kit.folder) for word in flags)]

    return make


def _assembly(spoil: Callable[[Path], Any]) -> Make:
    def make(kit: Kit) -> list:
        make_assembly(kit.folder)
        spoil(kit.folder / "assy.nc")
        words = ["--stimuli", kit.folder / "stimuli.csv", "--images", kit.folder / "images.zip"]
        return [PACK, "brainio", kit.folder / "assy.nc", *words, "--out", kit.folder / "out"]

    return make


_BRAINIO = ("--stimuli", "{}/stimuli.csv", "--images", "{}/images")
_ELSEWHERE = h5py.ExternalLink("/etc/passwd", "/x")
_CLAIM = {"shape": (10**12,), "dtype": "i8", "chunks": (1000,)}

HDF5: dict[str, Case] = {
    "an external link": (_hdf5("it-h5", _put("spikes_train", lambda _: _ELSEWHERE)), ("spikes_train", "link")),
    "an external link to what may be absent": (
        lambda kit: _hdf5("it-h5", lambda file, _: file.__setitem__("spikes_test", _ELSEWHERE))(kit),
        ("spikes_test", "link"),
    ),
    "a soft link": (
        _hdf5("it-h5", _put("spikes_train", lambda _: h5py.SoftLink("/spikes_val"))),
        ("spikes_train", "link"),
    ),
    "data in another file": (_hdf5("it-h5", _outside), ("spikes_train", "other files")),
    "data put together from other files": (_hdf5("it-h5", _virtual), ("spikes_train", "other files")),
    "a claim of 24 terabytes": (
        _hdf5("it-h5", _put("spikes_train", lambda _: {"shape": (24, 10**12), "dtype": "f4", "chunks": (1, 1000)})),
        ("spikes_train", "claims"),
    ),
    "a trillion images": (
        _hdf5(
            "it-h5",
            _put("stimulus_train", lambda _: {"shape": (10**9, 3, 32, 32), "dtype": "f4", "chunks": (1, 3, 32, 32)}),
        ),
        ("stimulus_train", "claims"),
    ),
    "responses as objects": (
        _hdf5("it-h5", _put("spikes_train", lambda _: {"shape": (24, 10), "dtype": h5py.string_dtype()})),
        ("spikes_train", "numbers"),
    ),
    "responses that are infinite": (
        _hdf5("it-h5", lambda file, _: file["spikes_val"].__setitem__((2, 3), np.inf)),
        ("spikes_val", "infinite"),
    ),
    "images that are no images": (
        _hdf5("it-h5", lambda file, _: file["stimulus_val"].__setitem__(0, 1e9)),
        ("stimulus_val", "ImageNet"),
    ),
    "images with NaN": (
        _hdf5("it-h5", lambda file, _: file["stimulus_val"].__setitem__(0, np.nan)),
        ("stimulus_val", "NaN"),
    ),
    "a split missing": (_hdf5("it-h5", lambda file, _: file.__delitem__("object_val")), ("object_val",)),
    "a pickle": (_file("it-h5", lambda kit: kit.code()), ("a.it-h5", "HDF5")),
    "next to nothing": (_file("it-h5", b"\x89HDF\r\n\x1a\n"), ("a.it-h5", "HDF5")),
    "a comparison file's link": (
        _hdf5("mbs-h5", _put("train", lambda _: _ELSEWHERE)),
        ("train", "link"),
    ),
    "a comparison file's ids without end": (
        _hdf5("mbs-h5", _put("train/stimulus_ids", lambda _: _CLAIM)),
        ("stimulus_ids", "claims"),
    ),
    "a session's link": (_hdf5("nwb", _put("units", lambda _: _ELSEWHERE)), ("units", "link")),
    "a session's spikes without end": (
        _hdf5("nwb", _put("units/spike_times", lambda _: _CLAIM | {"dtype": "f8"})),
        ("spike_times", "claims"),
    ),
    "a session's spikes before the first": (
        _hdf5("nwb", lambda file, _: file["units/spike_times_index"].__setitem__(0, 2**16 - 1)),
        ("spike_times_index", "damaged"),
    ),
    "an assembly cut short": (_assembly(lambda path: os.truncate(path, 3000)), (".nc",)),
    "an assembly that is a pickle": (_file("brainio", lambda kit: kit.code(), *_BRAINIO), ("a.brainio",)),
    "an assembly of version 3 cut short": (_file("brainio", b"CDF\x01" + bytes(4), *_BRAINIO), ("a.brainio",)),
    "an assembly of version 3 that claims": (
        _file("brainio", b"CDF\x01" + b"\xff" * 400, *_BRAINIO),
        ("a.brainio",),
    ),
}
