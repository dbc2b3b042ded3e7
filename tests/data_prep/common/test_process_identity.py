"""A process knows who it is, or says which variables contradict each other."""

import ast
import random

import pytest
from helpers import ROOT, run_here, started_as

from data_prep.common.process_identity import (
    ADDRESS_VARIABLES,
    RANK_VARIABLES,
    Contradiction,
    ProcessIdentity,
    identify,
    own_identity,
    speaks,
)
from launch import processes
from train.distributed.launch_environment import PROCESS_COUNTS

TWO = started_as(rank=1, ranks=2)
CASES = {
    "nothing is set": ({}, ProcessIdentity(0, 1, 0, 1)),
    "unrelated variables": ({"SLURM_PROCID": "3", "PMI_RANK": "1", "HOME": "/"}, ProcessIdentity(0, 1, 0, 1)),
    "torchrun": (TWO, ProcessIdentity(1, 2, 1, 2)),
    "torchrun on the second of two machines": (
        TWO | {"RANK": "3", "WORLD_SIZE": "4"},
        ProcessIdentity(3, 4, 1, 2),
    ),
    "torchrun with one process": (started_as(rank=0, ranks=1), ProcessIdentity(0, 1, 0, 1)),
    "only the world size, of one": ({"WORLD_SIZE": "1"}, ProcessIdentity(0, 1, 0, 1)),
    "left over rank": ({"RANK": "3"}, "RANK=3 is set but WORLD_SIZE is not; unset RANK, or start with launch/local.sh"),
    "left over local rank": ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 is set but WORLD_SIZE is not; unset LOCAL_RANK, or"),
    "left over ranks": ({"RANK": "0", "LOCAL_RANK": "0"}, "unset RANK LOCAL_RANK, or"),
    "empty": ({"WORLD_SIZE": ""}, "WORLD_SIZE is empty, but must be a whole number from 1; unset WORLD_SIZE, or"),
    "no number": ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two, but must be a whole number from 1"),
    "no whole number": ({"RANK": "1.0", "WORLD_SIZE": "2"}, "RANK=1.0, but must be a whole number from 0"),
    "negative": ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1, but must be a whole number from 0"),
    "no processes": ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0, but must be a whole number from 1"),
    "other digits": ({"RANK": "\u0663", "WORLD_SIZE": "4"}, "must be a whole number"),
    "too many digits": ({"WORLD_SIZE": "9" * 5000}, f"WORLD_SIZE={'9' * 40}, but must be a whole number"),
    "rank beyond the world": (TWO | {"RANK": "2"}, "RANK=2 and WORLD_SIZE=2 cannot be right: RANK must be below"),
    "rank of an old world": (started_as(0, 1) | {"RANK": "3"}, "RANK=3 and WORLD_SIZE=1 cannot be right"),
    "local rank beyond the machine": (
        started_as(3, 4) | {"LOCAL_WORLD_SIZE": "2"},
        "LOCAL_RANK=3 and LOCAL_WORLD_SIZE=2 cannot be right",
    ),
    "more on the machine than in the world": (TWO | {"LOCAL_WORLD_SIZE": "3"}, "must not exceed WORLD_SIZE"),
    "local rank of another job": (TWO | {"RANK": "0"}, "RANK=0 and LOCAL_RANK=1 cannot be right: on a single machine"),
    "no local rank": (
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
        "RANK=1 and WORLD_SIZE=2 are set but LOCAL_RANK and LOCAL_WORLD_SIZE are not; unset RANK WORLD_SIZE, or",
    ),
    "nowhere to meet": ({name: TWO[name] for name in RANK_VARIABLES}, "but MASTER_ADDR and MASTER_PORT are not"),
    "no port": (TWO | {"MASTER_PORT": "http"}, "MASTER_PORT=http, but must be a number"),
}


@pytest.mark.parametrize("case", CASES)
def test_variables_give_an_identity_or_a_sentence(case):
    environment, expected = CASES[case]
    if isinstance(expected, ProcessIdentity):
        assert identify(environment) == expected
        return
    with pytest.raises(Contradiction) as refused:
        identify(environment)
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "launch/local.sh" in str(refused.value)


def identity_or_reason(environment: dict[str, str]) -> ProcessIdentity | str:
    try:
        return identify(environment)
    except Contradiction as refused:
        return str(refused)


def test_random_environments_are_consistent_or_refused():
    """What is accepted is a possible process; the complete variables of one are accepted, and a wrong one is not."""
    draw = random.Random(0)
    values = ["", "-1", "x", *map(str, range(5))]
    accepted = 0
    for _ in range(20_000):
        names = draw.sample([*RANK_VARIABLES, *ADDRESS_VARIABLES], draw.randrange(7))
        environment = {name: draw.choice(values) for name in names}
        identity = identity_or_reason(environment)
        if isinstance(identity, str):
            assert any(name in identity for name in environment)
            continue
        accepted += 1
        assert 0 <= identity.rank < identity.world_size
        assert 0 <= identity.local_rank < identity.ranks_on_machine <= identity.world_size
        given = {"RANK": identity.rank, "WORLD_SIZE": identity.world_size, "LOCAL_RANK": identity.local_rank}
        assert all(str(number) == environment.get(name, str(number)) for name, number in given.items())
        if identity.world_size > 1:
            assert {*RANK_VARIABLES, *ADDRESS_VARIABLES} <= environment.keys()
    assert accepted > 100
    for _ in range(2000):
        machines, on_each = draw.randrange(1, 5), draw.randrange(1, 9)
        machine, local = draw.randrange(machines), draw.randrange(on_each)
        rank, ranks = machine * on_each + local, machines * on_each
        numbers = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": on_each}
        environment = started_as(0, 1) | {name: str(number) for name, number in numbers.items()}
        assert identify(environment) == ProcessIdentity(rank, ranks, local, on_each)
        with pytest.raises(Contradiction):
            identify(environment | {"RANK": str(ranks + draw.randrange(3))})
        with pytest.raises(Contradiction):
            identify(environment | {"LOCAL_RANK": str(on_each + draw.randrange(3))})


@pytest.mark.parametrize("script", ["data_prep/show.py", "train/report.py", "train/evaluate.py"])
def test_an_error_is_reported_whatever_a_shell_has_left_over(monkeypatch, tmp_path, script):
    monkeypatch.setenv("LOCAL_RANK", "2")
    words = [tmp_path / "nowhere", *(["--out", tmp_path / "page"] if "report" in script else [])]
    done = run_here(script, *words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")


def test_a_command_without_ranks_reports_its_errors_on_all_of_them(monkeypatch, tmp_path):
    for name, value in TWO.items():
        monkeypatch.setenv(name, value)
    assert run_here("data_prep/show.py", tmp_path / "nowhere").stderr.startswith("error: ")
    assert run_here("train/evaluate.py", tmp_path / "nowhere").stderr == ""


def test_a_machine_speaks_through_its_first_process(monkeypatch):
    for name, value in TWO.items():
        monkeypatch.setenv(name, value)
    assert not speaks()
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert not speaks()  # it was read once
    own_identity.cache_clear()
    assert speaks()  # nobody knows who this is


def test_nothing_else_reads_the_variables():
    """The launcher and the sweep remove them from an environment, and accelerate is told of them in one place."""
    names = {*RANK_VARIABLES, *PROCESS_COUNTS, "SLURM_PROCID", "SLURM_LOCALID", "PMI_RANK", "OMPI_COMM_WORLD_RANK"}
    allowed = {
        "data_prep/common/process_identity.py",
        "train/distributed/launch_environment.py",
        "train/distributed/accelerator.py",
        "launch/processes.py",
    }
    found = set()
    for path in [file for part in ("data_prep", "train", "launch") for file in (ROOT / part).rglob("*.py")]:
        constants = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        if any(constant.value in names for constant in constants):
            found.add(path.relative_to(ROOT).as_posix())
    assert found == allowed
    # It starts before the project can be imported, so it has a list of its own, with those of torchrun.
    assert set(processes.RANK_VARIABLES) >= {*RANK_VARIABLES, *PROCESS_COUNTS, *ADDRESS_VARIABLES}
