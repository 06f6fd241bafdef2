"""Single-line infilling: HumanEval's lines (Bavarian et al. 2022) run by their tests, or compared, and the
SantaCoder set (Ben Allal et al. 2023), which is compared.

Compared means: equal to the line that was taken out, without white space at both ends. Of the answer the
first paper takes everything ("whole"), the second its first line ("first_line"); the published numbers of the
two differ by that alone.
"""

from collections.abc import Sequence
from pathlib import Path

from dscoder.config.task import Scoring
from dscoder.sandbox.verdict import Limits, Program, Verdict
from dscoder.tasks.answers import cut_at, first_line
from dscoder.tasks.ending import grade_ended, python_program
from dscoder.tasks.human_eval import call_check, code_before
from dscoder.tasks.problem import Grade, Problem, Task, graded
from dscoder.tasks.sources import Record, read_records

WHOLE_STOPS = ("<|endoftext|>", "<|filename|>")
_FILES = ("humaneval_single_line_infilling.jsonl.gz", "HumanEval-SingleLineInfilling.jsonl.gz")
_FIELDS = ("prompt", "suffix", "canonical_solution")
_LANGUAGES = {"py": "python", "js": "javascript", "java": "java"}
_STOPS: dict[Scoring, tuple[str, ...]] = {"tests": (), "whole": WHOLE_STOPS, "first_line": ("\n",)}


def _code(problem: Problem, completion: str) -> str:
    return f"{problem.code}{completion}{problem.suffix}\n"


class SingleLineInfilling(Task):
    """One line to write between what stands before and after it.

    Args:
        sources: where the records are, see `read_records`: HumanEval's, or SantaCoder's, which have a
            `language` (py, js, java) and a `name` and no tests.
        scoring: "tests" runs the program; "whole" and "first_line" compare.
    """

    name = "single_line_infilling"

    def __init__(
        self,
        sources: str | Path | Sequence[str | Path],
        *,
        scoring: Scoring = "first_line",
        max_new_tokens: int = 128,
    ) -> None:
        self.scoring = scoring
        self.limits = Limits(time=3.0)
        self._max_new_tokens = max_new_tokens
        wanted = (*_FIELDS, *(("test", "entry_point") if scoring == "tests" else ()))
        records = read_records(sources, names=_FILES, wanted=wanted)
        self._problems = [self._problem(idx, record) for idx, record in enumerate(records)]

    def problems(self) -> Sequence[Problem]:
        """All problems, in the order of the records."""
        return self._problems

    def program(self, problem: Problem, completion: str) -> Program | None:
        """What stands before, the answer as it is, what stands after; None if it is compared."""
        if self.scoring != "tests":
            return None
        return python_program(
            _code(problem, completion),
            problem.tests,
            given=code_before(problem.code, problem.entry_point),
            asked=(problem.entry_point,),
        )

    def grade(self, problem: Problem, completion: str, verdict: Verdict | None) -> Grade:
        """By the tests, or by comparison."""
        if self.scoring == "tests":
            return grade_ended(_code(problem, completion), verdict, tests=problem.tests)
        is_first = self.scoring == "first_line"
        found = first_line(completion) if is_first else cut_at(completion, WHOLE_STOPS)
        is_equal = found.strip() == (problem.answer or "").strip()
        return graded(is_equal, detail="" if is_equal else "not the line that was taken out")

    def _problem(self, idx: int, record: Record) -> Problem:
        has_tests = self.scoring == "tests"
        names = {"name": str(record["name"])} if "name" in record else {}
        return Problem(
            task=self.name,
            id=record.get("task_id", f"santacoder/{idx}"),
            prompt=record["prompt"],
            form="infill",
            stop=_STOPS[self.scoring],
            max_new_tokens=self._max_new_tokens,
            language=_LANGUAGES[record.get("language", "py")],
            entry_point=record.get("entry_point", ""),
            code=record["prompt"],
            suffix=record["suffix"],
            tests=call_check(record["test"], record["entry_point"]) if has_tests else "",
            reference=record["canonical_solution"],
            answer=record["canonical_solution"],
            metadata=names,
        )
