"""Peak memory of packing large sources, per process.

    python benchmarks/packing_memory.py [--gigabytes 2] [--formats brainio nwb mbs-h5] [--workers 2] [--json FILE]

Each source is written with responses of the given size (random; 3,200 small images) and packed by the real command:
a Brain-Score assembly of many repetitions and sites, an NWB file of many spikes, HDF5 with many sites and repetitions.
Peaks are of resident memory, of the process of the command's group that holds most; pages of mapped files count. The
aim is less than 1 GB per process. Exits with 1 where it is missed.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
from harness import options_of, table, write_json
from PIL import Image

AIM = 1e9  # bytes per process
STIMULI = 3200
NAMES = [f"im{k:04d}" for k in range(STIMULI)]


def write_images(folder: Path, size: int = 32) -> None:
    """A PNG per stimulus."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in NAMES:
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / f"{name}.png")


def write_assembly(folder: Path, size: float) -> list[str]:
    """A BrainIO assembly, float32 (neuroid, presentation), each stimulus shown 50 times in random order."""
    shown = np.random.default_rng(0).permutation(np.repeat(np.arange(STIMULI), 50))
    sites = int(size / 4 / len(shown))
    with h5py.File(folder / "assy.nc", "w") as file:
        for name, length in {"neuroid": sites, "presentation": len(shown)}.items():
            file.create_dataset(name, data=np.arange(length)).make_scale(name)
        coordinates = {
            "stimulus_id": ("presentation", np.array(NAMES, object)[shown]),
            "neuroid_id": ("neuroid", np.array([f"n{k}" for k in range(sites)], object)),
            "region": ("neuroid", np.array(["IT"] * sites, object)),
            "animal": ("neuroid", np.array(["M"] * sites, object)),
        }
        for name, (axis, values) in coordinates.items():
            file.create_dataset(name, data=values, dtype=h5py.string_dtype()).dims[0].attach_scale(file[axis])
        data = file.create_dataset("data", (sites, len(shown)), np.float32)
        data.dims[0].attach_scale(file["neuroid"])
        data.dims[1].attach_scale(file["presentation"])
        fill(data)
    lines = ["stimulus_id,filename", *(f"{name},{name}.png" for name in NAMES)]
    (folder / "stimuli.csv").write_text("\n".join(lines))
    write_images(folder / "images")
    return ["brainio", "assy.nc", "--stimuli", "stimuli.csv", "--images", "images"]


def write_nwb(folder: Path, size: float) -> list[str]:
    """An NWB file: 200 units, each stimulus shown 10 times; spike times are float64 and fill the size."""
    from datetime import UTC, datetime

    from pynwb import NWBHDF5IO, NWBFile
    from pynwb.epoch import TimeIntervals

    units, shown = 200, np.random.default_rng(0).permutation(np.repeat(np.arange(STIMULI), 10))
    spikes, seconds = int(size / 8 / units), 0.3 * len(shown) + 1
    file = NWBFile("a long session", "s", datetime(2024, 1, 1, tzinfo=UTC))
    for _ in range(units):
        file.add_unit(spike_times=[0.0])
    rows = TimeIntervals(name="trials", description="what was shown")
    rows.add_column("stimulus_id", "which")
    for k, stimulus in enumerate(shown):
        rows.add_row(start_time=0.3 * k, stop_time=0.3 * k + 0.1, stimulus_id=NAMES[stimulus])
    file.trials = rows
    with NWBHDF5IO(folder / "session.nwb", "w") as io:
        io.write(file)
    with h5py.File(folder / "session.nwb", "a") as opened:  # pynwb would want all spikes in memory
        table, attributes = opened["units"], dict(opened["units/spike_times"].attrs)
        del table["spike_times"]
        table.create_dataset("spike_times", (units * spikes,), np.float64).attrs.update(attributes)
        table["spike_times_index"][:] = spikes * np.arange(1, units + 1)
        for unit in range(units):
            times = np.sort(np.random.default_rng(unit).uniform(0, seconds, spikes))
            table["spike_times"][unit * spikes : (unit + 1) * spikes] = times
        table["spike_times_index"].attrs["target"] = table["spike_times"].ref
    write_images(folder / "stimuli")
    return ["nwb", "session.nwb", "--images", "stimuli"]


def write_mbs(folder: Path, size: float) -> list[str]:
    """HDF5 of one subject and region, float32 (presentations, sites), each stimulus shown 20 times."""
    rng = np.random.default_rng(0)
    sites = int(size / 4 / STIMULI / 20)
    with h5py.File(folder / "data.h5", "w") as file:
        for split, part in {"train": np.arange(STIMULI * 4 // 5), "test": np.arange(STIMULI * 4 // 5, STIMULI)}.items():
            shown = rng.permutation(np.repeat(part, 20))
            file[f"{split}/stimulus_ids"] = np.array([f"{NAMES[k]}.png" for k in shown], object)
            fill(file.create_dataset(f"{split}/neural_data/s1/IT", (len(shown), sites), np.float32))
        file["noise_ceilings/s1/IT"] = np.full(sites, 50.0)
    write_images(folder / "images")
    return ["mbs-h5", "data.h5", "--images", "images"]


def fill(data: h5py.Dataset) -> None:
    """Random responses, some rows at a time."""
    rows = max(1, 2**24 // data.shape[1])
    for start in range(0, len(data), rows):
        shape = data[start : start + rows].shape
        data[start : start + rows] = np.random.default_rng(start).standard_normal(shape, np.float32)


FORMATS: dict[str, Callable[[Path, float], list[str]]] = {
    "brainio": write_assembly,
    "nwb": write_nwb,
    "mbs-h5": write_mbs,
}


def pack(folder: Path, words: list[str], workers: int) -> tuple[float, float]:
    """Pack by the command; returns its peak in bytes, of the process that held most, and its time in seconds."""
    script = Path(__file__).parents[1] / "data_prep" / "pack.py"
    command = [sys.executable, str(script), *words, "--out", "shards", "--workers", str(workers)]
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)  # of the process and all descendants it has waited for
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{words[0]}: packing ended with exit code {process.returncode}")
    return used.ru_maxrss * 1024, time.perf_counter() - started


def main() -> None:
    """Write, pack, print."""
    parser = options_of(__doc__)
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    measured = {}
    for name in options.formats:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            words = FORMATS[name](folder, options.gigabytes * 1e9)
            peak, seconds = pack(folder, words, options.workers)
        measured[name] = {"peak_bytes": peak, "seconds": seconds}
        print(f"{name}: {peak / 1e9:.2f} GB in the process that held most, {seconds:.0f} s", flush=True)
    rows = [[name, f"{f['peak_bytes'] / 1e9:.2f} GB", f"{f['seconds']:.0f} s"] for name, f in measured.items()]
    print(table([[f"{options.gigabytes:g} GB of responses", "peak per process", "time"], *rows]))
    write_json(options, measured)
    sys.exit(any(f["peak_bytes"] >= AIM for f in measured.values()))


if __name__ == "__main__":
    main()
