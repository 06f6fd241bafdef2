"""The walls: the bubblewrap command line, the user ids, and the way in.

Seen from inside, the supervisor is user 0 and the program user 1000. Started by root, 1000 is a user id that
nobody else has, so neither a file, a process nor a limit is shared with the host. Started by anybody else,
both are user 1000. In either case the supervisor hides its memory and descriptors.
"""

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from dscoder.sandbox.cgroup import Group
from dscoder.sandbox.job import Job
from dscoder.sandbox.process import Ending, SandboxError, Supervised, above_streams

INSIDE_USER = 1000
_SUPERVISOR_INSIDE = "/supervisor"
_SHM_FOLDER = "/dev/shm"
MEMORY_FOLDERS = ("/tmp", _SHM_FOLDER)
# Root's sandboxes take user ids from here on, by process id; the second range is for a host that maps few.
_USER_RANGES = ((1_610_612_736, 1 << 22), (20_000, 1 << 14))
_SYSTEM_FOLDERS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
# What honest programs read of /etc. No passwords, no host name, no resolver.
_ETC = ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives", "localtime", "mono", "R")
_ETC_PATTERNS = ("java-*-openjdk", "php*", "lua*")
_DEVICES = ("null", "zero", "full", "random", "urandom")
_MAX_NEWS = 4096  # bytes of what bubblewrap says of itself; its first line has the process id
_EMPTY_SIZE = 1 << 16  # bytes of the file system that lies over what is masked


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """What a program sees of the machine beside the system folders.

    Attributes:
        shown: folders, read-only, at their own paths.
        masked: folders below those that look empty.
    """

    shown: tuple[Path, ...] = ()
    masked: tuple[Path, ...] = ()


def is_root() -> bool:
    """Whether this process may give user ids away."""
    return os.geteuid() == 0


def find_bubblewrap() -> str:
    """The path of bwrap; SandboxError naming the package if it is not installed."""
    found = shutil.which("bwrap")
    if found is None:
        raise SandboxError(
            "isolation 'full' needs bubblewrap, and no bwrap is on PATH: install the package bubblewrap "
            "(apt-get install bubblewrap), or ask for isolation 'rlimits', which is much weaker"
        )
    return found


def private_user(pid: int, ranges: str) -> int:
    """A user id for the sandbox of process `pid` that this host lets root give away.

    Args:
        ranges: the text of /proc/self/uid_map.
    """
    mapped = [tuple(map(int, line.split())) for line in ranges.splitlines()]
    for first, size in _USER_RANGES:
        user = first + pid % size
        if any(inside <= user < inside + length for inside, _, length in mapped):
            return user
    raise SandboxError(f"no user id for a sandbox: root here may use none of its ranges {_USER_RANGES}")


@cache
def supervisor() -> Path:
    """The program that runs the others, installed beside the extension, which need not be loaded."""
    extension = find_spec("dscoder._C")
    if extension is None or extension.origin is None:
        raise SandboxError("the sandbox needs dscoder's compiled parts, and none are installed")
    return Path(extension.origin).with_name("dscoder-supervisor")


def _etc_entries() -> list[Path]:
    root = Path("/etc")
    found = [root / name for name in _ETC] + [path for glob in _ETC_PATTERNS for path in root.glob(glob)]
    return [path for path in found if path.exists()]


def _open_folder(path: Path) -> list[str]:
    # Of itself bubblewrap makes the folders above a mount so that only user 0 may enter them.
    return ["--perms", "0755", "--dir", str(path)]


@cache
def mounts(view: View, *, disk: int) -> tuple[str, ...]:
    """bubblewrap's arguments for the file system. Later ones lie over earlier ones."""
    arguments: list[str] = []
    for folder in _SYSTEM_FOLDERS:
        if Path(folder).is_symlink():
            arguments += ["--symlink", str(Path(folder).readlink()), folder]
        elif Path(folder).is_dir():
            arguments += ["--ro-bind", folder, folder]
    arguments += _open_folder(Path("/dev"))
    for name in _DEVICES:
        arguments += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    for name, target in (("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        arguments += ["--symlink", f"/proc/self/{target}", f"/dev/{name}"]
    for folder in MEMORY_FOLDERS:
        arguments += ["--size", str(disk), "--perms", "1777", "--tmpfs", folder]
    outside = [path for path in (*_etc_entries(), *view.shown) if not path.is_relative_to("/usr")]
    parents = {parent for path in outside for parent in path.parents} - {
        Path("/"),
        Path("/tmp"),
        Path("/dev"),
    }
    for parent in sorted(parents):
        arguments += _open_folder(parent)
    for path in outside:
        arguments += ["--ro-bind", str(path), str(path)]
    for path in view.masked:
        arguments += ["--size", str(_EMPTY_SIZE), "--perms", "0555", "--tmpfs", str(path)]
    arguments += ["--ro-bind", str(supervisor()), _SUPERVISOR_INSIDE]
    return (*arguments, "--proc", "/proc", "--remount-ro", "/")


def command_line(bubblewrap: str, job: Job, view: View, gates: "Gates") -> list[str]:
    """The whole command."""
    namespaces = [f"--unshare-{name}" for name in ("user", "pid", "ipc", "uts", "net", "cgroup-try")]
    # To see how much memory processes share; to become the program's user and to kill what runs under it. The
    # program has none of them.
    kept = ("CAP_SYS_PTRACE", *(("CAP_SETUID", "CAP_SETGID", "CAP_KILL") if job.user else ()))
    capabilities = ["--cap-drop", "ALL", *(word for name in kept for word in ("--cap-add", name))]
    # Not --die-with-parent: a bubblewrap that dies before its child may go on leaves it asleep for ever. The
    # child sees the launcher's death itself.
    return [
        *(bubblewrap, *namespaces, *capabilities),
        *("--as-pid-1", "--new-session", "--hostname", "sandbox", "--clearenv"),
        *("--info-fd", str(gates.news_end), "--userns-block-fd", str(gates.users_end)),
        *("--block-fd", str(gates.start_end)),
        *(*mounts(view, disk=int(job.limits.disk)), "--chdir", "/"),
        *("--", _SUPERVISOR_INSIDE),
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Gates:
    """The pipes by which a launcher and bubblewrap agree; the ends so named are bubblewrap's.

    Attributes:
        news: where bubblewrap writes its child's process id.
        users: opened once that has user ids; bubblewrap builds the file system then.
        start: opened once it is in its control group; bubblewrap becomes the supervisor then.
    """

    news: int
    news_end: int
    users: int
    users_end: int
    start: int
    start_end: int

    def passed(self) -> tuple[int, ...]:
        """What bubblewrap inherits: the reading end of the news too, so that writing never fails."""
        return self.news, self.news_end, self.users_end, self.start_end


@contextmanager
def open_gates() -> Iterator[Gates]:
    """The pipes while the block runs. Whoever waits at one goes on when the launcher is gone."""
    files: list[int] = []
    try:
        for _ in range(3):
            files += map(above_streams, os.pipe())
        news, news_end, users_end, users, start_end, start = files
        yield Gates(
            news=news,
            news_end=news_end,
            users=users,
            users_end=users_end,
            start=start,
            start_end=start_end,
        )
    finally:
        for file in files:
            os.close(file)


def map_users(pid: int, *, is_root: bool) -> None:
    """Give the user namespace of `pid`, which waits for it, its user and group ids."""
    folder = Path("/proc", str(pid))
    if is_root:
        user = private_user(pid, Path("/proc/self/uid_map").read_text())
        users = groups = f"0 0 1\n{INSIDE_USER} {user} 1\n"
    else:
        users, groups = f"{INSIDE_USER} {os.geteuid()} 1\n", f"{INSIDE_USER} {os.getegid()} 1\n"
        (folder / "setgroups").write_text("deny")
    (folder / "uid_map").write_text(users)
    (folder / "gid_map").write_text(groups)


def _admit(process: Supervised, gates: Gates, group: Group) -> None:
    """From bubblewrap's fork to its becoming the supervisor. If it ends before, its complaint says why."""
    if not process.wait_for(gates.news):
        return
    news = os.read(gates.news, _MAX_NEWS)
    found = re.search(rb'"child-pid": (\d+)', news)
    if found is None:
        raise SandboxError(f"bubblewrap must name its child's process id, got {news!r}")
    pid = int(found[1])
    process.watch_init(pid)
    map_users(pid, is_root=is_root())
    os.write(gates.users, b"1")
    group.add(pid)  # takes the kernel some milliseconds, in which bubblewrap builds the file system
    os.write(gates.start, b"1")


def execute(job: Job, view: View, group: Group, *, cancel: int | None) -> Ending:
    """Run a job under full isolation to its end."""
    bubblewrap = find_bubblewrap()
    deadline = time.monotonic() + job.deadline()
    with open_gates() as gates, group.open_doors() as doors:
        job = replace(job, join=tuple(f"/proc/self/fd/{door}" for door in doors))
        command = command_line(bubblewrap, job, view, gates)
        passed = (*gates.passed(), *doors)
        with Supervised(command, job, passed=passed, deadline=deadline, cancel=cancel) as process:
            _admit(process, gates, group)
            return process.ending()
