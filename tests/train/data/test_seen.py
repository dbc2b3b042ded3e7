"""What was seen is exactly the images with the same bytes or the same pixels; the file is read back as written."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.common.errors import BadInput
from data_prep.shards.image_identity import ImageIdentities
from train.data.seen import FITTED, ROLES, SELECTED, TAUGHT, SeenImages, SeenRecord, record_of
from train.evaluation.seen_stimuli import Seen, SeenRule, mark_of

IMAGES = st.lists(st.tuples(st.integers(0, 9), st.integers(10, 19)), max_size=12)  # the numbers of bytes and of pixels


def identities(images: list[tuple[int, int]]) -> ImageIdentities:
    """Hashes that end in zeros, as some do, and differ in one byte."""
    hashes = [np.zeros((len(images), 16), np.uint8) for _ in range(2)]
    for row, numbers in enumerate(images):
        for array, number in zip(hashes, numbers, strict=True):
            array[row, 3] = number
    return ImageIdentities(*hashes)


def part(role: str, images: list[tuple[int, int]], inherited_from: str = "") -> SeenImages:
    return SeenImages(role, "made_up", inherited_from, identities(images), [f"{role}{k}" for k in range(len(images))])


def expected(images: list[tuple[int, int]], others: list[tuple[int, int]]) -> np.ndarray:
    encoded, pixels = ({numbers[k] for numbers in others} for k in range(2))
    return np.array([a in encoded or b in pixels for a, b in images], bool)


@settings(max_examples=60, deadline=None)
@given(scored=IMAGES, fitted=IMAGES, taught=IMAGES, selected=IMAGES)
def test_what_is_refused_dropped_and_kept_is_the_intersection_by_content(scored, fitted, taught, selected):
    record = SeenRecord((part(FITTED, fitted), part(TAUGHT, taught, "teacher t"), part(SELECTED, selected)))
    ids, images = [f"s{k}" for k in range(len(scored))], identities(scored)
    is_fitted = expected(scored, fitted)
    leaks = is_fitted | expected(scored, taught)

    def compared(policy, kind=None):
        return SeenRule("runs/a", "val", policy, kind).compare(record, images, ids)

    if not ids:
        return
    if leaks.any():
        with pytest.raises(BadInput, match=rf"runs/a: {leaks.sum()} of the {len(ids)} stimuli of val were fitted"):
            compared("refuse")
    else:
        assert mark_of(compared("refuse").seen) == "none"
    kept = compared("keep")
    assert kept.scored.all()
    assert (kept.seen.fitted, kept.seen.taught) == (is_fitted.sum(), (leaks & ~is_fitted).sum())
    assert kept.seen.selected == expected(scored, selected).sum()
    assert kept.seen.stimuli == [ids[k] for k in np.flatnonzero(leaks)[:5]]
    if leaks.all():
        with pytest.raises(BadInput, match="nothing is left"):
            compared("drop")
        return
    dropped = compared("drop")
    np.testing.assert_array_equal(dropped.scored, ~leaks)
    assert (dropped.seen.fitted, dropped.seen.taught, dropped.seen.dropped) == (0, 0, leaks.sum())
    assert compared("refuse", "train").scored.all()


@settings(max_examples=20, deadline=None)
@given(first=IMAGES, second=IMAGES)
def test_what_is_inherited_is_the_union(first, second):
    own, ancestor = SeenRecord((part(FITTED, first),)), SeenRecord((part(FITTED, second),), ("weights w",), ("net",))
    record = own.inheriting(ancestor, "weights runs/a")
    assert (record.unknown, record.pretrained) == (("weights w",), ("net",))
    every = [(a, b) for a in range(10) for b in range(10, 20)]
    seen = record.overlap(identities(every))
    np.testing.assert_array_equal(seen.fitted, expected(every, first) | expected(every, second))
    new = [image for image in second if image not in first]
    assert record.count(FITTED) == len(first) + len(new)
    assert record.origins(identities(second)) == (["weights runs/a"] if new else [])


def test_a_teacher_s_stimuli_are_taught():
    teacher = SeenRecord((part(FITTED, [(1, 11)]), part(SELECTED, [(2, 12)])))
    record = SeenRecord().inheriting(teacher, "teacher t", {FITTED: TAUGHT})
    assert [kept.role for kept in record.parts] == [TAUGHT, SELECTED]


def test_the_file_holds_the_record(tmp_path):
    parts = tuple(part(role, [(1, 11), (2, 12)][: number + 1]) for number, role in enumerate(ROLES[:2]))
    record = SeenRecord((*parts, part(SELECTED, [], "weights ä/b")), ("weights x.pth",), ("resnet50",))
    record.write(tmp_path)
    read = record_of(tmp_path)
    assert read is not None
    assert (read.unknown, read.pretrained) == (record.unknown, record.pretrained)
    for a, b in zip(read.parts, record.parts, strict=True):
        assert (a.role, a.recording, a.inherited_from, a.stimulus_ids) == (
            b.role,
            b.recording,
            b.inherited_from,
            b.stimulus_ids,
        )
        np.testing.assert_array_equal(a.images.encoded, b.images.encoded)
        np.testing.assert_array_equal(a.images.pixels, b.images.pixels)
    assert record_of(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("version", np.array(2), "newer version"),
        ("parts", np.array([["eaten", "r", ""]]), "eaten"),
        ("parts", np.arange(3), "lists of texts"),
        ("0.pixels", np.zeros((1, 15), np.uint8), "do not fit"),
        ("0.encoded", None, "0.encoded"),
        ("unknown", np.zeros(1), "lists of texts"),
    ],
)
def test_a_damaged_record_is_refused(tmp_path, name, array, words):
    arrays = SeenRecord((part(FITTED, [(1, 11)]),)).arrays() | {name: array}
    np.savez(tmp_path / "seen.npz", **{key: values for key, values in arrays.items() if values is not None})
    with pytest.raises(BadInput, match=words):
        record_of(tmp_path)


def test_marks_name_what_is_unknown():
    assert mark_of(None) == "unknown"
    assert Seen(unknown=["weights x.pth"], dropped=3).mark == "3 dropped, unknown"
    assert Seen(fitted=2, taught=1).mark == "3 KEPT"
    assert Seen(part="folds").mark == "out of fold"
    assert Seen(part="train", fitted=9).mark == "train: 9 fitted"
