"""Check that no training step makes the host wait for the GPU: torch raises an error for every such call.

    python benchmarks/host_sync.py --data DIR [--json FILE]

DIR holds a recording with classes. Without a GPU the steps run, but no fault can be detected.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from harness import options_of, write_json
from synthetic import recipe_of, training

NETWORK, SIDE, BATCH = "test_resnet", 64, 16
AUGMENT = {"shift": 0.1, "zoom": 0.1, "brightness": 0.2, "contrast": 0.2, "flip": True}
RECIPES = {
    "nadam": {},
    "adamw, clipping, average, augmentation": {
        "optimizer": {"name": "adamw", "clip_norm": 1.0},
        "ema": 0.99,
        "augment": AUGMENT,
    },
    "hybrid by uncertainty, accumulation": {
        "task": {"kind": "hybrid", "weighting": "uncertainty"},
        "batch": {"global_size": BATCH, "per_device": BATCH // 2},
    },
    "poisson, sgd, momentum that cycles": {
        "loss": {"responses": "poisson"},
        "optimizer": {"name": "sgd", "lr": 1e-4},
        "schedule": {"cycle_momentum": True},
    },
    "correlation, lion": {"loss": {"responses": "correlation"}, "optimizer": {"name": "lion", "lr": 1e-4}},
}
STEPS = 3


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Turn calls that wait for a GPU into errors."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def fault_of(sections: dict, data: Path, out: Path) -> str | None:
    """The call that made the host wait in the steps of a recipe, or None."""
    with training(recipe_of(NETWORK, SIDE, BATCH, loader={"workers": 0}, **sections), data, out) as run:
        micros = next(run.loader.epoch(0))  # on the host: the copy to the device is part of a step
        for _ in range(STEPS):
            run.step(micros, 0)
        try:
            with no_waiting(run.runtime.device):
                for _ in range(STEPS):
                    run.step(micros, 0)
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            return " ".join(str(error).split())
    return None


def main() -> None:
    """Try every recipe and print the faults."""
    parser = options_of(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="shard folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        faults = {
            name: fault_of(sections, options.data, Path(folder) / str(index))
            for index, (name, sections) in enumerate(RECIPES.items())
        }
    for name, fault in faults.items():
        print(f"{name}: {fault or 'no waiting'}")
    write_json(options, faults)


if __name__ == "__main__":
    main()
