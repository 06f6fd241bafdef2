"""Outcomes from what was seen, without running anything."""

import signal
import time

import pytest

from dscoder.sandbox.judge import judge, judge_compiling, same_output
from dscoder.sandbox.languages import LANGUAGES
from dscoder.sandbox.verdict import Limits, Phase

LIMITS = Limits(time=2.0, memory=1000, output=10)


def phase(**parts: object) -> Phase:
    seen = {"exit_code": 0, "signal": None, "stopped": "", "wall": 0.1, "cpu": 0.1, "peak_memory": 1}
    return Phase(**{**seen, "stdout": b"", "stderr": b"", **parts})


@pytest.mark.parametrize(
    ("seen", "outcome"),
    [
        ({}, "passed"),
        ({"exit_code": 1}, "runtime_error"),
        ({"exit_code": None, "signal": signal.SIGKILL, "stopped": "time"}, "time_limit"),
        ({"exit_code": None, "signal": signal.SIGKILL, "stopped": "memory"}, "memory_limit"),
        ({"exit_code": None, "signal": signal.SIGKILL, "stopped": "output"}, "output_limit"),
        ({"exit_code": 0, "stopped": "output"}, "output_limit"),
        ({"exit_code": None, "signal": signal.SIGXCPU}, "time_limit"),
        ({"exit_code": None, "signal": signal.SIGSYS}, "security"),
        ({"exit_code": None, "signal": signal.SIGXFSZ}, "output_limit"),
        ({"exit_code": None, "signal": signal.SIGKILL}, "runtime_error"),
        ({"exit_code": 1, "stderr": b"Traceback\nAssertionError: x\n"}, "failed"),
        ({"exit_code": 1, "stderr": b"Traceback\nMemoryError\n"}, "memory_limit"),
        ({"exit_code": 0, "stderr": b"Traceback\nMemoryError\n"}, "passed"),
    ],
)
def test_outcomes(seen: dict[str, object], outcome: str) -> None:
    assert judge(phase(**seen), LIMITS, LANGUAGES["python"], wanted=None)[0] == outcome


def test_a_signal_without_a_name_is_told_by_number() -> None:
    seen = phase(exit_code=None, signal=40)
    assert judge(seen, LIMITS, LANGUAGES["c"], wanted=None)[1] == "killed by signal 40"


def test_a_compiler_out_of_time_is_no_compile_error() -> None:
    late = phase(exit_code=None, signal=9, stopped="time")
    assert judge_compiling(late, LIMITS) == ("time_limit", "compiling: not done after 60 s")
    assert judge_compiling(phase(exit_code=1), LIMITS)[0] == "compile_error"


@pytest.mark.parametrize(
    ("language", "stderr", "outcome"),
    [
        ("cpp", b"a.out: main.cpp:3: int main(): Assertion `x == 2' failed.\n", "failed"),
        ("cpp", b"terminate called after throwing an instance of 'std::bad_alloc'\n", "memory_limit"),
        ("java", b'Exception in thread "main" java.lang.AssertionError\n', "failed"),
        ("java", b"java.lang.OutOfMemoryError: Java heap space\n", "memory_limit"),
        ("javascript", b"AssertionError [ERR_ASSERTION]: false == true\n", "failed"),
        ("javascript", b"FATAL ERROR: JavaScript heap out of memory\n", "memory_limit"),
        ("rust", b"thread 'main' panicked at main.rs:2:5:\nassertion `left == right` failed\n", "failed"),
        ("perl", b"Out of memory!\n", "memory_limit"),
        ("c", b"boom\n", "runtime_error"),
    ],
)
def test_failures_are_read_from_what_each_language_says(language: str, stderr: bytes, outcome: str) -> None:
    seen = phase(exit_code=1, stderr=stderr)
    assert judge(seen, LIMITS, LANGUAGES[language], wanted=None)[0] == outcome


@pytest.mark.parametrize("language", ["c", "rust", "python"])
@pytest.mark.parametrize("word", [b"Assertion `", b"assertion `", b"Assertion "])
def test_what_a_program_writes_cannot_keep_the_judge_busy(language: str, word: bytes) -> None:
    begin = time.process_time()
    judge(phase(exit_code=1, stderr=word * 100_000), LIMITS, LANGUAGES[language], wanted=None)
    assert time.process_time() - begin < 5.0


@pytest.mark.parametrize(
    ("found", "wanted", "is_same"),
    [
        (b"1\n2\n", "1\n2", True),
        (b"1 \r\n2\n\n\n", "1\n2\n", True),
        (b" 1\n", "1\n", False),
        (b"1\n\n2", "1\n2", False),
        (b"", "", True),
        (b"", "0", False),
        (b"\xff", "\udcff", True),
        (b"1 2", "1\n2", False),
    ],
)
def test_output_is_compared_by_lines(found: bytes, wanted: str, is_same: bool) -> None:
    assert same_output(found, wanted) is is_same
