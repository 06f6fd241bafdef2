"""Programs that say that they reached their end.

Exit status 0 does not tell: a function under test may leave the whole program (`sys.exit()`, `exit(0)`), and
a model that is rewarded for passing finds that out. So the last thing a program does after its tests is to
write a mark, a hash of its own text, which no answer can know while it is being written.
"""

import hashlib
import re

from dscoder.sandbox.verdict import Program, Verdict
from dscoder.tasks.problem import Grade, grade_verdict, graded

_MARK = re.compile(r"(tests ended )[0-9a-f]{24}")


def end_mark(source: str) -> str:
    """What a program with this text writes after its tests."""
    digest = hashlib.blake2b(source.encode("utf-8", errors="surrogatepass"), digest_size=12).hexdigest()
    return f"tests ended {digest}"


def without_digests(text: str) -> str:
    """A program's text with its marks alike, for comparing programs."""
    return _MARK.sub(r"\1", text)


def python_program(source: str) -> Program:
    """The program in Python, its mark after it. Only what is no name of the answer's writes the mark."""
    return Program(source=f"{source}\n__import__('sys').__stdout__.write('\\n{end_mark(source)}\\n')\n")


def grade_ended(source: str, verdict: Verdict | None) -> Grade:
    """By the verdict, but a program that did not write its mark has not passed.

    Args:
        source: the text of the program without what writes the mark.
    """
    grade = grade_verdict(verdict)
    if verdict is None or not grade.is_passed or end_mark(source) in verdict.stdout:
        return grade
    return graded(False, verdict=verdict, detail="the program ended before its tests did")
