import os
import subprocess
import sys

import pytest

from dscoder.sandbox.verdict import Verdict
from dscoder.tasks.driver import NOTE
from dscoder.tasks.ending import end_mark, grade_ended, mark_name, python_program, without_digests

CODE, TESTS = "x = 1\n", "assert x\n"
MARK = end_mark(CODE, TESTS)


def grade(stdout: str, *, outcome="passed", code=CODE, tests=TESTS, stderr=""):
    return grade_ended(code, Verdict(outcome=outcome, stdout=stdout, stderr=stderr), tests=tests)


def test_the_mark_follows_answer_and_tests():
    marks = [end_mark("a", "b"), end_mark("ab"), end_mark("", "ab"), end_mark("a", "c"), end_mark("b", "a")]
    assert len({*marks, *map(mark_name, marks)}) == 10
    assert end_mark("a", "b") == marks[0]


def test_no_other_process_has_the_same_mark():
    code = f"from dscoder.tasks.ending import end_mark; print(end_mark({CODE!r}, {TESTS!r}))"
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    ).stdout.strip()
    assert other.partition("ended ")[0] == MARK.partition("ended ")[0]
    assert other != MARK


def test_the_mark_is_in_no_file_but_its_own():
    files = dict(python_program(CODE, TESTS).files)
    assert files.pop("mark") == MARK
    assert files["answer.py"] == CODE
    assert next(iter(files)) == "main.py"
    digest = MARK.rpartition(" ")[2]
    assert not any(digest in str(content) for content in files.values())


# With names of their own: a mark is another in every process, and pytest-xdist compares names.
@pytest.mark.parametrize("text", [MARK, f"namespace {mark_name(MARK)} {{"], ids=["mark", "name"])
def test_programs_are_compared_without_their_marks(text):
    other = text.replace(MARK, end_mark("y")).replace(mark_name(MARK), mark_name(end_mark("y")))
    assert text != other
    assert without_digests(text) == without_digests(other) != other
    assert without_digests("tests ended 0123") == "tests ended 0123"


@pytest.mark.parametrize(
    ("stdout", "is_passed"),
    [
        (f"{MARK}\n", True),
        (f"1\n\n{MARK}\n", True),
        (f"{MARK}\nmore\n", True),  # a thread of the answer that writes on
        (f"write('{MARK}')\n", False),
        (f"1{MARK}", False),
        (end_mark("other", TESTS), False),
        (end_mark(CODE, "other"), False),
        ("", False),
    ],
    ids=[
        "last",
        "behind_output",
        "ahead",
        "in_text",
        "within_a_line",
        "of_other_code",
        "of_other_tests",
        "none",
    ],
)
def test_the_mark_is_a_line_of_the_output(stdout, is_passed):
    found = grade(stdout)
    assert found.is_passed is is_passed
    assert found.detail == ("" if is_passed else "the program ended before its tests did")


def test_the_grades_verdict_is_without_the_mark():
    assert grade(f"1\n\n{MARK}\n2\n").verdict.stdout == "1\n\n2\n"
    assert grade(f"1\n{MARK}\n", outcome="time_limit").verdict.stdout == "1\n"


def test_a_mark_does_not_make_up_for_how_the_program_ended():
    found = grade(f"{MARK}\n", outcome="runtime_error")
    assert (found.is_passed, found.score, found.verdict.outcome) == (False, 0.0, "runtime_error")


def test_what_the_tests_note_is_suspect():
    assert grade("", stderr=f"{NOTE}'Always'\n", outcome="failed").is_suspect
    assert not grade("", stderr="something else", outcome="failed").is_suspect


def test_no_answer_stays_no_answer():
    assert grade("", outcome="sandbox_error").is_passed is None
    assert grade_ended("", None).is_passed is None
