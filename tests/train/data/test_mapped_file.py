"""Files in memory get huge pages where the kernel has them, and the same bytes where it does not."""

import os

import numpy as np
import pytest

from train.data import mapped_file
from train.data.mapped_file import HUGE_PAGE, HugePages, MappedFile

COUNT = 40


@pytest.fixture
def descriptor():
    """A file in memory: one page for states, COUNT that can be huge, and half a one."""
    descriptor = os.memfd_create("test")
    os.ftruncate(descriptor, (COUNT + 1) * HUGE_PAGE + HUGE_PAGE // 2)
    yield descriptor
    os.close(descriptor)


def opened(descriptor) -> tuple[MappedFile, HugePages]:
    file = MappedFile(descriptor)
    return file, HugePages(file, HUGE_PAGE, 8, COUNT)


def test_what_is_written_is_in_the_file_whatever_its_pages(descriptor):
    file, pages = opened(descriptor)
    content = np.random.default_rng(0).integers(0, 256, HUGE_PAGE, np.uint8)
    start = HUGE_PAGE // 2  # in two pages
    os.pwrite(descriptor, b"before", HUGE_PAGE + start - 6)
    if not pages.hold(start, start + HUGE_PAGE):
        pytest.skip("this kernel gives no huge pages to shared memory")
    file.bytes[HUGE_PAGE + start :][:HUGE_PAGE] = content
    assert os.pread(descriptor, HUGE_PAGE + 6, HUGE_PAGE + start - 6) == b"before" + content.tobytes()
    other, its_pages = opened(descriptor)
    assert np.array_equal(other.bytes[HUGE_PAGE + start :][:HUGE_PAGE], content)
    assert its_pages.hold(0, 2 * HUGE_PAGE)
    assert not its_pages.hold(COUNT * HUGE_PAGE - 1, COUNT * HUGE_PAGE + 1)  # the last half page


def test_without_huge_pages_the_file_is_mapped_all_the_same(descriptor, tmp_path, monkeypatch):
    monkeypatch.setattr(mapped_file, "_HUGE_PAGE_OF_KERNEL", tmp_path / "none")
    file, pages = opened(descriptor)
    assert not pages.hold(0, 1)
    os.pwrite(descriptor, b"there", HUGE_PAGE)
    assert file.bytes[HUGE_PAGE : HUGE_PAGE + 5].tobytes() == b"there"


def test_a_file_on_a_disk_has_no_huge_pages(tmp_path):
    """Writing to its memory would end the process where the disk is full."""
    with (tmp_path / "file").open("w+b") as on_disk:
        on_disk.truncate((COUNT + 1) * HUGE_PAGE)
        file, pages = opened(on_disk.fileno())
        assert not pages.hold(0, 1)
        on_disk.write(b"there")
        on_disk.flush()
        assert file.bytes[:5].tobytes() == b"there"


def test_expensive_huge_pages_are_left_out_more_and_more(descriptor, monkeypatch):
    monkeypatch.setattr(MappedFile, "make_huge", lambda file, start: True)
    monkeypatch.setattr(mapped_file, "_EXPENSIVE", -1)  # as all are where memory is fragmented
    _, pages = opened(descriptor)
    held = [number for number in range(COUNT) if pages.hold(number * HUGE_PAGE, (number + 1) * HUGE_PAGE)]
    assert held == [0, 2, 6, 14, 30]
    _, others = opened(descriptor)  # another process knows them without trying
    assert [number for number in range(COUNT) if others.hold(number * HUGE_PAGE, number * HUGE_PAGE + 1)] == held


def test_cheap_huge_pages_are_all_made(descriptor, monkeypatch):
    monkeypatch.setattr(MappedFile, "make_huge", lambda file, start: True)
    monkeypatch.setattr(mapped_file, "_EXPENSIVE", 3600)
    _, pages = opened(descriptor)
    assert all(pages.hold(number * HUGE_PAGE, (number + 1) * HUGE_PAGE) for number in range(COUNT))


def test_addresses_are_given_back(descriptor):
    def mapped() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0])

    opened(descriptor)
    before = mapped()
    for _ in range(50):
        opened(descriptor)
    assert mapped() - before < COUNT * HUGE_PAGE // 4096
