"""The folder of a search.

SWEEP_DIR/sweep.yaml  recipe.yaml  study.json     what is searched, from which recipe, on which data
SWEEP_DIR/trials/0000.yaml  0000.log  0000/       a trial's recipe, its output, and its run folder
SWEEP_DIR/table.md  table.csv  heatmap.png  best.yaml  tensorboard/
"""

import json
from pathlib import Path
from typing import Any

import yaml

from data_prep.common.atomic_writes import write_bytes, write_json
from data_prep.common.errors import BadInput
from data_prep.shards.manifest import Manifest
from train.run.folder import check_writable, flattened
from train.sweeping.plan import Plan
from train.sweeping.queue_folder import QueueFolder, read_settings_file


class SweepFolder(QueueFolder):
    """Paths in the folder of a search, and the search it belongs to."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.sweep = path / "sweep.yaml"
        self.recipe = path / "recipe.yaml"
        self.table = path / "table.md"
        self.csv = path / "table.csv"
        self.heatmap = path / "heatmap.png"
        self.best = path / "best.yaml"
        self.tensorboard = path / "tensorboard"

    def trial_recipe(self, run: str) -> Path:
        """The recipe of a trial."""
        return self.trials / f"{run}.yaml"

    def check(self, plan: Plan, manifest: Manifest) -> None:
        """Refuse a folder that this search cannot begin or join.

        Raises:
            BadInput: it holds something else, another search, or the same search on other data.
        """
        if self.study.is_file():
            self._check_same(plan, manifest)
        elif self.path.exists() and (not self.path.is_dir() or self._holds_something()):
            raise BadInput(f"{self.path} exists and is not an empty folder; choose another --out")
        check_writable(self.path)

    def _holds_something(self) -> bool:
        """Whether it holds more than a sweep that was stopped during set-up leaves."""
        return any(self.path.iterdir()) and not self.lock.exists()

    def _check_same(self, plan: Plan, manifest: Manifest) -> None:
        if self.facts()["recording"] != manifest.fingerprint:
            raise BadInput(f"{self.path} holds a sweep on other data; join it with the --data it was started with")
        before = flattened(read_settings_file(self.sweep)) | flattened(read_settings_file(self.recipe), "recipe.")
        now = flattened(_plain(plan.resolved())) | flattened(plan.base.model_dump(mode="json"), "recipe.")
        differing = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if differing:
            name = differing[0]
            raise BadInput(
                f"{self.path} holds another sweep ({name}: {before.get(name)} -> {now.get(name)}); choose another --out"
            )

    def begin(self, plan: Plan, manifest: Manifest, study: str) -> None:
        """Write the settings of the search; study.json comes last and marks the folder as complete."""
        for path, content in ((self.recipe, plan.base.model_dump(mode="json")), (self.sweep, _plain(plan.resolved()))):
            write_bytes(path, yaml.safe_dump(content, sort_keys=False).encode())
        write_json(self.study, {"study": study, "recording": manifest.fingerprint, "data": manifest.name})


def _plain(content: Any) -> Any:
    """Content as JSON holds it: lists for tuples."""
    return json.loads(json.dumps(content))
