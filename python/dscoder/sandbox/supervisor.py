"""The process inside the sandbox that runs the steps of a job and measures them; pid 1 under full isolation.

A bare interpreter is handed it as compiled code with the job behind it (see job.py). It writes the report to
stdout: one record a step, then the word "end". Its own user id differs from the program's where it may choose
one; else guard.py hides it. Only modules that load in microseconds are imported: `signal` alone, for its
enums, would take as long as the interpreter itself.
"""

import _signal  # type: ignore[import-not-found]
import fcntl
import os
import resource
import select
import time
from typing import Any

_TICK = 0.02  # seconds between looks at the memory
_CHUNK = 1 << 16
_PAGE = resource.getpagesize()
_INODE = 1024  # bytes of kernel memory a file takes at least, even an empty one
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
_FILES_OPEN = 1024
_STACK = 8 << 20

Step = dict[str, Any]
Job = dict[str, Any]


# ---- the processes inside ----


def _other_processes(job: Job) -> list[int]:
    """Every process of the namespace but this one; without a namespace: every descendant."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    me = os.getpid()
    if job["is_pid_1"]:
        return [pid for pid in pids if pid != me]
    parents = {}
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                parents[pid] = int(file.read().rpartition(b")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue  # it is gone
    found = {me}
    while grown := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= grown
    return sorted(found - {me})


def _held_memory(job: Job) -> int:
    """Bytes that the processes hold for themselves, with what lies in the file systems in memory."""
    num_pages = 0
    for pid in _other_processes(job):
        try:
            with open(f"/proc/{pid}/statm", "rb") as file:
                _, resident, shared, *_ = file.read().split()
            num_pages += int(resident) - int(shared)
        except (OSError, ValueError):
            continue
    held = num_pages * _PAGE
    for folder in job["memory_folders"]:
        usage = os.statvfs(folder)
        held += (usage.f_blocks - usage.f_bfree) * usage.f_frsize + (usage.f_files - usage.f_ffree) * _INODE
    return held


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _kill_all(job: Job) -> None:
    """SIGKILL to every other process. Without a namespace all are stopped first: none may fork meanwhile."""
    if job["is_pid_1"]:
        _send(-1, _signal.SIGKILL)
        return
    stopped: set[int] = set()
    while fresh := set(_other_processes(job)) - stopped:
        for pid in fresh:
            _send(pid, _signal.SIGSTOP)
        stopped |= fresh
    for pid in stopped:
        _send(pid, _signal.SIGKILL)


class _Usage:
    """What the processes that are gone have used."""

    def __init__(self) -> None:
        self.cpu = 0.0
        self.peak = 0

    def add(self, usage: resource.struct_rusage) -> None:
        self.cpu += usage.ru_utime + usage.ru_stime
        self.peak = max(self.peak, usage.ru_maxrss * 1024)


def _reap(usage: _Usage, *, options: int, main: int = 0) -> int | None:
    """Collect dead children until none is dead (WNOHANG) or none is left; the status of `main`, if seen."""
    status = None
    while True:
        try:
            pid, found, used = os.wait4(-1, options)
        except ChildProcessError:
            return status
        if pid == 0:
            return status
        usage.add(used)
        if pid == main:
            status = found


# ---- starting the program ----


def _open_input(content: bytes) -> int:
    """A descriptor that reads `content` and that nobody can write to."""
    if not content:
        return os.open("/dev/null", os.O_RDONLY)
    file = os.memfd_create("stdin", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(content)
    while view:
        view = view[os.write(file, view) :]
    os.lseek(file, 0, os.SEEK_SET)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
    return file


def _bound(step: Step) -> None:
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_MEMLOCK: _CHUNK,
        resource.RLIMIT_NOFILE: _FILES_OPEN,
        resource.RLIMIT_STACK: _STACK,
        resource.RLIMIT_FSIZE: step["disk"],
        resource.RLIMIT_NPROC: step["processes"],
        resource.RLIMIT_CPU: step["cpu_time"],
    }
    if step["address_space"]:
        limits[resource.RLIMIT_AS] = step["address_space"]
    for number, value in limits.items():
        _, ceiling = resource.getrlimit(number)
        most = value if ceiling == resource.RLIM_INFINITY else min(value, ceiling)
        # SIGXCPU at the soft limit says what happened; SIGKILL follows a second later for who ignores it.
        soft = max(1, most - 1) if number == resource.RLIMIT_CPU else most
        resource.setrlimit(number, (soft, most))


def _become(user: int) -> None:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def _offer_to_oom_killer() -> None:
    """Whatever is short of memory, the program goes before the supervisor."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except PermissionError:
        return  # guard.py has hidden the process, from itself too


def _exec(step: Step, job: Job, streams: tuple[int, int, int]) -> None:
    """In the child: everything between fork and exec."""
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    for number in (_signal.SIGINT, _signal.SIGPIPE, _signal.SIGXFSZ):  # ignored by the supervisor
        _signal.signal(number, _signal.SIG_DFL)
    _offer_to_oom_killer()
    os.chdir(job["folder"])
    if job["user"]:
        _become(job["user"])
    _bound(step)
    if "before_exec" in job:
        job["before_exec"]()
    os.execve(step["argv"][0], step["argv"], step["env"])


def _start(step: Step, job: Job) -> tuple[int, int, int]:
    """Process id and the reading ends of its stdout and stderr."""
    stdin = _open_input(step["stdin"])
    pipes = [os.pipe() for _ in range(3)]  # stdout, stderr, and why exec failed; all close on exec
    (out, out_end), (err, err_end), (failed, failed_end) = pipes
    pid = os.fork()
    if pid == 0:
        try:
            _exec(step, job, (stdin, out_end, err_end))
        except BaseException as error:  # whatever it is, this process must not go on as a second supervisor
            os.write(failed_end, repr(error).encode()[:1000])
        os._exit(127)
    for end in (stdin, out_end, err_end, failed_end):
        os.close(end)
    reason = os.read(failed, 1000)  # empty once exec has closed the other end
    os.close(failed)
    if reason:
        raise RuntimeError(f"{step['argv'][0]} did not start: {reason.decode(errors='replace')}")
    return pid, out, err


# ---- one step, from its start to the record of it ----


class _Watch:
    """A running step: its streams as read so far, and why it was stopped."""

    def __init__(self, step: Step, pid: int, streams: tuple[int, int]) -> None:
        self.step = step
        self.pid = pid
        self.exit_file = os.pidfd_open(pid)
        self.streams = {stream: bytearray() for stream in streams}
        self.poll = select.poll()
        for file in (self.exit_file, *streams):
            self.poll.register(file, select.POLLIN)
        self.usage = _Usage()
        self.status: int | None = None
        self.stopped = ""

    def read(self, stream: int) -> bool:
        """One chunk; False at the end of the stream, and once there is too much of it."""
        kept = self.streams[stream]
        chunk = os.read(stream, _CHUNK)
        kept += chunk
        if len(kept) > self.step["output"]:
            del kept[self.step["output"] :]
            self.stopped = self.stopped or "output"
            return False
        return bool(chunk)

    def look(self, seconds: float) -> None:
        """Wait for something to happen, at most so long, and take in what did."""
        for file, _ in self.poll.poll(max(0.0, seconds) * 1000):
            if file != self.exit_file and not self.read(file):
                self.poll.unregister(file)
        seen = _reap(self.usage, options=os.WNOHANG, main=self.pid)
        self.status = seen if seen is not None else self.status

    def drain(self) -> None:
        """Read what the dead have left in the pipes."""
        for stream in self.streams:
            os.set_blocking(stream, False)
            try:
                while self.read(stream):
                    pass
            except BlockingIOError:
                continue


def _run(step: Step, job: Job) -> bytes:
    begin = time.monotonic()
    pid, out, err = _start(step, job)
    watch = _Watch(step, pid, (out, err))
    deadline, next_look = begin + step["time"], begin + _TICK
    while watch.status is None and not watch.stopped:
        now = time.monotonic()
        if now >= deadline:
            watch.stopped = "time"
        elif now >= next_look:
            held = _held_memory(job)
            watch.usage.peak = max(watch.usage.peak, held)
            watch.stopped = "memory" if held > step["memory"] else watch.stopped
            next_look = time.monotonic() + _TICK
        else:
            watch.look(min(deadline, next_look) - now)
    wall = time.monotonic() - begin
    _kill_all(job)
    seen = _reap(watch.usage, options=0, main=pid)
    status = watch.status if watch.status is not None else seen or 0
    watch.drain()
    for file in (out, err, watch.exit_file):
        os.close(file)
    code = os.waitstatus_to_exitcode(status)
    stdout, stderr = watch.streams.values()
    sizes = f"{len(stdout)} {len(stderr)}"
    head = f"step {code} {watch.stopped or '-'} {wall:.6f} {watch.usage.cpu:.6f} {watch.usage.peak} {sizes}\n"
    return head.encode() + stdout + stderr


def _write_files(job: Job) -> None:
    os.umask(0o022)
    if (
        job["user"] and job["is_pid_1"]
    ):  # the files are the program's; root takes the right to them back below
        os.setegid(job["user"])
        os.seteuid(job["user"])
    os.makedirs(job["folder"], exist_ok=True)
    for name, content in job["files"]:
        path = os.path.join(job["folder"], name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)
    if job["user"] and job["is_pid_1"]:
        os.seteuid(0)
        os.setegid(0)


def main(job: Job) -> None:
    """Run the steps in order, up to the first that fails, and write the report."""
    _signal.signal(_signal.SIGINT, _signal.SIG_IGN)  # no handler: pid 1 gets no signal from inside
    os.closerange(3, _FILES_OPEN)
    for path in job["join"]:
        with open(path, "w") as file:
            file.write("0")  # this process
    _write_files(job)
    for step in job["steps"]:
        record = _run(step, job)
        with open(1, "wb", closefd=False) as report:
            report.write(record)
        if not record.startswith(b"step 0 - "):
            break
    os.write(1, b"end\n")
