"""Isolation "rlimits": what is left where namespaces are refused, for those who ask for it by name.

The same supervisor in a session and a temporary folder of its own, under rlimits, the seccomp filter and,
where the system allows, control groups. The program sees the host's files and processes with the rights of
its user: one that nobody else has if root started it, else the caller.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dscoder.sandbox import box
from dscoder.sandbox.job import Job
from dscoder.sandbox.process import Ending, SandboxError, Supervised

_READ_AND_ENTER = 0o005


def check_reachable(path: Path) -> None:
    """SandboxError unless a user without rights can run the file at `path`."""
    for place in (path, *path.parents):
        if place.stat().st_mode & _READ_AND_ENTER != _READ_AND_ENTER and not place.is_file():
            raise SandboxError(
                f"isolation 'rlimits' runs programs as a user without rights, who cannot enter {place}: "
                f"install {path} elsewhere, or do not run as root"
            )


def user() -> int:
    """The user id of the program; 0 for the caller's own."""
    if os.geteuid() != 0:
        return 0
    return box.private_user(time.monotonic_ns() // 1000, Path("/proc/self/uid_map").read_text())


@contextmanager
def new_folder(owner: int) -> Iterator[str]:
    """A temporary folder of the program's user; gone at the end, however deep the program made it."""
    folder = tempfile.mkdtemp(prefix="dscoder-sandbox-")
    try:
        if owner:
            os.chown(folder, owner, owner)
        yield folder
    finally:
        # rmtree of Python 3.11 recurses, and a program may nest folders deeper than that goes.
        subprocess.run([shutil.which("rm") or "/bin/rm", "-rf", "--", folder], check=False)


def execute(job: Job, *, cancel: int | None) -> Ending:
    """Run a job to its end. The supervisor is told to end, not killed: it alone knows the program."""
    deadline = time.monotonic() + job.deadline()
    command = [str(box.supervisor())]
    with Supervised(command, job, deadline=deadline, cancel=cancel, last_word=signal.SIGTERM) as process:
        return process.ending()
