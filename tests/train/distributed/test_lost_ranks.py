"""A rank that is lost while another waits for its GPU is named, and the process that waits ends."""

import faulthandler
import multiprocessing
import os
import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from data_prep.common.errors import FAILURE, Stopped
from train.distributed import lost_ranks
from train.distributed.heartbeat import Heartbeat
from train.distributed.lost_ranks import LostRankWatch, leaving_group


def blocked_rank(rank: int, folder) -> None:
    """Rank 1 dies after two beats; the main thread of rank 0 waits for what never comes, as for a GPU."""
    sys.stderr = (folder / f"{rank}.txt").open("w")
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    heartbeat = Heartbeat(2, timedelta(seconds=60))
    watch = LostRankWatch(lambda: None, lambda: "rank 1 on here has ended or hangs", notice_seconds=0.2)
    heartbeat.watch = watch
    heartbeat.beat()
    heartbeat.beat()
    heartbeat._exchange.wait()
    if rank == 1:
        os._exit(9)
    heartbeat.beat()
    time.sleep(60)


def test_a_rank_that_waits_for_its_gpu_names_the_lost_one_and_ends(tmp_path):
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=blocked_rank, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(40)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [FAILURE, 9]
    assert (tmp_path / "0.txt").read_text() == "error: rank 1 on here has ended or hangs\n"


def broken() -> SimpleNamespace:
    """An exchange that fails."""

    def wait():
        raise RuntimeError("Connection closed by peer")

    return SimpleNamespace(wait=wait)


@pytest.mark.parametrize("noticed", [True, False])
def test_a_process_that_notices_is_left_alone(monkeypatch, noticed):
    """Either way it tells the others at once that it runs: they do not wait, and would call it lost."""
    exits, reports = [], []
    monkeypatch.setattr(lost_ranks.os, "_exit", exits.append)
    watch = LostRankWatch(lambda: reports.append("here"), lambda: "rank 1 is lost", notice_seconds=0.3)
    watch.follow(SimpleNamespace(wait=lambda: None))
    watch.follow(broken())
    if noticed:
        watch.end()
    time.sleep(1)
    assert exits == ([] if noticed else [FAILURE])
    assert reports == ["here"]


@pytest.mark.parametrize(
    ("backend", "error", "calls"),
    [
        ("nccl", RuntimeError, ["end within a minute", "abort"]),
        ("nccl", Stopped, ["destroy"]),
        ("nccl", None, ["destroy"]),
        ("gloo", RuntimeError, ["destroy"]),
    ],
)
def test_operations_that_hang_on_a_gpu_are_aborted(monkeypatch, backend, error, calls):
    """`destroy_process_group` waits for them; after an exception it would wait for ever."""
    made = []
    monkeypatch.setattr(dist, "is_initialized", lambda: "abort" not in made)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: made.append("destroy"))
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", lambda: made.append("abort"))
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *_, **__: made.append("end within a minute"))
    if error is None:
        with leaving_group():
            pass
    else:
        with pytest.raises(error), leaving_group():
            raise error("")
    assert made == calls
