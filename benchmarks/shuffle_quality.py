"""How well the order by blocks mixes, beside a full shuffle, and how many shards it needs at a time for it.

    python benchmarks/shuffle_quality.py [--shards 256] [--stimuli 256] [--batch 64] [--classes 64] [--epochs 5]

The stimuli are taken to be stored class after class, which is the worst case. Pure computation: no data, no network.
"""

import argparse
import itertools

import numpy as np

from train.data.order import Blocks, epoch_order

WINDOWS = (1, 4, 8, 16, 32, 64, 128)
COLUMNS = {
    "rank r": "largest rank correlation, over epochs, of place in the epoch and place in storage (absolute)",
    "shards/batch": "different shards in a batch",
    "class spread": "distance of a batch's classes from those of all stimuli (total variation), as a multiple",
    "neighbours": "pairs of storage neighbours that share a batch, as a multiple",
    "companions": "pairs that share a batch in one epoch and in the next, as a multiple",
    "open": "most shards that are begun and not finished at a time",
}


def orders(options: argparse.Namespace) -> dict[str, list[np.ndarray]]:
    """The epochs of every order, by its name."""
    sizes, stimuli = (options.stimuli,) * options.shards, options.shards * options.stimuli
    ways = {"shuffled": None}
    ways |= {f"blocks of {window}": Blocks(sizes, window) for window in WINDOWS if window < options.shards}
    return {
        name: [epoch_order(options.seed, epoch, stimuli, blocks) for epoch in range(options.epochs)]
        for name, blocks in ways.items()
    }


def rank_correlation(order: np.ndarray) -> float:
    """Of place in the epoch and place in storage; both are permutations, so these are their own ranks."""
    return float(np.corrcoef(order, np.arange(len(order)))[0, 1])


def batch_of(order: np.ndarray, size: int) -> np.ndarray:
    """The batch that each stimulus is in."""
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    return place // size


def class_distance(order: np.ndarray, size: int, classes: int) -> float:
    """Total variation between a batch's classes and those of all stimuli, mean over batches."""
    count = len(order) // size
    label = (order[: count * size] * classes // len(order)).reshape(count, size)
    shares = np.stack([np.bincount(row, minlength=classes) for row in label]) / size
    return float(np.abs(shares - 1 / classes).sum(axis=1).mean() / 2)


def shared_pairs(one: np.ndarray, other: np.ndarray) -> float:
    """Of the pairs that share a batch in one epoch, the part that shares one in the other too."""

    def pairs(batches: np.ndarray) -> float:
        together = np.unique(batches, return_counts=True)[1].astype(float)
        return float((together * (together - 1)).sum())

    return pairs(one * (other.max() + 1) + other) / pairs(one)


def most_open(order: np.ndarray, stimuli_per_shard: int) -> int:
    """The largest number of shards that are begun and not finished at any place."""
    shard = order // stimuli_per_shard
    first = np.unique(shard, return_index=True)[1]
    last = len(order) - 1 - np.unique(shard[::-1], return_index=True)[1]
    change = np.zeros(len(order) + 1, np.int64)
    np.add.at(change, first, 1)
    np.add.at(change, last + 1, -1)
    return int(change.cumsum().max())


def measured(epochs: list[np.ndarray], options: argparse.Namespace) -> list[float]:
    """The columns of one order, means over its epochs where nothing else is said."""
    whole = len(epochs[0]) // options.batch * options.batch
    shards = [(order[:whole] // options.stimuli).reshape(-1, options.batch) for order in epochs]
    batches = [batch_of(order, options.batch) for order in epochs]
    return [
        max(abs(rank_correlation(order)) for order in epochs),
        float(np.mean([len(np.unique(row)) for rows in shards for row in rows])),
        float(np.mean([class_distance(order, options.batch, options.classes) for order in epochs])),
        float(np.mean([np.mean(np.diff(batch) == 0) for batch in batches])),
        float(np.mean([shared_pairs(*pair) for pair in itertools.pairwise(batches)])),
        max(most_open(order, options.stimuli) for order in epochs),
    ]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"shards": 256, "stimuli": 256, "batch": 64, "classes": 64, "epochs": 5, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    options = parser.parse_args()
    found = {name: measured(epochs, options) for name, epochs in orders(options).items()}
    print(f"{options.shards} shards of {options.stimuli} stimuli in {options.classes} classes, batch {options.batch}\n")
    print(f"| order | {' | '.join(COLUMNS)} |\n|{' --- |' * (len(COLUMNS) + 1)}")
    full = found["shuffled"]
    for name, (rank, shards, spread, near, again, most) in found.items():
        multiples = " | ".join(
            f"{mine / theirs:.2f}" for mine, theirs in zip((spread, near, again), full[2:5], strict=True)
        )
        print(f"| {name} | {rank:.3f} | {shards:.1f} | {multiples} | {most} |")
    print("\n" + "\n".join(f"{name}: {meaning}" for name, meaning in COLUMNS.items()))
    print("multiples: of the full shuffle's")


if __name__ == "__main__":
    main()
