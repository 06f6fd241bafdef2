"""What this process may take: the cores and memory of the machine, or of its container where that has less.

A container is known by its control groups: its own limits and those of the groups above it, as far as they
can be seen from inside.
"""

import math
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path


def control_groups(table: str, membership: str) -> Iterator[tuple[int, Path, Path, frozenset[str]]]:
    """(version, mount point, own group, mount options) of each mounted hierarchy that this process is in.

    Args:
        table: the text of /proc/self/mounts.
        membership: the text of /proc/self/cgroup.
    """
    paths = {}
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), path.lstrip("/")))  # "" is version 2
    for line in table.splitlines():
        _, place, kind, options, *_ = line.split()
        if kind not in ("cgroup", "cgroup2"):
            continue
        names = frozenset(options.split(","))
        own_path = next((paths[n] for n in ({""} if kind == "cgroup2" else names) if n in paths), None)
        if own_path is None:
            continue
        # Inside a container the mount point is often the own group, and the path that of the host.
        own = Path(place, own_path) if Path(place, own_path).is_dir() else Path(place)
        yield 2 if kind == "cgroup2" else 1, Path(place), own, names


def _read(path: Path) -> str:
    with suppress(OSError):
        return path.read_text().strip()
    return ""


def _lines_of(own: Path, top: Path) -> Iterator[Path]:
    yield own
    yield from (parent for parent in own.parents if parent.is_relative_to(top))


def _quota(group: Path, version: int) -> float:
    """Cores' worth of time that a group may take; infinite if nothing bounds it."""
    if version == 2:
        quota, _, period = _read(group / "cpu.max").partition(" ")
    else:
        quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
    is_bounded = quota.isdecimal() and period.isdecimal() and int(period) > 0
    return int(quota) / int(period) if is_bounded else math.inf


def _most_memory(group: Path, version: int) -> float:
    limit = _read(group / ("memory.max" if version == 2 else "memory.limit_in_bytes"))
    return int(limit) if limit.isdecimal() else math.inf


def container_limits(table: str, membership: str) -> tuple[float, float]:
    """(cores, bytes of memory) that control groups leave to this process; infinite where they bound nothing.

    Args:
        table: the text of /proc/self/mounts.
        membership: the text of /proc/self/cgroup.
    """
    cores = memory = math.inf
    for version, top, own, _ in control_groups(table, membership):
        for group in _lines_of(own, top):
            cores = min(cores, _quota(group, version))
            memory = min(memory, _most_memory(group, version))
    return cores, memory


@cache
def _container() -> tuple[float, float]:
    return container_limits(Path("/proc/self/mounts").read_text(), Path("/proc/self/cgroup").read_text())


def num_cores() -> int:
    """Cores that this process may use, at least one."""
    return max(1, min(len(os.sched_getaffinity(0)), math.ceil(min(_container()[0], 1e6))))


def memory() -> int:
    """Bytes that the machine has, or the container may take."""
    return int(min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), _container()[1]))


def num_killed_for_memory() -> int:
    """Processes that the kernel has killed for want of memory since it started, anywhere on the machine."""
    found = re.search(r"^oom_kill (\d+)$", _read(Path("/proc/vmstat")), flags=re.MULTILINE)
    return int(found[1]) if found else 0
