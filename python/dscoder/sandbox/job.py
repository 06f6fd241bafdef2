"""What the launcher tells the supervisor, and the report that comes back."""

import marshal
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

import dscoder.sandbox.guard
import dscoder.sandbox.supervisor
from dscoder.sandbox.verdict import Limits, Phase, Stopped

FOLDER = "/tmp/program"  # the working directory under full isolation
STOPPED: Mapping[str, Stopped] = MappingProxyType(
    {"-": "", "time": "time", "memory": "memory", "output": "output"}
)
_HEAD_SIZE = 200  # bytes of a record's first line, at most
# The job is all of stdin: the code to run and what to call it with.
_BOOTSTRAP = (
    "import marshal\n"
    "codes, job = marshal.loads(open(0, 'rb', closefd=False).read())\n"
    "for code in codes: exec(code)\n"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One command of a job."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    stdin: bytes
    time: float
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
    filter: bytes  # seccomp filter still to be installed; empty if bubblewrap does
    join: tuple[str, ...]  # control groups, by their files of processes, that the supervisor puts itself into
    is_guarded: bool  # whether the supervisor shares its user with the program

    def deadline(self) -> float:
        """Seconds after which a supervisor that has not reported never will."""
        return sum(step.time for step in self.steps) + 10.0

    def report_size(self) -> int:
        """Bytes of the longest honest report."""
        return len(self.steps) * (2 * self.limits.output + _HEAD_SIZE) + 4

    def bootstrap(self) -> str:
        """The argument of `python -c`."""
        return _BOOTSTRAP + ("guard(job)\n" if self.is_guarded else "") + "main(job)\n"

    def encode(self) -> bytes:
        """What the supervisor reads from stdin."""
        modules = [dscoder.sandbox.supervisor.__file__]
        if self.is_guarded:
            modules.insert(0, dscoder.sandbox.guard.__file__)
        job = {
            "files": [*self.files],
            "steps": [self._step(step) for step in self.steps],
            "folder": self.folder,
            "memory_folders": self.memory_folders,
            "user": self.user,
            "is_pid_1": self.is_pid_1,
            "filter": self.filter,
            "join": self.join,
        }
        return marshal.dumps(([_compiled(module) for module in modules], job))

    def _step(self, step: Step) -> dict[str, object]:
        limits = self.limits
        return {
            "argv": list(step.argv),
            "env": dict(step.env),
            "stdin": step.stdin,
            "time": float(step.time),
            "cpu_time": math.ceil(limits.cpu_time or step.time) + 1,
            "memory": int(limits.memory),
            "address_space": int(limits.memory) if step.is_bounded_in_address_space else 0,
            "output": int(limits.output),
            "processes": int(limits.processes),
            "disk": int(limits.disk),
        }


@cache
def _compiled(path: str) -> object:
    return compile(Path(path).read_bytes(), Path(path).name, "exec", dont_inherit=True)


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
        wall=float(wall),
        cpu=float(cpu),
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
