"""Text for a terminal is aligned, and no text from a file moves its cursor."""

import sys

import pytest

from data_prep.common.terminal import aligned, bar, bold, histogram, printable


def test_columns_are_under_each_other_and_numbers_to_the_right():
    lines = aligned([["model", "R2", "on"], ["a", "-0.100", "inner"], ["longer", "12", "val"]])
    assert lines == ["model       R2  on", "a       -0.100  inner", "longer      12  val"]


def test_bold_takes_no_room_and_is_for_terminals_alone(monkeypatch):
    assert bold("x") == "x"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert bold("x") == "\x1b[1mx\x1b[0m"
    first, second = aligned([[bold("x"), "7"], ["xyz", "8"]])
    assert first.index("7") - len("\x1b[1m\x1b[0m") == second.index("8")


@pytest.mark.parametrize(("share", "full"), [(-1, 0), (0, 0), (0.5, 4), (1, 8), (7, 8)])
def test_a_bar_is_as_long_as_its_share(share, full):
    assert bar(share, 8) == ("█" * full).ljust(8)


def test_a_bar_ends_within_a_character():
    assert bar(1 / 16, 8).strip() == "▌"


def test_a_terminal_without_blocks_gets_letters(monkeypatch):
    class Ascii:
        encoding = "ascii"

    monkeypatch.setattr(sys, "stdout", Ascii())
    assert bar(0.5, 8) == "####    "
    assert histogram([0.1, 0.1, 0.9], 0, 1, 2) == "#:"


def test_every_value_is_in_a_histogram_whose_least_block_is_seen():
    assert histogram([0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 1, 5], 0, 1, 2) == "█▂"
    assert histogram([], 0, 1, 3) == "   "


def test_terminal_escapes_are_shown_and_not_executed():
    assert printable("a\x1b[2Jb\nc\u202e") == r"a\x1b[2Jb\nc\u202e"
