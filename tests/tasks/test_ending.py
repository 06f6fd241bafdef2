import json

import pytest

from dscoder.sandbox.run import run
from dscoder.sandbox.verdict import Verdict
from dscoder.tasks.ending import end_mark, grade_ended, python_program
from dscoder.tasks.human_eval import HumanEval

# Ways out of a program that leave exit status 0 behind.
WAYS_OUT = [
    "raise SystemExit",
    "import sys; sys.exit(0)",
    "import os; os._exit(0)",
    "exit()",
    "import os, signal; signal.signal(15, lambda *_: os._exit(0)); signal.raise_signal(15)",
]


@pytest.fixture
def task(tmp_path):
    record = {"task_id": "X/0", "prompt": "def one():\n", "entry_point": "one"}
    record["test"] = "def check(candidate):\n    assert candidate() == 1\n"
    (tmp_path / "humaneval.jsonl").write_text(json.dumps(record))
    return HumanEval(tmp_path)


@pytest.mark.parametrize("way_out", WAYS_OUT)
@pytest.mark.usefixtures("sandbox")
def test_leaving_before_the_tests_end_is_not_passing(task, way_out):
    (problem,) = task.problems()
    completion = f"    {way_out}"
    verdict = run(task.program(problem, completion), task.limits)
    assert verdict.exit_code == 0
    grade = task.grade(problem, completion, verdict)
    assert (grade.is_passed, grade.score) == (False, 0.0)
    assert grade.detail == "the program ended before its tests did"


@pytest.mark.parametrize("line", ["print = None", "print('tests ended')", "import sys; sys.stdout = None"])
@pytest.mark.usefixtures("sandbox")
def test_what_an_answer_does_to_its_output_does_not_matter(task, line):
    (problem,) = task.problems()
    completion = f"    global print\n    {line}\n    return 1"
    assert task.grade(problem, completion, run(task.program(problem, completion))).is_passed


def test_the_mark_of_another_text_does_not_count():
    other = Verdict(outcome="passed", stdout=end_mark("x = 1\n"))
    assert grade_ended("x = 1\n", other).is_passed is True
    assert grade_ended("x = 2\n", other).is_passed is False


def test_the_mark_follows_the_text():
    assert end_mark("a") != end_mark("b")
    source = python_program("x = 1\n").source
    assert source.startswith("x = 1\n")
    assert end_mark("x = 1\n") in source


def test_no_answer_stays_no_answer():
    assert grade_ended("", Verdict(outcome="sandbox_error")).is_passed is None
    assert grade_ended("", None).is_passed is None
