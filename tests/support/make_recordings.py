"""Make small recordings that differ in stimuli, sites, image size and missing responses."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from make_sources import RecordingContent, make_folder, write_csv

from data_prep.shards.packing import pack
from data_prep.sources.folder import Folder


def pack_recording(
    path: Path,
    name: str,
    ids: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
    missing: float = 0.0,
    stimuli_per_shard: int = 8,
    **options,
) -> tuple[Path, RecordingContent]:
    """Pack a recording into `path / name`; returns the shard folder and its content.

    Args:
        path: parent of the source and the shard folder.
        name: of the recording.
        ids: of the stimuli; by default the name of the recording and a number.
        splits: of the stimuli; by default three of five are train.
        missing: share of the responses that were not recorded.
        stimuli_per_shard: in a tar.
        options: of `make_folder`.
    """
    source = path / f"{name}_source"
    written = make_folder(source, **{"splits": True} | options)
    ids = ids or [f"{name}{number:03d}" for number in range(len(written.ids))]
    images = [f"images/{old}.png" for old in written.ids]
    written.ids, written.splits = list(ids), list(splits or written.splits)
    write_csv(
        source / "stimuli.csv",
        {"stimulus_id": written.ids, "image": images, "object": written.objects, "split": written.splits},
    )
    written.rates[np.random.default_rng(0).uniform(size=written.rates.shape) < missing] = np.nan
    np.save(source / "rates.npy", written.rates)
    return pack(Folder(source=source, name=name).open(), path / name, stimuli_per_shard, 1).folder, written


def pack_two(path: Path) -> list[Path]:
    """`one`: 60 stimuli of 32 px, 5 sites. `two`: 100 of 40 px, 7 sites, a tenth of the responses missing."""
    one, _ = pack_recording(path, "one", n=60, size=32, sites=5, seed=1)
    two, _ = pack_recording(path, "two", n=100, size=40, sites=7, seed=2, missing=0.1)
    return [one, two]
