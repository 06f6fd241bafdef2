"""MBPP (Austin et al. 2021) as DeepSeek-Coder scores it: three examples, 500 problems, tests in the prompt.

Records 2, 3 and 4 (by task_id) are the examples, 11 to 510 the problems. Base models continue a text that
ends in [BEGIN]; instruct models get the examples in one message. Nothing is imported for the answer.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from dscoder.sandbox.verdict import Limits, Program, Verdict
from dscoder.tasks.answers import cut_at, first_block
from dscoder.tasks.ending import grade_ended, python_program
from dscoder.tasks.problem import Grade, Problem, Task
from dscoder.tasks.sources import Record, read_records

EXAMPLE_IDS = (2, 3, 4)
PROBLEM_IDS = range(11, 511)
STOP = "[DONE]"

_FILES = ("mbpp.jsonl",)
_FIELDS = ("task_id", "text", "code", "test_list")
_BASE_TOKENS = 500
_INSTRUCT_TOKENS = 512
_FUNCTION = re.compile(r"^def +(\w+)", flags=re.MULTILINE)


def _code(record: Record) -> str:
    """The solution with spaces for tabs and plain line breaks, as the prompts show it."""
    return str(record["code"]).replace("\r", "").replace("\t", "    ")


def _base_question(record: Record) -> str:
    tests = "\n".join(record["test_list"])
    return (
        f"You are an expert Python programmer, and here is your task: {record['text']} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]"
    )


def _base_prompts(examples: Sequence[Record], record: Record) -> list[str]:
    """The prompt with all examples, then with fewer: the last of them is dropped first."""
    shown = [f"{_base_question(example)}\n{_code(example)}\n{STOP}\n" for example in examples]
    question = _base_question(record)
    return ["".join(shown[:num_shown]) + question for num_shown in range(len(shown), -1, -1)]


def _instruct_question(record: Record) -> str:
    tests = "\n".join(record["test_list"])
    return f">>> Problem:\n{record['text'].strip()}\n>>> Test Cases:\n{tests}\n"


def _instruct_prompt(examples: Sequence[Record], record: Record) -> str:
    shown = [
        f"- Example {number}:\n{_instruct_question(example)}\n>>> Code:\n```python\n{_code(example)}\n```"
        for number, example in enumerate(examples, start=1)
    ]
    return (
        "Please refer the given examples and generate a python function for my problem.\n"
        "Examples are listed as follows:\n"
        + "\n\n".join(shown)
        + f"\n\nHere is my problem:\n{_instruct_question(record)}"
    )


def _entry_point(code: str, tests: str) -> str:
    """The last function of the reference that the tests name; one of them is called `sum`."""
    defined: list[str] = _FUNCTION.findall(code)
    return next((name for name in reversed(defined) if re.search(rf"\b{name}\b", tests)), "")


def _by_id(records: Sequence[Record], ids: Sequence[int]) -> list[Record]:
    found = {int(record["task_id"]): record for record in records}
    missing = [task_id for task_id in ids if task_id not in found]
    if missing:
        raise ValueError(
            f"Mbpp: the records must have the ids {ids[0]} to {ids[-1]}, got none for {missing[0]} "
            f"and {len(missing) - 1} others"
        )
    return [found[task_id] for task_id in ids]


class Mbpp(Task):
    """The 500 problems of the test split.

    Args:
        sources: where the records are, see `read_records`. On the hub the examples and the problems are
            different splits: name both files.
        asking: "base" for completion, "instruct" for a message.
    """

    name = "mbpp"

    def __init__(
        self,
        sources: str | Path | Sequence[str | Path],
        *,
        asking: Literal["base", "instruct"] = "base",
    ) -> None:
        self.asking = asking
        self.limits = Limits(time=10.0)
        records = read_records(sources, names=_FILES, wanted=_FIELDS)
        examples = _by_id(records, EXAMPLE_IDS)
        self._problems = [self._problem(examples, record) for record in _by_id(records, PROBLEM_IDS)]

    def problems(self) -> Sequence[Problem]:
        """All problems, by id."""
        return self._problems

    def program(self, problem: Problem, completion: str) -> Program:
        """The answer, and apart from it its tests. Without a fenced block, all of it is the answer."""
        asked = (problem.entry_point,) if problem.entry_point else ()
        return python_program(self._code(problem, completion), problem.tests, asked=asked)

    def grade(self, problem: Problem, completion: str, verdict: Verdict | None) -> Grade:
        """Passed if the program ran through its tests."""
        return grade_ended(self._code(problem, completion), verdict, tests=problem.tests)

    def _code(self, problem: Problem, completion: str) -> str:
        if self.asking == "base":
            return cut_at(completion, (STOP,)).strip() + "\n"
        block = first_block(completion, "python")
        return (completion if block is None else block) + "\n"

    def _problem(self, examples: Sequence[Record], record: Record) -> Problem:
        is_base = self.asking == "base"
        prompts = _base_prompts(examples, record) if is_base else [_instruct_prompt(examples, record)]
        code = _code(record)
        # Objects that the tests name: made of classes of the answer, so after it.
        setup = record.get("test_setup_code", "").replace("\r", "")
        tests = "\n".join([setup, *record["test_list"]])
        return Problem(
            task=self.name,
            id=f"mbpp/{record['task_id']}",
            prompt=prompts[0],
            shorter_prompts=tuple(prompts[1:]),
            form="completion" if is_base else "chat",
            stop=(STOP,) if is_base else (),
            max_new_tokens=_BASE_TOKENS if is_base else _INSTRUCT_TOKENS,
            entry_point=_entry_point(code, tests),
            tests=tests,
            reference=f"\n{code}\n{STOP}" if is_base else f"```python\n{code}\n```",
        )
