"""GSM8K (Cobbe et al. 2021) by programs (PAL, Gao et al. 2022), as DeepSeek-Coder scores it.

The model sees worked examples, each a question and a fenced `solution()`, and writes the next one. What
`solution()` returns is compared with the answer (`math_answer`).
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from dscoder.sandbox.verdict import Limits, Program, Verdict
from dscoder.tasks.answers import cut_at
from dscoder.tasks.math_answer import math_equal, strip_answer
from dscoder.tasks.problem import Grade, Problem, Task, grade_verdict, graded, not_judged
from dscoder.tasks.sources import Record, read_records

STOPS = ("Question", "----------------")
_MAX_NEW_TOKENS = 512

_FILES = ("gsm8k_test.json", "gsm8k_test.jsonl", "test.jsonl")
_FIELDS = ("question", "answer")
_SOLUTION = re.compile(r"```python\n(.*?def solution\(\):\n.*?)```", flags=re.DOTALL)
_REFUSED = re.compile(r"input\(|os.system\(")
_MARK = "=== solution() returned ==="  # what stands before the answer in the output

# Of the published worked examples: Evaluation/PAL-Math/prompts/gsm8k.md in deepseek-ai/DeepSeek-Coder, commit
# a4ba628, 1730 bytes.
PUBLISHED_SHA256 = "91340987e54a8ff53b82d09a285defbdabc3ed78e631d3429b69fa2d107b10f9"

# The published form with examples of our own; the published ones are read from a file if given.
EXAMPLES = '''\
Let's solve these questions by programs in Python.

Question: A ticket to the museum costs $7. Noor buys four and pays with $40. How much change is due?

```python
def solution():
    """A ticket to the museum costs $7. Noor buys four and pays with $40. How much change is due?"""
    ticket_price = 7
    num_tickets = 4
    money_paid = 40
    change = money_paid - num_tickets * ticket_price
    result = change
    return result
```

----------------

Question: A shelf held 64 books. On Monday 19 were lent, on Friday 8 more. How many were on the shelf then?

```python
def solution():
    """A shelf held 64 books. On Monday 19 were lent, on Friday 8 more. How many were on the shelf then?"""
    books_initial = 64
    books_lent_monday = 19
    books_lent_friday = 8
    books_left = books_initial - books_lent_monday - books_lent_friday
    result = books_left
    return result
```

----------------

Question: A tank held 12 litres. Six more came each hour, from two to five. How many does it hold now?

```python
def solution():
    """A tank held 12 litres. Six more came each hour, from two to five. How many does it hold now?"""
    litres_initial = 12
    litres_per_hour = 6
    num_hours = 3  # from two to five are 3 hours
    litres_added = litres_per_hour * num_hours
    litres_total = litres_initial + litres_added
    result = litres_total
    return result
```

----------------'''


def read_examples(path: str | Path | None) -> tuple[str, str]:
    """(the worked examples, whose they are: "own", "published", or "other" for any other file's).

    Args:
        path: a text file, used to the byte; None: our own.
    """
    if path is None:
        return EXAMPLES, "own"
    try:
        content = Path(path).read_bytes()
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"Gsm8kPal: examples must be a text file, got {str(path)!r}: {error}") from error
    return text, "published" if hashlib.sha256(content).hexdigest() == PUBLISHED_SHA256 else "other"


def final_answer(answer: str) -> str:
    """The number at the end of a record's answer, after ####."""
    _, mark, number = answer.partition("####")
    if not mark:
        raise ValueError(f"Gsm8kPal: the answer of a record must have ####, got {answer!r}")
    return strip_answer(number)


def extract_solution(completion: str) -> str | None:
    """The first fenced block that defines `solution()`, before any stop string; None without one."""
    found = _SOLUTION.search(cut_at(completion, STOPS))
    return found[1] if found else None


def refused_call(code: str) -> str | None:
    """A call that no solution may make (`input(`, `os.system(`); None if it makes none."""
    found = _REFUSED.search(code)
    return found[0] if found else None


class Gsm8kPal(Task):
    """The 1319 questions of the test split.

    Args:
        sources: where the records are, see `read_records`.
        examples: a text file with worked examples to use in place of ours, such as the published one. Each
            problem's metadata says whose they are.
    """

    name = "gsm8k_pal"

    def __init__(
        self, sources: str | Path | Sequence[str | Path], *, examples: str | Path | None = None
    ) -> None:
        self.limits = Limits(time=5.0)
        self._examples, self._origin = read_examples(examples)
        records = read_records(sources, names=_FILES, wanted=_FIELDS)
        self._problems = [self._problem(idx, record) for idx, record in enumerate(records)]

    def problems(self) -> Sequence[Problem]:
        """All problems, in the order of the records."""
        return self._problems

    def program(self, problem: Problem, completion: str) -> Program | None:
        """The solution and a line that writes what it returns; None without one, and for a refused call."""
        code = extract_solution(completion)
        if code is None or refused_call(code) is not None:
            return None
        return Program(source=f"{code}\n\nprint({_MARK!r} + str(solution()))\n")

    def grade(self, problem: Problem, completion: str, verdict: Verdict | None) -> Grade:
        """Passed if what `solution()` returned equals the answer."""
        code = extract_solution(completion)
        if code is None:
            return graded(False, detail="no fenced solution()")
        refused = refused_call(code)
        if refused is not None:
            return graded(False, detail=f"refused: {refused}")
        plain = grade_verdict(verdict)
        if verdict is None or not plain.is_passed:
            return plain
        _, mark, returned = verdict.stdout.rpartition(_MARK)
        if not mark:
            return graded(False, verdict=verdict, detail="solution() returned nothing to compare")
        if problem.answer is None:
            return not_judged("the problem has no answer", verdict=verdict)
        found = strip_answer(returned)
        is_equal = math_equal(found, problem.answer)
        return graded(
            is_equal, verdict=verdict, detail="" if is_equal else f"{found[:80]}, not {problem.answer}"
        )

    def _problem(self, idx: int, record: Record) -> Problem:
        return Problem(
            task=self.name,
            id=f"gsm8k/{record.get('idx', idx)}",
            prompt=f"{self._examples}\n\nQuestion: {record['question'].strip()}\n",
            form="completion",
            stop=STOPS,
            max_new_tokens=_MAX_NEW_TOKENS,
            entry_point="solution",
            answer=final_answer(record["answer"]),
            metadata={"examples": self._origin},
        )
