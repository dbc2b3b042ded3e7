"""Copies: stimuli that show the same image under different ids. What the manifest says of them, and how it reads."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from data_prep.shards.image_hashes import first_equal
from data_prep.shards.index import SplitIndex

SHOWN = 3  # images that the manifest names


def first_copies_in(splits: Mapping[str, SplitIndex]) -> np.ndarray | None:
    """For each stimulus of a folder, split after split, the position of the first one with the same image.

    Two images are the same if their bytes or, where they were decoded, their pixels are. None without hashes.
    """
    encoded = [index.encoded_hash for index in splits.values() if index.encoded_hash is not None]
    pixels = [index.pixel_hash for index in splits.values() if index.pixel_hash is not None]
    if len(encoded) < len(splits):
        return None
    hashes = [np.concatenate(encoded)]
    if len(pixels) == len(splits):
        hashes.append(np.concatenate(pixels))
    return first_equal(*hashes)


def copy_facts(splits: Mapping[str, SplitIndex]) -> dict[str, Any] | None:
    """What the manifest's provenance says of copies in a folder; None if its index has no hashes.

    Returns:
        `stimuli` and `images`: how many, and how many different ones; `compared`: "pixels" or, where images were not
        decoded, "bytes". Where copies are in more than one split, also `in_several_splits` and, of these,
        `in_train_and_held_out`: the numbers of images; and `examples`: {stimulus: split} for some of them.
    """
    first = first_copies_in(splits)
    if first is None:
        return None
    ids = [stimulus for index in splits.values() for stimulus in index.stimulus_id.tolist()]
    split_of = [name for name, index in splits.items() for _ in range(len(index.stimulus_id))]
    decoded = all(index.pixel_hash is not None for index in splits.values())
    facts: dict[str, Any] = {
        "stimuli": len(ids),
        "images": len(np.unique(first)),
        "compared": "pixels" if decoded else "bytes",
    }
    members: dict[int, list[int]] = {}
    for position, original in enumerate(first.tolist()):
        members.setdefault(original, []).append(position)
    separated = [group for group in members.values() if len({split_of[position] for position in group}) > 1]
    if separated:
        # Those in train first: they are what makes scores wrong.
        separated.sort(key=lambda group: "train" not in {split_of[position] for position in group})
        facts["in_several_splits"] = len(separated)
        facts["in_train_and_held_out"] = sum("train" in {split_of[k] for k in group} for group in separated)
        facts["examples"] = [{ids[position]: split_of[position] for position in group} for group in separated[:SHOWN]]
    return facts


def copy_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """What a summary says of copies: nothing where there are none."""
    stimuli, images = facts["stimuli"], facts["images"]
    if images < stimuli:
        yield f"  copies {stimuli:,} stimuli show {images:,} different images (compared by their {facts['compared']})"


def copy_warnings(facts: Mapping[str, Any]) -> Iterator[str]:
    """Warnings about copies that are in several splits."""
    separated = facts.get("in_several_splits", 0)
    if not separated:
        return
    train = facts["in_train_and_held_out"]
    example = ", ".join(f"{stimulus} in {split}" for stimulus, split in list(facts["examples"][0].items())[:SHOWN])
    consequence = "scores on what is held out are too good" if train else "images that are scored may also select"
    yield (
        f"images in more than one split under different ids: {separated:,}, of these both in train and held out: "
        f"{train:,} (such as {example}); {consequence}; divide the stimuli again with copies together "
        "(pack.py --split random or grouped, without --copies as-dealt)"
    )
