"""Recipes, weights and runs that are damaged, inconsistent or malicious."""

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hostile import EVALUATE, EXPORT, FINETUNE, PLAN, PROBE, SWEEP, Case, Kit, Make, edit, flip, sealed
from launching import SMALL
from safetensors.torch import load_file, save_file

from train.run import checkpoint

# ---- recipes -------------------------------------------------------------------------------------------------------


def _recipe(text: str | bytes | Callable[[Kit], str], command: str = FINETUNE) -> Make:
    """Start a run from a recipe."""

    def make(kit: Kit) -> list:
        path = kit.write("recipe.yaml", text(kit) if callable(text) else text)
        return [command, path, "--data", kit.packed, "--out", kit.folder / "out"]

    return make


def _flags(*words: Any, command: str = FINETUNE) -> Make:
    return lambda kit: [command, "--data", kit.packed, "--out", kit.folder / "out", *words]


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


def _piped(kit: Kit) -> list:
    os.mkfifo(kit.folder / "recipe.yaml")
    return [FINETUNE, kit.folder / "recipe.yaml", "--data", kit.packed, "--out", kit.folder / "out"]


def _execute(kit: Kit) -> str:
    return f"epochs: !!python/object/apply:os.system ['touch {kit.canary}']"


RECIPES: dict[str, Case] = {
    "a tag that runs a command": (_recipe(_execute), ("recipe.yaml", "python/object/apply")),
    "the same for a probe": (_recipe(lambda kit: f"layers: {_execute(kit)[8:]}", PROBE), ("python/object/apply",)),
    "the same for a sweep": (
        lambda kit: [SWEEP, kit.write("s.yaml", _execute(kit)), "--data", kit.packed, "--out", kit.folder / "out"],
        ("s.yaml", "python/object/apply"),
    ),
    "the same for a plan": (
        lambda kit: [PLAN, kit.write("r.yaml", _execute(kit)), "--gpus", 1, "--memory", 8],
        ("r.yaml", "python/object/apply"),
    ),
    "a billion laughs": (_recipe(LAUGHS), ("recipe.yaml", "10,000 values")),
    "laughs in a list": (_recipe("layers: [" + "x," * 15_000 + "x]", PROBE), ("recipe.yaml", "10,000 values")),
    "a list within itself": (_recipe("epochs: &a [*a]"), ("recipe.yaml", "10,000 values")),
    "nested without end": (_recipe("epochs: " + "[" * 100_000), ("recipe.yaml", "nested too deeply")),
    "a day that is none": (_recipe("seed: 2020-13-45"), ("recipe.yaml", "month")),
    "a time that is none": (_recipe("seed: !!timestamp x"), ("recipe.yaml",)),
    "no number": (_recipe("seed: !!int x"), ("recipe.yaml",)),
    "6,000 hexadecimal digits": (_recipe(f"seed: 0x{'f' * 6000}"), ("recipe.yaml", "line 1", "6,002 characters")),
    "5,000 digits": (_recipe(f"seed: {'9' * 5000}"), ("recipe.yaml", "line 1", "5,000 characters")),
    "90 digits": (_recipe(f"seed: {'9' * 90}"), ("recipe.yaml", "integer of 299 bits")),
    "one key twice": (_recipe("epochs: 3\nseed: 1\nepochs: 5\n"), ("recipe.yaml", "line 3: epochs is repeated")),
    "two megabytes": (_recipe("# " + "x" * 2**21), ("recipe.yaml", "2,097,154 bytes")),
    "no text": (_recipe(b"\xff\xfe\x00"), ("recipe.yaml", "YAML")),
    "a list": (_recipe("[1, 2]"), ("recipe.yaml", "list")),
    "a pipe": (_piped, ("recipe.yaml", "not a regular file")),
    "an unknown key": (_recipe("optimizer: {lrr: 1}"), ("optimizer.lrr", "did you mean lr?")),
    "a value of megabytes": (_recipe(f"epochs: {'x' * 100_000}"), ("epochs", "...")),
    "no such file": (lambda kit: [FINETUNE, "no.yaml", "--data", "x", "--out", "out"], ("no.yaml: no such recipe",)),
    "a weight path that steers the terminal": (_recipe('backbone: {weights: "a\\e[2J"}'), ("backbone.weights",)),
}
RECIPES |= {
    f"{name} {value}": (_flags(f"--{name}", value), (name.rpartition(".")[2].partition("_")[0],))
    for name, value in (
        *(("epochs", 0), ("epochs", 10**9), ("seed", -1), ("seed", 2**70), ("ema", 1.0)),
        *(("batch.global_size", 0), ("batch.global_size", 10**12), ("batch.per_device", 0)),
        *(("optimizer.lr", 0), ("optimizer.lr", "nan"), ("optimizer.lr", "inf"), ("optimizer.weight_decay", -1)),
        *(("images.size", 8), ("images.size", 10**6), ("readout.rank", 10**9), ("loader.workers", 10**6)),
        *(("faults.timeout", 1e300), ("faults.bad_steps", 0), ("checkpoint.keep", 0), ("schedule.warmup", 1)),
        *(("augment.zoom", 2), ("loss.label_smoothing", 1), ("early_stopping.inner_fraction", 0)),
        *(("loader.cache_gib", -1), ("precision", "int8"), ("loader.on_bad_sample", "guess")),
    )
}


def _without_classes(kit: Kit) -> list:
    folder = sealed(kit.shards())
    edit(folder / "manifest.json", lambda content: content.update(classes=None))
    return [FINETUNE, "--data", folder, "--out", kit.folder / "out", "--task.kind", "hybrid"]


CONTRADICTIONS: dict[str, Case] = {
    "a hybrid without labels": (_without_classes, ("no classes",)),
    "more to a device than there is": (
        _flags("--batch.per-device", 64, "--batch.global-size", 32),
        ("batch.per_device (64)", "batch.global_size (32)"),
    ),
    "a correlation of two": (
        _flags("--loss.responses", "correlation", "--batch.global-size", 2),
        ("batch.global_size (2)", "at least 3"),
    ),
    "top1 without classes": (_flags("--early-stopping.metric", "top1"), ("early_stopping.metric", "top1")),
    "nothing to learn": (
        _flags("--task.kind", "hybrid", "--task.regression-weight", 0, "--task.classification-weight", 0),
        ("both 0",),
    ),
    "a setting without effect": (_flags("--schedule.plateau-factor", 0.5), ("schedule.plateau_factor", "plateau")),
    "half precision without a GPU": (_flags("--precision", "fp16"), ("precision: fp16",)),
    "a network that is not": (_flags("--backbone.name", "resnett18"), ("backbone.name", "resnet18")),
    "a cut that is not": (_flags(*SMALL, "--backbone.cut", "stages.9"), ("backbone.cut", "stages.9")),
    "a strategy that is not": (_flags("--strategy", "zero9.json"), ("zero9.json",)),
    "a strategy nested without end": (
        lambda kit: _flags("--strategy", kit.write("s.json", "[" * 100_000))(kit),
        ("s.json", "JSON"),
    ),
    "a strategy that is a list": (
        lambda kit: _flags("--strategy", kit.write("s.json", "[]"))(kit),
        ("s.json", "stage"),
    ),
    "pixels and layers": (_flags("--layers", "pixels", "blocks.1", command=PROBE), ("layers", "pixels")),
    "more folds than stimuli": (
        _flags("--split", "cv", "--cross-validation.folds", 500, "--layers", "pixels", command=PROBE),
        ("cross_validation.folds",),
    ),
    "a place that is taken": (
        lambda kit: [FINETUNE, "--data", kit.packed, "--out", kit.trained()],
        ("already holds a run",),
    ),
    "a place that is a file": (
        lambda kit: [FINETUNE, "--data", kit.packed, "--out", kit.write("out", "x")],
        ("out exists",),
    ),
    "another recipe to go on with": (
        lambda kit: [FINETUNE, "--data", kit.packed, "--out", kit.trained(), "--resume", "--optimizer.lr", 0.5],
        ("another recipe", "optimizer.lr: 0.003 -> 0.5"),
    ),
    "nothing to go on with": (
        lambda kit: [FINETUNE, "--data", kit.packed, "--out", kit.folder / "out", "--resume"],
        ("recipe.yaml",),
    ),
    "the split to select on missing": (
        lambda kit: [EVALUATE, kit.trained(), "--split", "nothing"],
        ("split",),
    ),
}

# ---- weights -------------------------------------------------------------------------------------------------------


def _weights(name: str, content: Callable[[Path, Kit], Any]) -> Make:
    def make(kit: Kit) -> list:
        path = kit.folder / name
        content(path, kit)
        return [FINETUNE, "--data", kit.packed, "--out", kit.folder / "out", *SMALL, "--backbone.weights", path]

    return make


def _bomb(path: Path, _: Kit) -> None:
    """A torch file with compressed tensors."""
    torch.save({"a": torch.zeros(2**24)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


WEIGHTS: dict[str, Case] = {
    "a pickle": (_weights("w.pth", lambda path, kit: path.write_bytes(kit.code())), ("w.pth", "plain tensors")),
    "a torch file with code": (
        _weights("w.pth", lambda path, kit: torch.save({"a": kit.objects()}, path)),
        ("w.pth", "plain tensors"),
    ),
    "an old torch file with code": (
        _weights(
            "w.pt",
            lambda path, kit: torch.save({"a": kit.objects()}, path, _use_new_zipfile_serialization=False),
        ),
        ("w.pt", "plain tensors"),
    ),
    "a whole network": (
        _weights("w.pth", lambda path, _: torch.save(torch.nn.Linear(2, 2), path)),
        ("w.pth", "plain tensors"),
    ),
    "a bomb": (_weights("w.pth", _bomb), ("w.pth", "plain tensors")),
    "a torch file that is a list": (_weights("w.pth", lambda path, _: torch.save([1], path)), ("w.pth", "state dict")),
    "a pickle as safetensors": (
        _weights("w.safetensors", lambda path, kit: path.write_bytes(kit.code())),
        ("w.safetensors", "plain tensors"),
    ),
    "safetensors that claim": (
        _weights("w.safetensors", lambda path, _: path.write_bytes((2**62).to_bytes(8, "little") + b"{}")),
        ("w.safetensors", "plain tensors"),
    ),
    "of another network": (
        _weights("w.safetensors", lambda path, _: save_file({"stem.weight": torch.zeros(3)}, path)),
        ("w.safetensors", "does not fit the network"),
    ),
    "nowhere": (_weights("w.pth", lambda path, kit: None), ("w.pth is not a file",)),
    "a pipe": (_weights("w.pth", lambda path, kit: os.mkfifo(path)), ("w.pth is not a file",)),
    "a run without a checkpoint": (
        _weights("w", lambda path, kit: path.mkdir()),
        ("is a folder without weights",),
    ),
}

# ---- runs ----------------------------------------------------------------------------------------------------------


def _run(spoil: Callable[[Path, Kit], Any], *words: Any, command: str = EVALUATE, resealed: bool = True) -> Make:
    """Evaluate a faulty run; the checksums of its checkpoint match unless the fault is plain damage."""

    def make(kit: Kit) -> list:
        run = kit.trained()
        spoil(run, kit)
        if resealed:
            _seal(run / "checkpoints" / "best")
        if command == FINETUNE:
            return [FINETUNE, "--out", run, "--data", kit.packed, "--resume", *words]
        return [command, run, *words]

    return make


def _seal(found: Path) -> None:
    if (found / checkpoint.CHECKSUMS).is_file() and found.is_dir():
        files = [file for file in found.iterdir() if file.name != checkpoint.CHECKSUMS and file.is_file()]
        (found / checkpoint.CHECKSUMS).write_text(json.dumps({file.name: checkpoint.checksum(file) for file in files}))


def _in_best(name: str, change: Callable[[Path, Kit], Any]) -> Callable[[Path, Kit], Any]:
    return lambda run, kit: change((run / "checkpoints" / "best").resolve() / name, kit)


def _tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path, Kit], Any]:
    def spoil(path: Path, _: Kit) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return _in_best("network.safetensors", spoil)


def _progress(**changes: Any) -> Callable[[Path, Kit], Any]:
    return _in_best("progress.json", lambda path, _: edit(path, lambda content: content.update(changes)))


def _linked(name: str) -> Callable[[Path, Kit], Any]:
    """Evaluate a run in which a path to be written is a link to elsewhere."""

    def spoil(run: Path, kit: Kit) -> None:
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(kit.write("precious", "mine"))

    return spoil


def _best_leads(to: str) -> Callable[[Path, Kit], Any]:
    def spoil(run: Path, _: Kit) -> None:
        (run / "checkpoints" / "best").unlink()
        (run / "checkpoints" / "best").symlink_to(to)

    return spoil


_SUMS = f"checkpoints/best/{checkpoint.CHECKSUMS}"
_INFINITE = torch.tensor(float("inf"))

RUNS: dict[str, Case] = {
    "no run": (lambda kit: [EVALUATE, kit.folder], ("not the folder of a run",)),
    "a recipe with a tag": (
        _run(lambda run, kit: (run / "recipe.yaml").write_text(_execute(kit))),
        ("recipe.yaml", "python/object"),
    ),
    "a recipe of nothing": (_run(lambda run, _: (run / "recipe.yaml").write_text("- a")), ("recipe.yaml",)),
    "env.json nested": (_run(lambda run, _: (run / "env.json").write_text("[" * 100_000)), ("env.json",)),
    "env.json of 400 digits": (
        _run(lambda run, _: (run / "env.json").write_text(f'{{"data": {"9" * 400}}}')),
        ("env.json", "--data"),
    ),
    "env.json a list": (_run(lambda run, _: (run / "env.json").write_text("[]")), ("env.json", "--data")),
    "env.json of data that runs": (
        _run(lambda run, kit: edit(run / "env.json", lambda env: env.update(data=f"pipe:touch {kit.canary}"))),
        ("pipe:touch",),
    ),
    "no checkpoint": (_run(lambda run, _: shutil.rmtree(run / "checkpoints")), ("is not a checkpoint",)),
    "a checkpoint elsewhere": (_run(_best_leads("/etc")), ("best points to /etc",)),
    "a checkpoint above": (_run(_best_leads("../../x")), ("best points to ../../x",)),
    "a log that leads elsewhere": (_run(_linked("log.txt"), command=FINETUNE), ("log.txt is a link",)),
    "a history that leads elsewhere": (_run(_linked("history.jsonl"), command=FINETUNE), ("history.jsonl is a link",)),
    "charts that lead elsewhere": (_run(_linked("tensorboard")), ("tensorboard is a link",)),
    "scores that lead elsewhere": (_run(_linked("eval/val")), ("val is a link",)),
    "a pipe in a run": (_run(lambda run, _: os.mkfifo(run / "pipe")), ("pipe is a link or a device",)),
    "progress that is no JSON": (_run(_in_best("progress.json", lambda path, _: path.write_text("{"))), ("progress",)),
    "progress of NaN": (_run(_progress(best=float("nan"))), ("progress.json", "best")),
    "progress of 400 digits": (_run(_progress(step=10**400)), ("progress.json", "digits")),
    "progress before the start": (_run(_progress(epoch=-3)), ("progress.json", "epoch")),
    "images of a million pixels": (_run(_progress(image_size=10**6)), ("progress.json", "image_size")),
    "sites in another order": (
        _run(_progress(site_ids=["site_001", "site_000", "site_002", "site_003"])),
        ("site list", "'site_000' instead of 'site_001'"),
    ),
    "sites in another order, resumed": (
        _run(_progress(site_ids=["site_001", "site_000", "site_002", "site_003"]), command=FINETUNE),
        ("site list", "'site_000' instead of 'site_001'"),
    ),
    "fewer sites": (_run(_progress(site_ids=["site_000"])), ("site list", "4 instead of 1")),
    "other classes": (_run(_progress(classes=["a", "b", "c", "d"])), ("class list",)),
    "sums that are a list": (_run(lambda run, _: (run / _SUMS).write_text("[]"), resealed=False), ("sha256.json",)),
    "sums of files elsewhere": (
        _run(lambda run, _: (run / _SUMS).write_text('{"/dev/zero": "0"}'), resealed=False),
        ("sha256.json",),
    ),
    "sums of files elsewhere, resumed": (
        _run(lambda run, _: (run / _SUMS).write_text('{"/dev/zero": "0"}'), resealed=False, command=FINETUNE),
        ("not a complete checkpoint", "sha256.json"),
    ),
    "a bit flipped": (
        _run(_in_best("network.safetensors", lambda path, _: flip(path, 9000)), resealed=False),
        ("network.safetensors is damaged",),
    ),
    "cut": (
        _run(_in_best("network.safetensors", lambda path, _: os.truncate(path, 5000)), resealed=False),
        ("network.safetensors is damaged",),
    ),
    "a pickle for weights": (
        _run(_in_best("network.safetensors", lambda path, kit: path.write_bytes(kit.code()))),
        ("network.safetensors cannot be read",),
    ),
    "weights missing": (
        _run(_in_best("network.safetensors", lambda path, _: path.unlink()), resealed=False),
        ("network.safetensors cannot be read",),
    ),
    "weights of NaN": (
        _run(_tensors(lambda x: x[next(iter(x))].fill_(float("nan")))),
        ("network.safetensors", "NaN or infinity"),
    ),
    "a scale of infinity": (
        _run(_tensors(lambda x: x.update({name: _INFINITE.expand(x[name].shape).clone() for name in x}))),
        ("NaN or infinity",),
    ),
    "weights of integers": (
        _run(_tensors(lambda x: x.update({name: x[name].int() for name in x}))),
        ("another network",),
    ),
    "weights of another network": (_run(_tensors(lambda x: x.popitem())), ("another network",)),
    "a readout of other sites": (
        _run(_tensors(lambda x: x.update({"heads.rates.sites.weight": torch.zeros(2, 2)}))),
        ("another network",),
    ),
    "history of 400 digits": (
        _run(lambda run, _: (run / "history.jsonl").write_text(f'{{"epoch": {"9" * 400}}}\n'), command=FINETUNE),
        ("history.jsonl", "has no epoch"),
    ),
    "history that is none": (
        _run(lambda run, _: (run / "history.jsonl").write_text("{}\n"), command=FINETUNE),
        ("history.jsonl", "has no epoch"),
    ),
    "predictions that are objects": (
        _run(
            lambda run, kit: np.savez(_made(run / "eval" / "val") / "predictions.npz", prediction=kit.objects()),
            *("--out", "out", "--format", "mat"),
            command=EXPORT,
        ),
        ("predictions.npz", "Python objects"),
    ),
    "predictions that lack sites": (
        _run(
            lambda run, _: np.savez(_made(run / "eval" / "val") / "predictions.npz", prediction=np.zeros((2, 2))),
            *("--out", "out", "--format", "netcdf"),
            command=EXPORT,
        ),
        ("predictions.npz",),
    ),
    "weights of NaN, exported": (
        _run(
            _tensors(lambda x: x[next(iter(x))].fill_(float("nan"))),
            *("--out", "out", "--format", "timm"),
            command=EXPORT,
        ),
        ("NaN or infinity",),
    ),
}


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
