"""Lines of progress in a log file."""

import pytest

from data_prep.common import progress
from data_prep.common.progress import Progress, rate_text


@pytest.mark.parametrize(
    ("rate", "text"), [(12345.6, "12,346"), (12.4, "12"), (9.96, "10"), (1.25, "1.2"), (0.5, "0.5"), (0.01234, "0.012")]
)
def test_a_slow_rate_is_not_zero(rate, text):
    assert rate_text(rate) == text


def test_a_line_has_a_rate_once_something_is_done(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress(4, "packing") as bar:
        now[0] = 11.0
        bar.advance(0)
        now[0] = 22.0
        bar.advance()
    assert capsys.readouterr().err.splitlines() == ["packing: 0/4 stimuli", "packing: 1/4 stimuli, 0.045/s"]
