"""HumanEval (Chen et al. 2021) as DeepSeek-Coder scores it: zero-shot, with a header of imports.

Base models continue the stripped prompt, so an answer brings its own line break and indentation; the program
joins them to the unstripped prompt by one more line break. Instruct models are asked for the whole function.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from dscoder.sandbox.verdict import Limits, Program, Verdict
from dscoder.tasks.answers import Dialect, complete_function, cut_at
from dscoder.tasks.ending import grade_ended, python_program
from dscoder.tasks.problem import Grade, Problem, Task
from dscoder.tasks.sources import Record, read_records

Asking = Literal["base", "instruct", "instruct_v2"]

STOPS = ("\ndef", "\nclass", "\nif", "\n#", "\nprint")
BASE_TOKENS = 500
INSTRUCT_TOKENS = 1024
BASE_TIME = 10.0
INSTRUCT_TIME = 3.0

# The published header imports numpy too; here it may be missing, and then only programs that use it fail.
HEADER = """\
import math
import re
import sys
import copy
import datetime
import itertools
import collections
import heapq
import functools
import hashlib
import string
from typing import *
from collections import *
try:
    import numpy
    import numpy as np
except ImportError:
    pass
"""

_FILES = ("humaneval.jsonl.gz", "HumanEval.jsonl.gz", "humaneval-python.jsonl", "humaneval.jsonl")
_FIELDS = ("task_id", "prompt", "entry_point", "test")
_PYTHON = Dialect(fence="python")


def _instruction(code: str, language: str) -> str:
    """The message of DeepSeek-Coder's harness."""
    return (
        "Please continue to complete the function. You are not allowed to modify the given code and do the "
        "completion only. Please return all completed function in a codeblock. Here is the given code to do "
        f"completion:\n```{language}\n{code.strip()}\n```"
    )


def _instruction_v2(code: str, language: str) -> str:
    """The message of DeepSeek-Coder-V2 (footnote 4): the fence stays open, after a space."""
    return (
        f"Please complete the {language} function below. The final complete version of your function must be "
        f"returned within a code block. Here is the unfinished function:\n ```{language}\n{code}\n\n"
    )


def ask(code: str, *, asking: Asking, language: str) -> str:
    """What a model is given for a function to complete."""
    if asking == "base":
        return code.strip()
    return (_instruction if asking == "instruct" else _instruction_v2)(code, language)


def limits_for(asking: Asking, *, memory: float = Limits().memory) -> Limits:
    """The published time limits: ten seconds for base models, three for instruct models."""
    return Limits(time=BASE_TIME if asking == "base" else INSTRUCT_TIME, memory=int(memory))


def code_before(code: str, entry_point: str) -> str:
    """What stands before the function to complete: what the tests may call beside it."""
    before = code[: max(code.rfind(f"def {entry_point}("), 0)]
    try:
        compile(before, "given.py", "exec")
    except (SyntaxError, ValueError):  # a decorator; then the tests call whatever the answer has
        return ""
    return before


def test_program(problem: Problem, code: str) -> Program:
    """The program for an answer to a record, which runs apart from the record's tests."""
    given = HEADER + code_before(problem.code, problem.entry_point)
    return python_program(code, problem.tests, given=given, asked=(problem.entry_point,))


def call_check(test: str, entry_point: str) -> str:
    """The tests of a record, with the line that runs them, which some copies of the set have already."""
    call = f"check({entry_point})"
    return test if call in test else f"{test}\n{call}"


class HumanEval(Task):
    """The 164 problems in Python.

    Args:
        sources: where the records are, see `read_records`.
        asking: "base" for completion; "instruct" and "instruct_v2" for the messages of the two papers.
    """

    name = "human_eval"

    def __init__(self, sources: str | Path | Sequence[str | Path], *, asking: Asking = "base") -> None:
        self.asking = asking
        self.limits = limits_for(asking)
        self._problems = [self._problem(r) for r in read_records(sources, names=_FILES, wanted=_FIELDS)]

    def problems(self) -> Sequence[Problem]:
        """All problems, in the order of the records."""
        return self._problems

    def program(self, problem: Problem, completion: str) -> Program:
        """Header, given code and answer; apart from them the tests."""
        return test_program(problem, self._code(problem, completion))

    def grade(self, problem: Problem, completion: str, verdict: Verdict | None) -> Grade:
        """Passed if the program ran through its tests."""
        return grade_ended(self._code(problem, completion), verdict, tests=problem.tests)

    def _code(self, problem: Problem, completion: str) -> str:
        if self.asking == "base":
            return HEADER + problem.code + "\n" + cut_at(completion, STOPS)
        return HEADER + complete_function(problem.code, completion, _PYTHON)

    def _problem(self, record: Record) -> Problem:
        is_base = self.asking == "base"
        code, solution = record["prompt"], record.get("canonical_solution")
        whole = None if solution is None else f"```python\n{code}{solution}\n```"
        return Problem(
            task=self.name,
            id=record["task_id"],
            prompt=ask(code, asking=self.asking, language="python"),
            form="completion" if is_base else "chat",
            stop=STOPS if is_base else (),
            max_new_tokens=BASE_TOKENS if is_base else INSTRUCT_TOKENS,
            entry_point=record["entry_point"],
            code=code,
            tests=call_check(record["test"], record["entry_point"]),
            reference=solution if is_base else whole,
            metadata={} if solution is None else {"canonical_solution": solution},
        )
