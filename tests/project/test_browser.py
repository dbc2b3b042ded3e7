"""Reports and TensorBoard in headless Chromium (launch/test.sh --browser).

SPIKETUNE_SCREENSHOTS names a folder that is to keep what was seen.
"""

import os
from pathlib import Path

import numpy as np
import pytest
from boards import tensorboard_on
from chromium import PROGRAM, Chromium
from helpers import succeed_here
from launching import SMALL
from make_runs import SITES, guess, make_classifier, make_probe, make_run, responses

pytestmark = pytest.mark.skipif(
    not os.environ.get("SPIKETUNE_BROWSER") or PROGRAM is None,
    reason="pages are opened in a browser by launch/test.sh --browser, which installs Chromium",
)
DESKTOP, PHONE = 1280, 390


@pytest.fixture(scope="module")
def browser():
    with Chromium() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The address of a report over six runs, one of them still training."""
    folder, target = tmp_path_factory.mktemp("page"), responses()
    known = {"reliability": np.linspace(0.5, 0.9, SITES)}
    layers = {f"layer{k}": guess(target, 1.2 - k / 5) for k in range(1, 5)}
    runs = [make_probe(folder / "frozen", target, layers, "layer3", **known)]
    runs += [make_run(folder / f"run_{noise}", target, guess(target, noise), **known) for noise in (0.3, 0.6, 0.9)]
    runs += [
        make_run(folder / "running"),
        make_classifier(folder / "names", *np.tile(np.arange(4), (2, 5)), list("abcd")),
    ]
    succeed_here("train/report.py", *runs, "--out", folder / "out")
    return (folder / "out" / "report.html").as_uri()


def keep(browser, name):
    if folder := os.environ.get("SPIKETUNE_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        browser.screenshot(Path(folder) / f"{name}.png", whole_page=True)


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_a_report_is_whole_at_every_width(browser, page, width):
    browser.complaints.clear()
    browser.open(page, width)
    keep(browser, f"report_{width}")
    assert browser.complaints == []
    images = browser.value("[...document.images].map(i => [i.complete, i.naturalWidth])")
    assert len(images) >= 4
    assert all(complete and wide > 0 for complete, wide in images)
    across = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    assert browser.value(across)  # tables scroll within themselves
    assert browser.value("document.querySelector('table').getBoundingClientRect().height") > 100
    assert "running" in browser.value("document.querySelector('.mark').textContent")


COLUMN = "[...document.querySelector('table').tBodies[0].rows].map(row => row.cells[{}].dataset.value)"


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_a_heading_sorts_the_table(browser, page, width):
    browser.open(page, width)
    values = []
    for _ in range(2):
        browser.value("document.querySelectorAll('table th > button')[2].click()")
        values.append([float(value) for value in browser.value(COLUMN.format(2))])
    assert values[0] == sorted(values[0], reverse=True)
    assert values[1] == sorted(values[0])
    assert len(set(values[0])) > 2
    assert browser.value("document.querySelectorAll('table th')[2].getAttribute('aria-sort')") == "ascending"
    browser.value("document.querySelectorAll('table th > button')[0].click()")
    names = browser.value(COLUMN.format(0))
    assert names == sorted(names)


def test_a_report_is_printed(browser, page, tmp_path):
    browser.open(page, DESKTOP)
    browser.print(tmp_path / "report.pdf")
    content = (tmp_path / "report.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert 3 <= content.count(b"/Type /Page\n") <= 12


def test_a_script_that_slipped_in_would_not_run(browser, page, tmp_path):
    """The content security policy holds even where escaping was forgotten."""
    text = Path(page.removeprefix("file://")).read_text()
    worse = text.replace("<main>", "<main><script>window.slipped = 1</script><img src=x onerror='window.slipped = 1'>")
    (tmp_path / "worse.html").write_text(worse)
    browser.open((tmp_path / "worse.html").as_uri(), DESKTOP)
    assert browser.value("window.slipped") is None
    browser.complaints.clear()


def test_tensorboard_opens_on_a_real_training(browser, recording, tmp_path):
    out = tmp_path / "runs" / "run"
    succeed_here("train/finetune.py", "--data", recording, "--out", out, *SMALL)
    succeed_here("train/evaluate.py", out)
    with tensorboard_on(tmp_path / "runs") as board:
        for plugin in ("custom_scalars", "timeseries", "images"):
            browser.complaints.clear()
            browser.open(f"{board.url}#{plugin}", DESKTOP)
            browser.value("new Promise(done => setTimeout(done, 6000))")  # it draws long after it has loaded
            assert browser.value("document.querySelector('tb-webapp').innerHTML.length") > 1000
            keep(browser, f"tensorboard_{plugin}")
            assert browser.complaints == [], plugin
