"""Workers read large arrays from memory that they share."""

import gc
import multiprocessing
import os
import pickle

import numpy as np

from train.data.shared_arrays import SharedArray

RATES = np.arange(600_000, dtype=np.float32).reshape(300, 2000)


def describe(rates, answers) -> None:
    """What a worker has: the sum, whether it can be written to, and how much of its memory is its own."""
    with open(f"/proc/{os.getpid()}/maps") as maps:
        shared = any("spiketune-responses" in line for line in maps)
    answers.put((float(rates.sum(dtype=np.float64)), rates.flags.writeable, shared))


def test_a_worker_maps_the_array_and_has_no_copy():
    shared, context = SharedArray(RATES), multiprocessing.get_context("forkserver")
    answers = context.Queue()
    for _ in range(2):
        process = context.Process(target=describe, args=(shared, answers))
        process.start()
        assert answers.get(timeout=60) == (float(RATES.sum(dtype=np.float64)), False, True)
        process.join()
    descriptor = shared._descriptor
    del shared
    gc.collect()
    assert not os.path.exists(f"/proc/self/fd/{descriptor}")


def test_a_pickle_that_is_not_for_a_new_process_holds_the_array():
    loaded = pickle.loads(pickle.dumps(SharedArray(RATES)))
    assert np.array_equal(loaded, RATES)
    assert np.array_equal(pickle.loads(pickle.dumps(SharedArray(RATES[:0]))), RATES[:0])
