"""Control groups: a hard limit on the memory and the number of processes of a whole sandbox.

Version 2, or the version 1 hierarchies `memory` and `pids`, wherever this process may make groups below its
own. Where it may not, the limits rest on the supervisor's looks and on rlimits alone.

A process that starts sandboxes has one folder a hierarchy, and a group in it for each sandbox. It holds a
lock on that folder for as long as it lives, so that others can tell what the dead have left.
"""

import atexit
import errno
import fcntl
import os
import re
import secrets
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dscoder.sandbox.machine import control_groups
from dscoder.sandbox.process import above_streams

_NAME = "dscoder-sandboxes"
_LEAF = "dscoder-launcher"
_MAX_ROUNDS = 200
_PAUSE = 0.005  # seconds
_CHARGE = 4 << 20  # bytes that the kernel may ask a group for at once, and be refused


@dataclass(frozen=True, kw_only=True, slots=True)
class Hierarchy:
    """A place below which groups can be made."""

    root: Path
    controllers: frozenset[str]  # of memory and pids
    version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Shortage:
    """Whom the kernel killed for want of memory.

    Attributes:
        num_killed: processes of the group.
        is_own: the group had used up its own memory; else the machine, or a container around it.
    """

    num_killed: int = 0
    is_own: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The control groups of one sandbox, one a hierarchy; none where the system allows none."""

    folders: tuple[tuple[Hierarchy, Path], ...] = ()

    def member_files(self) -> list[Path]:
        """Where it says which processes are in."""
        return [folder / "cgroup.procs" for _, folder in self.folders]

    def add(self, pid: int) -> None:
        """Move a process into the groups of version 2, before it has started others."""
        for hierarchy, folder in self.folders:
            if hierarchy.version == 2:
                (folder / "cgroup.procs").write_text(str(pid))

    def doors(self) -> list[Path]:
        """The files of version 1 by which a process with one thread moves itself in, writing "0".

        Moving another holds up every fork on the machine for some milliseconds.
        """
        return [folder / "tasks" for hierarchy, folder in self.folders if hierarchy.version == 1]

    def all_doors(self) -> list[Path]:
        """The same, and those of version 2."""
        files = [folder / "cgroup.procs" for hierarchy, folder in self.folders if hierarchy.version == 2]
        return self.doors() + files

    @contextmanager
    def open_doors(self) -> Iterator[list[int]]:
        """Descriptors of the doors, for a process that does not see their paths."""
        files: list[int] = []
        try:
            for path in self.doors():
                files.append(above_streams(os.open(path, os.O_WRONLY | os.O_CLOEXEC)))
            yield files
        finally:
            for file in files:
                os.close(file)

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

    def counts_memory(self) -> bool:
        """Whether one of the groups does."""
        return any("memory" in hierarchy.controllers for hierarchy, _ in self.folders)

    def shortage(self) -> Shortage:
        """What the kernel did since memory was used up, in a group that counts it."""
        version, folder = next((h.version, path) for h, path in self.folders if "memory" in h.controllers)
        if version == 2:
            num_killed, num_full = (_count(folder / "memory.events", name) for name in ("oom_kill", "oom"))
        else:
            num_killed = _count(folder / "memory.oom_control", "oom_kill")
            # Newer kernels leave memory.failcnt at 0.
            most, limit = (
                int((folder / f"memory.{name}_in_bytes").read_text()) for name in ("max_usage", "limit")
            )
            num_full = int(most >= limit - _CHARGE)
        return Shortage(num_killed=num_killed, is_own=num_full > 0)


def _count(file: Path, name: str) -> int:
    found = re.search(rf"^{name} (\d+)$", file.read_text(), flags=re.MULTILINE)
    return int(found[1]) if found else 0


# ---- finding where groups can be made ----


def _enable(folder: Path, controllers: frozenset[str]) -> None:
    """Give the groups below `folder` these controllers of version 2."""
    if controllers - set((folder / "cgroup.subtree_control").read_text().split()):
        (folder / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in sorted(controllers)))


def _with_controllers(root: Path) -> frozenset[str]:
    """The controllers of version 2 that groups below `root` have or can be given."""
    wanted = frozenset({"memory", "pids"} & set((root / "cgroup.controllers").read_text().split()))
    if not wanted:
        return wanted
    try:
        _enable(root, wanted)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        # A group with processes of its own gives its children nothing: this one moves to a child.
        leaf = root / _LEAF
        leaf.mkdir(exist_ok=True)
        (leaf / "cgroup.procs").write_text(str(os.getpid()))
        try:
            _enable(root, wanted)
        except OSError:  # it was not the only one: back to where it came from
            (root / "cgroup.procs").write_text(str(os.getpid()))
            with suppress(OSError):
                leaf.rmdir()
            raise
    return wanted


def find_hierarchies(table: str, membership: str) -> tuple[Hierarchy, ...]:
    """What of the mounted hierarchies this process may make groups in.

    Args:
        table: the text of /proc/self/mounts.
        membership: the text of /proc/self/cgroup.
    """
    found = []
    missing = frozenset({"memory", "pids"})
    for version, _, own, options in control_groups(table, membership):
        root = own.parent if own.name == _LEAF else own  # started by a launcher that has moved
        if not os.access(root, os.W_OK):
            continue
        with suppress(OSError):
            controllers = missing & (_with_controllers(root) if version == 2 else options)
            if controllers:
                found.append(Hierarchy(root=root, controllers=controllers, version=version))
                missing -= controllers
    return tuple(found)


# ---- the launcher's folder ----


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the lock on a folder; None if somebody else does, or the folder is gone."""
    try:
        file = above_streams(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if folder.exists():  # while it was locked: whoever removes it locks it first
            return file
    except BlockingIOError:
        pass
    os.close(file)
    return None


def _remove(folder: Path, pid: int) -> None:
    if os.getpid() == pid:  # and not a process forked from it
        with suppress(OSError):  # busy with what would not die; a later sweep finds it
            folder.rmdir()


def open_folders(hierarchies: tuple[Hierarchy, ...]) -> tuple[Hierarchy, ...]:
    """A folder of this process's own in each hierarchy, locked until its end and removed by it."""
    found = []
    for hierarchy in hierarchies:
        lock = None
        while lock is None:  # a sweep may come between the making and the locking
            folder = hierarchy.root / f"{_NAME}-{os.getpid()}-{secrets.token_hex(4)}"
            folder.mkdir()
            lock = _lock(folder)
        atexit.register(_remove, folder, os.getpid())
        if hierarchy.version == 2:
            _enable(folder, hierarchy.controllers)
        found.append(Hierarchy(root=folder, controllers=hierarchy.controllers, version=hierarchy.version))
    return tuple(found)


def _clear(hierarchy: Hierarchy, folder: Path) -> None:
    for group in (*(path for path in folder.iterdir() if path.is_dir()), folder):
        with suppress(OSError):
            Group(folders=((hierarchy, group),)).kill()
        with suppress(OSError):
            group.rmdir()


def sweep(hierarchies: tuple[Hierarchy, ...]) -> None:
    """Remove what launchers that are dead have left, and kill what lives in it."""
    for hierarchy in hierarchies:
        for folder in hierarchy.root.glob(f"{_NAME}-*"):
            lock = _lock(folder)
            if lock is not None:
                _clear(hierarchy, folder)
                os.close(lock)


# ---- one sandbox's groups ----


def _write_limits(hierarchy: Hierarchy, folder: Path, *, memory: int, processes: int) -> None:
    if "memory" in hierarchy.controllers:
        is_2 = hierarchy.version == 2
        (folder / ("memory.max" if is_2 else "memory.limit_in_bytes")).write_text(str(memory))
        with suppress(OSError):  # a kernel without swap accounting lacks the file
            name, most = ("memory.swap.max", 0) if is_2 else ("memory.memsw.limit_in_bytes", memory)
            (folder / name).write_text(str(most))
    if "pids" in hierarchy.controllers:
        (folder / "pids.max").write_text(str(processes))


@contextmanager
def new_group(hierarchies: tuple[Hierarchy, ...], *, memory: int, processes: int) -> Iterator[Group]:
    """A group under these limits while the block runs; what is alive in it at the end is killed."""
    name = secrets.token_hex(8)
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
