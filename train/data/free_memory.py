"""The memory that this process can still use, on its machine and within its control groups."""

from collections.abc import Iterator
from pathlib import Path

import psutil

CONTROL_GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def free_memory(mount: Path = CONTROL_GROUPS, membership: Path = MEMBERSHIP) -> int:
    """Bytes that can be used without swapping or being killed.

    Containers and batch systems limit memory by control groups, which the machine's own numbers do not show.

    Args:
        mount: where control groups are mounted.
        membership: the list of the groups that this process is in.
    """
    return min([psutil.virtual_memory().available, *_left_by_groups(mount, membership)])


def _left_by_groups(mount: Path, membership: Path) -> Iterator[int]:
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from _left(mount, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = mount / "memory"
            yield from _left(root, path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _left(root: Path, path: str, limit: str, usage: str, reclaimable: str) -> Iterator[int]:
    """The bytes that each group above the process leaves; files' page cache counts as used but is freed on demand."""
    group = root / path.lstrip("/")
    for folder in (group, *group.parents):
        if not folder.is_relative_to(root):
            return
        try:
            most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
            statistics = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
            yield max(most - used + int(statistics.get(reclaimable, 0)), 0)
        except (OSError, ValueError):  # "max" means no limit; a container may not see the groups above its own
            continue
