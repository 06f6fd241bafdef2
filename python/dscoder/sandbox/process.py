"""A supervisor as its launcher sees it: started, listened to, and dead at the end whatever happens.

Nothing here waits for the end of a pipe: a process forked elsewhere in the launcher holds copies of its
descriptors for as long as it likes. What ends is a process, and that the kernel tells by its descriptor.
"""

import fcntl
import os
import select
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from dscoder.sandbox.job import Job

_MAX_COMPLAINT = 2000
_CHUNK = 1 << 16
_PATIENCE = 5.0  # seconds that processes may take to end once they are told to


class SandboxError(RuntimeError):
    """The sandbox itself failed; says nothing about the program."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """What a supervisor left behind."""

    report: bytes
    complaint: str  # what it or bubblewrap wrote to stderr


def above_streams(file: int) -> int:
    """The same open file by a number above those of the standard streams, which a process may lack."""
    if file > 2:
        return file
    try:
        return fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(file)


def memory_file(name: str, content: bytes) -> int:
    """A descriptor that reads `content`; it closes on exec unless it is passed on."""
    file = above_streams(os.memfd_create(name))
    view = memoryview(content)
    while view:
        view = view[os.write(file, view) :]
    os.lseek(file, 0, os.SEEK_SET)
    return file


def start(command: Sequence[str], streams: Sequence[int], passed: Sequence[int]) -> int:
    """The process id of a supervisor, or of bubblewrap around one: an empty environment, its own session.

    Both close what else they inherit. Not by `subprocess`, which waits until every copy of a pipe of its own
    is closed: one in a process forked meanwhile by another thread would hold it up.
    """
    actions = [(os.POSIX_SPAWN_DUP2, file, number) for number, file in enumerate(streams)]
    actions += [(os.POSIX_SPAWN_DUP2, file, file) for file in passed]  # onto itself: stays open
    return os.posix_spawn(command[0], list(command), {}, file_actions=actions, setsid=True, setsigmask=())


class Supervised:
    """A started supervisor. A context manager: whatever it started is dead when the block is left.

    Args:
        command: the supervisor's, or bubblewrap's around it.
        passed: descriptors for the command beside its streams.
        deadline: on the monotonic clock, when waiting for it ends.
        cancel: a descriptor that can be read once it is called off; None: it never is.
        last_word: the signal at which a supervisor kills its program and ends.
    """

    def __init__(
        self,
        command: Sequence[str],
        job: Job,
        *,
        passed: Sequence[int] = (),
        deadline: float,
        cancel: int | None,
        last_word: signal.Signals = signal.SIGKILL,
    ) -> None:
        self._deadline = deadline
        self._cancel = cancel
        self._last_word = last_word
        self._max_report = job.report_size()
        self._init: int | None = None
        self._files: list[int] = []
        try:
            self._start(command, job, passed)
        except BaseException:
            self._close()
            raise

    def _start(self, command: Sequence[str], job: Job, passed: Sequence[int]) -> None:
        self._complaints = self._keep(memory_file("stderr", b""))
        content = self._keep(memory_file("job", job.encode()))
        self._report, report_end = (self._keep(above_streams(file)) for file in os.pipe())
        self._pid = start(command, (content, report_end, self._complaints), passed)
        for file in (content, report_end):
            os.close(file)
            self._files.remove(file)
        try:
            self._end = self._keep(above_streams(os.pidfd_open(self._pid)))
        except OSError:  # too many open files, say
            with suppress(ProcessLookupError):
                os.killpg(self._pid, signal.SIGKILL)
            self._bury()
            raise

    def _keep(self, file: int) -> int:
        self._files.append(file)
        return file

    def _close(self) -> None:
        while self._files:
            os.close(self._files.pop())

    def __enter__(self) -> Self:
        """The process itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill what is left and wait until it is gone."""
        self._kill()
        self._close()

    def watch_init(self, pid: int) -> None:
        """Name the process whose death is that of all in the sandbox: its pid 1."""
        self._init = self._keep(above_streams(os.pidfd_open(pid)))

    def wait_for(self, file: int) -> bool:
        """Until `file` can be read (True) or the command has ended (False).

        SandboxError once it is called off or overdue.
        """
        poll = select.poll()
        for watched in (file, self._end, self._cancel):
            if watched is not None:
                poll.register(watched, select.POLLIN)
        ready = {number for number, _ in poll.poll(max(0.0, self._deadline - time.monotonic()) * 1000)}
        if self._cancel in ready:
            raise SandboxError("cancelled")
        if not ready:
            raise SandboxError("the supervisor did not report in time")
        return file in ready

    def ending(self) -> Ending:
        """The report, once the command has ended or written too much. SandboxError as for `wait_for`."""
        os.set_blocking(self._report, False)
        report = bytearray()
        while len(report) <= self._max_report:
            is_written = self.wait_for(self._report)
            try:
                chunk = os.read(self._report, _CHUNK)
            except BlockingIOError:
                chunk = b""
            report += chunk
            if not chunk and (is_written or not self._is_running()):
                break
        complaint = os.pread(self._complaints, _MAX_COMPLAINT, 0).decode(errors="replace").strip()
        return Ending(report=bytes(report), complaint=complaint)

    def _is_running(self) -> bool:
        return not self._ends_within(self._end, 0.0)

    @staticmethod
    def _ends_within(process: int, seconds: float) -> bool:
        poll = select.poll()
        poll.register(process, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def _bury(self) -> None:
        with suppress(ChildProcessError):  # a launcher that ignores SIGCHLD has none to bury
            os.waitpid(self._pid, 0)

    def _kill(self) -> None:
        """Leave nothing alive. Pid 1 goes first, and bubblewrap after it, which buries it."""
        if self._init is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._init, signal.SIGKILL)
        elif self._is_running():
            os.killpg(self._pid, self._last_word)
        if not self._ends_within(self._end, _PATIENCE):
            os.killpg(self._pid, signal.SIGKILL)
        self._bury()
        if self._init is not None:
            self._ends_within(self._init, _PATIENCE)
