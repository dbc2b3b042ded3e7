"""What every folder has whose work waits in a queue: locks, the journal, and a few files for each trial."""

from pathlib import Path
from typing import Any

from data_prep.common.errors import BadInput
from train.run.yaml_files import read_yaml


class QueueFolder:
    """Paths in the folder of a queue.

    Args:
        path: of the folder.
        trials: name of the folder in it that holds the trials.
    """

    def __init__(self, path: Path, trials: str = "trials"):
        self.path = path
        self.study = path / "study.json"
        self.lock = path / "sweep.lock"
        self.results_lock = path / "results.lock"
        self.journal = path / "journal.log"
        self.trials = path / trials

    def launch(self, run: str) -> Path:
        """The configuration that `accelerate launch` reads for a trial."""
        return self.trials / f"{run}.launch.yaml"

    def log(self, run: str) -> Path:
        """A trial's output."""
        return self.trials / f"{run}.log"

    def heartbeat(self, run: str) -> Path:
        """A trial's heartbeat file: touched while the trial runs, and holding the token of the worker that runs it."""
        return self.trials / f"{run}.beat"

    def run(self, run: str) -> Path:
        """The run folder of a trial."""
        return self.trials / run

    def facts(self) -> dict[str, Any]:
        """The content of study.json, which marks the folder as complete: among others the name of Optuna's study."""
        return read_settings_file(self.study)


def read_settings_file(path: Path) -> dict[str, Any]:
    """A file that train/sweep.py or train/study.py has written.

    Raises:
        BadInput: it cannot be read.
    """
    try:
        content = read_yaml(path)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read ({error}); choose another --out") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path} was not written by this command; choose another --out")
    return content
