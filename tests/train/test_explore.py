"""Exploration with scripted answers: order, overlap with sandboxes, what is left out, dynamic sampling."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dscoder.config.grpo import GrpoConfig
from dscoder.infer.request import Completion, Request
from dscoder.tasks.problem import Problem, Task
from dscoder.train.explore import Explorer, Judge, make_questions
from dscoder.train.prompts import PromptEncoder
from dscoder.train.reward import RewardBatch, Rewards, RewardTerm
from dscoder.train.reward_functions import passed_tests
from tests.train.grpo_stand_in import (
    TOKENIZER,
    FakePool,
    FakeSampler,
    Letters,
    Programs,
    completion_of,
    config_for,
)

ENCODER = PromptEncoder(tokenizer=TOKENIZER, max_positions=32)


def config(**rollout: Any) -> GrpoConfig:
    made = config_for(Path("model"), Path("out"))
    return replace(made, rollout=replace(made.rollout, **rollout))


def explorer(
    sampler: FakeSampler,
    made: GrpoConfig,
    *,
    task: Task | None = None,
    outcome: Callable[[str], str | BaseException] = lambda source: "passed" if "good" in source else "failed",
    reward: Any = passed_tests,
) -> tuple[Explorer, FakePool]:
    task = Programs() if task is None else task
    pool = FakePool(outcome)
    rewards = Rewards([RewardTerm(name="tests", function=reward)])
    questions = make_questions(task, ENCODER, max_new_tokens=6)
    return Explorer(
        questions,
        sampler=sampler,
        judge=Judge(task, pool),
        rewards=rewards,
        config=made,  # type: ignore[arg-type]
    ), pool


def some_good(idx: int, _: Request) -> str:
    return "good" if idx % 4 == 1 else f"bad {idx}"


def test_answers_come_out_by_group_however_the_sampler_ends_them() -> None:
    made, pool = explorer(FakeSampler(some_good, window=8), config())
    found = made.explore(1, 0)
    assert [(r.group, r.completion) for r in found.rollouts] == [
        (idx // 4, some_good(idx, None))  # type: ignore[arg-type]
        for idx in range(8)
    ]
    assert sorted(pool.sources) == sorted(r.completion for r in found.rollouts)
    assert (found.next_position, found.num_rounds) == (2, 1)


def test_each_answer_has_its_verdict_reward_and_advantage() -> None:
    made, _ = explorer(FakeSampler(some_good), config())
    rollouts = made.explore(7, 0).rollouts
    assert [r.step for r in rollouts] == [7] * 8
    assert [r.verdict["outcome"] for r in rollouts[:3]] == ["failed", "passed", "failed"]  # type: ignore[index]
    assert [r.reward for r in rollouts[:4]] == [0.0, 1.0, 0.0, 0.0]
    assert [r.is_passed for r in rollouts[:3]] == [False, True, False]
    assert [r.score for r in rollouts[:3]] == [0.0, 1.0, 0.0]
    assert [r.advantage for r in rollouts[:4]] == pytest.approx([-0.5, 1.5, -0.5, -0.5])
    assert all(r.is_used and r.reason == "" for r in rollouts)
    assert rollouts[1].completion_ids == completion_of("good").tokens
    assert rollouts[1].logprobs == completion_of("good").logprobs


def test_groups_are_judged_while_the_sampler_goes_on() -> None:
    scored = threading.Event()

    def reward(batch: RewardBatch) -> list[float | None]:
        scored.set()
        return passed_tests(batch)

    def texts(idx: int, request: Request) -> str:
        # The second group is not written before the first has been rewarded.
        assert idx < 4 or scored.wait(10)
        return some_good(idx, request)

    made, _ = explorer(FakeSampler(texts), config(), reward=reward)
    assert len(made.explore(1, 0).rollouts) == 8


def test_programs_run_while_their_group_is_still_written() -> None:
    def texts(idx: int, request: Request) -> str:
        assert len(pool.sources) == idx
        return some_good(idx, request)

    made, pool = explorer(FakeSampler(texts), config())
    made.explore(1, 0)
    assert len(pool.sources) == 8


def test_the_same_answer_of_a_group_runs_once() -> None:
    made, pool = explorer(FakeSampler(lambda idx, _: "good" if idx % 2 else "bad"), config())
    rollouts = made.explore(1, 0).rollouts
    assert pool.sources == ["bad", "good"] * 2  # of two groups
    assert [r.reward for r in rollouts] == [0.0, 1.0] * 4


def test_an_answer_that_nobody_could_judge_is_left_out_and_is_no_zero() -> None:
    def outcome(source: str) -> str:
        return {"bad 0": "sandbox_error", "bad 2": "toolchain_missing"}.get(
            source, "passed" if source == "good" else "failed"
        )

    made, _ = explorer(FakeSampler(some_good), config(groups=1), outcome=outcome)
    rollouts = made.explore(1, 0).rollouts
    assert [r.reward for r in rollouts] == [None, 1.0, None, 0.0]
    assert [r.reason for r in rollouts] == ["no_reward", "", "no_reward", ""]
    assert [r.advantage for r in rollouts] == [
        None,
        pytest.approx(0.5**0.5),
        None,
        pytest.approx(-(0.5**0.5)),
    ]
    assert rollouts[0].failures == {"tests": "no_answer"}
    assert rollouts[0].detail.startswith("sandbox_error")


def test_a_task_that_fails_on_an_answer_leaves_it_out() -> None:
    class Broken(Programs):
        def program(self, problem: Problem, completion: str) -> Any:
            if completion == "bad 0":
                raise IndexError("no block")
            return super().program(problem, completion)

        def grade(self, problem: Problem, completion: str, verdict: Any) -> Any:
            if completion == "bad 2":
                raise KeyError("score")
            return Programs.grade(self, problem, completion, verdict)

    made, _ = explorer(FakeSampler(some_good), config(groups=1), task=Broken())
    rollouts = made.explore(1, 0).rollouts
    assert [r.reward for r in rollouts] == [None, 1.0, None, 0.0]
    assert rollouts[0].detail == "the task could not make a program: IndexError('no block')"
    assert rollouts[2].detail == "the task could not grade: KeyError('score')"


@pytest.mark.parametrize(
    ("happening", "told"),
    [
        (RuntimeError("pipe"), "the sandbox raised: RuntimeError('pipe')"),
        (SystemExit(3), "the sandbox raised: SystemExit(3)"),
        (asyncio.CancelledError(), "the sandbox raised: CancelledError()"),
        ("cancelled", "the program was called off"),
        (RuntimeError("submit"), "the sandbox took no program: RuntimeError('submit')"),
    ],
    ids=["raised", "exited", "task_cancelled", "cancelled", "refused"],
)
def test_a_sandbox_that_fails_is_no_wrong_answer_and_ends_no_run(
    happening: str | BaseException, told: str
) -> None:
    def outcome(source: str) -> str | BaseException:
        return happening if source == "bad 0" else "passed" if source == "good" else "failed"

    made, _ = explorer(FakeSampler(some_good), config(groups=1), outcome=outcome)
    rollouts = made.explore(1, 0).rollouts
    assert [r.reward for r in rollouts] == [None, 1.0, 0.0, 0.0]
    assert (rollouts[0].is_passed, rollouts[0].reason, rollouts[0].detail) == (None, "no_reward", told)


def test_groups_of_equal_rewards_are_left_out() -> None:
    made, _ = explorer(FakeSampler(lambda idx, _: "good" if idx < 5 else "bad"), config())
    rollouts = made.explore(1, 0).rollouts
    assert [r.reason for r in rollouts] == ["equal_rewards"] * 4 + [""] * 4
    assert [r.is_used for r in rollouts] == [False] * 4 + [True] * 4
    assert rollouts[0].advantage is None


def test_dynamic_sampling_replaces_groups_that_teach_nothing() -> None:
    calls: list[int] = []

    def texts(idx: int, request: Request) -> str:
        calls.append(idx)
        # Of the first two groups one is of equal rewards, the third is too, the fourth is not.
        group = (len(calls) - 1) // 4
        return some_good(idx, request) if group in (1, 3) else "bad"

    made, _ = explorer(FakeSampler(texts), config(max_rounds=5))
    found = made.explore(1, 0)
    assert (found.num_rounds, found.next_position) == (3, 4)
    assert [r.group for r in found.rollouts[::4]] == [0, 1, 2, 3]
    assert [r.is_used for r in found.rollouts[::4]] == [False, True, False, True]


def test_dynamic_sampling_ends_with_its_rounds() -> None:
    made, _ = explorer(FakeSampler(lambda *_: "bad"), config(max_rounds=3))
    found = made.explore(1, 0)
    assert (found.num_rounds, found.next_position, len(found.rollouts)) == (3, 6, 24)


@pytest.mark.parametrize("is_masked", [True, False])
def test_answers_cut_off_at_their_longest_may_be_masked(is_masked: bool) -> None:
    def texts(idx: int, request: Request) -> str | Completion:
        text = some_good(idx, request)
        return completion_of(text, reason="length") if idx == 2 else text

    made, _ = explorer(FakeSampler(texts), config(groups=1, mask_truncated=is_masked))
    rollouts = made.explore(1, 0).rollouts
    assert rollouts[2].reason == ("truncated" if is_masked else "")
    assert rollouts[2].is_used != is_masked
    assert rollouts[2].advantage == pytest.approx(-0.5)  # it is part of its group all the same


def test_every_question_comes_once_an_epoch_in_an_order_of_its_own() -> None:
    made, _ = explorer(FakeSampler(some_good), config())
    epochs = [[made.question_at(5 * epoch + i).problem.id for i in range(5)] for epoch in range(4)]
    assert all(sorted(epoch) == ["p0", "p1", "p2", "p3", "p4"] for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1
    assert [made.question_at(i).problem.id for i in range(5)] == epochs[0]


def test_what_is_asked_depends_on_the_place_among_the_problems_alone() -> None:
    samplers = [FakeSampler(some_good), FakeSampler(some_good)]
    first, _ = explorer(samplers[0], config())
    first.explore(1, 0)
    first.explore(2, 2)
    second, _ = explorer(samplers[1], config())
    second.explore(2, 2)
    assert samplers[0].requests[8:] == samplers[1].requests
    seeds = [request.sampling.seed for request in samplers[0].requests]
    assert len(set(seeds)) == 16
    assert all(request.keep_logprobs for request in samplers[0].requests)


def test_a_failure_to_judge_is_told_once_a_kind(caplog: pytest.LogCaptureFixture) -> None:
    kinds = {0: "sandbox_error", 1: "toolchain_missing"}
    made, _ = explorer(FakeSampler(some_good), config(), outcome=lambda source: kinds[len(source) % 2])
    with caplog.at_level("WARNING", logger="dscoder"):
        made.explore(1, 0)
    told = [message for message in caplog.messages if "was not judged" in message]
    assert sorted(message.partition("(")[2].partition(":")[0] for message in told) == sorted(kinds.values())


def test_a_sampler_that_leaves_a_request_out_is_named() -> None:
    class Forgetful(FakeSampler):
        def sample(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
            return (found for found in super().sample(requests) if found[0] != 2)

    made, _ = explorer(Forgetful(some_good), config())
    with pytest.raises(ValueError, match="must complete all 8 requests, got none for 1"):
        made.explore(1, 0)


def test_a_chat_template_that_is_missing_is_no_matter_of_room() -> None:
    class Chats(Letters):
        def problems(self) -> list[Problem]:
            return [Problem(task="chats", id="0", prompt="a", form="chat", max_new_tokens=4)]

    with pytest.raises(ValueError, match=r"^prompts: template must be one of"):
        make_questions(Chats(), ENCODER, max_new_tokens=6)


def test_problems_that_leave_no_room_are_left_out() -> None:
    class Chats(Letters):
        """Chat prompts, which are never cut."""

        def __init__(self, *lengths: int) -> None:
            self._problems = [
                Problem(task="chats", id=str(n), prompt="a" * n, form="chat", max_new_tokens=4)
                for n in lengths
            ]

    encoder = replace(ENCODER, template="v2", max_positions=40)
    found = make_questions(Chats(1, 200, 2), encoder, max_new_tokens=6)
    assert [question.problem.id for question in found] == ["1", "2"]
    assert [question.request.max_new_tokens for question in found] == [4, 4]
    with pytest.raises(ValueError, match=r"some of the 1 problems of letters must leave room .* \(200: "):
        make_questions(Chats(200), encoder, max_new_tokens=6)
    with pytest.raises(ValueError, match=r"some of the 0 problems .* \(there are none\)"):
        make_questions(Letters(0), ENCODER, max_new_tokens=6)


def test_a_sampler_that_fails_does_not_wait_for_programs() -> None:
    def texts(idx: int, request: Request) -> str:
        if idx == 6:
            raise ValueError("logits must be finite")
        return f"program {idx}"

    made, pool = explorer(FakeSampler(texts), config(), outcome=lambda _: "never")
    with pytest.raises(ValueError, match="logits must be finite"):
        made.explore(1, 0)
    assert len(pool.waiting) == 6
    assert all(future.cancelled() for future in pool.waiting)


def test_a_sampler_without_log_probabilities_is_refused() -> None:
    made, _ = explorer(FakeSampler(lambda *_: replace(completion_of("good"), logprobs=None)), config())
    with pytest.raises(ValueError, match="a sampler must give the log-probabilities"):
        made.explore(1, 0)
