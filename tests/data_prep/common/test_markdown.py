"""Markdown tables, as they are and in a terminal."""

from data_prep.common.markdown import markdown_table, tables_as_columns


def test_a_text_with_tables_is_readable_in_a_terminal():
    text = "\n".join(["Before.", "", markdown_table(["model", "R2"], [["a", "0.1"], ["longer", "-12"]]), "", "After."])
    assert "| longer | -12 |" in text
    assert tables_as_columns(text).splitlines() == [
        "Before.",
        "",
        "model    R2",
        "a       0.1",
        "longer  -12",
        "",
        "After.",
    ]
