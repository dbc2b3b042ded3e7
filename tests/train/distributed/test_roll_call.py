"""Processes that disagree on who they are or on what to do are refused before they work together."""

from dataclasses import replace
from threading import Thread

import pytest
import torch
from torch.distributed import HashStore

from data_prep.common.errors import BadInput
from train.distributed.roll_call import Member, call_roll, check_agreement, check_members, own_entry

TWO = [Member(rank, 2, f"node{rank}", "cuda", f"GPU-{rank}", "2.11") for rank in range(2)]


def test_every_rank_hears_all_others():
    store, heard = HashStore(), {}
    entries = [own_entry(rank, 3, torch.device("cpu")) for rank in range(3)]
    threads = [Thread(target=lambda own=own: heard.setdefault(own.rank, call_roll(own, store))) for own in entries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert heard == dict.fromkeys(range(3), entries)
    check_members(entries, share_gpus=False)


WRONG = {
    "another number of processes": ({"ranks": 3}, "rank 1 on node1 of 3 answered for rank 1 of 2"),
    "another rank": ({"rank": 0}, "rank 0 on node1 of 2 answered for rank 1 of 2"),
    "no GPU on one machine": ({"device": "cpu", "gpu": ""}, "rank 0 on node0 computes on cuda, but rank 1 on node1 on"),
    "another torch": ({"torch_version": "2.9"}, "rank 0 on node0 runs torch 2.11, but rank 1 on node1 torch 2.9"),
    "the same GPU": ({"gpu": "GPU-0"}, "rank 0 on node0 and rank 1 on node1 have the same GPU (GPU-0); start one"),
}


@pytest.mark.parametrize("case", WRONG)
def test_processes_that_cannot_work_together_are_refused(case):
    change, expected = WRONG[case]
    check_members(TWO, share_gpus=False)
    with pytest.raises(BadInput) as refused:
        check_members([TWO[0], replace(TWO[1], **change)], share_gpus=False)
    assert expected in str(refused.value)


def test_two_processes_may_share_a_gpu_where_that_works():
    check_members([TWO[0], replace(TWO[1], gpu="GPU-0")], share_gpus=True)


def test_processes_with_other_plans_are_refused_by_the_name_of_what_differs():
    plan = {"optimizer.lr": "0.001", "the stimuli to train on": "abc"}
    check_agreement([plan, dict(plan)], ["rank 0 on a", "rank 1 on b"])
    for other, words in [
        (plan | {"optimizer.lr": "0.01"}, "disagree on optimizer.lr: 0.001 for rank 0 on a, but 0.01 for rank 1 on b"),
        ({"optimizer.lr": "0.001"}, "disagree on the stimuli to train on: abc for rank 0 on a, but nothing"),
        (plan | {"more": "1"}, "disagree on more: nothing for rank 0 on a, but 1"),
    ]:
        with pytest.raises(BadInput, match=words):
            check_agreement([plan, other], ["rank 0 on a", "rank 1 on b"])
