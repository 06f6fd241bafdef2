"""Commands with a limit each, out of one budget; none outlives the check."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

GRACE_S = 3.0  # from SIGTERM to SIGKILL


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How a command ended."""

    code: int | None  # None: stopped, at its limit or with the check
    seconds: float
    output: str  # stdout and stderr together


class Budget:
    """The seconds a check may take. A step ends where its share does; what it leaves is the next one's."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._begin = time.monotonic()

    def spent(self) -> float:
        """Seconds since the check began."""
        return time.monotonic() - self._begin

    def until(self, share: float) -> float:
        """Seconds left before `share` of the budget is spent; never negative."""
        return max(0.0, self.seconds * share - self.spent())


class Runner:
    """Runs commands in `root`, each in a process group of its own and with a log of its own."""

    def __init__(self, root: Path, logs: Path, environment: Mapping[str, str]) -> None:
        self.root = root
        self.logs = logs
        self.environment = dict(environment)
        self._running: set[int] = set()
        self._lock = threading.Lock()
        self.is_stopped = False
        logs.mkdir(parents=True, exist_ok=True)

    def run(
        self,
        command: Sequence[str | Path],
        *,
        name: str,
        limit: float,
        environment: Mapping[str, str] | None = None,
    ) -> Ended:
        """Run `command` for at most `limit` seconds; its output goes to logs/`name`.log."""
        begin = time.monotonic()
        log = self.logs / f"{name}.log"
        code = None
        with log.open("wb") as output:
            output.write(f"$ {' '.join(map(str, command))}\n".encode())
            output.flush()
            process = self._start(command, {**self.environment, **(environment or {})}, output.fileno())
            if process is not None:
                code = self._wait(process, limit)
        text = log.read_text(encoding="utf-8", errors="replace")
        return Ended(code=code, seconds=time.monotonic() - begin, output=text)

    def stop(self) -> None:
        """End what runs, start nothing more; takes no lock, for it may run inside a signal handler."""
        self.is_stopped = True
        for group in tuple(self._running):
            _signal_group(group, signal.SIGKILL)

    def _start(
        self, command: Sequence[str | Path], environment: Mapping[str, str], output: int
    ) -> subprocess.Popen[bytes] | None:
        with self._lock:
            if self.is_stopped:
                return None
            process = subprocess.Popen(
                [str(part) for part in command],
                cwd=self.root,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
            self._running.add(process.pid)
            return process

    def _wait(self, process: subprocess.Popen[bytes], limit: float) -> int | None:
        is_over = False
        if self.is_stopped:  # between the look before the start and now
            _signal_group(process.pid, signal.SIGKILL)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            is_over = True
            _signal_group(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
        _signal_group(process.pid, signal.SIGKILL)  # also what the command left running
        process.wait()
        self._running.discard(process.pid)
        return None if is_over or self.is_stopped else process.returncode


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)
