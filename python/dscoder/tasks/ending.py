"""Programs that say that their tests ended, and how Python's are made.

Exit status 0 does not tell: a function under test may leave the whole program (`sys.exit()`, `exit(0)`), and
a model that is rewarded for passing finds that out. So after its tests a program writes a mark, which nobody
can know who has not read it: it comes from a key that this process draws, and lies in a file beside the
program that is read and deleted before any of the answer runs.

In Python the answer runs in a process of its own (`driver.py`), so it never meets the tests or the mark.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from dscoder.sandbox.verdict import Program, Verdict
from dscoder.tasks.driver import NOTE
from dscoder.tasks.problem import Grade, grade_verdict, graded

MARK_FILE = "mark"
_LABEL = "tests ended "
_NUM_BYTES = 16
_DIGEST = re.compile(rf"({_LABEL}|mark_)[0-9a-f]{{{2 * _NUM_BYTES}}}")
_BEFORE_END = "the program ended before its tests did"


@cache
def _key() -> bytes:
    return os.urandom(32)


@cache
def _driver() -> str:
    return Path(__file__).with_name("driver.py").read_text(encoding="utf-8")


def end_mark(code: str, tests: str = "") -> str:
    """What the program with this answer and these tests writes after its tests, in this process alone."""
    digest = hashlib.blake2b(key=_key(), digest_size=_NUM_BYTES)
    for part in (code, tests):
        content = part.encode("utf-8", errors="surrogatepass")
        digest.update(len(content).to_bytes(8, "little") + content)
    return _LABEL + digest.hexdigest()


def mark_name(mark: str) -> str:
    """An identifier that goes with a mark, for what an answer is not to find."""
    return "mark_" + hashlib.blake2b(mark.encode(), digest_size=_NUM_BYTES).hexdigest()


def without_digests(text: str) -> str:
    """A program's text with its marks left out, for comparing programs."""
    return _DIGEST.sub(r"\g<1>0", text)


def python_program(code: str, tests: str = "", *, given: str = "", asked: Sequence[str] = ()) -> Program:
    """The program in Python that runs an answer, and apart from it its tests.

    Args:
        code: the answer, with all that it needs.
        tests: use names of `code`, but not those that Python or `given` have.
        given: trusted code whose names the tests use; it runs in the tests' process.
        asked: names that come from `code` whoever else has them.
    """
    return Program(
        files={
            "main.py": _driver(),
            "given.py": given,
            "answer.py": code,
            "tests.py": tests,
            MARK_FILE: end_mark(code, tests),
        },
        args=tuple(asked),
    )


def grade_ended(code: str, verdict: Verdict | None, *, tests: str = "") -> Grade:
    """By the verdict, but a program that did not write its mark has not passed.

    The verdict of the grade is without the mark, which no two processes have alike.
    """
    grade = grade_verdict(verdict)
    if verdict is None or grade.is_passed is None:
        return grade
    mark, lines = end_mark(code, tests), verdict.stdout.split("\n")
    has_ended = mark in lines
    verdict = replace(verdict, stdout="\n".join(line for line in lines if line != mark))
    if not grade.is_passed or has_ended:
        is_suspect = NOTE in verdict.stderr
        return replace(grade, verdict=verdict, is_suspect=is_suspect)
    return graded(False, verdict=verdict, detail=_BEFORE_END)
