"""Generated problems as a task: both ways of asking, and answers that pass and fail."""

import json
from pathlib import Path

import pytest

from dscoder.config.generated import GeneratedConfig, ProblemCounts
from dscoder.config.task import TaskConfig
from dscoder.data import generated
from dscoder.sandbox.pool import Pool
from dscoder.tasks.by_name import open_task
from dscoder.tasks.generated import Generated, question
from dscoder.tasks.problem import Problem

RECORD = {
    "id": "0/numbers/add/number",
    "task": "Add a and b, add 3, return it.",
    "code": 'def solve(a, b):\n    """Add a and b, add 3, return it."""\n',
    "tests": "assert solve(1, 2) == 6\n",
    "solution": "    n = a + b\n    n = n + 3\n    return n\n",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps(RECORD) + "\n")
    return path


def passed(task: Generated, problem: Problem, *answers: str) -> list[bool | None]:
    programs = [task.program(problem, answer) for answer in answers]
    with Pool(num_workers=2) as pool:
        verdicts = pool.run_many(programs, task.limits)
    return [
        task.grade(problem, answer, verdict).is_passed
        for answer, verdict in zip(answers, verdicts, strict=True)
    ]


def test_a_base_model_continues_the_docstring(source: Path) -> None:
    [problem] = Generated(source).problems()
    assert problem.prompt == RECORD["code"]
    assert problem.form == "completion"
    assert problem.reference == RECORD["solution"]


def test_an_instruct_model_is_asked_in_a_sentence(source: Path) -> None:
    [problem] = Generated(source, asking="instruct").problems()
    assert problem.prompt == "Write solve(a, b): Add a and b, add 3, return it."
    assert problem.form == "chat"
    assert problem.stop == ()
    assert question("Do it.", "def solve(xs):\n    pass\n") == "Write solve(xs): Do it."


@pytest.mark.usefixtures("sandbox")
def test_an_answer_may_stand_in_a_block_or_alone(source: Path) -> None:
    task = Generated(source, asking="instruct")
    [problem] = task.problems()
    assert problem.reference is not None
    wrong = problem.reference.replace("+ 3", "+ 4")
    fenced = f"Here:\n```python\n{problem.reference}```"
    answers = (problem.reference, f" {problem.reference}", fenced, wrong, "")
    assert passed(task, problem, *answers) == [True, True, True, False, False]


@pytest.mark.usefixtures("sandbox")
def test_what_follows_the_function_of_a_base_model_is_cut_off(source: Path) -> None:
    task = Generated(source)
    [problem] = task.problems()
    answer = f"{RECORD['solution']}\ndef other(\n"
    early = "    import sys; sys.exit(0)\n"
    assert passed(task, problem, RECORD["solution"], answer, early) == [True, True, False]


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize("asking", ["base", "instruct"])
def test_the_references_of_written_problems_pass(tmp_path: Path, asking: str) -> None:
    num = ProblemCounts(documents=1, dialogues=1, practised=1, validation=1, test=40)
    written = generated.run(GeneratedConfig(out=str(tmp_path / "out"), num=num))
    task = open_task(TaskConfig(name="generated", sources=(str(written),), asking=asking))  # type: ignore[arg-type]
    problems = task.problems()
    assert len({problem.id for problem in problems}) == 40
    programs = [task.program(problem, problem.reference) for problem in problems]
    with Pool(num_workers=2) as pool:
        verdicts = pool.run_many(programs, task.limits)
    grades = [task.grade(p, p.reference, v) for p, v in zip(problems, verdicts, strict=True)]
    assert [grade.detail for grade in grades if not grade.is_passed] == []


def test_the_wording_of_the_other_paper_is_refused(source: Path) -> None:
    with pytest.raises(ValueError, match="asking must be base or instruct, got 'instruct_v2'"):
        Generated(source, asking="instruct_v2")
