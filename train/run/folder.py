"""The folder of a run: its layout, who may write to it, and whether the run can be resumed.

RUN/recipe.yaml  env.json  log.txt  history.jsonl
RUN/events.out.tfevents.*  wandb/                      the trackers' files, see train/run/trackers.py
RUN/seen.npz                                           the images that were seen, see train/data/seen.py
RUN/checkpoints/{last,best} -> step_N/                 see train/run/checkpoint.py
RUN/eval/<split>/{metrics.json,predictions.npz}        with several recordings: <split>/<recording>/
RUN/predictor.safetensors                              of a probe, see train/models/saved_probe.py
RUN/eval/left_out/predictions.npz                      of training stimuli that the model was not fitted on
RUN/failures/rank_N.txt                                tracebacks of unexpected failures
"""

import contextlib
import os
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.common import locks
from data_prep.common.atomic_writes import write_json
from data_prep.common.errors import BadInput, Stopped
from data_prep.common.option_fields import marked
from data_prep.common.safe_reading import parse_json, read_regular_file
from data_prep.remote.url import is_url, public_location
from train.run.field_rules import FREE_ON_RESUME
from train.run.recipe import ProbeRecipe, Recipe, load_recipe, save_recipe
from train.run.yaml_files import read_yaml

WANDB = "wandb"  # the folder of W&B's files
LOCK = ".lock"  # locked by the process that writes to the run
SECONDS_TO_END = 10.0  # for a killed process to end
LEFT_OUT = "left_out"  # as a split: training stimuli, each predicted by a model that was not fitted on it


class RunFolder:
    """Paths in a run's folder, and the right to write to it."""

    def __init__(self, path: Path):
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.env = path / "env.json"
        self.log = path / "log.txt"
        self.history = path / "history.jsonl"
        self.checkpoints = path / "checkpoints"
        self._lock: int | None = None  # descriptor

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's files, which names the run there; of earlier versions a folder within it."""
        within = self.path / "tensorboard"
        return within if within.is_dir() else self.path

    def evaluation(self, split: str, checkpoint: str = "best", recording: str | None = None) -> Path:
        """Folder for the results on a split, with a subfolder for each recording if there are several."""
        folder = self.path / "eval" / (split if checkpoint == "best" else f"{split}_{checkpoint}")
        return folder if recording is None else folder / recording

    def results_on(self, split: str, recording: str, checkpoint: str = "best") -> Path:
        """Folder of the results on a recording: its own, or that of the split if the run has a single recording."""
        folder = self.evaluation(split, checkpoint, recording)
        return folder if is_folder_name(recording) and folder.is_dir() else self.evaluation(split, checkpoint)

    def belongs_to_this_job(self) -> bool:
        """Whether an earlier start of this process's job made the folder.

        A job keeps its name over restarts, in the environment variable SPIKETUNE_JOB, which launch/ sets.
        """
        job = os.environ.get("SPIKETUNE_JOB")
        return bool(job) and self._facts().get("job") == job

    def _facts(self) -> dict[str, Any]:
        """The content of env.json; empty if it cannot be read."""
        try:
            content = parse_json(read_regular_file(self.env))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def check_free(self, recipe: Recipe | ProbeRecipe | None = None) -> None:
        """Refuse a folder that is not free for a new run.

        Args:
            recipe: of the run or the probe that is to begin; None for an ensemble.

        Raises:
            BadInput: it holds a run or other files, or cannot be written.
        """
        if not self.recipe.exists() and self.belongs_to_this_job():
            return  # the job ended while `claim` was writing
        if self.recipe.exists():
            holds_probe = is_probe(self)
            can_resume = isinstance(recipe, ProbeRecipe if holds_probe else Recipe)
            resume = ", or continue it with --resume" if can_resume else ""
            raise BadInput(
                f"{self.path} already holds a {'probe' if holds_probe else 'run'}; choose another --out{resume}"
            )
        if self.path.exists() and (not self.path.is_dir() or any(path.name != LOCK for path in self.path.iterdir())):
            raise BadInput(f"{self.path} exists and is not an empty folder; choose another --out")
        check_writable(self.path)

    def check_resumable(self, recipe: Recipe | ProbeRecipe) -> None:
        """Refuse to resume a run with other settings, except those that may change (`FREE_ON_RESUME`).

        Raises:
            BadInput: the folder holds no run, or its recipe differs; every difference is named.
        """
        if not self.recipe.is_file():
            raise BadInput(f"{self.path} holds no run to resume (no recipe.yaml); start it without --resume")
        check_no_links(self.path)
        kind = type(recipe)
        if kind is Recipe:  # a probe has no epochs
            for line in self.epochs():
                epoch_of(line, self.history)
        before, now = flattened(load_recipe(self.recipe, kind).model_dump()), flattened(recipe.model_dump())
        fixed = [name for name in now if name not in marked(kind, FREE_ON_RESUME)]
        changes = [f"{name}: {before[name]} -> {now[name]}" for name in fixed if before[name] != now[name]]
        if changes:
            raise BadInput(
                f"{self.path} was started with another recipe ({'; '.join(changes)}); resume it with the same settings"
            )

    def claim(self, recipe: Recipe | ProbeRecipe, data: Sequence[Path | str], facts: Mapping[str, Any]) -> None:
        """Make the folder, lock it until `close`, and write recipe.yaml and env.json.

        recipe.yaml records the data only if they are behind URLs: paths mean nothing on another machine.

        Raises:
            BadInput: another run has just claimed it.
        """
        from train.run.environment import environment  # it imports torch, which a command line must not wait for

        self.path.mkdir(parents=True, exist_ok=True)
        self.lock(seconds=0)
        self.check_free(recipe)
        folders = [public_location(folder) for folder in data]
        recorded_data = folders if len(folders) > 1 else folders[0]
        write_json(self.env, environment() | {"data": recorded_data} | dict(facts))
        recipe = recipe.model_copy(update={"data": recorded_data if all(map(is_url, data)) else None})
        save_recipe(recipe, self.recipe)

    def lock(self, seconds: float = SECONDS_TO_END) -> None:
        """Keep other processes from writing to the run until `close`, or until this process ends in any way.

        Args:
            seconds: to wait for a process that is about to end.

        Raises:
            BadInput: another process is writing to the run, or the folder cannot be written.
        """
        try:
            self._lock = locks.open_lock(self.path / LOCK)
        except OSError as error:
            raise BadInput(f"{self.path} cannot be written ({error.strerror})") from None
        try:
            locked = locks.try_lock(self._lock, seconds)
        except OSError:  # some network file systems have no locks; then no process is kept out
            return
        if not locked:
            self.close()
            raise BadInput(f"{self.path}: another process is writing to this run; wait for it, or choose another --out")

    def close(self) -> None:
        """Let other processes write to the run."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @contextmanager
    def logging_failures(self, rank: int) -> Iterator[None]:
        """Append the traceback of an unexpected failure in the block to RUN/failures/rank_N.txt."""
        try:
            yield
        except (Stopped, KeyboardInterrupt):
            raise
        except BaseException:
            with contextlib.suppress(OSError):
                folder = self.path / "failures"
                folder.mkdir(exist_ok=True)
                with (folder / f"rank_{rank}.txt").open("a", encoding="utf-8") as file:
                    file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {traceback.format_exc()}\n")
            raise

    def epochs(self) -> list[str]:
        """The complete lines of history.jsonl; a crash can leave half a line at its end.

        Raises:
            BadInput: it cannot be read.
        """
        if not self.history.exists():
            return []
        try:
            text = read_regular_file(self.history).decode("utf-8", errors="replace")
        except (OSError, ValueError) as error:
            raise BadInput(f"{self.history} cannot be read ({error})") from None
        return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def data_folders(self) -> list[str]:
        """The shard folders the run was trained on, or their URLs without secrets.

        Raises:
            BadInput: env.json does not name them.
        """
        data = self._facts().get("data")
        if data is None:
            raise BadInput(f"{self.env} does not name the run's shard folder; give it with --data")
        return [str(folder) for folder in data] if isinstance(data, list) else [str(data)]

    def recordings(self) -> list[str]:
        """The names of the recordings in `data_folders`, if there are several; else empty."""
        names = self._facts().get("recordings")
        return [str(name) for name in names] if isinstance(names, list) else []


def epoch_of(line: str, path: Path) -> int:
    """The epoch of a line of history.jsonl.

    Raises:
        BadInput: the line is damaged.
    """
    try:
        return int(parse_json(line)["epoch"])
    except (ValueError, KeyError, TypeError):
        raise BadInput(f"{path}: the line {line[:60].strip()!r} has no epoch; remove it") from None


def begun_by_this_job(path: Path) -> bool:
    """Whether a folder holds a run that an earlier start of this job began."""
    folder = RunFolder(path)
    return folder.recipe.is_file() and folder.belongs_to_this_job()


def open_run(path: Path) -> tuple[RunFolder, Recipe]:
    """An existing run and its recipe.

    Raises:
        BadInput: the folder is not that of a run.
    """
    folder = RunFolder(path)
    if not folder.recipe.is_file():
        raise BadInput(f"{path} is not a run folder (it has no recipe.yaml); give the --out of a train/finetune.py run")
    check_no_links(path)
    if is_probe(folder):
        raise BadInput(f"{path} is a probe, already scored by train/probe.py; see {path / 'eval'}")
    return folder, load_recipe(folder.recipe, Recipe)


def open_probe(path: Path) -> ProbeRecipe:
    """The recipe of an existing probe.

    Raises:
        BadInput: the folder is not that of a probe.
    """
    folder = RunFolder(path)
    if not folder.recipe.is_file() or not is_probe(folder):
        raise BadInput(f"{path} is not a probe that can be resumed; start it without --resume")
    return load_recipe(folder.recipe, ProbeRecipe)


def check_no_links(path: Path) -> None:
    """Refuse a run folder that contains links or devices: writing to them would change something elsewhere.

    Raises:
        BadInput: naming the first.
    """
    for folder, folders, files in os.walk(path):
        if Path(folder).parent == path / WANDB:
            folders.clear()  # W&B links to its logs there, and never writes to such a folder again
            continue
        for name in (*folders, *files):
            entry = Path(folder) / name
            if entry.parent == path / "checkpoints" and name in ("last", "best"):
                continue
            plain = not entry.is_symlink() and (entry.is_file() or entry.is_dir())
            if not plain and os.path.lexists(entry):  # a run in progress may have removed it by now
                raise BadInput(f"{entry} is a link or a device; a run folder may contain only plain files and folders")


def is_folder_name(name: str) -> bool:
    """Whether a recording's name can name the folder of its results."""
    return bool(name) and "/" not in name and not name.startswith(".")


def is_probe(folder: RunFolder) -> bool:
    """Whether a run's folder is that of a probe."""
    try:
        content = read_yaml(folder.recipe)
    except (OSError, ValueError):
        return False  # reading it as a recipe reports what is wrong
    return isinstance(content, dict) and "layers" in content


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings in sections, by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def check_writable(path: Path) -> None:
    """Refuse to start work whose results could not be written.

    Raises:
        BadInput: the nearest existing folder above `path` is read-only or not a folder.
    """
    above = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not above.is_dir():
        raise BadInput(f"{path} cannot be written: {above} is not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise BadInput(f"{path} cannot be written: {above} is read-only")
