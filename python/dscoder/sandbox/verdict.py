"""What goes into the sandbox and what comes out: Program, Limits, Phase, Verdict."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import PurePosixPath
from typing import Literal, get_args

MIB = 1 << 20

Isolation = Literal["full", "rlimits"]
Outcome = Literal[
    "passed",
    "failed",  # ran to its end with the wrong output, or an assertion of a test did not hold
    "compile_error",
    "runtime_error",
    "time_limit",
    "memory_limit",
    "output_limit",
    "security",  # killed for a system call that no program under test needs
    "sandbox_error",  # the sandbox failed, not the program
    "toolchain_missing",  # nothing here can run the language
]
Stopped = Literal["", "time", "memory", "output"]
NO_ANSWER: frozenset[Outcome] = frozenset({"sandbox_error", "toolchain_missing"})

_MAX_ARGUMENT = 100_000  # bytes; Linux takes 128 KiB an argument
_MAX_ARGUMENTS = 1_000_000


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    is_plain = bool(name) and "\0" not in name and not path.is_absolute()
    return is_plain and ".." not in path.parts and path.name != ""


def as_bytes(content: str | bytes) -> bytes:
    """Text as a program gets it: UTF-8, and what has none all the same.

    Lower halves of characters that stand for bytes, as in names of files, become those bytes; models write
    others.
    """
    if isinstance(content, bytes):
        return content
    try:
        return content.encode("utf-8", errors="surrogateescape")
    except UnicodeEncodeError:
        return content.encode("utf-8", errors="surrogatepass")


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A program, its input and, if its output decides, what it must write.

    Attributes:
        source: its one file, named as the language wants it; or pass `files`.
        files: content by relative path; the first is the main one. Bytes are for what is not text (a jar).
        args: arguments on its command line.
        compiler_args: further arguments of the compiler, after its own.
        expected_stdout: None: it passes by exit status 0. Else what it must write as well, compared line by
            line without trailing white space.
    """

    language: str = "python"
    source: str | None = None
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    args: tuple[str, ...] = ()
    compiler_args: tuple[str, ...] = ()
    stdin: str | bytes = ""
    expected_stdout: str | None = None

    def __post_init__(self) -> None:
        if (self.source is None) == (not self.files):
            raise ValueError(
                f"Program: wants either source or files, got {'neither' if self.source is None else 'both'}"
            )
        outside = [name for name in self.files if not _is_inside(name)]
        if outside:
            raise ValueError(f"Program: files must be named by relative paths, got {outside[0]!r}")
        arguments = (*self.args, *self.compiler_args)
        sizes = [len(as_bytes(argument)) for argument in arguments]
        if max(sizes, default=0) > _MAX_ARGUMENT or sum(sizes) > _MAX_ARGUMENTS:
            raise ValueError(
                f"Program: args must take <= {_MAX_ARGUMENT} bytes each and <= {_MAX_ARGUMENTS} together, "
                f"got {max(sizes)} and {sum(sizes)}"
            )
        if any("\0" in argument for argument in arguments):
            raise ValueError("Program: args must hold no NUL, got one that does")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a program may take. Compiling has its own times; the other limits hold for it too.

    Attributes:
        time: seconds on the wall clock.
        cpu_time: seconds of processor time of one process; None: as many as `time` allows on all cores.
        memory: bytes, all processes together.
        output: bytes kept of stdout, and of stderr; one more ends the program.
        processes: processes and threads at one time.
        disk: bytes in the working directory and /tmp, and again in /dev/shm.
        compile_time: seconds on the wall clock, for each step of compiling.
        compile_cpu_time: as `cpu_time`, for each step of compiling.
    """

    time: float = 10.0
    cpu_time: float | None = None
    memory: int = 512 * MIB
    output: int = 1 * MIB
    processes: int = 64
    disk: int = 64 * MIB
    compile_time: float = 60.0
    compile_cpu_time: float | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"Limits: {item.name} must be > 0 and finite, got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """One step as it was seen: compiling, or running.

    Attributes:
        exit_code: None if a signal ended it.
        signal: number of the signal that ended it; None if none did.
        stopped: which limit the supervisor ended it for; "" if none.
        wall, cpu: seconds; cpu is that of all processes.
        peak_memory: bytes; the most that one process held, or all together when looked at, whichever is more.
    """

    exit_code: int | None
    signal: int | None
    stopped: Stopped
    wall: float
    cpu: float
    peak_memory: int
    stdout: bytes
    stderr: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What became of a program.

    Attributes:
        stdout, stderr: at most `Limits.output` bytes each; bytes that are not UTF-8 stand as \\xNN.
        wall, cpu, peak_memory: of running alone; seconds, seconds and bytes.
        compile: what compiling took and said; None where nothing was compiled.
        isolation: the mode that the program really ran under.
        detail: one line for a person: why it is not "passed", or which toolchain is missing.
    """

    outcome: Outcome
    stdout: str = ""
    stderr: str = ""
    exit_code: int | None = None
    signal: int | None = None
    wall: float = 0.0
    cpu: float = 0.0
    peak_memory: int = 0
    compile: Phase | None = None
    isolation: Isolation = "full"
    detail: str = ""

    def __post_init__(self) -> None:
        if self.outcome not in get_args(Outcome):
            raise ValueError(f"Verdict: outcome must be one of {get_args(Outcome)}, got {self.outcome!r}")

    @property
    def is_passed(self) -> bool:
        """Whether the program did what it must."""
        return self.outcome == "passed"

    @property
    def is_answer(self) -> bool:
        """False if the verdict says nothing about the program: then it must never count as wrong."""
        return self.outcome not in NO_ANSWER
