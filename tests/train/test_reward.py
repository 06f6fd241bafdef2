"""Reward functions that answer, and those that raise, hang or answer nonsense."""

import asyncio
import math
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from dscoder.tasks.problem import Problem
from dscoder.train import reward as reward_module
from dscoder.train.reward import (
    Answer,
    RewardBatch,
    RewardFunction,
    Rewards,
    RewardTerm,
    Score,
    failure_kind,
)

PROBLEM = Problem(task="test", id="0", prompt="p", max_new_tokens=8)


def batch_of(*completions: str) -> RewardBatch:
    return RewardBatch(
        answers=tuple(
            Answer(
                problem=PROBLEM,
                prompt="p",
                completion=text,
                tokens=tuple(range(len(text))),
                finish_reason="eos",
                max_tokens=8,
            )
            for text in completions
        )
    )


def failures_of(scores: Sequence[Score]) -> Counter[str]:
    return Counter(failure_kind(name, reason) for score in scores for name, reason in score.reasons.items())


def lengths(batch: RewardBatch) -> list[float | None]:
    return [float(len(answer.completion)) for answer in batch.answers]


def answering(values: Any) -> RewardFunction:
    return lambda _: values


def score_one(function: RewardFunction, *completions: str, time: float = 5.0) -> tuple[list[Any], list[str]]:
    """Rewards and reasons of one function."""
    rewards = Rewards([RewardTerm(name="f", function=function, time=time)])
    scores = rewards.score(batch_of(*completions))
    assert [score.reward for score in scores] == [score.rewards["f"] for score in scores]
    return [score.reward for score in scores], [score.reasons.get("f", "") for score in scores]


def test_a_function_rewards_each_answer() -> None:
    assert score_one(lengths, "a", "", "abc") == ([1.0, 0.0, 3.0], ["", "", ""])


def test_an_async_function_rewards_each_answer() -> None:
    async def slowly(batch: RewardBatch) -> Sequence[float | None]:
        await asyncio.sleep(0.01)
        return lengths(batch)

    assert score_one(slowly, "ab", "c")[0] == [2.0, 1.0]


def test_an_object_with_an_async_call_is_awaited() -> None:
    class Slowly:
        async def __call__(self, batch: RewardBatch) -> Sequence[float | None]:
            return lengths(batch)

    assert score_one(Slowly(), "ab")[0] == [2.0]


def test_integers_and_booleans_are_numbers() -> None:
    assert score_one(answering((True, 3)), "a", "b")[0] == [1.0, 3.0]


def test_none_says_that_a_function_cannot_tell() -> None:
    assert score_one(answering([None, 1.0]), "a", "b") == ([None, 1.0], ["no_answer", ""])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_left_out_alone(value: float) -> None:
    assert score_one(answering([value, 1.0]), "a", "b") == ([None, 1.0], [f"not_finite: {value}", ""])


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ([1.0], "wrong_length: 1 for 2 answers"),
        (1.0, "not_a_sequence: float"),
        (None, "not_a_sequence: NoneType"),
        ("ab", "not_a_sequence: str"),
        (["1", "x"], "not_a_number: str"),
    ],
)
def test_what_is_not_a_number_an_answer_is_named(found: object, reason: str) -> None:
    assert score_one(answering(found), "a", "b") == ([None, None], [reason, reason])


@pytest.mark.parametrize("error", [ValueError("broken"), TimeoutError("slow server"), SystemExit(3)])
@pytest.mark.parametrize("is_async", [False, True])
def test_a_function_that_raises_is_named_and_gives_no_zero(error: BaseException, is_async: bool) -> None:
    def fail(_: RewardBatch) -> Sequence[float | None]:
        raise error

    async def fail_later(batch: RewardBatch) -> Sequence[float | None]:
        await asyncio.sleep(0)
        return fail(batch)

    values, reasons = score_one(fail_later if is_async else fail, "a", "b")
    assert values == [None, None]
    assert reasons == [f"raised: {error!r}"] * 2


def test_a_function_that_hangs_is_named_and_not_asked_again_until_it_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reward_module, "_GRACE", 0.05)
    gate = threading.Event()

    def hang(batch: RewardBatch) -> list[float | None]:
        gate.wait(20)
        return lengths(batch)

    rewards = Rewards(
        [RewardTerm(name="slow", function=hang, time=0.1), RewardTerm(name="fast", function=lengths)]
    )
    began = time.monotonic()
    first, second = rewards.score(batch_of("ab")), rewards.score(batch_of("ab"))
    assert time.monotonic() - began < 5
    assert first[0].reasons == {"slow": "hung: more than 0.1 s"}
    assert second[0].reasons == {"slow": "hung: an earlier call still runs"}
    assert first[0].rewards == second[0].rewards == {"slow": None, "fast": 2.0}
    assert failures_of([*first, *second]) == {"slow: hung": 2}
    gate.set()
    assert score_until_answered(rewards) == {"slow": 2.0, "fast": 2.0}


def score_until_answered(rewards: Rewards) -> Any:
    for _ in range(100):
        found = rewards.score(batch_of("ab"))[0].rewards
        if found["slow"] is not None:
            break
    return found


def test_a_hang_that_ends_while_several_groups_wait_for_it_fails_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reward_module, "_GRACE", 30.0)
    num_groups, gate = 8, threading.Event()
    waiting = threading.Barrier(num_groups + 1, timeout=30)

    def hang(batch: RewardBatch) -> list[float | None]:
        gate.wait(30)
        return lengths(batch)

    def score(batch: RewardBatch) -> float | None:
        waiting.wait()
        return rewards.score(batch)[0].reward

    rewards = Rewards([RewardTerm(name="slow", function=hang, time=0.05)])
    assert rewards.score(batch_of("ab"))[0].reward is None
    with ThreadPoolExecutor(num_groups) as threads:
        found = [threads.submit(score, batch_of("abc")) for _ in range(num_groups)]
        waiting.wait()
        time.sleep(0.3)  # until they all wait for the thread that hangs
        gate.set()
        for future in found:
            future.result(timeout=30)


def test_an_async_function_that_hangs_is_cancelled() -> None:
    cancelled = threading.Event()

    async def hang(_: RewardBatch) -> Sequence[float | None]:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return []

    assert score_one(hang, "a", time=0.05) == ([None], ["hung: more than 0.05 s"])
    assert cancelled.wait(5)


def test_functions_of_a_group_run_at_once() -> None:
    both = threading.Barrier(2, timeout=5)

    def meet(batch: RewardBatch) -> list[float | None]:
        both.wait()
        return lengths(batch)

    async def meet_too(batch: RewardBatch) -> Sequence[float | None]:
        both.wait()
        return lengths(batch)

    rewards = Rewards([RewardTerm(name="a", function=meet), RewardTerm(name="b", function=meet_too)])
    assert rewards.score(batch_of("x"))[0].reward == 2.0


def test_groups_are_scored_by_several_threads_at_once() -> None:
    both = threading.Barrier(2, timeout=5)

    def meet(batch: RewardBatch) -> list[float | None]:
        both.wait()
        return lengths(batch)

    rewards = Rewards([RewardTerm(name="f", function=meet)])
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(rewards.score, [batch_of("a"), batch_of("bc")]))
    assert [scores[0].reward for scores in found] == [1.0, 2.0]


def test_failures_are_counted_by_function_and_kind() -> None:
    rewards = Rewards(
        [
            RewardTerm(name="odd", function=answering([math.nan, "1", None])),
            RewardTerm(name="none", function=answering([])),
        ]
    )
    scores = rewards.score(batch_of("a", "b", "c"))
    assert [score.reward for score in scores] == [None, None, None]
    assert failures_of(scores) == {
        "odd: not_finite": 1,
        "odd: not_a_number": 1,
        "odd: no_answer": 1,
        "none: wrong_length": 3,
    }


def test_an_empty_group_has_no_scores() -> None:
    assert Rewards([RewardTerm(name="f", function=lengths)]).score(batch_of()) == []


@pytest.mark.parametrize("value", [10**400, -(10**5000), 1e305], ids=["int", "long int", "float"])
def test_what_is_too_large_to_be_compared_is_left_out(value: float) -> None:
    values, reasons = score_one(answering([value, 1.0]), "a", "b")
    assert values == [None, 1.0]
    assert reasons[0].startswith("not_finite: ")


def test_a_sum_that_is_too_large_is_left_out_and_counted() -> None:
    functions = {"a": answering([1e200, 1.0]), "b": answering([-1e200, 1.0])}
    rewards = Rewards([RewardTerm(name=name, function=f, weight=1e200) for name, f in functions.items()])
    scores = rewards.score(batch_of("x", "y"))
    assert [score.reward for score in scores] == [None, 2e200]
    assert failures_of(scores) == {"mix: not_finite": 1}


def test_a_group_is_left_out_where_a_required_function_gives_nothing_at_all() -> None:
    def scores(*tests: float | None) -> list[float | None]:
        needed = RewardTerm(name="tests", function=answering(tests), is_required=True)
        rewards = Rewards([needed, RewardTerm(name="length", function=lengths)])
        return [score.reward for score in rewards.score(batch_of("a", "bcd"))]

    assert scores(None, None) == [None, None]
    assert scores(None, 1.0) == [2.0, 4.0]  # one answer alone is filled up


def test_terms_need_names_of_their_own() -> None:
    term = RewardTerm(name="f", function=lengths)
    with pytest.raises(ValueError, match=r"Rewards: terms must be some, each name once .* got \['f', 'f'\]"):
        Rewards([term, term])
    with pytest.raises(ValueError, match=r"each name once .* got \[\]"):
        Rewards([])
    with pytest.raises(ValueError, match=r"none 'mix', got \['mix'\]"):
        Rewards([RewardTerm(name="mix", function=lengths)])


def steps_of(*answers: tuple[str, ...]) -> RewardBatch:
    """Answers cut into these steps."""
    batch = batch_of(*("".join(steps) for steps in answers))
    return RewardBatch(
        answers=tuple(
            replace(answer, steps=steps) for answer, steps in zip(batch.answers, answers, strict=True)
        )
    )


def process_term(function: Any, name: str = "process.f", **fields: Any) -> RewardTerm:
    return RewardTerm(name=name, function=function, is_process=True, **fields)


def step_lengths(batch: RewardBatch) -> list[list[float]]:
    return [[float(len(step)) for step in answer.steps] for answer in batch.answers]


TELLING = RewardTerm(name="tests", function=lengths)


def test_each_step_is_rewarded_and_mixed() -> None:
    async def later(batch: RewardBatch) -> list[list[float]]:
        await asyncio.sleep(0)
        return [[1.0] * len(answer.steps) for answer in batch.answers]

    terms = [TELLING, process_term(step_lengths, weight=2.0), process_term(later, "process.g")]
    scores = Rewards(terms).score(steps_of(("a", "bcd"), ("ef",)))
    assert [score.steps for score in scores] == [(3.0, 7.0), (5.0,)]
    assert scores[0].step_rewards == {"process.f": (1.0, 3.0), "process.g": (1.0, 1.0)}
    # Rewards of whole answers are mixed apart.
    assert [(score.rewards, score.reward) for score in scores] == [
        ({"tests": 4.0}, 4.0),
        ({"tests": 2.0}, 2.0),
    ]


@pytest.mark.parametrize(
    ("found", "steps", "reason"),
    [
        ([[1.0, None], [3.0]], [(1.0, None), (3.0,)], "no_answer"),
        ([None, [3.0]], [(None, None), (3.0,)], "no_answer"),
        ([[1.0], [3.0]], [(None, None), (3.0,)], "wrong_length: 1 for 2 steps"),
        ([[math.nan, 1.0], [3.0]], [(None, 1.0), (3.0,)], "not_finite: nan"),
        ([5.0, [3.0]], [(None, None), (3.0,)], "not_a_sequence: float"),
        ([[1.0, 2.0]], [(None, None), (None,)], "wrong_length: 1 for 2 answers"),
        (7, [(None, None), (None,)], "not_a_sequence: int"),
    ],
)
def test_what_a_process_function_cannot_tell_is_none_with_a_reason(
    found: Any, steps: list[tuple[float | None, ...]], reason: str
) -> None:
    scores = Rewards([TELLING, process_term(answering(found))]).score(steps_of(("a", "b"), ("c",)))
    assert [score.steps for score in scores] == steps
    assert scores[0].reasons == {"process.f": reason}


def test_a_process_function_that_fails_is_replaced_by_the_mean_of_the_others_steps() -> None:
    def some(batch: RewardBatch) -> list[list[float | None]]:
        return [[1.0, None], [5.0]]

    terms = [TELLING, process_term(step_lengths), process_term(some, "process.g")]
    scores = Rewards(terms).score(steps_of(("a", "b"), ("c",)))
    assert [score.steps for score in scores] == [(2.0, 4.0), (6.0,)]  # 3 stands for the missing one


def test_a_process_function_that_raises_or_hangs_leaves_the_others_alone() -> None:
    def fails(_: RewardBatch) -> list[list[float]]:
        raise KeyError("x")

    terms = [
        TELLING,
        process_term(fails),
        process_term(lambda _: time.sleep(1), "process.slow", time=0.05),
        process_term(step_lengths, "process.g"),
    ]
    scores = Rewards(terms).score(steps_of(("a", "b"), ("c",)))
    assert [score.steps for score in scores] == [(1.0, 1.0), (1.0,)]
    assert failures_of(scores) == {"process.f: raised": 2, "process.slow: hung": 2}


def test_a_required_function_that_gives_nothing_leaves_the_steps_out_too() -> None:
    required = RewardTerm(name="tests", function=answering([None, None]), is_required=True)
    scores = Rewards([required, process_term(step_lengths)]).score(steps_of(("a", "b"), ("c",)))
    assert [score.steps for score in scores] == [(None, None), (None,)]


def test_a_mix_of_step_rewards_that_is_too_large_is_left_out_and_told() -> None:
    terms = [TELLING, process_term(answering([[1e300, 1.0], [1.0]]), weight=2.0)]
    scores = Rewards(terms).score(steps_of(("a", "b"), ("c",)))
    assert [score.steps for score in scores] == [(None, 2.0), (2.0,)]
    assert [score.reasons for score in scores] == [{"mix": "not_finite: the sum is beyond 1e+300"}, {}]
