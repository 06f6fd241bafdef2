"""The walls: the bubblewrap command line, the user ids, and the supervisor's start and end.

Seen from inside, the supervisor is user 0 and the program user 1000. Started by root, 1000 is a user id that
nobody else has, so neither a file, a process nor a limit is shared with the host. Started by anybody else,
both are user 1000. In either case the supervisor hides its memory and descriptors.
"""

import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from dscoder.sandbox.cgroup import Group
from dscoder.sandbox.job import Job

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
_MAX_COMPLAINT = 2000
_CHUNK = 1 << 16
_EMPTY_SIZE = 1 << 16  # bytes of the file system that lies over what is masked


class SandboxError(RuntimeError):
    """The sandbox itself failed; says nothing about the program."""


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """What a program sees of the machine beside the system folders.

    Attributes:
        shown: folders, read-only, at their own paths.
        masked: folders below those that look empty.
    """

    shown: tuple[Path, ...] = ()
    masked: tuple[Path, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """How a supervisor ended."""

    report: bytes
    complaint: str  # what it or bubblewrap wrote to stderr
    is_overdue: bool
    is_cancelled: bool


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


def command_line(bubblewrap: str, job: Job, view: View, *, news: int, go_ahead: int) -> list[str]:
    """The whole command. Descriptors: where bubblewrap tells its process id, and what it waits for then."""
    namespaces = [f"--unshare-{name}" for name in ("user", "pid", "ipc", "uts", "net", "cgroup-try")]
    capabilities = ["--cap-drop", "ALL"]
    if job.user:
        # To become the program's user and to kill what runs under it. The program has none of them.
        for name in ("CAP_SETUID", "CAP_SETGID", "CAP_KILL"):
            capabilities += ["--cap-add", name]
    return [
        *(bubblewrap, *namespaces, *capabilities),
        *("--as-pid-1", "--die-with-parent", "--new-session", "--hostname", "sandbox", "--clearenv"),
        *("--info-fd", str(news), "--userns-block-fd", str(go_ahead)),
        *(*mounts(view, disk=int(job.limits.disk)), "--chdir", "/"),
        *("--", _SUPERVISOR_INSIDE),
    ]


def memory_file(name: str, content: bytes) -> int:
    """A descriptor that reads `content`; it closes on exec unless it is passed on."""
    file = os.memfd_create(name)
    view = memoryview(content)
    while view:
        view = view[os.write(file, view) :]
    os.lseek(file, 0, os.SEEK_SET)
    return file


def _read_all(file: int, deadline: float) -> bytes:
    poll = select.poll()
    poll.register(file, select.POLLIN)
    chunks: list[bytes] = []
    while poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        chunks.append(os.read(file, _CHUNK))
        if not chunks[-1]:
            return b"".join(chunks)
    raise SandboxError("bubblewrap did not start in time")


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


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """End a supervisor or bubblewrap, and by that all that is inside."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def collect(
    process: "subprocess.Popen[bytes]", complaints: int, *, job: Job, deadline: float, cancel: int | None
) -> Ending:
    """Read the report to its end, the deadline or the cancellation, whichever is first; then kill."""
    assert process.stdout is not None
    report = bytearray()
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    if cancel is not None:
        poll.register(cancel, select.POLLIN)
    is_overdue = is_cancelled = False
    while not (is_overdue or is_cancelled):
        ready = [file for file, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1000)]
        is_overdue = not ready
        is_cancelled = cancel in ready
        if process.stdout.fileno() in ready:
            chunk = os.read(process.stdout.fileno(), _CHUNK)
            report += chunk
            if not chunk or len(report) > job.report_size():
                break
    if is_overdue or is_cancelled or len(report) > job.report_size():
        _kill(process)
    process.stdout.close()
    process.wait()
    complaint = os.pread(complaints, _MAX_COMPLAINT, 0).decode(errors="replace").strip()
    return Ending(report=bytes(report), complaint=complaint, is_overdue=is_overdue, is_cancelled=is_cancelled)


def start(
    command: Sequence[str], content: int, complaints: int, passed: Sequence[int]
) -> "subprocess.Popen[bytes]":
    """A supervisor, or bubblewrap around one. Its environment is empty and its session its own."""
    # No preexec_fn, so that a large process starts it by vfork.
    return subprocess.Popen(
        command,
        stdin=content,
        stdout=subprocess.PIPE,
        stderr=complaints,
        pass_fds=passed,
        env={},
        cwd="/",
        start_new_session=True,
    )


def _admit(news: int, go_ahead: int, group: Group, *, deadline: float) -> None:
    """Between bubblewrap's first fork and its going on. If it is dead already, its complaint says why."""
    text = _read_all(news, deadline)
    if text:
        pid = int(json.loads(text)["child-pid"])
        group.add(pid)
        map_users(pid, is_root=is_root())
        os.write(go_ahead, b"1")


def execute(job: Job, view: View, group: Group, *, cancel: int | None) -> Ending:
    """Run a job under full isolation to its end."""
    bubblewrap = find_bubblewrap()
    deadline = time.monotonic() + job.deadline()
    content, complaints = memory_file("job", job.encode()), memory_file("stderr", b"")
    (news, news_end), (wait_end, go_ahead) = os.pipe(), os.pipe()
    open_files = {content, complaints, news, news_end, wait_end, go_ahead}
    try:
        command = command_line(bubblewrap, job, view, news=news_end, go_ahead=wait_end)
        process = start(command, content, complaints, (news_end, wait_end))
        for end in (news_end, wait_end):
            os.close(end)
            open_files.remove(end)
        try:
            _admit(news, go_ahead, group, deadline=deadline)
        except BaseException:
            _kill(process)
            raise
        return collect(process, complaints, job=job, deadline=deadline, cancel=cancel)
    finally:
        for file in open_files:
            os.close(file)
