import json
import re

import pytest

from dscoder.sandbox.run import run
from dscoder.sandbox.verdict import Verdict
from dscoder.tasks.ending import end_mark, end_statement, grade_ended, python_program, without_digests
from dscoder.tasks.human_eval import HumanEval

# Ways out of a program that leave exit status 0 behind.
WAYS_OUT = [
    "raise SystemExit",
    "import sys; sys.exit(0)",
    "import os; os._exit(0)",
    "exit()",
    "import os, signal; signal.signal(15, lambda *_: os._exit(0)); signal.raise_signal(15)",
    "import os; print(open(__file__).read(), flush=True); os._exit(0)",
    "import inspect, os, sys; print(inspect.getsource(sys.modules['__main__']), flush=True); os._exit(0)",
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
    assert end_statement("x = 1\n") in source


@pytest.mark.parametrize("language", ["python", "cpp", "java", "javascript", "bash"])
def test_the_mark_does_not_stand_in_the_program(language):
    statement = end_statement("x = 1\n", language)
    label, _, total = end_mark("x = 1\n").rpartition(" ")
    assert total not in statement
    assert sum(map(int, re.findall(r"\d{15}", statement))) == int(total)
    assert re.search(rf"{label} \D", statement)


@pytest.mark.parametrize("language", ["python", "cpp", "java", "javascript", "bash"])
def test_programs_are_compared_without_their_numbers(language):
    one, other = (end_statement(source, language) for source in ("x = 1\n", "x = 2\n"))
    assert one != other
    assert without_digests(one) == without_digests(other) != other
    assert without_digests("x = 100000000000000 + 200000000000000") == "x = 100000000000000 + 200000000000000"


@pytest.mark.parametrize(
    ("stdout", "is_passed"),
    [
        ("{mark}\n", True),
        ("1\n\n{mark}\n", True),
        ("{mark}\nmore\n", False),
        ("x = 1\nwrite('{mark}')\n", False),
        ("1{mark}", False),
        ("", False),
    ],
)
def test_the_mark_is_the_last_line(stdout, is_passed):
    verdict = Verdict(outcome="passed", stdout=stdout.format(mark=end_mark("x = 1\n")))
    assert grade_ended("x = 1\n", verdict).is_passed is is_passed


def test_no_answer_stays_no_answer():
    assert grade_ended("", Verdict(outcome="sandbox_error")).is_passed is None
    assert grade_ended("", None).is_passed is None
