"""Programs that say that they reached their end.

Exit status 0 does not tell: a function under test may leave the whole program (`sys.exit()`, `exit(0)`), and
a model that is rewarded for passing finds that out. So the last thing a program does after its tests is to
write a mark, which follows from the hash of its own text: no answer can know it while it is being written.

A program can read its own text, so the mark does not stand in it: what stands there is a sum to compute. And
the mark must be the last line of the output, so a program that prints the sum has not said that it ended.
"""

import hashlib
import re
from collections.abc import Mapping
from types import MappingProxyType

from dscoder.sandbox.verdict import Program, Verdict
from dscoder.tasks.problem import Grade, grade_verdict, graded

_LABEL = "tests ended "
# Two numbers of 15 digits: their sum is exact in JavaScript, and none begins with 0, which means octal.
_SMALLEST = 10**14
_NUM_VALUES = 9 * 10**14
_SUM = re.compile(rf"({_LABEL}\D{{,30}})\d{{15}}(\D{{,4}})\d{{15}}")

# By language, what writes the label and a sum. Python: through no name that answers are likely to define;
# Java: not by +, which its compiler would do.
_STATEMENTS: Mapping[str, str] = MappingProxyType(
    {
        "python": "__import__('sys').__stdout__.write(f'\\n%s{%d + %d}\\n')",
        "cpp": 'std::cout << "\\n%s" + std::to_string(%d + %d) << std::endl;',
        "java": 'System.out.println("\\n%s" + Long.sum(%dL, %dL));',
        "javascript": "process.stdout.write(`\\n%s${%d + %d}\\n`);",
        "bash": "printf '\\n%%s\\n' \"%s$((%d + %d))\"",
    }
)


def _terms(source: str) -> tuple[int, int]:
    digest = hashlib.blake2b(source.encode("utf-8", errors="surrogatepass"), digest_size=16).digest()
    first, second = (int.from_bytes(half, "little") % _NUM_VALUES for half in (digest[:8], digest[8:]))
    return _SMALLEST + first, _SMALLEST + second


def end_mark(source: str) -> str:
    """What a program with this text writes after its tests."""
    return f"{_LABEL}{sum(_terms(source))}"


def end_statement(source: str, language: str = "python") -> str:
    """The statement that writes the mark of a program with this text, without the mark in it."""
    return _STATEMENTS[language] % (_LABEL, *_terms(source))


def without_digests(text: str) -> str:
    """A program's text with the numbers of its marks left out, for comparing programs."""
    return _SUM.sub(r"\g<1>0\g<2>0", text)


def python_program(source: str) -> Program:
    """The program in Python, with the statement that writes its mark after it."""
    return Program(source=f"{source}\n{end_statement(source)}\n")


def grade_ended(source: str, verdict: Verdict | None) -> Grade:
    """By the verdict, but a program whose last line is not its mark has not passed.

    Args:
        source: the text of the program without the statement that writes the mark.
    """
    grade = grade_verdict(verdict)
    if verdict is None or not grade.is_passed:
        return grade
    if verdict.stdout.strip().rpartition("\n")[2] == end_mark(source):
        return grade
    return graded(False, verdict=verdict, detail="the program ended before its tests did")
