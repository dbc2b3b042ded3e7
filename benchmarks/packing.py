"""Images packed per second: ours with one and more workers, beside WebDataset's own ShardWriter fed with bytes.

    python benchmarks/packing.py [--stimuli 3200] [--size 256] [--workers 1 2] [--repeats 5] [--json FILE]

The images are JPEGs of smooth noise, quality 90, about 20 kB each, in a folder of files with a table and responses.
`ShardWriter` reads each file, and writes its bytes, the bytes of its responses and of its JSON: the members that ours
writes. Ours also checks every image, hashes the tars, and writes index and manifest. `ours, one process` is the part
that runs in each worker, without starting any: the aim is 0.9 of ShardWriter. The others are the whole command but for
the start of Python and its imports, by the clock, so they need cores of their own. All take turns; medians over the
repeats, ratios within a turn.
"""

import argparse
import io
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import webdataset
from synthetic import write_images

from data_prep.common.worker_processes import usable_cores
from data_prep.recording import Recording
from data_prep.shards import packing
from data_prep.shards.packing import pack
from data_prep.sources.folder import Folder

PER_SHARD = 256
RIVAL = "WebDataset's ShardWriter from bytes"


def npy(array: np.ndarray) -> bytes:
    """An array as the bytes of an .npy file."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def by_webdataset(source: Path, out: Path) -> None:
    """The same members, by the library's writer."""
    out.mkdir()
    rates = np.load(source / "rates.npy")
    files = sorted((source / "images").rglob("*.jpg"))
    with webdataset.ShardWriter(str(out / "train-%06d.tar"), maxcount=PER_SHARD, encoder=False, verbose=0) as writer:
        for file, row in zip(files, rates, strict=True):
            members = {"jpg": file.read_bytes(), "rates.npy": npy(row), "json": json.dumps({}).encode()}
            writer.write({"__key__": file.stem} | members)


def in_this_process(recording: Recording, out: Path) -> None:
    """What a worker of ours does, for all shards."""
    out.mkdir()
    packing._prepare(recording, multiprocessing.Value("q", 0))
    for _, name, indices in packing._shard_jobs(recording.splits, PER_SHARD):
        packing._write_one(out / name, indices)


def seconds(write: Callable[[Path], None], out: Path) -> tuple[float, float]:
    """How long writing to a new folder takes, by the clock and by this process's processor time."""
    clock, processor = time.perf_counter(), time.process_time()
    write(out)
    took = time.perf_counter() - clock, time.process_time() - processor
    shutil.rmtree(out)
    return took


def measure(source: Path, folder: Path, workers: list[int], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of every side, in turns; the first turn does not count."""
    recording = Folder(source=source, name="images").open()
    sides: dict[str, Callable[[Path], None]] = {
        RIVAL: lambda out: by_webdataset(source, out),
        "ours, one process": lambda out: in_this_process(recording, out),
    }
    for count in workers:
        sides[f"ours, {count} worker{'s' * (count > 1)}"] = lambda out, n=count: pack(recording, out, PER_SHARD, n)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, write in sides.items():
            took = seconds(write, folder / "out")
            if turn:
                found[name].append(took)
    return found


def table(found: dict[str, list[tuple[float, float]]], stimuli: int) -> str:
    """Medians, ranges and ratios to the library's writer; the last column by processor time, for single processes."""
    lines = [f"{'':38}{'images/s':>10}{'range':>19}{'of ShardWriter':>16}{'by CPU time':>13}"]
    for name, took in found.items():
        speeds = [stimuli / clock for clock, _ in took]
        ratios = [
            [theirs[which] / mine[which] for mine, theirs in zip(took, found[RIVAL], strict=True)] for which in (0, 1)
        ]
        spread = f"{min(speeds):,.0f}-{max(speeds):,.0f}"
        alone = f"{statistics.median(ratios[1]):13.2f}" if "worker" not in name else f"{'':13}"
        line = f"{name:38}{statistics.median(speeds):10,.0f}{spread:>19}{statistics.median(ratios[0]):16.2f}{alone}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def main() -> None:
    """Make the images, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stimuli", type=int, default=3200)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_images(folder / "source", options.stimuli, options.size)
        found = measure(folder / "source", folder, options.workers, options.repeats)
    print(f"{options.stimuli:,} images, {usable_cores()} cores, load average {os.getloadavg()[0]:.1f}")
    print(table(found, options.stimuli))
    if options.json:
        options.json.write_text(json.dumps({"options": vars(options) | {"json": None}, "seconds": found}))


if __name__ == "__main__":
    main()
