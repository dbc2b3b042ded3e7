"""Notes for the log about data that is left out or slow to read."""

from collections.abc import Sequence

from data_prep.remote.cache import GIB
from data_prep.shards.folder import ShardFolder
from data_prep.shards.remote_files import RemoteFiles
from train.data.recordings import FitAndSelection, Recordings
from train.run.recipe import Loader


def notes_on_left_out(recordings: Recordings, divided: Sequence[FitAndSelection]) -> list[str]:
    """Training stimuli of each recording that are left out because another recording holds them out."""
    return [
        f"note: {part.left_out:,} of the {len(part.train):,} train stimuli of {name} are left out, because another "
        "recording holds them out (the same image, whatever its id)"
        for name, part in zip(recordings.names, divided, strict=True)
        if part.left_out
    ]


def notes_on_remote_shards(folders: Sequence[ShardFolder], loader: Loader) -> list[str]:
    """Remote shards that are slow to read."""
    remote = [folder for folder in folders if folder.is_remote]
    if not remote:
        return []
    notes = [
        f"note: {folder.folder} has no targets.npz, so all shards were read for their responses; pack again"
        for folder in remote
        if not folder.has_response_table
    ]
    splits = [folder.split("train") for folder in remote]
    files = splits[0].files
    assert isinstance(files, RemoteFiles)
    budget = files.cache.budget
    sizes = sorted((shard.bytes for split in splits for shard in split.shards), reverse=True)
    if loader.order == "blocks":
        needed, advice = sum(sizes[: loader.block_shards + 1]), "lower loader.block_shards"
    else:
        needed, advice = sum(sizes), "loader.order blocks fetches each about once"
    if needed > budget:
        notes.append(
            f"note: loader.order {loader.order} needs {needed / GIB:.3g} GiB of shards at a time and "
            f"loader.shard_cache_gib keeps {budget / GIB:.3g}, so shards are fetched several times an epoch; {advice}"
        )
    return notes
