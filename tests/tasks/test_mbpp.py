import json

import pytest

from dscoder.sandbox.pool import Pool
from dscoder.sandbox.run import run
from dscoder.sandbox.verdict import Limits
from dscoder.tasks.mbpp import Mbpp


def record(number: int) -> dict[str, object]:
    return {
        "task_id": number,
        "text": f"Return {number}.",
        "code": f"def f():\r\n\treturn {number}",
        "test_list": [f"assert f() == {number}", "assert f() > 0"],
        "test_setup_code": "",
    }


def shown(number: int) -> str:
    """One example as base models see it."""
    return question(number) + f"\ndef f():\n    return {number}\n[DONE]\n"


def question(number: int) -> str:
    return (
        f"You are an expert Python programmer, and here is your task: Return {number}. Your code should pass "
        f"these tests:\n\nassert f() == {number}\nassert f() > 0\n[BEGIN]"
    )


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "mbpp.jsonl"
    path.write_text("\n".join(json.dumps(record(number)) for number in range(1, 513)))
    return path


@pytest.mark.usefixtures("sandbox")
def test_reference_code_passes_its_tests(records):
    task = Mbpp(records)
    # One in eight, and the one whose tests need objects made beforehand.
    problems = [p for idx, p in enumerate(task.problems()) if idx % 8 == 1 or p.id == "mbpp/367"]
    programs = [task.program(problem, problem.reference) for problem in problems]
    with Pool(num_workers=2) as pool:
        found = pool.run_many(programs, Limits(time=30.0))
    grades = [task.grade(p, p.reference, verdict) for p, verdict in zip(problems, found, strict=True)]
    assert len(grades) == 64
    wrong = {p.id: grade.detail for p, grade in zip(problems, grades, strict=True) if not grade.is_passed}
    assert wrong == {}


def test_problems_are_records_11_to_510_by_id_and_not_by_place(source, tmp_path):
    problems = Mbpp(source).problems()
    assert [problem.id for problem in problems] == [f"mbpp/{number}" for number in range(11, 511)]
    lines = source.read_text().splitlines()
    (tmp_path / "test.jsonl").write_text("\n".join(lines[10:510]))
    (tmp_path / "prompt.jsonl").write_text("\n".join(lines[:10]))
    assert Mbpp([tmp_path / "test.jsonl", tmp_path / "prompt.jsonl"]).problems() == problems


def test_the_base_prompt_has_three_examples_and_ends_in_begin(source):
    problem = Mbpp(source).problems()[0]
    assert problem.prompt == shown(2) + shown(3) + shown(4) + question(11)
    assert (problem.form, problem.stop, problem.max_new_tokens) == ("completion", ("[DONE]",), 500)


def test_examples_are_dropped_from_the_right(source):
    task = Mbpp(source)
    problem = task.problems()[0]
    texts = [
        shown(2) + shown(3) + shown(4) + question(11),
        shown(2) + shown(3) + question(11),
        shown(2) + question(11),
        question(11),
    ]
    for text in texts:
        assert task.request(problem, fits=lambda found, text=text: len(found) <= len(text)).text == text
    assert task.request(problem, fits=lambda found: False).text == question(11)


def test_an_answer_ends_at_done_and_is_stripped(source):
    task = Mbpp(source)
    program = task.program(task.problems()[0], "\ndef f():\n    return 11\n[DONE]\nMore: [DONE]")
    assert program.files["answer.py"] == "def f():\n    return 11\n"
    assert program.files["tests.py"] == "\nassert f() == 11\nassert f() > 0"


@pytest.mark.usefixtures("sandbox")
def test_nothing_is_imported_for_the_answer(source):
    task = Mbpp(source)
    problem = task.problems()[0]
    answers = ["def f():\n    return math.floor(11.5)", "import math\ndef f():\n    return math.floor(11.5)"]
    assert [run(task.program(problem, a)).outcome for a in answers] == ["runtime_error", "passed"]


def test_the_message_for_instruct_models_is_the_published_one(source):
    problem = Mbpp(source, asking="instruct").problems()[0]
    assert (problem.form, problem.stop, problem.max_new_tokens) == ("chat", (), 512)
    head, example, rest = problem.prompt.partition(
        "- Example 1:\n>>> Problem:\nReturn 2.\n>>> Test Cases:\nassert f() == 2\nassert f() > 0\n\n"
        ">>> Code:\n```python\ndef f():\n    return 2\n```\n\n- Example 2:\n"
    )
    assert example
    assert head == (
        "Please refer the given examples and generate a python function for my problem.\n"
        "Examples are listed as follows:\n"
    )
    assert rest.endswith(
        "```\n\nHere is my problem:\n"
        ">>> Problem:\nReturn 11.\n>>> Test Cases:\nassert f() == 11\nassert f() > 0\n"
    )


def test_the_first_block_is_the_answer_and_without_one_everything_is(source):
    task = Mbpp(source, asking="instruct")
    problem = task.problems()[0]
    answers = ["So:\n```python\nx = 1\n```\n```python\ny = 2\n```", "x = 1"]
    assert [task.program(problem, a).files["answer.py"].strip() for a in answers] == ["x = 1", "x = 1"]


def test_missing_records_are_named(tmp_path):
    (tmp_path / "mbpp.jsonl").write_text("\n".join(json.dumps(record(number)) for number in range(1, 500)))
    with pytest.raises(ValueError, match="must have the ids 11 to 510, got none for 500 and 10 others"):
        Mbpp(tmp_path)


def test_a_function_called_like_one_of_pythons_is_the_answers(records):
    task = Mbpp(records)
    (problem,) = [problem for problem in task.problems() if problem.id == "mbpp/126"]
    assert (problem.entry_point, task.program(problem, "").args) == ("sum", ("sum",))
    assert {len(problem.entry_point) > 0 for problem in task.problems()} == {True}
