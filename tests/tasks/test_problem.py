import dataclasses
import pickle

import pytest

from dscoder.sandbox.verdict import Program, Verdict
from dscoder.tasks.problem import Grade, Problem, Task, grade_verdict, graded, not_judged


def a_problem(**changes) -> Problem:
    return Problem(**({"task": "t", "id": "t/0", "prompt": "three two one", "max_new_tokens": 4} | changes))


class OneProblem(Task):
    name = "one"

    def problems(self):
        return [a_problem()]

    def program(self, problem, completion):
        return Program(source=completion)


def test_a_request_says_all_that_a_model_is_asked():
    problem = a_problem(suffix="}", form="infill", stop=("\n",))
    prompt = OneProblem().request(problem)
    assert dataclasses.asdict(prompt) == {
        "text": "three two one",
        "suffix": "}",
        "form": "infill",
        "stop": ("\n",),
        "max_new_tokens": 4,
    }


@pytest.mark.parametrize(
    ("max_length", "text"), [(99, "three two one"), (10, "two one"), (5, "one"), (1, "one")]
)
def test_the_longest_prompt_that_fits_is_taken_and_else_the_shortest(max_length, text):
    problem = a_problem(shorter_prompts=("two one", "one"))
    assert OneProblem().request(problem, fits=lambda text: len(text) <= max_length).text == text


def test_the_verdict_decides_where_a_task_does_not():
    problem = a_problem()
    passed, failed = Verdict(outcome="passed"), Verdict(outcome="time_limit", detail="not done after 1 s")
    assert OneProblem().grade(problem, "", passed) == Grade(is_passed=True, score=1.0, verdict=passed)
    grade = OneProblem().grade(problem, "", failed)
    assert (grade.is_passed, grade.score, grade.detail) == (False, 0.0, "time_limit: not done after 1 s")


@pytest.mark.parametrize("outcome", ["sandbox_error", "toolchain_missing"])
def test_a_verdict_that_is_no_answer_is_not_a_wrong_answer(outcome):
    grade = grade_verdict(Verdict(outcome=outcome, detail="why"))
    assert (grade.is_passed, grade.score, grade.detail) == (None, None, f"{outcome}: why")


def test_what_was_not_run_is_not_judged():
    assert grade_verdict(None) == not_judged("the program was not run")


def test_problems_and_grades_travel_between_processes():
    grade = graded(True, verdict=Verdict(outcome="passed"))
    for record in (a_problem(metadata={"name": "x"}), grade, OneProblem().request(a_problem())):
        assert pickle.loads(pickle.dumps(record)) == record


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "essay"}, "form must be one of completion, chat, infill, got 'essay'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
        ({"stop": ("\n", "")}, "stop strings must not be empty"),
    ],
)
def test_a_wrong_problem_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        a_problem(**changes)


def test_a_grade_without_a_score_is_refused():
    with pytest.raises(ValueError, match="both be None or neither, got True and None"):
        Grade(is_passed=True, score=None)
    assert graded(False).score == 0.0
