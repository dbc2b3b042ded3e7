"""What README tells a new user to do in the first hour works, on small data: every command, and what it prints."""

import re

import pytest
from documents import Command, commands
from helpers import ROOT, slow, succeed_here
from make_sources import make_folder
from mirrors import cowley_mirror

RUN = ("fetch", "pack", "show", "probe", "finetune", "evaluate", "report")
# Words that make a command small, by what its text contains.
SMALLER = {
    "pack.py": ["--workers", "1"],
    "probes/best.yaml": ["--images.size", "48"],
    "finetune.py": ["--epochs", "1", "--images.size", "48", "--loader.workers", "0"],
    "lite1": ["--backbone.weights", "random"],
    "lite2": ["--backbone.weights", "random"],
}


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A working folder with the project's programs; fetch.py finds a small session on a server of this machine."""
    for name in ("data_prep", "train", "launch", "ds_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    with cowley_mirror(tmp_path / "repository", monkeypatch, images=60) as url:
        monkeypatch.setitem(SMALLER, "fetch.py", ["--mirror", url])
        yield tmp_path


def section(title: str) -> str:
    """The text below a heading of README."""
    return re.search(rf"\n## {re.escape(title)}\n(.*?)(?=\n## )", (ROOT / "README.md").read_text(), re.DOTALL)[1]


def documented(title: str) -> list[Command]:
    """The commands of a section of README that can be run here, in order."""
    text = section(title)
    inside = [command for command in commands() if command.page.name == "README.md" and command.text in text]
    return [command for command in inside if re.search(rf"\b({'|'.join(RUN)})\.py ", command.text)]


def run(command: Command) -> str:
    """Run a command in this process, made small; returns what it printed."""
    words = command.words()
    script = next(k for k, word in enumerate(words) if word.endswith(".py"))
    smaller = [word for key, added in SMALLER.items() if key in command.text for word in added]
    kept = words[script:]
    if "--images.size" in smaller and "--images.size" in kept:
        at = kept.index("--images.size")
        kept = kept[:at] + kept[at + 2 :]
    return succeed_here(*kept, *smaller).stdout


def test_from_a_download_to_a_score(desk):
    fetch, pack, pixels, windows, report = documented("A score on a real recording")
    told = run(fetch)
    assert "GPL-3.0" in told
    assert f"  {pack.text}\n" in told, "README and fetch.py must name the same command"
    assert "48 stimuli with responses" in run(pack)
    assert "pixels (chosen) " in run(pixels)
    assert "blocks.2+...+blocks.5.3.bn2 (16 modules) (chosen) " in run(windows)
    shown = run(report)
    columns = next(line for line in section("A score on a real recording").splitlines() if "Pearson r" in line)
    assert re.sub(r"\s+", " ", columns).strip() in re.sub(r"\s+", " ", shown)
    assert "v4_hvm640: 3 sites, 12 stimuli of val\n" in shown
    assert re.search(r"(windows|pixels) is ahead of (windows|pixels) by \d\.\d{3} in R2; its 95 % interval", shown)
    assert (desk / "runs/report/report.html").is_file()


def test_every_row_of_the_table_of_results_has_its_commands():
    text = section("What scores what")
    rows = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert len(rows) == 6
    *making, report = documented("What scores what")
    made = {match[1] for command in making if (match := re.search(r"--out runs/(\w+)", command.text))}
    assert made - {"windows_1", "windows_2"} == set(rows)
    assert [f"runs/{row}" for row in rows] == report.words()[2:-2]


@slow
def test_the_whole_of_readme(desk):
    """From recordings to reports; two networks have random weights, and trainings an epoch."""
    for command in documented("A score on a real recording")[:2]:
        run(command)
    rows = documented("What scores what")
    assert len(rows) == 10
    printed = [run(command) for command in rows]
    assert "combined" in printed[-2] or "stack" in printed[-2]
    make_folder(desk / "my_recording", n=240, sites=4, noise=0.5)
    own = documented("Your own recording")
    assert len(own) == 7
    for command in own:
        run(command)
    assert (desk / "runs/mine/report.html").is_file()
    assert (desk / "data/mine/contact_sheet.png").is_file()
