"""Problems made by rule (`pipelines.py`), as `data/generated.py` writes them to files.

Base models continue the function from its docstring on; instruct models are asked for the whole function in
one sentence, and may put it in a fenced block or not.
"""

from collections.abc import Sequence
from pathlib import Path

from dscoder.sandbox.verdict import Limits, Program, Verdict
from dscoder.tasks.answers import Dialect, complete_function, cut_at, first_block
from dscoder.tasks.ending import grade_ended, python_program
from dscoder.tasks.human_eval import STOPS, Asking
from dscoder.tasks.pipelines import NAME, Pipeline
from dscoder.tasks.problem import Grade, Problem, Task
from dscoder.tasks.sources import Record, read_records

MAX_NEW_TOKENS = 160
_FIELDS = ("id", "task", "code", "tests", "solution")
_FILES = ("test.jsonl",)
_PYTHON = Dialect(fence="python")
_INDENT = "    "


def documented(pipeline: Pipeline) -> str:
    """The function's first line, with what it does as its docstring."""
    return f'{pipeline.head}\n{_INDENT}"""{pipeline.task}"""\n'


def question(task: str, code: str) -> str:
    """What an instruct model is asked."""
    signature = code.split("\n", 1)[0].removeprefix("def ").removesuffix(":")
    return f"Write {signature}: {task}"


def record_of(pipeline: Pipeline, tests: str, *, number: int) -> Record:
    """A problem as a line of a file."""
    return {
        "id": f"{number}/{pipeline.composition}",
        "task": pipeline.task,
        "code": documented(pipeline),
        "tests": tests,
        "solution": pipeline.body,
    }


class Generated(Task):
    """Small functions to write.

    Args:
        sources: where the records are, see `read_records`; in a directory, those of the test split.
        asking: "base" to continue the docstring, "instruct" for a message.
    """

    name = "generated"
    limits = Limits(time=5.0)

    def __init__(self, sources: str | Path | Sequence[str | Path], *, asking: Asking = "base") -> None:
        if asking == "instruct_v2":
            raise ValueError(f"Generated: asking must be base or instruct, got {asking!r}")
        self.asking = asking
        self._problems = [self._problem(r) for r in read_records(sources, names=_FILES, wanted=_FIELDS)]

    def problems(self) -> Sequence[Problem]:
        """All problems, in the order of the records."""
        return self._problems

    def program(self, problem: Problem, completion: str) -> Program:
        """The answer, and apart from it its tests."""
        return python_program(self._code(problem, completion), problem.tests, asked=(problem.entry_point,))

    def grade(self, problem: Problem, completion: str, verdict: Verdict | None) -> Grade:
        """Passed if the program ran through its tests."""
        return grade_ended(self._code(problem, completion), verdict, tests=problem.tests)

    def _code(self, problem: Problem, completion: str) -> str:
        if self.asking == "base":
            return problem.code + cut_at(completion, STOPS)
        if first_block(completion, _PYTHON.fence) is None:
            return completion.strip() + "\n"
        return complete_function(problem.code, completion, _PYTHON)

    def _problem(self, record: Record) -> Problem:
        is_base = self.asking == "base"
        code, solution = record["code"], record["solution"]
        return Problem(
            task=self.name,
            id=record["id"],
            prompt=code if is_base else question(record["task"], code),
            form="completion" if is_base else "chat",
            stop=STOPS if is_base else (),
            max_new_tokens=MAX_NEW_TOKENS,
            entry_point=NAME,
            code=code,
            tests=record["tests"],
            reference=solution if is_base else code.split("\n", 1)[0] + "\n" + solution,
        )
