"""From what the supervisor saw to an outcome."""

import re
import signal as signals

from dscoder.sandbox.languages import Language
from dscoder.sandbox.verdict import Limits, Outcome, Phase, as_bytes

_BY_SIGNAL: dict[int, Outcome] = {
    signals.SIGSYS: "security",
    signals.SIGXCPU: "time_limit",
    signals.SIGXFSZ: "output_limit",
}

_END_SIZE = 1 << 16  # bytes at the end of stderr that are searched for marks


def same_output(found: bytes, wanted: str) -> bool:
    """Equal line by line, without white space at the end of lines and of the text."""

    def lines(content: bytes) -> list[bytes]:
        return [line.rstrip() for line in content.rstrip().split(b"\n")]

    return lines(found) == lines(as_bytes(wanted))


def _has(mark: str, text: bytes) -> bool:
    end = text[-_END_SIZE:].decode(errors="replace")
    return bool(mark) and re.search(mark, end, flags=re.MULTILINE) is not None


def _how_it_ended(phase: Phase) -> str:
    if phase.signal is None:
        return f"exit status {phase.exit_code}"
    names = {number.value: number.name for number in signals.Signals}
    return f"killed by {names.get(phase.signal, f'signal {phase.signal}')}"


def out_of_memory(limits: Limits) -> str:
    """A line for a person."""
    return f"more than {limits.memory:g} bytes of memory"


def _limit(phase: Phase, limits: Limits, *, seconds: float) -> tuple[Outcome, str] | None:
    """The limit that ended a step; None if none did."""
    if phase.stopped == "time":
        return "time_limit", f"not done after {seconds:g} s"
    if phase.stopped == "memory":
        return "memory_limit", out_of_memory(limits)
    if phase.stopped == "output":
        return "output_limit", f"more than {limits.output:g} bytes of output"
    if phase.signal in _BY_SIGNAL:
        return _BY_SIGNAL[phase.signal], _how_it_ended(phase)
    return None


def judge_compiling(phase: Phase, limits: Limits) -> tuple[Outcome, str]:
    """Outcome and detail of a program that did not compile."""
    limit = _limit(phase, limits, seconds=limits.compile_time)
    if limit is not None:
        return limit[0], f"compiling: {limit[1]}"
    return "compile_error", f"compiler: {_how_it_ended(phase)}"


def judge(phase: Phase, limits: Limits, language: Language, *, wanted: str | None) -> tuple[Outcome, str]:
    """Outcome and detail of a program that ran."""
    limit = _limit(phase, limits, seconds=limits.time)
    if limit is not None:
        return limit
    if phase.exit_code == 0:
        if wanted is None or same_output(phase.stdout, wanted):
            return "passed", ""
        return "failed", "the output is not what it must be"
    if _has(language.memory_mark, phase.stderr):
        return "memory_limit", f"ran out of memory under a limit of {limits.memory:g} bytes"
    if _has(language.assertion_mark, phase.stderr):
        return "failed", "an assertion did not hold"
    return "runtime_error", _how_it_ended(phase)
