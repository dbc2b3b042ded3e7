"""The Kubernetes job, as far as it can be checked without a cluster: its fields, its environment, its command line.

The fields are those of TrainJob, version v1alpha1, as the Kubeflow Trainer documents them (its Go types in
pkg/apis/trainer/v1alpha1/trainjob_types.go, from which the cluster's own check is made), and the variables those that
its runtime for torchrun sets (pkg/runtime/framework/plugins/torch).
"""

import re
from typing import Annotated, Literal

import pytest
import yaml
from helpers import ROOT
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError
from torch.distributed.run import parse_args

from train.finetune import parse_command_line

MANIFEST = ROOT / "launch" / "kubernetes" / "finetune.yaml"
SET_BY_THE_RUNTIME = ("PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT")
READ_BY_LIBRARIES = ("OMP_NUM_THREADS",)

Label = Annotated[StrictStr, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Quantity = StrictInt | Annotated[StrictStr, Field(pattern=r"^\d+(\.\d+)?([munkMGTPE]|[KMGTPE]i)?$")]


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Variable(_Fields):
    name: StrictStr
    value: StrictStr


class Resources(_Fields):
    limits: dict[str, Quantity] = {}
    requests: dict[str, Quantity] = {}


class Trainer(_Fields):
    image: StrictStr
    command: list[StrictStr]
    args: list[StrictStr]
    env: list[Variable]
    numNodes: Annotated[StrictInt, Field(ge=1)]
    numProcPerNode: Literal["auto", "cpu", "gpu"] | Annotated[StrictInt, Field(ge=1)]
    resourcesPerNode: Resources


class RuntimeRef(_Fields):
    name: Annotated[StrictStr, Field(min_length=1)]
    apiGroup: Literal["trainer.kubeflow.org"] = "trainer.kubeflow.org"
    kind: Literal["ClusterTrainingRuntime", "TrainingRuntime"] = "ClusterTrainingRuntime"


class Spec(_Fields):
    runtimeRef: RuntimeRef
    trainer: Trainer


class Metadata(_Fields):
    name: Label
    namespace: Label = "default"


class TrainJob(_Fields):
    apiVersion: Literal["trainer.kubeflow.org/v1alpha1"]
    kind: Literal["TrainJob"]
    metadata: Metadata
    spec: Spec


@pytest.fixture
def manifest() -> dict:
    return yaml.safe_load(MANIFEST.read_text())


@pytest.fixture
def trainer(manifest) -> Trainer:
    return TrainJob.model_validate(manifest).spec.trainer


def test_its_fields_are_those_of_a_train_job(trainer):
    assert len({variable.name for variable in trainer.env}) == len(trainer.env)
    assert trainer.resourcesPerNode.limits["nvidia.com/gpu"] == trainer.numProcPerNode


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["spec", "trainer", "numNodes"], "2"),
        (["spec", "trainer", "env", 0, "value"], 1),
        (["spec", "trainer", "replicas"], 2),
        (["spec", "runtimeRef", "name"], None),
        (["metadata", "name"], "Spiketune_1"),
    ],
)
def test_what_a_cluster_would_refuse_is_refused_here(manifest, path, value):
    *outer, last = path
    place = manifest
    for step in outer:
        place = place[step]
    place[last] = value
    with pytest.raises(ValidationError):
        TrainJob.model_validate(manifest)


def test_its_environment_is_read_by_somebody_and_set_by_nobody_else(trainer):
    sources = "".join(path.read_text() for folder in ("launch", "train") for path in (ROOT / folder).rglob("*.py"))
    for variable in trainer.env:
        assert variable.name not in SET_BY_THE_RUNTIME
        assert variable.name in READ_BY_LIBRARIES or f'"{variable.name}"' in sources, variable.name


def test_its_command_line_is_one_of_torchrun_and_of_the_command(trainer, monkeypatch):
    values = {"PET_NNODES": str(trainer.numNodes), "PET_NPROC_PER_NODE": str(trainer.numProcPerNode)}
    values |= {"PET_NODE_RANK": "0", "PET_MASTER_ADDR": "node-0", "PET_MASTER_PORT": "29500"}
    assert values.keys() == set(SET_BY_THE_RUNTIME)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    assert trainer.command == ["torchrun"]
    started = parse_args(trainer.args)
    assert started.nnodes == str(trainer.numNodes)
    assert started.nproc_per_node == str(trainer.numProcPerNode)
    assert (ROOT / started.training_script).is_file()
    options, recipe = parse_command_line(started.training_script_args)
    assert options.data == ["/data/it"]
    assert recipe.backbone.name == "resnet50"


def test_it_says_that_no_cluster_has_run_it():
    assert re.search(r"^# .*Untested", MANIFEST.read_text(), re.MULTILINE)
