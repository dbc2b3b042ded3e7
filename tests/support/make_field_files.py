"""Write small recordings in the file formats of the field: BrainIO, NWB, MATLAB v7.3 and HDF5."""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from make_sources import OBJECTS, encode, make_images, mean_rates, write_csv


@dataclass
class Written:
    """What was written.

    Attributes:
        ids: of the stimuli.
        images: uint8 (stimuli, size, size, 3).
        objects: one name per stimulus.
        trials: float32 (stimuli, repetitions, sites), NaN where a stimulus has no such repetition.
        regions: per site.
        subjects: per site.
    """

    ids: list[str]
    images: np.ndarray
    objects: list[str]
    trials: np.ndarray
    regions: list[str]
    subjects: list[str]


def make_trials(images: np.ndarray, repetitions: int, sites: int, seed: int = 0) -> np.ndarray:
    """Single trials float32 (stimuli, repetitions, sites); every third stimulus lacks the last repetition."""
    noise = np.random.default_rng([seed, 3]).normal(size=(len(images), repetitions, sites))
    trials = (mean_rates(images, sites, seed)[:, None] + noise).astype(np.float32)
    if repetitions > 1:
        trials[::3, -1] = np.nan
    return trials


def write_images(path: Path, names: list[str], images: np.ndarray, encoding: str = "png") -> None:
    """Write an image per name into a folder, sub-folders included, or a zip archive (by the ending of `path`)."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, image in zip(names, images, strict=True):
                archive.writestr(name, encode(image, encoding))
        return
    for name, image in zip(names, images, strict=True):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(encode(image, encoding))


# ---- Brain-Score ---------------------------------------------------------------------------------------------------


def make_assembly(
    folder: Path,
    n: int = 24,
    repetitions: int = 4,
    axes: tuple[str, ...] = ("neuroid", "presentation", "time_bin"),
    bins: tuple[tuple[float, float], ...] = ((70, 170),),
    id_name: str = "image_id",
    variable: str | None = "data",
    drop: tuple[str, ...] = (),
    **netcdf,
) -> Written:
    """Write assy.nc, stimuli.csv and images.zip as BrainIO packages them.

    Presentations are in random order and neuroids of two regions and animals are mixed; all coordinates lie along a
    dimension that has no coordinate of its own. With several bins, bin k holds the responses plus k.

    Args:
        folder: to write into.
        n: number of stimuli.
        repetitions: of a stimulus; every third lacks the last.
        axes: their order in the file; without time_bin there is none.
        bins: start and end of each.
        id_name: of the coordinate and the CSV's column.
        variable: name of the responses; None writes an unnamed array.
        drop: coordinates to leave out.
        netcdf: for xarray's to_netcdf.
    """
    import xarray as xr

    folder.mkdir(parents=True, exist_ok=True)
    images, label = make_images(n)
    sites = 10
    trials = make_trials(images, repetitions, sites)
    ids = [f"{k * 7919 % 65536:04x}{k:04x}" for k in range(n)]  # like the hashes of HvM
    objects = [OBJECTS[k] for k in label]
    regions = [("IT", "V4")[k % 2] for k in range(sites)]
    animals = [("Chabo", "Tito")[k // 5] for k in range(sites)]
    shown = [(k, r) for k in range(n) for r in range(repetitions) if not np.isnan(trials[k, r]).all()]
    shown = [shown[k] for k in np.random.default_rng(0).permutation(len(shown))]
    data = np.array([trials[k, r] for k, r in shown])[:, :, None] + np.arange(len(bins), dtype=np.float32)
    stimulus = np.array([k for k, _ in shown])
    coordinates = {
        id_name: ("presentation", np.array(ids)[stimulus]),
        "repetition": ("presentation", np.array([r for _, r in shown])),
        "object_name": ("presentation", np.array(objects)[stimulus]),
        "neuroid_id": ("neuroid", [f"{animals[k]}_L_{k}" for k in range(sites)]),
        "region": ("neuroid", regions),
        "animal": ("neuroid", animals),
        "depth": ("neuroid", [np.nan if k == 0 else k / 2 for k in range(sites)]),
        "time_bin_start": ("time_bin", [start for start, _ in bins]),
        "time_bin_end": ("time_bin", [end for _, end in bins]),
    }
    array = xr.DataArray(
        data,
        dims=("presentation", "neuroid", "time_bin"),
        coords={name: value for name, value in coordinates.items() if name not in drop},
        attrs={"identifier": "dicarlo.Test", "stimulus_set_identifier": "dicarlo.test"},
    )
    if "time_bin" not in axes:
        array = array.isel(time_bin=0, drop=True)
    array = array.transpose(*axes)
    if variable is not None:
        array = array.to_dataset(name=variable)
    array.to_netcdf(folder / "assy.nc", **netcdf)
    columns = {
        id_name: ids,
        "filename": [f"{name}.png" for name in ids],
        "object_name": objects,
        "category_name": [("thing", "being")[k % 2] for k in label],
        "rxy": [k / 4 for k in range(n)],
    }
    order = np.random.default_rng(1).permutation(n)
    write_csv(folder / "stimuli.csv", {name: [cells[k] for k in order] for name, cells in columns.items()})
    write_images(folder / "images.zip", [f"image_dicarlo/{name}.png" for name in ids], images)
    return Written(ids, images, objects, trials, regions, animals)


# ---- NWB -----------------------------------------------------------------------------------------------------------


def make_nwb(
    path: Path, n: int = 20, repetitions: int = 3, units: int = 6, table: str = "trials", column: str = "stimulus_id"
) -> Written:
    """Write an NWB file with spike times, and a folder `stimuli` beside it.

    Every third stimulus lacks the last repetition, blank screens lie between, and the last unit was observed in the
    first half only.

    Returns:
        what was written, with the counts in 70-170 ms as trials.
    """
    from datetime import UTC, datetime

    from pynwb import NWBHDF5IO, NWBFile
    from pynwb.epoch import TimeIntervals
    from pynwb.file import Subject

    images, label = make_images(n)
    rng = np.random.default_rng(5)
    shown = [(k, r) for k in range(n) for r in range(repetitions) if r < repetitions - 1 or k % 3]
    shown = [shown[k] for k in rng.permutation(len(shown))]
    onsets = 1 + 0.5 * np.arange(len(shown)) + rng.uniform(0, 0.1, len(shown))
    rates = np.maximum(mean_rates(images, units), 1)
    end = onsets[-1] + 1
    middle = float(onsets[len(onsets) // 2])
    file = NWBFile("a session", "session-1", datetime(2024, 1, 1, tzinfo=UTC))
    file.subject = Subject(subject_id="M1", species="Macaca mulatta", age="P5Y", sex="M")
    device = file.create_device("array")
    group = file.create_electrode_group("g", "d", "IT", device)
    regions = [("IT", "V4")[k % 2] for k in range(units)]
    for region in regions:
        file.add_electrode(location=region, group=group)
    file.add_unit_column("quality", "of the isolation")
    trials, spikes = np.full((n, repetitions, units), np.nan, np.float32), []
    for unit in range(units):
        background = rng.uniform(0, end, int(5 * end))
        count = rng.poisson([rates[k, unit] for k, _ in shown])
        evoked = [onset + rng.uniform(0.05, 0.19, spiked) for onset, spiked in zip(onsets, count, strict=True)]
        spikes.append(np.sort(np.concatenate([background, *evoked])))
        until = middle if unit == units - 1 else end
        file.add_unit(
            spike_times=spikes[-1],
            electrodes=[unit],
            quality="good" if unit % 3 else "multi",
            obs_intervals=[[0.0, until]],
        )
    times_shown = [0] * n
    for onset, (k, _) in zip(onsets, shown, strict=True):
        for unit in range(units):
            if unit < units - 1 or onset + 0.17 <= middle:
                inside = (spikes[unit] >= onset + 0.07) & (spikes[unit] < onset + 0.17)
                trials[k, times_shown[k], unit] = inside.sum()
        times_shown[k] += 1
    ids = [f"im_{k:02d}" for k in range(n)]
    rows = TimeIntervals(name=table, description="what was shown")
    for name in (column, "object_name"):
        rows.add_column(name, name)
    rows.add_column("correct", "whether fixation was held")
    for onset, (k, _) in zip(onsets, shown, strict=True):
        facts = {column: ids[k], "object_name": OBJECTS[label[k]]}
        rows.add_row(start_time=onset, stop_time=onset + 0.2, correct=bool(k % 2), **facts)
        if k == 0:
            rows.add_row(
                start_time=onset + 0.2, stop_time=onset + 0.3, correct=True, **{column: "blank", "object_name": ""}
            )
    if table == "trials":
        file.trials = rows
    else:
        file.add_time_intervals(rows)
    with NWBHDF5IO(path, "w") as io:
        io.write(file)
    write_images(path.parent / "stimuli", [f"set_a/{name}.png" for name in ids], images)
    return Written(ids, images, [OBJECTS[k] for k in label], trials, regions, ["M1"] * units)


# ---- TVSD ----------------------------------------------------------------------------------------------------------


def make_tvsd(folder: Path, train: int = 30, test: int = 5, repetitions: int = 4, turned: bool = False) -> Written:
    """Write monkeyF/THINGS_normMUA.mat, monkeyF/_logs/things_imgs.mat and object_images as MATLAB v7.3 lays them out.

    Returns:
        what was written; `trials` is (stimuli, repetitions, 1024), the training stimuli first, with one repetition.
    """
    monkey = folder / "monkeyF"
    (monkey / "_logs").mkdir(parents=True)
    images, label = make_images(train + test, n_objects=6)
    rng = np.random.default_rng(6)
    objects = [OBJECTS[k].replace("é", "e") for k in label]
    paths = [f"{name}\\{name}_{k:02d}b.jpg" for k, name in enumerate(objects)]
    trials = np.full((train + test, repetitions, 1024), np.nan, np.float32)
    trials[:train, 0] = rng.normal(size=(train, 1024))
    trials[train:] = rng.normal(size=(test, repetitions, 1024))
    arrays = {
        "train_MUA": trials[:train, 0],
        "test_MUA": trials[train:].mean(axis=1),
        "test_MUA_reps": trials[train:].transpose(1, 0, 2),
        "reliab": np.tile(np.linspace(-0.1, 0.9, 1024), (repetitions * (repetitions - 1) // 2, 1)),
        "SNR_max": np.arange(1024.0)[:, None],
        "oracle": np.full((1024, 1), 0.5),
    }
    arrays["reliab"][0, 7] = np.nan  # one pair of a channel
    with h5py.File(monkey / "THINGS_normMUA.mat", "w", userblock_size=512) as file:
        for name, array in arrays.items():
            file[name] = (array.T if turned else array).astype(np.float64)
            file[name].attrs["MATLAB_class"] = np.bytes_("double")
    with h5py.File(monkey / "_logs" / "things_imgs.mat", "w", userblock_size=512) as file:
        file.create_group("#refs#")
        for name, rows in {"train_imgs": paths[:train], "test_imgs": paths[train:]}.items():
            references = np.empty((len(rows), 1), h5py.ref_dtype)
            for k, path in enumerate(rows):
                codes = file["#refs#"].create_dataset(f"{name}{k}", data=np.array([[ord(c)] for c in path], np.uint16))
                codes.attrs["MATLAB_class"] = np.bytes_("char")
                references[k, 0] = codes.ref
            file.create_group(name).create_dataset("things_path", data=references, dtype=h5py.ref_dtype)
    write_images(folder / "object_images", [path.replace("\\", "/") for path in paths], images, "jpg")
    ids = [path.split("\\")[1].removesuffix(".jpg") for path in paths]
    regions = ["V1"] * 512 + ["IT"] * 320 + ["V4"] * 192
    return Written(ids, images, objects, trials, regions, ["F"] * 1024)


# ---- Cowley et al. 2023 --------------------------------------------------------------------------------------------


def make_cowley2023(folder: Path, session: str = "210325", n: int = 12, sites: int = 3, trials: bool = True) -> Written:
    """Write a session as the repository holds it: a zip of images in mixed order, averages and, if wanted, trials."""
    images, label = make_images(n)
    written = make_trials(images, 4, sites)
    for kind in ("images", "responses_repeat_averaged", "responses_raw"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(0).permutation(n)
    write_images(
        folder / f"images/images_{session}.zip", [f"image{k + 1:04d}.jpg" for k in order], images[order], "jpg"
    )
    averages = np.nanmean(written.astype(np.float64), axis=1)
    np.save(folder / f"responses_repeat_averaged/responses_{session}.npy", averages.T)
    if trials:
        np.save(folder / f"responses_raw/responses_{session}.npy", written.transpose(2, 0, 1).astype(np.float64))
    ids = [f"{session}_{k + 1:04d}" for k in range(n)]
    return Written(ids, images, [OBJECTS[k] for k in label], written, ["V4"] * sites, ["PE"] * sites)


# ---- model-brain comparisons ---------------------------------------------------------------------------------------


def make_mbs(path: Path, own_ids: bool = False, with_images: bool = True, val: bool = False) -> Written:
    """Write HDF5 with two subjects and two regions; with `own_ids` each has seen other training stimuli.

    Returns:
        what was written; `trials` is (stimuli, 2, sites): training stimulus 3 was shown twice, all others once.
    """
    n, train, sites = 26, 20, {("s1", "IT"): 4, ("s1", "V4"): 3, ("s2", "IT"): 2}
    images, _ = make_images(n)
    total = sum(sites.values())
    single, trials = make_trials(images, 2, total), np.full((n, 2, total), np.nan, np.float32)
    single[:, 1] = single[:, 0] + 1
    splits = {"train": [*range(train), 3], "test": list(range(train, n))}
    if val:
        splits |= {"val": [20, 21], "test": list(range(22, n))}
    names = [str(1000 + k) if own_ids else f"im{1000 + k}.png" for k in range(n)]
    with h5py.File(path, "w") as file:
        file.attrs["max_nc"] = 100.0
        for split, shown in splits.items():
            seen = {"s1": shown, "s2": shown}
            if own_ids and split == "train":
                seen = {"s1": shown[5:], "s2": shown[:12]}
            if own_ids:
                for subject, stimuli in seen.items():
                    file[f"{split}/stimulus_ids/{subject}"] = np.array([1000 + k for k in stimuli])
            else:
                file[f"{split}/stimulus_ids"] = np.array([names[k] for k in shown], dtype=object)
            columns = np.split(np.arange(total), np.cumsum(list(sites.values()))[:-1])
            for (subject, region), part in zip(sites, columns, strict=True):
                repetition = [seen[subject][:at].count(k) for at, k in enumerate(seen[subject])]
                responses = single[seen[subject], repetition][:, part]
                file[f"{split}/neural_data/{subject}/{region}"] = responses
                trials[np.array(seen[subject])[:, None], np.array(repetition)[:, None], part] = responses
        for (subject, region), count in sites.items():
            file[f"noise_ceilings/{subject}/{region}"] = np.linspace(20, 80, count)
        if with_images and own_ids:
            file["stimuli"], file["ids"] = images[::-1], np.arange(n)[::-1] + 1000
        elif with_images:
            for split, shown in splits.items():
                file[f"{split}/stimuli"] = images[shown]
    regions = [region for (_, region), count in sites.items() for _ in range(count)]
    subjects = [subject for (subject, _), count in sites.items() for _ in range(count)]
    return Written(names, images, [], trials, regions, subjects)
