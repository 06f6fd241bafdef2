"""Control groups: a hard limit on the memory and the number of processes of a whole sandbox.

Version 2, or the version 1 hierarchies `memory` and `pids`, wherever this process may make groups below its
own. Where it may not, the limits rest on the supervisor's looks and on rlimits alone.
"""

import itertools
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_NAME = "dscoder-sandbox"
_COUNTER = itertools.count()
_MAX_ROUNDS = 200
_PAUSE = 0.005  # seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Hierarchy:
    """A place below which groups can be made."""

    root: Path
    controllers: frozenset[str]  # of memory and pids
    version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The control groups of one sandbox, one a hierarchy; none where the system allows none."""

    folders: tuple[tuple[Hierarchy, Path], ...] = ()

    def member_files(self) -> list[Path]:
        """Where a process id is written to move that process in."""
        return [folder / "cgroup.procs" for _, folder in self.folders]

    def add(self, pid: int) -> None:
        """Move a process into the group, before it has started others."""
        for file in self.member_files():
            file.write_text(str(pid))

    def kill(self) -> None:
        """SIGKILL to whatever is in the group, until nothing is; gives up after a while."""
        for _ in range(_MAX_ROUNDS):
            pids = {int(pid) for file in self.member_files() for pid in file.read_text().split()}
            if not pids:
                return
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(_PAUSE)

    def num_killed(self) -> int:
        """How many processes the kernel has killed since the memory was used up."""
        for hierarchy, folder in self.folders:
            if "memory" in hierarchy.controllers:
                name = "memory.events" if hierarchy.version == 2 else "memory.oom_control"
                found = re.search(r"^oom_kill (\d+)$", (folder / name).read_text(), flags=re.MULTILINE)
                return int(found[1]) if found else 0
        return 0


def _mounts(table: str) -> Iterator[tuple[int, Path, frozenset[str]]]:
    """(version, mount point, mount options) of each control group file system in a table of mounts."""
    for line in table.splitlines():
        _, place, kind, options, *_ = line.split()
        if kind in ("cgroup", "cgroup2"):
            yield 2 if kind == "cgroup2" else 1, Path(place), frozenset(options.split(","))


def _own_path(membership: str, controller: str) -> str | None:
    """Where in the hierarchy of `controller` ("" for version 2) this process is."""
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path.lstrip("/")
    return None


def _with_controllers(root: Path) -> frozenset[str]:
    """The controllers of version 2 that groups below `root` have or can be given."""
    wanted = {"memory", "pids"} & set((root / "cgroup.controllers").read_text().split())
    enabled = set((root / "cgroup.subtree_control").read_text().split())
    if wanted - enabled:
        # Refused while processes are in `root` itself, as they are unless somebody set the group up for us.
        (root / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in sorted(wanted)))
    return frozenset(wanted)


def find_hierarchies(table: str, membership: str) -> tuple[Hierarchy, ...]:
    """What of the mounted hierarchies this process may make groups in.

    Args:
        table: the text of /proc/self/mounts.
        membership: the text of /proc/self/cgroup.
    """
    found = []
    missing = {"memory", "pids"}
    for version, place, options in _mounts(table):
        here = frozenset({""}) if version == 2 else options & missing
        path = _own_path(membership, next(iter(here))) if here else None
        if path is None or not os.access(place / path, os.W_OK):
            continue
        with suppress(OSError):
            controllers = _with_controllers(place / path) if version == 2 else here
            if controllers & missing:
                found.append(Hierarchy(root=place / path, controllers=controllers & missing, version=version))
                missing -= controllers
    return tuple(found)


def _write_limits(hierarchy: Hierarchy, folder: Path, *, memory: int, processes: int) -> None:
    if "memory" in hierarchy.controllers:
        names = ("memory.max", "memory.swap.max") if hierarchy.version == 2 else ("memory.limit_in_bytes",)
        (folder / names[0]).write_text(str(memory))
        for name in names[1:]:
            with suppress(OSError):  # a kernel without swap accounting lacks the file
                (folder / name).write_text("0")
    if "pids" in hierarchy.controllers:
        (folder / "pids.max").write_text(str(processes))


def sweep(hierarchies: tuple[Hierarchy, ...]) -> None:
    """Remove the empty groups of processes that died before they could."""
    folders = [folder for hierarchy in hierarchies for folder in hierarchy.root.glob(f"{_NAME}-*-*")]
    for folder in folders:
        is_orphan = not Path("/proc", folder.name.split("-")[2]).exists()
        with suppress(OSError):
            if is_orphan:
                folder.rmdir()


@contextmanager
def new_group(hierarchies: tuple[Hierarchy, ...], *, memory: int, processes: int) -> Iterator[Group]:
    """A group under these limits while the block runs; what is alive in it at the end is killed."""
    name = f"{_NAME}-{os.getpid()}-{next(_COUNTER)}"
    folders: list[tuple[Hierarchy, Path]] = []
    try:
        for hierarchy in hierarchies:
            folder = hierarchy.root / name
            folder.mkdir()
            folders.append((hierarchy, folder))
            _write_limits(hierarchy, folder, memory=memory, processes=processes)
        yield Group(folders=tuple(folders))
    finally:
        Group(folders=tuple(folders)).kill()
        for _, folder in folders:
            with suppress(OSError):  # busy with what would not die; a later sweep finds it
                folder.rmdir()
