"""Images packed per second: ours with one and more workers, beside WebDataset's own ShardWriter fed with bytes.

    python benchmarks/packing.py [--stimuli 3200] [--size 256] [--workers 1 2] [--repeats 5] [--json FILE]

The images are JPEGs of smooth noise, quality 90, about 20 kB each, in a folder of files with a table and responses.
`ShardWriter` reads each file, and writes its bytes, the bytes of its responses and of its JSON: the members that ours
writes. Ours also decodes every image, unless `--no-decode` is given, hashes images and tars, and writes index and
manifest. `ours, one process` is the part that runs in each worker, without starting any. Those with workers are the
whole command except for starting Python and its imports, so they need cores of their own. All take turns; medians over
the repeats, ratios within a turn.
"""

import io
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import webdataset
from harness import Side, measure_in_turns, options_of, write_json
from synthetic import write_images

from data_prep.common.worker_processes import usable_cores
from data_prep.recording import Recording
from data_prep.shards import packing
from data_prep.shards.image_rules import DEFAULT_RULES, ImageRules
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
    """Write the same members with the library's own writer."""
    out.mkdir()
    rates = np.load(source / "rates.npy")
    files = sorted((source / "images").rglob("*.jpg"))
    with webdataset.ShardWriter(str(out / "train-%06d.tar"), maxcount=PER_SHARD, encoder=False, verbose=0) as writer:
        for file, row in zip(files, rates, strict=True):
            members = {"jpg": file.read_bytes(), "rates.npy": npy(row), "json": json.dumps({}).encode()}
            writer.write({"__key__": file.stem} | members)


def in_this_process(recording: Recording, out: Path, rules: ImageRules = DEFAULT_RULES) -> None:
    """Do the work of one of our workers, for all shards."""
    out.mkdir()
    packing.set_work(recording, multiprocessing.Value("q", 0), rules)
    for job in packing.shard_jobs(recording.splits, PER_SHARD):
        packing.write_one_shard(out, job)


def side_of(write: Callable[[Path], object], stimuli: int, out: Path) -> Side:
    """A side of the comparison: images per second, by the clock, of writing to a new folder."""

    def side() -> dict[str, float]:
        started = time.perf_counter()
        write(out)
        seconds = time.perf_counter() - started
        shutil.rmtree(out)
        return {"images/s": stimuli / seconds}

    return side


def writers(source: Path, workers: list[int]) -> dict[str, Callable[[Path], object]]:
    """The sides of the comparison, by name."""
    recording = Folder(source=source, name="images").open()
    sides: dict[str, Callable[[Path], object]] = {
        RIVAL: lambda out: by_webdataset(source, out),
        "ours, one process": lambda out: in_this_process(recording, out),
        "ours, one process, --no-decode": lambda out: in_this_process(recording, out, ImageRules(decode=False)),
    }
    for count in workers:
        sides[f"ours, workers: {count}"] = partial(pack, recording, stimuli_per_shard=PER_SHARD, workers=count)
    return sides


def main() -> None:
    """Make the images, measure, and print."""
    parser = options_of(__doc__, repeats=5)
    parser.add_argument("--stimuli", type=int, default=3200)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_images(folder / "source", options.stimuli, options.size)
        sides = {
            name: side_of(write, options.stimuli, folder / "out")
            for name, write in writers(folder / "source", options.workers).items()
        }
        speeds = measure_in_turns(sides, options.repeats)["images/s"]
    print(f"{options.stimuli:,} images, {usable_cores()} cores, load average {os.getloadavg()[0]:.1f}")
    print(speeds.table("images/s", {"of ShardWriter": RIVAL}))
    write_json(options, {"images_per_second": speeds.values})


if __name__ == "__main__":
    main()
