import json

import pytest

from dscoder.sandbox.pool import Pool
from dscoder.sandbox.run import run
from dscoder.sandbox.verdict import Limits
from dscoder.tasks.single_line_infilling import SingleLineInfilling

# The form of the SantaCoder set: a language, no tests.
SANTACODER = {
    "name": "HumanEval_53_add",
    "language": "js",
    "prompt": "function add(x, y){\n",
    "suffix": "\n}\n",
    "canonical_solution": "  return x + y;",
}


# The form of HumanEval's lines.
LINE = {
    "task_id": "SingleLineInfilling/X/0/L0",
    "entry_point": "one",
    "prompt": "def one(n):\n\n",
    "suffix": "    return x\n",
    "canonical_solution": "    x = 1\n",
    "test": "def check(f):\n    assert f(0) == 1\n",
}


@pytest.fixture
def line(tmp_path):
    path = tmp_path / "line.jsonl"
    path.write_text(json.dumps(LINE))
    return path


@pytest.fixture
def santacoder(tmp_path):
    path = tmp_path / "santacoder.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in (SANTACODER, SANTACODER | {"language": "py"})))
    return path


@pytest.mark.usefixtures("sandbox")
def test_the_lines_taken_out_pass_and_others_fail(records):
    task = SingleLineInfilling(records, scoring="tests")
    assert len(task.problems()) == 1033
    problems = task.problems()[::20]
    right = [task.program(problem, problem.reference) for problem in problems]
    wrong = [task.program(problem, "    raise KeyError\n") for problem in problems[:10]]
    with Pool(num_workers=2) as pool:
        found = pool.run_many([*right, *wrong], Limits(time=30.0))
    num_right = len(right)
    grades = [task.grade(p, p.reference, v) for p, v in zip(problems, found[:num_right], strict=True)]
    assert all(grade.is_passed for grade in grades)
    assert not any(verdict.is_passed for verdict in found[num_right:])


def test_a_program_joins_the_parts_without_a_character_more(line):
    task = SingleLineInfilling(line, scoring="tests")
    (problem,) = task.problems()
    files = task.program(problem, "    x = 1\n").files
    assert files["answer.py"] == "def one(n):\n\n    x = 1\n    return x\n\n"
    assert files["tests.py"] == "def check(f):\n    assert f(0) == 1\n\ncheck(one)"
    assert task.limits.time == 3.0


@pytest.mark.usefixtures("sandbox")
def test_the_tests_decide_and_not_the_words(line):
    task = SingleLineInfilling(line, scoring="tests")
    (problem,) = task.problems()
    grades = {}
    for completion in ("    x = 1\n", "    x = 2 - 1\n", "    x = 2\n", "    x = 1"):
        verdict = run(task.program(problem, completion), Limits(time=30.0))
        grades[completion] = task.grade(problem, completion, verdict).is_passed
    # The last one has no line break, and the suffix begins with none.
    assert list(grades.values()) == [True, True, False, False]


def test_a_model_is_asked_with_the_prompt_as_it_is(line):
    task = SingleLineInfilling(line)
    prompt = task.request(task.problems()[0])
    assert (prompt.form, prompt.text, prompt.suffix) == ("infill", "def one(n):\n\n", "    return x\n")


@pytest.mark.parametrize(
    ("completion", "whole", "first"),
    [
        ("  return x + y;", True, True),
        ("return x + y;  \n", True, True),  # white space at both ends does not count
        ("  return x + y;\n}", False, True),  # the one difference between the two rules
        ("  return x + y;<|endoftext|>\nmore", True, False),
        ("\n  return x + y;", True, False),
        ("  return y + x;", False, False),
        ("", False, False),
    ],
)
def test_the_two_rules_differ_by_what_follows_the_first_line(santacoder, completion, whole, first):
    for scoring, is_passed in (("whole", whole), ("first_line", first)):
        task = SingleLineInfilling(santacoder, scoring=scoring)
        problem = task.problems()[0]
        assert task.program(problem, completion) is None
        assert task.grade(problem, completion, None).is_passed is is_passed


def test_each_rule_has_its_stop_strings(santacoder):
    stops = {
        s: SingleLineInfilling(santacoder, scoring=s).problems()[0].stop for s in ("whole", "first_line")
    }
    assert stops == {"whole": ("<|endoftext|>", "<|filename|>"), "first_line": ("\n",)}


def test_santacoders_records_keep_their_language_and_name(santacoder):
    problems = SingleLineInfilling(santacoder).problems()
    assert [(p.id, p.language, p.metadata["name"]) for p in problems] == [
        ("santacoder/0", "javascript", "HumanEval_53_add"),
        ("santacoder/1", "python", "HumanEval_53_add"),
    ]


def test_records_without_tests_cannot_be_run(santacoder):
    with pytest.raises(ValueError, match="got record 0 without test, entry_point"):
        SingleLineInfilling(santacoder, scoring="tests")
