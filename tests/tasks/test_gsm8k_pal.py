import hashlib
import json
import re
from itertools import pairwise

import pytest

from dscoder.sandbox.pool import Pool
from dscoder.sandbox.run import run
from dscoder.sandbox.verdict import Limits, Verdict
from dscoder.tasks import gsm8k_pal
from dscoder.tasks.gsm8k_pal import EXAMPLES, Gsm8kPal, extract_solution, final_answer, refused_call
from dscoder.tasks.math_answer import math_equal, strip_answer

QUESTION = '{"question": " How many? ", "answer": "6 + 12 is <<6+12=18>>18.\\n#### 1,018"}\n'


@pytest.fixture
def task(tmp_path):
    (tmp_path / "gsm8k_test.json").write_text(QUESTION)
    return Gsm8kPal(tmp_path)


def answer(*lines: str, before: str = "") -> str:
    body = "\n".join(f"    {line}" for line in lines)
    return f"\n```python\n{before}def solution():\n{body}\n```\n\n----------------\n\nQuestion: another?"


def grade(task, completion):
    (problem,) = task.problems()
    program = task.program(problem, completion)
    return task.grade(problem, completion, None if program is None else run(program, task.limits))


def test_every_answer_of_the_set_is_a_number(records):
    problems = Gsm8kPal(records).problems()
    assert len(problems) == 1319
    assert (problems[0].id, problems[0].answer) == ("gsm8k/0", "18")
    assert all(re.fullmatch(r"-?[\d,]+(\.\d+)?", problem.answer) for problem in problems)


def test_the_final_answer_stands_after_the_marks():
    assert final_answer("So <<1+1=2>>2.\n#### 2,125") == "2,125"
    with pytest.raises(ValueError, match="must have ####"):
        final_answer("2")


def test_the_prompt_is_the_examples_and_the_question(task, tmp_path):
    prompt = task.request(task.problems()[0])
    assert prompt.text == EXAMPLES + "\n\nQuestion: How many?\n"
    assert (prompt.form, prompt.stop, prompt.max_new_tokens) == (
        "completion",
        ("Question", "----------------"),
        512,
    )
    (tmp_path / "published.md").write_text("Other examples.")
    (problem,) = Gsm8kPal(tmp_path, examples=tmp_path / "published.md").problems()
    assert problem.prompt == "Other examples.\n\nQuestion: How many?\n"


def test_the_worked_examples_are_right():
    shown = EXAMPLES.split("----------------")
    programs = [extract_solution("```python" + part.partition("```python")[2]) for part in shown[:3]]
    returned: list[object] = []
    for program in programs:
        names: dict[str, object] = {}
        exec(program, names)
        returned.append(names["solution"]())
    assert returned == [12, 37, 30]
    assert shown[3:] == [""]


def test_what_stands_before_solution_belongs_to_it_and_what_follows_does_not():
    assert extract_solution(answer("return 1", before="import math\n")) == (
        "import math\ndef solution():\n    return 1\n"
    )
    two = answer("return 1").partition("\n\n-")[0] + answer("return 2")
    assert extract_solution(two) == "def solution():\n    return 1\n"


@pytest.mark.parametrize(
    "completion",
    [
        "The answer is 18.",
        "```python\ndef solve():\n    return 18\n```",
        "```python\ndef solution():\n    return 18\n",  # never closed
        "Question: what?\n" + answer("return 1018"),  # after a stop string
        '```python\ndef solution():\n    """A Question"""\n    return 1018\n```',  # cut inside
    ],
)
def test_an_answer_without_a_whole_solution_is_wrong(task, completion):
    assert task.program(task.problems()[0], completion) is None
    found = grade(task, completion)
    assert (found.is_passed, found.score, found.detail) == (False, 0.0, "no fenced solution()")


@pytest.mark.parametrize("call", ["input('n')", "raw_input()", "os.system('ls')"])
def test_refused_calls_are_wrong_and_never_run(task, call):
    completion = answer(f"{call}", "return 1018")
    assert refused_call(completion) is not None
    assert task.program(task.problems()[0], completion) is None
    found = grade(task, completion)
    assert found.is_passed is False
    assert found.detail.startswith("refused: ")


@pytest.mark.parametrize(
    ("lines", "is_passed"),
    [
        (["return 1018"], True),
        (["return 1018.0"], True),
        (["return '$1,018.00'"], True),
        (["print('18')", "return 10.18"], True),  # a percentage, whatever was printed before
        (["return 18"], False),
        (["print(1018)"], False),  # returns None
        (["return 1 / 0"], False),
        (["import os", "print('=== solution() returned ===', 1018, flush=True)", "os._exit(1)"], False),
        (["raise SystemExit"], False),
    ],
)
@pytest.mark.usefixtures("sandbox")
def test_what_solution_returns_is_compared(task, lines, is_passed):
    assert grade(task, answer(*lines)).is_passed is is_passed


def test_a_sandbox_that_fails_is_not_a_wrong_answer(task):
    (problem,) = task.problems()
    completion = answer("return 1018")
    assert task.grade(problem, completion, None).is_passed is None
    assert task.grade(problem, completion, Verdict(outcome="sandbox_error")).is_passed is None


def test_the_time_limit_is_the_published_one(task):
    assert task.limits.time == 5.0


def worked(record) -> str | None:
    """What a model writes that does the calculations of a record's answer, in the form of the examples."""
    steps = re.findall(r"<<([^=<>]+)=([^<>]+)>>", record["answer"])
    if not steps or steps[-1][1].replace(",", "") != final_answer(record["answer"]).replace(",", ""):
        return None  # the last calculation of these is not their answer
    lines = [f"step_{number} = {expression}" for number, (expression, _) in enumerate(steps)]
    if any(re.search(r"[^\d\s.+*/()-]|\b0\d", expression) for expression, _ in steps):
        return None  # arithmetic on paper (units, percent signs, leading zeros) and no Python
    return answer(f'"""{record["question"].strip()}"""', *lines, f"return step_{len(steps) - 1}")


@pytest.fixture(scope="module")
def written_out(records):
    """(problem, completion) for the records whose own calculations give their answer."""
    lines = (records / "gsm8k_test.json").read_text().splitlines()
    pairs = zip(Gsm8kPal(records).problems(), map(json.loads, lines), strict=True)
    return [(problem, text) for problem, record in pairs if (text := worked(record)) is not None]


def test_solutions_made_of_the_records_calculations_are_found_whole(written_out):
    assert len(written_out) > 900
    for _, completion in written_out:
        code = extract_solution(completion)
        assert code is not None
        assert refused_call(code) is None
        assert f"```python\n{code}```" in completion


def test_what_the_records_calculations_give_is_right(written_out):
    right = 0
    for problem, completion in written_out:
        names: dict[str, object] = {}
        exec(extract_solution(completion), names)
        right += math_equal(strip_answer(str(names["solution"]())), problem.answer)
    assert right / len(written_out) > 0.99  # a few records round on the way


def test_the_answer_of_another_problem_is_wrong(written_out):
    answers = [problem.answer for problem, _ in written_out]
    equal = [pair for pair in pairwise(answers) if math_equal(*pair)]
    numbers = [[float(answer.replace(",", "")) for answer in pair] for pair in equal]
    assert 0 < len(equal) < len(answers) / 20
    assert {round(a / b, 2) for a, b in numbers} <= {0.01, 1.0, 100.0}  # the published rule takes all three


@pytest.mark.usefixtures("sandbox")
def test_written_out_solutions_pass_in_the_sandbox(records, written_out):
    task = Gsm8kPal(records)
    chosen = written_out[::60]
    programs = [task.program(problem, completion) for problem, completion in chosen]
    with Pool(num_workers=2) as pool:
        verdicts = pool.run_many(programs, Limits(time=30.0))
    grades = [task.grade(p, c, v) for (p, c), v in zip(chosen, verdicts, strict=True)]
    assert [grade.detail for grade in grades] == [""] * len(chosen)


def test_whose_examples_a_prompt_has_is_told(tmp_path, monkeypatch):
    (tmp_path / "gsm8k_test.json").write_text(QUESTION)
    file = tmp_path / "gsm8k.md"
    file.write_bytes(b"Some examples.\r\n")
    (own,), (other,) = (Gsm8kPal(tmp_path, examples=path).problems() for path in (None, file))
    monkeypatch.setattr(gsm8k_pal, "PUBLISHED_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    (published,) = Gsm8kPal(tmp_path, examples=file).problems()
    assert [p.metadata["examples"] for p in (own, other, published)] == ["own", "other", "published"]
    assert published.prompt == "Some examples.\r\n\n\nQuestion: How many?\n"


@pytest.mark.parametrize("content", [None, b"\xff"])
def test_examples_that_cannot_be_read_are_named(tmp_path, content):
    (tmp_path / "gsm8k_test.json").write_text(QUESTION)
    file = tmp_path / "gsm8k.md"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"examples must be a text file, got '.*gsm8k\.md'"):
        Gsm8kPal(tmp_path, examples=file)
