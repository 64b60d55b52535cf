"""What a container or a service manager allows this process, by Linux control groups of either version. Reads only.

A limit may stand in the group itself or in any above it; the lowest counts. Where a group's path is not mounted, as in
a container with version 1, the top of the mount is the container's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """None: there is no limit, or it cannot be read."""

    memory: int | None = None  # bytes
    memory_free: int | None = None  # bytes that may still be used; what the kernel caches counts as free
    cpus: int | None = None  # a part of one counts as one


def read(mount: Path = MOUNT, membership: Path = MEMBERSHIP) -> Limits:
    """The limits of this process."""
    groups = [*_groups(mount, membership)]
    memory = [found for group in groups if (found := _memory(group))]
    cpus = [count for group in groups if (count := _cpus(group))]
    return Limits(
        memory=min((limit for limit, _ in memory), default=None),
        memory_free=min((max(limit - used, 0) for limit, used in memory), default=None),
        cpus=min(cpus, default=None),
    )


def _groups(mount: Path, membership: Path) -> Iterator[Path]:
    """The folder of every group that this process is in, and of each above."""
    for line in _text(membership).splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        for controller in controllers.split(",") or [""]:
            top = mount / controller
            own = top / path.strip("/")
            yield from (group for group in (own, *own.parents) if group == top or top in group.parents)


def _memory(group: Path) -> tuple[int, int] | None:
    """The limit and what is in use of it."""
    for limit_file, used_file, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit = _number(_text(group / limit_file))
        if limit is not None:
            statistics = dict(line.split(" ", 1) for line in _text(group / "memory.stat").splitlines() if " " in line)
            used = (_number(_text(group / used_file)) or 0) - (_number(statistics.get(cache, "")) or 0)
            return limit, max(used, 0)
    return None


def _cpus(group: Path) -> int | None:
    words = _text(group / "cpu.max").split() or [
        _text(group / "cpu.cfs_quota_us").strip(),
        _text(group / "cpu.cfs_period_us").strip(),
    ]
    quota, period = (_number(word) for word in (*words, "", "")[:2])
    return max(math.ceil(quota / period), 1) if quota and period else None


def _number(text: str) -> int | None:
    """A count; None for "max", -1 and whatever else is none."""
    return int(text) if text.strip().isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
