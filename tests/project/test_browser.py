"""Reports and TensorBoard in headless Chromium (launch/test.sh --browser).

SPIKETUNE_SCREENSHOTS names a folder that is to keep what was seen.
"""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from blank_figures import drawn_figures
from boards import tensorboard_on
from chromium import PROGRAM, Chromium
from helpers import succeed_here
from launching import SMALL
from make_runs import SITES, guess, make_classifier, make_probe, make_run, responses
from pdf_pages import filled_heights

pytestmark = pytest.mark.skipif(
    not os.environ.get("SPIKETUNE_BROWSER") or PROGRAM is None,
    reason="pages are opened in a browser by launch/test.sh --browser, which installs Chromium",
)
DESKTOP, PHONE = 1280, 390


@pytest.fixture(scope="module", autouse=True)
def _figures():
    with drawn_figures():
        yield


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


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_a_report_is_whole_at_every_width(browser, page, width, scheme):
    browser.complaints.clear()
    browser.prefer(scheme)
    browser.open(page, width)
    keep(browser, f"report_{width}_{scheme}")
    assert browser.complaints == []
    images = browser.value("[...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth])")
    assert len(images) >= 4
    room = browser.value("document.documentElement.clientWidth")
    assert all(complete and natural > 0 and shown <= room for complete, natural, shown in images)
    assert browser.value("document.documentElement.scrollWidth") <= room  # tables scroll within themselves
    assert browser.value("document.querySelector('table').getBoundingClientRect().height") > 100
    assert "running" in browser.value("document.querySelector('.mark').textContent")
    ink, paper = (luminance(browser.value(f"getComputedStyle(document.body).{name}")) for name in STYLES)
    assert (ink + 0.05) / (paper + 0.05) > 7 if scheme == "dark" else (paper + 0.05) / (ink + 0.05) > 7
    faint = luminance(browser.value("getComputedStyle(document.querySelector('.what')).color"))
    assert (max(faint, paper) + 0.05) / (min(faint, paper) + 0.05) > 4.5


STYLES = ("color", "backgroundColor")


def luminance(colour: str) -> float:
    """The relative luminance of a colour `rgb(r, g, b)`, as WCAG defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


HINT = "getComputedStyle(document.querySelector('.hint')).display"
MOVE = """new Promise(done => {
  const scroll = document.querySelector(".scroll"), end = Date.now() + 20000;  // a busy machine is slow
  const look = () => {
    const more = scroll.parentElement.hasAttribute("data-more");
    if (more && Date.now() < end) setTimeout(look, 50); else done([scroll.scrollLeft, more]);
  };
  scroll.scrollLeft = scroll.scrollWidth;
  look();
})"""


def test_a_table_that_is_cut_off_says_so_until_its_end_is_reached(browser, page):
    browser.open(page, PHONE)
    assert browser.value(HINT) == "block"
    moved, more = browser.value(MOVE)
    assert moved > 100
    assert not more
    browser.open(page, 2000)
    assert browser.value(HINT) == "none"


def test_the_link_of_a_row_unfolds_what_reproduces_it(browser, page):
    browser.open(page, PHONE)
    opened = "[...document.querySelectorAll('details.run')].filter(d => d.open).length"
    assert browser.value(opened) == 0
    browser.value("document.querySelector('tbody a').click()")
    assert browser.value("new Promise(done => setTimeout(done, 300))") is None
    assert browser.value(opened) == 1
    browser.open(page, DESKTOP)
    assert browser.value(opened) == browser.value("document.querySelectorAll('details.run').length")


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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_report_is_printed_without_half_empty_pages(browser, page, tmp_path, scheme):
    browser.prefer(scheme)
    browser.open(page, DESKTOP)
    browser.print(tmp_path / "report.pdf")
    content = (tmp_path / "report.pdf").read_bytes()
    heights = filled_heights(content)
    assert 3 <= len(heights) <= 9
    assert min(heights[:-1]) > 0.6, heights
    if folder := os.environ.get("SPIKETUNE_SCREENSHOTS"):
        (Path(folder) / f"report_{scheme}.pdf").write_bytes(content)


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
