"""What becomes of candidates whose sandbox fails."""

from concurrent.futures import Future

import pytest

from dscoder.sandbox.pool import Pool
from dscoder.sandbox.run import DEFAULT_LIMITS
from dscoder.sandbox.verdict import Limits, Program, Verdict
from dscoder.tasks.problem import Problem, Prompt, Task
from dscoder.train.candidates import Completions, Judging

PROBLEM = Problem(task="one", id="1", prompt="?", max_new_tokens=1)


class OneProblem(Task):
    name = "one"
    limits = DEFAULT_LIMITS

    def problems(self) -> list[Problem]:
        return [PROBLEM]

    def program(self, problem: Problem, completion: str) -> Program:
        return Program(source=completion)


class CountingPool(Pool):
    """Passes every program but "b", and remembers what it was given."""

    def __init__(self) -> None:
        self.sources: list[str | None] = []

    def submit(self, program: Program, limits: Limits = DEFAULT_LIMITS) -> "Future[Verdict]":
        self.sources.append(program.source)
        return ended(Verdict(outcome="failed" if program.source == "b" else "passed"))


def asked(*texts: str) -> Completions:
    return Completions(
        problem=PROBLEM,
        prompt=Prompt(text="?", max_new_tokens=1),
        texts=texts,
        finish_reasons=("stop",) * len(texts),
        origins=tuple(("file", idx) for idx in range(len(texts))),
    )


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
    judging = Judging(
        task=OneProblem(),
        completions=asked("a", "b"),
        keys=("key", "other"),
        verdicts=(ended(result), ended(Verdict(outcome="passed"))),
    )
    first, second = judging.finish()
    assert (first.score, first.outcome) == (score, outcome)
    assert first.detail.startswith(detail)
    assert second.score == 1.0


def test_the_same_text_runs_once_and_is_stored_each_time() -> None:
    pool = CountingPool()
    judged = Judging.start(OneProblem(), asked("a", "b", "a", "a", "b"), pool).finish()
    assert pool.sources == ["a", "b"]
    assert [(item.idx, item.completion, item.score) for item in judged] == [
        (0, "a", 1.0),
        (1, "b", 0.0),
        (2, "a", 1.0),
        (3, "a", 1.0),
        (4, "b", 0.0),
    ]
    assert len({item.program for item in judged}) == 2
