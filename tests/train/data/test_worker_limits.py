"""A run takes as many decoding processes as shared memory and the limit of open files have room for, and says so."""

import resource

import pytest
from helpers import started_as
from torch.utils.data import DataLoader, TensorDataset

from data_prep.common.errors import RunFailed
from train.data import worker_limits
from train.data.loader import data_loader
from train.data.worker_limits import free_shared_memory, raise_open_files, workers_within_limits

MIB = 2**20
PLENTY = 2**40


@pytest.fixture
def system(monkeypatch):
    """Sets what the system has: free shared memory in bytes, soft and hard limit of open files."""
    limits = {}

    def have(shared: int | None = PLENTY, soft: int = 1024, hard: int = 4096) -> dict[str, int]:
        limits.update(soft=soft, hard=hard)
        monkeypatch.setattr(worker_limits, "free_shared_memory", lambda: shared)
        return limits

    monkeypatch.setattr(resource, "getrlimit", lambda _: (limits["soft"], limits["hard"]))
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.update(soft=new[0], hard=new[1]))
    have()
    return have


@pytest.mark.parametrize(
    ("shared", "expected"),
    [
        (PLENTY, 8),
        (None, 8),  # no /dev/shm
        (64 * MIB, 0),  # Docker's default; a batch of 64 at 224 px has 9.2 MiB
        (200 * MIB, 1),
        (400 * MIB, 4),
    ],
)
def test_batches_fit_into_half_of_the_free_shared_memory(system, capsys, shared, expected):
    system(shared=shared)
    assert workers_within_limits(8, stimuli=64, size=224) == expected
    said = capsys.readouterr().err
    if expected == 8:
        assert said == ""
    else:
        batches = expected * worker_limits.PREFETCHED + worker_limits.IN_USE
        assert expected == 0 or batches * 64 * 224**2 * 3 <= shared / 2
        assert f"/dev/shm has room for the batches of {expected} of 8 decoding processes per rank" in said
        assert "docker run --shm-size" in said


def test_small_batches_fit_into_dockers_default(system):
    system(shared=64 * MIB)
    assert workers_within_limits(8, stimuli=16, size=128) == 8


def test_the_ranks_of_a_machine_share_it(system, monkeypatch):
    system(shared=400 * MIB)
    for name, value in started_as(rank=1, ranks=2).items():
        monkeypatch.setenv(name, value)
    assert workers_within_limits(8, stimuli=64, size=224) == 1


@pytest.mark.parametrize(
    ("soft", "hard", "workers", "raised"),
    [(1024, 4096, 8, 1024), (256, 4096, 8, 402), (256, 256, 3, 256), (64, 64, 0, 64)],
)
def test_files_are_open_for_as_many_processes_as_allowed(system, capsys, soft, hard, workers, raised):
    limits = system(soft=soft, hard=hard)
    assert workers_within_limits(8, stimuli=1, size=8) == workers
    assert limits == {"soft": raised, "hard": hard}
    said = capsys.readouterr().err
    assert said == "" if workers == 8 else f"(ulimit -n) is enough for {workers} of 8 decoding processes" in said


def test_without_decoding_processes_nothing_is_said(system, capsys):
    system(shared=0, soft=64, hard=64)
    assert workers_within_limits(0, stimuli=64, size=224) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "Caught RuntimeError in DataLoader worker process 1.\\nunable to allocate shared memory(shm) for f",
            "--shm-size",
        ),
        ("Too many open files. Communication with the workers is no longer possible.", "ulimit -n"),
    ],
)
def test_what_runs_out_later_is_named(monkeypatch, message, expected):
    def fail(_loader):
        raise RuntimeError(message)

    monkeypatch.setattr(DataLoader, "__iter__", fail)
    with pytest.raises(RunFailed, match=expected) as failure:
        list(data_loader(TensorDataset(), [], 0, False))
    assert failure.value.on_one_rank


def test_this_machine_answers():
    assert free_shared_memory() is None or free_shared_memory() > 0
    assert raise_open_files(1) >= 64
