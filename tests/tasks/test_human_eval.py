import json

import pytest

from dscoder.sandbox.pool import Pool
from dscoder.sandbox.run import run
from dscoder.sandbox.verdict import Limits
from dscoder.tasks.human_eval import HEADER, STOPS, HumanEval
from tests.tasks.mutate import mutated

# Faults that the benchmark's own tests do not see.
SURVIVORS = {
    "HumanEval/116",  # the same order: without its leading one, a binary number has one one less
    "HumanEval/127",  # takes four for a prime: the tests have no interval of a composite length
}

RECORD = {
    "task_id": "X/0",
    "prompt": '\n\ndef one():\n    """Return 1."""\n',
    "entry_point": "one",
    "canonical_solution": "    return 1\n",
    "test": "def check(candidate):\n    assert candidate() == 1\n",
}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "humaneval.jsonl"
    path.write_text(json.dumps(RECORD))
    return path


def grades(task, answers, limits=None):
    """The grade of each of `answers` (by id of the problem)."""
    problems = [problem for problem in task.problems() if problem.id in answers]
    programs = [task.program(problem, answers[problem.id]) for problem in problems]
    with Pool(num_workers=2) as pool:
        found = pool.run_many(programs, limits or task.limits)
    return {p.id: task.grade(p, answers[p.id], verdict) for p, verdict in zip(problems, found, strict=True)}


@pytest.mark.parametrize(("asking", "step"), [("base", 1), ("instruct", 5)])
@pytest.mark.usefixtures("sandbox")
def test_canonical_solutions_pass(records, asking, step):
    task = HumanEval(records, asking=asking)
    assert len(task.problems()) == 164
    answers = {problem.id: problem.reference for problem in task.problems()[::step]}
    found = grades(task, answers, Limits(time=30.0))  # the tests share their machine
    assert {name: grade.detail for name, grade in found.items()} == dict.fromkeys(answers, "")
    assert all(grade.is_passed for grade in found.values())


@pytest.mark.usefixtures("sandbox")
def test_mutated_solutions_fail(records):
    task = HumanEval(records)
    answers = {problem.id: mutated(problem.reference) for problem in task.problems()}
    found = grades(task, answers, Limits(time=5.0))
    assert all(grade.is_passed is not None for grade in found.values())
    passed = {name for name, grade in found.items() if grade.is_passed}
    assert passed <= SURVIVORS


def test_the_prompt_is_stripped_and_the_program_keeps_it_whole(source):
    task = HumanEval(source)
    (problem,) = task.problems()
    assert problem.prompt == 'def one():\n    """Return 1."""'
    files = task.program(problem, "\n    return 1").files
    code = '\n\ndef one():\n    """Return 1."""\n' + "\n" + "\n    return 1"
    assert files["answer.py"] == HEADER + code
    assert files["tests.py"] == problem.tests
    assert files["given.py"] == HEADER + "\n\n"


@pytest.mark.usefixtures("sandbox")
def test_an_answer_brings_its_own_indentation(source):
    task = HumanEval(source)
    (problem,) = task.problems()
    outcomes = [run(task.program(problem, text)).outcome for text in ("    return 1", "return 1")]
    assert outcomes == ["passed", "runtime_error"]


@pytest.mark.parametrize("rest", ["\ndef two():", "\nclass A:", "\nif True:", "\n# more", "\nprint(one())"])
def test_an_answer_ends_where_the_next_thing_starts(source, rest):
    task = HumanEval(source)
    (problem,) = task.problems()
    cut, plain = task.program(problem, "    return 1" + rest), task.program(problem, "    return 1")
    assert cut == plain
    assert task.request(problem).stop == STOPS


def test_the_header_imports_what_the_published_one_does():
    names: dict[str, object] = {}
    exec(HEADER, names)
    wanted = "math re sys copy datetime itertools collections heapq functools hashlib string List Counter"
    assert set(wanted.split()) <= set(names)


def test_the_tests_are_called_once(source, tmp_path):
    (problem,) = HumanEval(source).problems()
    assert problem.tests.endswith("== 1\n\ncheck(one)")
    called = tmp_path / "called.jsonl"
    called.write_text(json.dumps(RECORD | {"test": RECORD["test"] + "\ncheck(one)"}))
    (problem,) = HumanEval(called).problems()
    assert problem.tests.count("check(one)") == 1


def test_each_way_of_asking_has_its_message_its_length_and_its_time(source):
    base, instruct, v2 = (HumanEval(source, asking=a) for a in ("base", "instruct", "instruct_v2"))
    asked = [task.request(task.problems()[0]) for task in (base, instruct, v2)]
    assert [(a.form, a.max_new_tokens) for a in asked] == [
        ("completion", 500),
        ("chat", 1024),
        ("chat", 1024),
    ]
    assert [task.limits.time for task in (base, instruct, v2)] == [10.0, 3.0, 3.0]
    assert asked[1].text.startswith("Please continue to complete the function. You are not allowed to modify")
    assert asked[1].text.endswith(':\n```python\ndef one():\n    """Return 1."""\n```')
    assert asked[2].text.endswith(
        'unfinished function:\n ```python\n\n\ndef one():\n    """Return 1."""\n\n\n'
    )


@pytest.mark.usefixtures("sandbox")
def test_an_instruct_answer_without_a_block_continues_the_code(source):
    task = HumanEval(source, asking="instruct")
    (problem,) = task.problems()
    assert run(task.program(problem, "    return 1")).is_passed
    assert not run(task.program(problem, "I cannot do that.")).is_passed
