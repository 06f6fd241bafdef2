"""What the launcher tells the supervisor (csrc/sandbox/job.h), and the report that comes back."""

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from dscoder.sandbox.verdict import Limits, Phase, Stopped, as_bytes

FOLDER = "/tmp/program"  # the working directory under full isolation
STOPPED: Mapping[str, Stopped] = MappingProxyType(
    {"-": "", "time": "time", "memory": "memory", "output": "output"}
)
GRACE = 10.0  # seconds beyond its limits that a supervisor may take to report
_HEAD_SIZE = 200  # bytes of a record's first line, at most


def _number(value: float) -> bytes:
    return struct.pack("<Q", int(value))


def _text(content: str | bytes) -> bytes:
    raw = as_bytes(content)
    return _number(len(raw)) + raw


def _list(items: Iterable[bytes]) -> bytes:
    encoded = list(items)
    return _number(len(encoded)) + b"".join(encoded)


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One command of a job."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    stdin: bytes
    time: float
    cpu_time: float
    is_bounded_in_address_space: bool  # False for runtimes that reserve more than they use


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """The files and commands of one program, and the process that they run as."""

    files: Sequence[tuple[str, bytes]]
    steps: Sequence[Step]
    limits: Limits
    folder: str
    memory_folders: tuple[str, ...]  # file systems in memory, counted as such
    user: int  # the program's user id, seen from inside; 0: the supervisor's own
    is_pid_1: bool
    launcher: int  # the process id that the supervisor's parent must have; 0: not seen from inside
    filter: bytes  # what seccomp.py makes
    join: tuple[str, ...]  # files of control groups that the supervisor writes "0" to, to be in

    def deadline(self) -> float:
        """Seconds after which a supervisor that has not reported never will."""
        return sum(step.time for step in self.steps) + GRACE

    def report_size(self) -> int:
        """Bytes of the longest honest report."""
        return len(self.steps) * (2 * self.limits.output + _HEAD_SIZE) + 4

    def encode(self) -> bytes:
        """What the supervisor reads from stdin."""
        return b"".join(
            [
                _text(self.folder),
                _list(map(_text, self.memory_folders)),
                _list(map(_text, self.join)),
                _text(self.filter),
                _number(self.user),
                _number(self.is_pid_1),
                _number(self.launcher),
                _list(_text(name) + _text(content) for name, content in self.files),
                _list(self._step(step) for step in self.steps),
            ]
        )

    def _step(self, step: Step) -> bytes:
        limits = self.limits
        numbers = (
            step.time * 1e6,
            math.ceil(step.cpu_time),
            limits.memory,
            limits.memory if step.is_bounded_in_address_space else 0,
            limits.output,
            limits.processes,
            limits.disk,
        )
        env = (f"{name}={value}" for name, value in step.env.items())
        return b"".join(
            [
                _list(map(_text, step.argv)),
                _list(map(_text, env)),
                _text(step.stdin),
                *map(_number, numbers),
            ]
        )


def _take(report: bytes) -> tuple[Phase, bytes]:
    head, _, rest = report.partition(b"\n")
    word, code, stopped, wall, cpu, peak, *sizes = head.decode("ascii").split()
    num_out, num_err = map(int, sizes)
    if word != "step" or min(num_out, num_err) < 0 or num_out + num_err > len(rest):
        raise ValueError(f"a record with the head {head[:_HEAD_SIZE]!r}")
    phase = Phase(
        exit_code=int(code) if int(code) >= 0 else None,
        signal=-int(code) if int(code) < 0 else None,
        stopped=STOPPED[stopped],
        wall=int(wall) / 1e6,
        cpu=int(cpu) / 1e6,
        peak_memory=int(peak),
        stdout=rest[:num_out],
        stderr=rest[num_out : num_out + num_err],
    )
    return phase, rest[num_out + num_err :]


def read_report(report: bytes) -> list[Phase]:
    """The steps that ran; ValueError for anything but a whole report, which is data from a hostile place."""
    phases = []
    try:
        while report != b"end\n":
            phase, report = _take(report)
            phases.append(phase)
    except (ValueError, KeyError) as error:
        raise ValueError(f"the supervisor's report is no report: {error}") from error
    return phases
