"""The readers of untrusted plain data: whatever the bytes are, they end with data within bounds or with ValueError."""

import json
import os

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_prep.common.safe_reading import (
    LARGEST_INTEGER,
    csv_lines,
    map_npy,
    parse_json,
    parse_json_lines,
    parse_npy,
    read_regular_file,
)

NUMBERS = st.one_of(
    st.integers(-(10**400), 10**400).map(str),
    st.integers(0, 16**60).map(hex),
    st.floats().map(repr),
    st.sampled_from(["1e999", "-1e999", "9" * 5000, "1_5", "True", "0x" + "f" * 6000]),
)


def numbers_in(content) -> list:
    """All numbers in a JSON document."""
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list):
        return [number for value in content for number in numbers_in(value)]
    return [content] if isinstance(content, int | float) else []


@settings(max_examples=200, deadline=None)
@given(number=NUMBERS, around=st.sampled_from(["{}", "[{}]", '{{"a": {{"b": [1, {}]}}}}']))
@example(number="9" * 400, around="{}")
@example(number="1.7e308", around="{}")
def test_json_has_no_number_that_cannot_be_handled(number, around):
    text = around.format(number)
    for read in (parse_json, lambda text: [content for _, content in parse_json_lines(f"{text}\n".encode())]):
        try:
            content = read(text)
        except ValueError:
            continue
        assert all(np.isfinite(found) for found in numbers_in(content))
        assert all(abs(found) <= LARGEST_INTEGER for found in numbers_in(content) if isinstance(found, int))
        json.dumps(content)


def test_json_lines_are_the_complete_ones_and_a_fault_names_its_line():
    content = b'{"epoch": 1}\n\n{"epoch": 2}\n{"epo'
    assert [content for _, content in parse_json_lines(content)] == [{"epoch": 1}, {"epoch": 2}]
    with pytest.raises(ValueError, match=r"line 2: .*400 digits"):
        list(parse_json_lines(b"1\n" + b"9" * 400 + b"\n"))


LENGTHS = st.one_of(
    st.integers(-3, 20).map(str), st.sampled_from(["True", "False", "1.0", "2**70", str(10**30), "None"])
)


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(LENGTHS, max_size=3),
    kind=st.sampled_from(["<f4", ">i2", "|O", "|V0", "<U3"]),
    size=st.integers(0, 64),
)
@example(lengths=["True"], kind="<f4", size=4)
def test_npy_is_what_its_header_claims_or_is_refused(tmp_path_factory, lengths, kind, size):
    shape = f"({', '.join(lengths)}{',' if len(lengths) == 1 else ''})"
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(size)
    path = tmp_path_factory.getbasetemp() / "a.npy"
    path.write_bytes(data)
    for read in (lambda: parse_npy(data), lambda: map_npy(path)):
        try:
            array = read()
        except ValueError:
            continue
        assert array.nbytes == size
        assert all(type(length) is int for length in array.shape)
        assert "True" not in lengths


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(), (3,), (4, 5), (2, 3, 4), (0, 3)])
def test_whole_arrays_are_read_as_numpy_reads_them(tmp_path, shape, order):
    array = np.asarray(np.random.default_rng(0).normal(size=shape), order=order)
    np.save(tmp_path / "a.npy", array)
    for read in (map_npy(tmp_path / "a.npy"), parse_npy((tmp_path / "a.npy").read_bytes())):
        assert np.array_equal(read, array)
        assert read.dtype == array.dtype


@pytest.mark.parametrize("read", [read_regular_file, map_npy, lambda path: list(csv_lines(path))])
def test_a_pipe_does_not_block(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        read(tmp_path / "pipe")


@settings(max_examples=100, deadline=None)
@given(content=st.one_of(st.binary(max_size=200), st.text(alphabet='a",;\n\r\x00é', max_size=50).map(str.encode)))
def test_csv_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "a.csv"
    path.write_bytes(content)
    try:
        rows = [cells for _, cells in csv_lines(path)]
    except ValueError:
        return
    assert all(rows)
    assert content.count(b",") >= sum(len(row) - 1 for row in rows)
