"""What becomes of candidates whose sandbox fails."""

from concurrent.futures import Future

import pytest

from dscoder.sandbox.verdict import Program, Verdict
from dscoder.tasks.problem import Problem, Prompt, Task
from dscoder.train.candidates import Completions, Judging

PROBLEM = Problem(task="one", id="1", prompt="?", max_new_tokens=1)


class OneProblem(Task):
    name = "one"

    def problems(self) -> list[Problem]:
        return [PROBLEM]

    def program(self, problem: Problem, completion: str) -> Program:
        return Program(source=completion)


def ended(result: Verdict | Exception | None) -> "Future[Verdict]":
    future: Future[Verdict] = Future()
    if result is None:
        future.cancel()
    elif isinstance(result, Verdict):
        future.set_result(result)
    else:
        future.set_exception(result)
    return future


@pytest.mark.parametrize(
    ("result", "score", "outcome", "detail"),
    [
        (Verdict(outcome="passed"), 1.0, "passed", ""),
        (Verdict(outcome="failed", detail="an assertion"), 0.0, "failed", "failed: an assertion"),
        (OSError("no more files"), None, "sandbox_error", "sandbox_error: the sandbox raised: OSError('no "),
        (None, None, "sandbox_error", "sandbox_error: the program was called off"),
    ],
)
def test_a_sandbox_that_raises_or_is_called_off_is_no_wrong_answer(
    result: Verdict | Exception | None, score: float | None, outcome: str, detail: str
) -> None:
    completions = Completions(
        problem=PROBLEM,
        prompt=Prompt(text="?", max_new_tokens=1),
        texts=("a", "b"),
        finish_reasons=("stop", "stop"),
        origins=(("file", 0), ("file", 1)),
    )
    judging = Judging(
        task=OneProblem(),
        completions=completions,
        keys=("key", "other"),
        verdicts=(ended(result), ended(Verdict(outcome="passed"))),
    )
    first, second = judging.finish()
    assert (first.score, first.outcome) == (score, outcome)
    assert first.detail.startswith(detail)
    assert second.score == 1.0
