"""Shard folders and tars that are damaged or malicious, with the words of the error that each must cause."""

import gzip
import io
import os
import re
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from hostile import (
    END,
    EVALUATE,
    FINETUNE,
    FIRST,
    RATES,
    SHOW,
    Case,
    Kit,
    Make,
    claiming,
    edit,
    flip,
    header,
    large_jpeg,
    large_png,
    many_scans,
    place_in,
    rewritten,
    sealed,
    tars,
    with_index,
    with_index_file,
    with_manifest,
    with_manifest_bytes,
)
from make_sources import encode
from make_tars import IMAGES, members_of, npy, sample, write_tar
from PIL import Image

MANIFESTS: dict[str, Case] = {
    "empty": (with_manifest_bytes(b""), ("manifest.json",)),
    "no JSON": (with_manifest_bytes(b"{'a': 1}"), ("manifest.json",)),
    "a list": (with_manifest_bytes(b"[]"), ("manifest.json",)),
    "cut short": (with_manifest_bytes(lambda old: old[: len(old) // 2]), ("manifest.json", "not readable as JSON")),
    "nested without end": (with_manifest_bytes(b"[" * 200_000), ("manifest.json", "nested too deeply")),
    "a digit flipped": (
        with_manifest_bytes(lambda old: re.sub(rb'("mean": \[\s+)\d', rb"\g<1>7", old, count=1)),
        ("manifest.json", "checksum differs"),
    ),
    "NaN": (with_manifest(rates__mean__0=float("nan")), ("manifest.json", "NaN")),
    "a number beyond all numbers": (
        with_manifest_bytes(
            lambda old: old.replace(b'"response_window_ms": null', b'"response_window_ms": [0, 1e999]')
        ),
        ("1e999",),
    ),
    "of a trillion stimuli": (with_manifest(splits__train__stimuli=10**12), ("splits.train.stimuli", "1000000000")),
    "of a trillion stimuli in a shard": (
        with_manifest(splits__train__shards__0__stimuli=10**12),
        ("splits.train.shards.0.stimuli",),
    ),
    "of a shard of an exabyte": (with_manifest(splits__train__shards__0__bytes=10**18), ("shards.0.bytes",)),
    "of a shard elsewhere": (with_manifest(splits__train__shards__0__file="../x.tar"), ("shards.0.file",)),
    "of a shard at the root": (with_manifest(splits__train__shards__0__file="/etc/x.tar"), ("shards.0.file",)),
    "of a pipe": (with_manifest(splits__train__shards__0__file="pipe:touch x.tar"), ("shards.0.file",)),
    "of a shard in two splits": (with_manifest(splits__val__shards__0__file=FIRST), (FIRST, "listed twice")),
    "counts that disagree": (with_manifest(splits__train__stimuli=11), ("splits.train.stimuli is 11",)),
    "of an unknown split": (with_manifest(splits__holdout={}), ("holdout",)),
    "of another version": (with_manifest(format_version=9), ("format_version",)),
    "an unknown field": (with_manifest(command="touch x"), ("command",)),
    "classes of one name": (with_manifest(classes__1="apple", classes__0="apple"), ("classes", "same name")),
    "sites without an id": (with_manifest(sites__0={}), ("its own id",)),
    "sites of one id": (with_manifest(sites__0__id="site_001"), ("its own id",)),
    "a site that steers the terminal": (with_manifest(sites__0__id="\x1b[2J"), ("sites", "not printable")),
    "a name that steers the terminal": (with_manifest(name="\x1b]0;x\x07"), ("name", "printable")),
    "a class of two lines": (with_manifest(classes__0="a\nb"), ("classes.0", "printable")),
    "too few means": (with_manifest(rates__mean=[1.0]), ("rates.mean has 1 values",)),
    "a negative deviation": (with_manifest(rates__std__0=-1.0), ("rates.std.0",)),
    "a mean without a deviation": (with_manifest(rates__std__0=None), ("a mean but no std",)),
    "a reliability above one": (with_manifest(ceiling__reliability__0=7.0), ("ceiling.reliability.0",)),
    "too few intervals": (with_manifest(ceiling__ci95=[]), ("ceiling.ci95 has 0 values",)),
    "an interval of one number": (with_manifest(ceiling__mean_ci95=[0.5]), ("ceiling.mean_ci95",)),
    "repetitions of another kind": (with_manifest(ceiling__repetitions={"touch": 1}), ("ceiling.repetitions",)),
    "images as wide as the moon": (with_manifest(image__width=10**9), ("image.width",)),
    "warnings that are none": (with_manifest(provenance__warnings=7), ("provenance", "sentences")),
    "a group of no name": (with_manifest(group_by=""), ("group_by", "printable")),
    "groups that are none": (with_manifest(provenance__straddling={"object": 3}), ("provenance", "straddling")),
}


def _huge_manifest(kit: Kit) -> list:
    folder = kit.shards()
    os.truncate(folder / "manifest.json", 2**33)
    return [SHOW, folder]


def _manifest_pipe(kit: Kit) -> list:
    folder = kit.shards()
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    return [SHOW, folder]


MANIFESTS |= {
    "of eight gigabytes": (_huge_manifest, ("manifest.json", "8,589,934,592 bytes")),
    "a pipe": (_manifest_pipe, ("manifest.json",)),
}

# ---- indexes -------------------------------------------------------------------------------------------------------


def _overlapping(path: Path, _: Kit) -> None:
    """An .npz whose entries all point to the same bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a0.npy", npy(np.zeros(10_000)))
        first = archive.filelist[0]
        for number in range(1, 500):
            entry = zipfile.ZipInfo(f"a{number}.npy")
            for name in ("header_offset", "CRC", "compress_size", "file_size"):
                setattr(entry, name, getattr(first, name))
            archive.filelist.append(entry)
            archive.NameToInfo[entry.filename] = entry
        archive._didModify = True


def _two_of_a_name(path: Path, _: Kit) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for _number in range(2):
            archive.writestr("members.npy", npy(np.array(["jpg"])))


def _of_member(data: bytes):
    def spoil(path: Path, _: Kit) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("members.npy", data)

    return spoil


def _set(name: str, place, value):
    return with_index(lambda arrays: arrays[name].__setitem__(place, value))


def _replace(name: str, change):
    return with_index(lambda arrays: arrays.__setitem__(name, change(arrays[name])))


def _older_index(kit: Kit) -> list:
    """The index of another pack beside these tars, without its checksum in the manifest."""
    folder = kit.shards()
    with np.load(folder / "index.npz") as index:
        arrays = dict(index)
    arrays["train.crc32"] += 1
    np.savez(folder / "index.npz", **arrays)
    return [SHOW, folder]


INDEXES: dict[str, Case] = {
    "missing": (with_index_file(lambda path, _: path.unlink(), seal=False), ("no index.npz", "--index")),
    "flipped": (with_index_file(lambda path, _: flip(path, 3000), seal=False), ("index.npz", "sha256 differs")),
    "of another pack": (_older_index, ("index.npz", "sha256 differs")),
    "cut": (with_index_file(lambda path, _: os.truncate(path, 2000)), ("index.npz cannot be read",)),
    "no archive": (with_index_file(lambda path, _: path.write_bytes(b"{}")), ("index.npz cannot be read",)),
    "a pickle": (with_index_file(lambda path, kit: path.write_bytes(kit.code())), ("index.npz cannot be read",)),
    "objects": (
        with_index_file(lambda path, kit: np.savez(path, members=kit.objects())),
        ("index.npz cannot be read", "Python objects"),
    ),
    "a bomb": (
        with_index_file(lambda path, _: np.savez_compressed(path, members=np.zeros(2**23))),
        ("index.npz cannot be read", "compressed"),
    ),
    "entries over each other": (with_index_file(_overlapping), ("index.npz cannot be read", "claim")),
    "two arrays of a name": (with_index_file(_two_of_a_name), ("index.npz cannot be read", "same name")),
    "a claim": (with_index_file(_of_member(claiming("(1000000000000,)"))), ("claims 4,000,000,000,000 bytes",)),
    "a claim beyond all numbers": (with_index_file(_of_member(claiming(f"({10**30}, {10**30})"))), ("claims",)),
    "a negative claim": (with_index_file(_of_member(claiming("(-1,)"))), ("claims the shape (-1,)",)),
    "a header that is nested": (with_index_file(_of_member(claiming("(" * 5000))), ("header is damaged",)),
    "a header that is code": (
        with_index_file(_of_member(claiming("__import__('os').system('touch canary')"))),
        ("header is damaged",),
    ),
    "an array missing": (with_index(lambda arrays: arrays.pop("val.size")), ("val.size",)),
    "unknown members": (_replace("members", lambda old: np.array(["pkl"])), ("lists the members pkl",)),
    "members as numbers": (_replace("members", lambda old: np.arange(3)), ("lists the members 0, 1, 2",)),
    "beyond the end of the shard": (_set("train.offset", (0, 0), 10**12), ("train", "beyond the end")),
    "beyond all numbers": (_set("train.size", (0, 1), 2**63 - 1), ("train", "beyond the end")),
    "of negative size": (_set("train.size", (0, 1), -5), ("train", "beyond the end")),
    "of a shard that is not": (_set("train.shard", -1, 10**9), ("train", "must ascend from 0 to 1")),
    "of a negative shard": (_set("train.shard", 0, -1), ("train", "must ascend from 0 to 1")),
    "shards in disorder": (_replace("train.shard", lambda old: old[::-1]), ("train", "must ascend from 0 to 1")),
    "shards as floats": (_replace("train.shard", lambda old: old.astype(float)), ("train", "shard is float64")),
    "too short": (_replace("train.stimulus_id", lambda old: old[:-1]), ("train", "manifest.json counts")),
    "ids as numbers": (_replace("train.stimulus_id", lambda old: np.arange(len(old))), ("stimulus_id is int64",)),
    "one id twice": (_replace("train.stimulus_id", lambda old: old[[0, *range(len(old) - 1)]]), ("is listed twice",)),
    "an id of two lines": (_set("train.stimulus_id", 0, "a\nb"), ("not printable",)),
    "an id in two splits": (
        with_index(lambda arrays: arrays["val.stimulus_id"].__setitem__(0, arrays["train.stimulus_id"][0])),
        ("is in both train and val",),
    ),
}

# ---- tars of a packed folder ---------------------------------------------------------------------------------------


def _tar(spoil, command: str = SHOW) -> Make:
    """Run a command on a folder with one tar damaged."""

    def make(kit: Kit) -> list:
        folder = kit.shards()
        spoil(folder)
        if command == SHOW:
            return [SHOW, folder]
        if command == EVALUATE:
            return [EVALUATE, kit.trained(), "--split", "train", "--data", folder]
        return [command, "--data", folder, "--out", kit.folder / "out", "--backbone.weights", "random"]

    return make


def _flip_in(kind: str):
    def spoil(folder: Path) -> None:
        offset, size = place_in(folder, kind)
        flip(folder / FIRST, offset + size // 2)

    return spoil


def _exchanged(folder: Path) -> None:
    """Swap the responses of two stimuli, which only checksums reveal because they have the same size."""
    (one, size), (other, _) = place_in(folder, "rates.npy", 0), place_in(folder, "rates.npy", 1)
    data = bytearray((folder / FIRST).read_bytes())
    data[one : one + size], data[other : other + size] = data[other : other + size], data[one : one + size]
    (folder / FIRST).write_bytes(data)


def _cut_at_border(folder: Path) -> None:
    os.truncate(folder / FIRST, place_in(folder, "trials.npy", 7)[0] - 512)


def _cut_and_indexed(kit: Kit) -> list:
    """Cut a tar between two members, and update everything recorded about it."""
    folder = kit.shards()
    _cut_at_border(folder)
    return [SHOW, sealed(folder), "--index"]


def _reversed_sites(kit: Kit) -> list:
    folder = sealed(kit.shards())
    edit(folder / "manifest.json", lambda content: content["sites"].reverse())
    return [EVALUATE, kit.trained(), "--data", folder]


def _member(kind: str, data: bytes, command: str = FINETUNE) -> Make:
    """Run a command on a folder in which one member has other bytes and all checksums match."""
    return _tar(lambda folder: rewritten(folder, kind, data), command)


def _progressive() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (2048, 2048), "white").save(file, format="JPEG", progressive=True)
    return file.getvalue()


TARS: dict[str, Case] = {
    "missing": (_tar(lambda folder: (folder / FIRST).unlink()), (FIRST, "missing")),
    "cut": (_tar(lambda folder: os.truncate(folder / FIRST, 3333)), (FIRST, "3333 bytes")),
    "cut at a member's border": (_tar(_cut_at_border), (FIRST, "manifest.json lists")),
    "cut and reindexed": (_cut_and_indexed, (FIRST, "manifest.json lists")),
    "empty": (_tar(lambda folder: os.truncate(folder / FIRST, 0)), (FIRST, "0 bytes")),
    "grown": (_tar(lambda folder: os.truncate(folder / FIRST, 10**6)), (FIRST, "1000000 bytes")),
    "a bit of an image flipped, shown": (_tar(_flip_in("png")), (FIRST, ".png", "checksum")),
    "a bit of an image flipped, evaluated": (_tar(_flip_in("png"), EVALUATE), (FIRST, ".png", "checksum")),
    "a bit of a response flipped": (_tar(_flip_in("rates.npy"), FINETUNE), (FIRST, ".rates.npy", "checksum")),
    "a bit of a response flipped, evaluated": (_tar(_flip_in("rates.npy"), EVALUATE), (FIRST, "checksum")),
    "a bit of a fact flipped": (_tar(_flip_in("json")), (FIRST, ".json", "checksum")),
    "responses exchanged": (_tar(_exchanged, FINETUNE), (FIRST, ".rates.npy", "checksum")),
    "sites in another order": (_reversed_sites, ("site", "differs from the one the network was trained for")),
    "responses that are objects": (
        _member("rates.npy", claiming("(1,)", "|O", b"\x80\x04N.")),
        (".rates.npy", "Python objects"),
    ),
    "responses that claim a terabyte": (_member("rates.npy", claiming("(1000000000000,)")), (".rates.npy", "claims")),
    "responses of too many sites": (_member("rates.npy", npy(np.zeros(9))), (".rates.npy", "4 sites")),
    "responses with two axes": (_member("rates.npy", npy(np.zeros((1, 4)))), (".rates.npy", "(1, 4)")),
    "responses that are infinite": (_member("rates.npy", npy(np.full(4, np.inf))), (".rates.npy", "infinite")),
    "responses that are complex": (_member("rates.npy", npy(np.zeros(4, complex))), (".rates.npy", "complex128")),
    "responses that are text": (_member("rates.npy", npy(np.array(["a"] * 4))), (".rates.npy", "real numbers")),
    "facts that are no JSON": (_member("json", b"{", SHOW), (".json", "JSON")),
    "facts with NaN": (_member("json", b'{"x": NaN}', SHOW), (".json", "NaN")),
    "facts nested without end": (_member("json", b"[" * 100_000, SHOW), (".json", "nested too deeply")),
    "a class that is not listed": (
        _tar(lambda folder: rewritten(folder, "json", b'{"object": "touch"}'), EVALUATE),
        (FIRST, "'touch' is not among the manifest's classes"),
    ),
    "an image of another format": (_member("png", encode(IMAGES[0], "gif"), SHOW), (".png", "readable image")),
    "an image that is a program": (_member("png", b"%!PS-Adobe\n(touch x) run\n", SHOW), (".png", "readable image")),
    "a huge PNG": (_member("png", large_png(100_000), SHOW), (".png", "megapixels")),
    "a huge PNG, evaluated": (_member("png", large_png(60_000), EVALUATE), (".png", "megapixels")),
    "a huge JPEG": (_member("png", large_jpeg(encode(IMAGES[0], "jpg")), SHOW), (".png", "megapixels")),
    "a JPEG of endless scans": (_member("png", many_scans(_progressive()), SHOW), (".png", "scans, more than 200")),
    "an image cut short": (_member("png", encode(IMAGES[0], "png")[:-20], SHOW), (".png", "cut short")),
}

# ---- tars of strangers ---------------------------------------------------------------------------------------------

PLAIN = header("a.rates.npy", len(RATES)) + RATES.ljust(512, b"\0")


def _foreign(**members: bytes) -> Make:
    """Show a folder with a tar whose second stimulus has other members."""

    def make(kit: Kit) -> list:
        made = {"s0": sample(0), "s1": sample(1, **{name.replace("_", "."): data for name, data in members.items()})}
        return [SHOW, write_tar(kit.folder / "tars" / "a.tar", members_of(made)).parent]

    return make


def _named(name: str, data: bytes = b"") -> Make:
    return lambda kit: [SHOW, write_tar(kit.folder / "tars" / "a.tar", [(name, data)]).parent]


def _joined(kit: Kit) -> list:
    one = write_tar(kit.folder / "tars" / "a.tar", members_of({"s0": sample(0)}))
    one.write_bytes(one.read_bytes() * 2)
    return [SHOW, one.parent]


def _gzipped(name: str) -> Make:
    def make(kit: Kit) -> list:
        tar = write_tar(kit.folder / "made.tar", members_of({"s0": sample(0)}))
        path = kit.write(f"tars/{name}", gzip.compress(tar.read_bytes()))
        return [SHOW, path.parent]

    return make


def _sparse(kit: Kit) -> list:
    header_of_holes = bytearray(header("a.png", 0, tarfile.GNUTYPE_SPARSE))
    header_of_holes[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header_of_holes))[0]
    return [SHOW, kit.write("tars/a.tar", bytes(header_of_holes) + END).parent]


def _pax(text: str, size: int | None = None) -> bytes:
    data = text.encode()
    return header("pax", len(data) if size is None else size, tarfile.XHDTYPE) + data.ljust(512, b"\0")


STRANGERS: dict[str, Case] = {
    "a pickle": (lambda kit: _named("s0.pkl", kit.code())(kit), ("s0.pkl", "plain data")),
    "a pickle by another name": (lambda kit: _named("s0.pyd", kit.code())(kit), ("s0.pyd", "plain data")),
    "a torch file": (lambda kit: _named("s0.pth", kit.code())(kit), ("s0.pth", "plain data")),
    "a YAML file": (_named("s0.yaml", b"!!python/object/apply:os.system ['touch x']"), ("s0.yaml", "plain data")),
    "an absolute name": (_named("/etc/passwd.png"), ("/etc/passwd.png", "points outside")),
    "a name that leads out": (_named("a/../../x.png"), ("a/../../x.png", "points outside")),
    "a name that steers the terminal": (_named("\x1b[2J.png"), ("not printable",)),
    "a name without an end": (_named("a" * 5000 + ".png"), ("too long",)),
    "a symbolic link": (tars(header("a.png", 0, tarfile.SYMTYPE, "/etc/passwd") + END), ("a.png", "link")),
    "a hard link": (tars(header("a.png", 0, tarfile.LNKTYPE, "b.png") + END), ("a.png", "link")),
    "a device": (tars(header("a.png", 0, tarfile.CHRTYPE) + END), ("a.png", "device")),
    "a pipe": (tars(header("a.png", 0, tarfile.FIFOTYPE) + END), ("a.png", "device")),
    "a file with holes": (_sparse, ("a.tar",)),
    "no end mark": (tars(PLAIN), ("a.tar", "end mark")),
    "cut within a member": (tars(header("a.png", 9999) + bytes(512)), ("a.tar", "not a whole tar")),
    "a negative size": (tars(PLAIN + header("b.png", -1024) + END), ("a.tar", "backwards")),
    "a size beyond all numbers": (tars(PLAIN + header("b.png", 2**80) + END), ("a.tar", "not a whole tar")),
    "a long name of 100 GB": (
        tars(header("././@LongLink", 10**11, tarfile.GNUTYPE_LONGNAME) + END),
        ("a.tar", "claims 100,000,000,"),
    ),
    "long names without end": (
        tars((header("././@LongLink", 1, tarfile.GNUTYPE_LONGNAME) + b"a".ljust(512, b"\0")) * 3000 + END),
        ("a.tar", "not a whole tar"),
    ),
    "a pax header of 100 GB": (tars(_pax("", 10**11) + END), ("a.tar", "claims 100,000,000,")),
    "a pax header that is none": (tars(_pax("99999 path=x\n") + PLAIN + END), ("a.tar",)),
    "holes without end": (
        tars(_pax("22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n") + header("a.png", 512) + b"9999".ljust(512, b"1")),
        ("a.tar",),
    ),
    "two tars joined": (_joined, ("a.tar", "has data after its end")),
    "compressed": (_gzipped("a.tar.gz"), ("a.tar.gz", "compressed")),
    "compressed in secret": (_gzipped("a.tar"), ("a.tar", "not a whole tar")),
    "responses that are objects": (_foreign(rates_npy=claiming("(1,)", "|O", b"N.")), ("s1.rates.npy", "objects")),
    "responses that claim a terabyte": (_foreign(rates_npy=claiming("(1000000000000,)")), ("s1.rates.npy", "claims")),
    "responses that are records": (_foreign(rates_npy=npy(np.zeros(5, "i4,f4"))), ("s1.rates.npy", "real numbers")),
    "responses of other sites": (_foreign(rates_npy=npy(np.zeros(9))), ("s1.rates.npy", "9 sites")),
    "a huge PNG": (_foreign(png=large_png(100_000)), ("s1.png", "megapixels")),
    "a PNG that is a GIF": (_foreign(png=encode(IMAGES[0], "gif")), ("s1.png", "is not that of its name")),
    "a program as an image": (_foreign(png=b"%!PS-Adobe\n"), ("s1.png", "readable image")),
    "pixels that are objects": (
        lambda kit: _named("s0.image.npy", npy(kit.objects(), allow_pickle=True))(kit),
        ("s0.image.npy", "Python objects"),
    ),
    "pixels that claim a terabyte": (
        _named("s0.image.npy", claiming("(1000000, 1000000, 3)", "|u1")),
        ("s0.image.npy", "claims"),
    ),
    "a class of two lines": (_foreign(cls=b"a\nb"), ("s1.cls",)),
    "a class that steers the terminal": (_foreign(json=b'{"object": "\\u001b[2J"}'), ("s1.json", "printable")),
    "responses of some only": (
        lambda kit: [
            SHOW,
            write_tar(
                kit.folder / "tars" / "a.tar", members_of({"s0": sample(0), "s1": {"png": sample(1)["png"]}})
            ).parent,
        ],
        ("s1: has no rates.npy",),
    ),
}

# ---- addresses -----------------------------------------------------------------------------------------------------


def _at(place: str) -> Make:
    return lambda kit: [SHOW, place.format(canary=kit.canary)]


ADDRESSES: dict[str, Case] = {
    "a pipe": (_at("pipe:touch {canary}"), ("pipe:touch",)),
    "a pipe as a URL": (_at("pipe://touch {canary}"), ("pipe",)),
    "a shell": (_at("$(touch {canary})"), ("touch",)),
    "a chain": (_at("simplecache::https://127.0.0.1/x"), ("chained URLs",)),
    "a list of other files": (_at("reference://x"), ("reference://",)),
    "somebody's archive": (_at("zip://x.zip"), ("zip://",)),
    "a device": (_at("file:///dev/zero"), ("/dev/zero",)),
    "no host": (_at("https:///x"), ("has no host",)),
    "nothing": (_at("nowhere"), ("nowhere is not a folder",)),
}


def _copy_of_index_only(kit: Kit) -> list:
    """A folder of tars with the index of a pack and no manifest."""
    folder = kit.shards()
    (folder / "manifest.json").unlink()
    return [SHOW, folder]


STRANGERS["a pack without its manifest"] = (_copy_of_index_only, ("no manifest.json", "an incomplete copy"))
TARS["damaged, and indexed as if it were not"] = (
    lambda kit: [SHOW, (lambda folder: (_flip_in("png")(folder), folder)[1])(kit.shards()), "--index"],
    (FIRST, "sha256 differs"),
)
