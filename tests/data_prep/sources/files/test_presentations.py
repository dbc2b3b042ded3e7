"""From presentations to the trials of each stimulus."""

import numpy as np

from data_prep.sources.files.presentations import gather_trials, rows_by_stimulus


def test_presentations_of_a_stimulus_are_in_order_of_repetition():
    rows = rows_by_stimulus(["b", "a", "b", "b"], [2, 0, 0, 1])
    assert {name: repetitions.tolist() for name, repetitions in rows.items()} == {"b": [2, 3, 0], "a": [1]}
    assert list(rows) == ["b", "a"]


def test_gathering_reads_only_what_holds_a_wanted_presentation():
    data, reads = np.arange(200.0).reshape(100, 2), []

    def read(rows):
        reads.append((rows.start, rows.stop))
        return data[rows]

    rows = [np.array([71, 3]), np.array([], int), np.array([4, 99, 72])]
    trials = list(gather_trials(read, rows, 2, 10))
    assert all(np.array_equal(part, data[wanted]) for part, wanted in zip(trials, rows, strict=True))
    assert reads == [(3, 5), (71, 73), (99, 100)]
