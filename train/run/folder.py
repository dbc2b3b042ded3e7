"""A run's folder: what lies where in it, how it is claimed and continued, and writing that is never half done.

RUN/recipe.yaml  env.json  log.txt  history.jsonl  tensorboard/
RUN/checkpoints/{last,best} -> step_N/     see train/run/checkpoint.py
RUN/eval/<split>/{metrics.json,predictions.npz}                of a run of several recordings: <split>/<recording>/
RUN/eval/left_out/predictions.npz          of training stimuli that the model was not fitted on
RUN/failures/rank_N.txt                    what ended a process by surprise
"""

import contextlib
import json
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

LOCK = ".lock"  # held by the process that writes to the run
SECONDS_TO_END = 10.0  # that a process which was killed takes to go
LEFT_OUT = "left_out"  # as a split: training stimuli, each predicted by a model that was not fitted on it


class RunFolder:
    """Paths in a run's folder, and atomic writing to them."""

    def __init__(self, path: Path):
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.env = path / "env.json"
        self.log = path / "log.txt"
        self.history = path / "history.jsonl"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self._lock: int | None = None

    def evaluation(self, split: str, checkpoint: str = "best", recording: str | None = None) -> Path:
        """Where the results on a split go; those of another checkpoint than the best lie beside it.

        Of a run of several recordings, each has a folder of its own in there.
        """
        folder = self.path / "eval" / (split if checkpoint == "best" else f"{split}_{checkpoint}")
        return folder if recording is None else folder / recording

    def scored(self, split: str, recording: str) -> Path:
        """Where the results on a recording are: in its own folder, or of a run on it alone, in that of the split."""
        own = self.evaluation(split, recording=recording)
        return own if is_folder_name(recording) and own.is_dir() else self.evaluation(split)

    def is_of_this_job(self) -> bool:
        """Whether it was made by the job that this process is of, which has then been started again.

        A job has a name that outlives its restarts, in the environment as SPIKETUNE_JOB; launch/ sets it.
        """
        job = os.environ.get("SPIKETUNE_JOB")
        try:
            return bool(job) and parse_json(read_regular_file(self.env))["job"] == job
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def check_free(self) -> None:
        """Refuse a folder that holds something already.

        Raises:
            BadInput: it does.
        """
        if not self.recipe.exists() and self.is_of_this_job():
            return  # it ended between the two files that `claim` writes
        if self.recipe.exists():
            raise BadInput(f"{self.path} holds a run already; choose another --out (or finetune --resume to go on)")
        if self.path.exists() and (not self.path.is_dir() or any(path.name != LOCK for path in self.path.iterdir())):
            raise BadInput(f"{self.path} exists and is not an empty folder; choose another --out")
        check_writable(self.path)

    def check_same(self, recipe: Recipe | ProbeRecipe) -> None:
        """Refuse to go on with a run under other settings; `epochs`-independent differences are all shown.

        Raises:
            BadInput: there is no run in the folder, or its recipe differs.
        """
        if not self.recipe.is_file():
            raise BadInput(f"{self.path} holds no run to resume (no recipe.yaml); start it without --resume")
        check_no_links(self.path)
        for line in self.epochs():
            epoch_of(line, self.history)
        before, now = flat(load_recipe(self.recipe, type(recipe)).model_dump()), flat(recipe.model_dump())
        free = marked(type(recipe), FREE_ON_RESUME)
        changed = [
            f"{name}: {before[name]} -> {now[name]}" for name in now if name not in free and before[name] != now[name]
        ]
        if changed:
            raise BadInput(
                f"{self.path} was started with another recipe ({'; '.join(changed)}); resume it with its own"
            )

    def claim(self, recipe: Recipe | ProbeRecipe, data: Sequence[Path | str], facts: Mapping[str, Any]) -> None:
        """Make the folder and write down what the run is: settings, versions, hardware, command.

        Of the data, the recipe gets URLs alone: a path means nothing elsewhere. From here on until `close` nobody else
        can write to the run.

        Raises:
            BadInput: another run was quicker.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self.hold(seconds=0)
        self.check_free()
        places = [public_location(place) for place in data]
        places = places if len(places) > 1 else places[0]
        from train.run.environment import environment  # it imports torch, which a command line must not wait for

        env = environment() | {"data": places} | dict(facts)
        recipe = recipe.model_copy(update={"data": places if all(map(is_url, data)) else None})
        write_json(self.env, env)
        temporary = self.recipe.with_suffix(".tmp")
        save_recipe(recipe, temporary)
        temporary.replace(self.recipe)

    def hold(self, seconds: float = SECONDS_TO_END) -> None:
        """Keep others from writing to the run until `close`, or until this process ends, however it does.

        Args:
            seconds: to wait for a process that is just ending.

        Raises:
            BadInput: another process is at it, or the folder cannot be written.
        """
        try:
            self._lock = locks.open_lock(self.path / LOCK)
        except OSError as error:
            raise BadInput(f"{self.path} cannot be written ({error.strerror})") from None
        try:
            free = locks.try_lock(self._lock, seconds)
        except OSError:  # some network file systems lock nothing; then nobody is kept out
            return
        if not free:
            self.close()
            raise BadInput(f"{self.path}: another process is writing to this run; wait for it, or choose another --out")

    def close(self) -> None:
        """Let others write to the run."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @contextmanager
    def keeping_failures(self, rank: int) -> Iterator[None]:
        """Around a rank's work: what ends it by surprise is added to RUN/failures/rank_N.txt, with its traceback."""
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
        """The whole lines of history.jsonl: a crash can leave half of one at its end."""
        if not self.history.exists():
            return []
        text = self.history.read_text(encoding="utf-8", errors="replace")
        return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def data_folders(self) -> list[str]:
        """The shard folders the run was trained on, or their URLs without the secrets they may need."""
        try:
            places = parse_json(read_regular_file(self.env))["data"]
        except (OSError, ValueError, KeyError, TypeError):
            raise BadInput(f"{self.env} does not tell the run's shard folder; name it with --data") from None
        return list(map(str, places)) if isinstance(places, list) else [str(places)]

    def recordings(self) -> list[str]:
        """The names of the recordings that the run was trained on, in the order of `data_folders`, if several."""
        try:
            return list(map(str, parse_json(read_regular_file(self.env)).get("recordings", [])))
        except (OSError, ValueError, AttributeError, TypeError):
            return []


def epoch_of(line: str, path: Path) -> int:
    """The epoch that a line of history.jsonl is about.

    Raises:
        BadInput: the line is damaged.
    """
    try:
        return int(json.loads(line)["epoch"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BadInput(f"{path}: the line {line[:60].strip()!r} tells no epoch; remove it") from None


def begun_by_this_job(path: Path) -> bool:
    """Whether a folder holds a run that this job has begun and can go on with."""
    folder = RunFolder(path)
    return folder.recipe.is_file() and folder.is_of_this_job()


def open_run(path: Path) -> tuple[RunFolder, Recipe]:
    """An existing run and its recipe.

    Raises:
        BadInput: there is none.
    """
    folder = RunFolder(path)
    if not folder.recipe.is_file():
        raise BadInput(f"{path} is no run folder (it has no recipe.yaml); give what train/finetune.py --out was given")
    check_no_links(path)
    if is_probe(folder):
        raise BadInput(f"{path} is a probe, which train/probe.py has scored already; see {path / 'eval'}")
    return folder, load_recipe(folder.recipe)


def open_probe(path: Path) -> ProbeRecipe:
    """The recipe of an existing probe.

    Raises:
        BadInput: there is none.
    """
    folder = RunFolder(path)
    if not folder.recipe.is_file() or not is_probe(folder):
        raise BadInput(f"{path} is no probe to resume; start it without --resume")
    return load_recipe(folder.recipe, ProbeRecipe)


def check_no_links(path: Path) -> None:
    """Refuse a run folder with links or devices in it: what is written to them would go elsewhere.

    Raises:
        BadInput: naming the first.
    """
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            found = Path(folder) / name
            ours = found.parent == path / "checkpoints" and name in ("last", "best")
            if not ours and (found.is_symlink() or not (found.is_file() or found.is_dir())) and os.path.lexists(found):
                raise BadInput(f"{found} is a link or a device; a run consists of plain files and folders")


def is_folder_name(name: str) -> bool:
    """Whether a recording's name can be that of a folder with its results."""
    return bool(name) and "/" not in name and not name.startswith(".")


def is_probe(folder: RunFolder) -> bool:
    """Whether a run's folder is that of a probe."""
    try:
        content = read_yaml(folder.recipe)
    except (OSError, ValueError):
        return False  # reading it as a recipe says what is wrong
    return isinstance(content, dict) and "layers" in content


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings of sections by their dotted names."""
    found = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def check_writable(path: Path) -> None:
    """Refuse to begin work whose results could not be written.

    Raises:
        BadInput: the nearest folder above `path` that exists is read-only, or no folder.
    """
    above = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise BadInput(f"{path} cannot be written: {above} is {'read-only' if above.is_dir() else 'no folder'}")
