"""Ids of stimuli for the shards."""

from data_prep.sources.files.ids import safe_ids


def test_ids_become_safe_and_stay_different():
    assert safe_ids(["a.png", "b", "a_png", "ü"]) == [
        *safe_ids(["a.png", "a_png"])[:1],
        "b",
        safe_ids(["a.png", "a_png"])[1],
        "_",
    ]
    assert len(set(safe_ids(["a.b", "a_b", "a b"]))) == 3
    assert safe_ids(["a.b"]) == ["a_b"]
