"""Answers that may have cheated their tests: never rewarded, never an example, always told."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dscoder.config.grpo import ProcessConfig, RewardsConfig
from dscoder.config.reward import PreferConfig
from dscoder.runtime.artifact import read_manifest
from dscoder.sandbox.verdict import Verdict
from dscoder.tasks.problem import Grade, Problem
from dscoder.train import grpo, preferences
from dscoder.train.pairs import Candidate, pool_answers
from dscoder.train.policy_step import rollout_figures
from dscoder.train.refresh import candidates_of
from dscoder.train.reward import RewardBatch
from dscoder.train.rollout import Rollout, read_rollouts, require_rewards, step_file, write_rollouts
from tests.train.grpo_stand_in import FakeSampler, Letters, config_for, rollout, save_policy


class Watched(Letters):
    """An answer with an "x" is suspect; it passes all the same, but with a "y"."""

    def grade(self, problem: Problem, completion: str, verdict: Verdict | None) -> Grade:
        grade = Letters.grade(self, problem, completion, verdict)
        is_cheating = "x" in completion
        if is_cheating and "y" not in completion:
            grade = Grade(is_passed=True, score=1.0, detail="passed, but has 'x'")
        return replace(grade, is_suspect=is_cheating)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("suspects"))


def explored(model_dir: Path, out: Path, texts: list[str], **fields: Any) -> list[Rollout]:
    """The first group of a step with these four answers."""
    hooks = {name: fields.pop(name) for name in ("rewards_given", "process_rewards") if name in fields}
    made = config_for(model_dir, out, num_steps=1, **fields)
    grpo.run(
        made,
        Watched(),
        rewards=hooks.get("rewards_given"),
        process_rewards=hooks.get("process_rewards"),
        make_sampler=lambda *_: FakeSampler(lambda idx, _: texts[idx % 4]),
    )
    return read_rollouts(out, 1)[:4]


def ones(batch: RewardBatch) -> list[float | None]:
    return [1.0 if "x" in answer.completion else 0.25 for answer in batch.answers]


def test_a_suspect_has_no_reward_from_any_function_and_moves_nobody_elses(
    model_dir: Path, tmp_path: Path
) -> None:
    rewards = RewardsConfig(functions=("tests", "ones"))
    found = explored(
        model_dir, tmp_path / "run", ["ee", "x", "aa", "ea"], rewards=rewards, rewards_given={"ones": ones}
    )
    suspect = found[1]
    assert (suspect.is_suspect, suspect.is_passed, suspect.score) == (True, True, 1.0)
    assert (suspect.reward, suspect.advantage, suspect.is_used) == (None, None, False)
    assert suspect.reason == "suspect"
    assert suspect.rewards == {"tests": None, "ones": None}
    assert suspect.failures == {"mix": "suspect"}
    # The others are compared with one another alone.
    assert [r.advantage for r in (found[0], found[2], found[3])] == pytest.approx([1.0, -1.0, 0.0])
    assert all(r.is_used for r in found if r is not suspect)


def test_a_suspect_that_failed_keeps_its_failure(model_dir: Path, tmp_path: Path) -> None:
    found = explored(model_dir, tmp_path / "run", ["ee", "xy", "aa", "ea"])[1]
    assert (found.is_suspect, found.reward, found.is_used, found.reason) == (True, 0.0, True, "")


def test_a_suspect_stands_in_for_no_missing_reward(model_dir: Path, tmp_path: Path) -> None:
    def some(batch: RewardBatch) -> list[float | None]:
        return [None if answer.completion == "ee" else value for answer, value in _valued(batch)]

    def _valued(batch: RewardBatch) -> list[tuple[Any, float]]:
        return list(zip(batch.answers, [0.0, 100.0, 0.0, 1.0], strict=True))

    rewards = RewardsConfig(functions=("tests", "ones"))
    found = explored(
        model_dir, tmp_path / "run", ["ee", "x", "aa", "ea"], rewards=rewards, rewards_given={"ones": some}
    )
    assert found[0].reward == pytest.approx(1.0 + 0.5)


def test_steps_of_a_suspect_are_not_rewarded_either(model_dir: Path, tmp_path: Path) -> None:
    def per_step(batch: RewardBatch) -> list[list[float]]:
        return [[float(letter in "ex") for letter in answer.steps] for answer in batch.answers]

    rewards = RewardsConfig(process=ProcessConfig(functions=("per_step",), steps=r"[\s\S]", outcome=0.5))
    found = explored(
        model_dir,
        tmp_path / "run",
        ["ee", "xxxx", "aa", "ea"],
        rewards=rewards,
        process_rewards={"per_step": per_step},
    )
    suspect = found[1]
    assert (suspect.reason, suspect.is_used) == ("suspect", False)
    assert [(step.reward, step.advantage) for step in suspect.steps] == [(None, None)] * 4
    # Three of the six steps that count are right: their mean is a half.
    assert found[0].steps[-1].advantage == pytest.approx(0.5 / (6 * 0.25 / 5) ** 0.5 + 0.5 * 1.0)


def test_suspects_are_counted_told_once_and_stored(
    model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING"):
        found = explored(model_dir, tmp_path / "run", ["ee", "x", "xx", "ea"])
    told = [record.getMessage() for record in caplog.records if "suspect" in record.getMessage()]
    assert len(told) == 1
    assert "is suspect: it may have cheated its tests (passed, but has 'x'); it has no reward" in told[0]
    figures = rollout_figures(found)
    assert (figures["suspect"], figures["left_out mix: suspect"]) == (0.5, 2.0)
    assert figures["reward_tests"] == pytest.approx(0.75)  # of the two others
    lines = step_file(tmp_path / "run", 1).read_text().splitlines()
    assert ["is_suspect" in line for line in lines[:4]] == [False, True, True, False]


def test_a_step_of_suspects_alone_ends_no_run(tmp_path: Path) -> None:
    withheld = rollout(is_suspect=True, is_passed=True, score=1.0, reward=None, advantage=None)
    write_rollouts(tmp_path, 1, [withheld])
    assert read_rollouts(tmp_path, 1) == [withheld]
    require_rewards([rollout(reward=None), withheld])
    with pytest.raises(ValueError, match="must have a reward"):
        require_rewards([rollout(reward=None, is_suspect=True, is_passed=False, score=0.0)])


def test_a_group_of_suspects_but_one_is_left_out(model_dir: Path, tmp_path: Path) -> None:
    found = explored(model_dir, tmp_path / "run", ["ee", "x", "xx", "xxx"])
    assert {r.reason for r in found} == {"too_few_rewards"}


def candidate(program: str, score: float, *, is_suspect: bool = False) -> Candidate:
    return Candidate(
        problem="p",
        form="completion",
        prompt="?",
        suffix="",
        source="model",
        idx=0,
        completion=program,
        finish_reason="eos",
        program=program,
        outcome="passed" if score else "failed",
        score=score,
        detail="",
        is_suspect=is_suspect,
    )


def test_a_program_of_a_suspect_is_in_no_answer() -> None:
    found = pool_answers(
        [
            candidate("cheat", 1.0),
            candidate("cheat", 1.0, is_suspect=True),
            candidate("right", 1.0),
            candidate("failed", 0.0, is_suspect=True),
        ]
    )
    assert [answer.program for answer in found] == ["right", "failed"]


def written(directory: Path, answers: list[str]) -> str:
    path = directory / "answers.jsonl"
    path.write_text("".join(json.dumps({"problem": "p0", "completion": text}) + "\n" for text in answers))
    return str(path)


def test_prefer_makes_no_pair_of_suspects_and_counts_them(tmp_path: Path) -> None:
    source = written(tmp_path, ["ee", "x", "x ", "aa", "xy"])
    out = preferences.run(PreferConfig(out=str(tmp_path / "out"), candidates=(source,)), task=Watched())
    pairs = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    assert {(pair["chosen"]["completion"], pair["rejected"]["completion"]) for pair in pairs} == {
        ("ee", "aa"),
        ("ee", "xy"),
    }
    assert [pair["prompt_pass_rate"] for pair in pairs] == pytest.approx([1 / 3, 1 / 3])
    dropped = read_manifest(out, command="prefer")["dropped"]
    assert (dropped["suspect"], dropped["not_judged"], dropped["same_program"]) == (2, 0, 0)


def test_that_only_suspects_passed_is_told(tmp_path: Path) -> None:
    source = written(tmp_path, ["x", "aa", "xy"])
    with pytest.raises(ValueError, match=r"'passed': 1\}, 1 left out as suspect"):
        preferences.run(PreferConfig(out=str(tmp_path / "out"), candidates=(source,)), task=Watched())


@pytest.mark.parametrize(("score", "wanted"), [(1.0, []), (0.0, ["x"])])
def test_a_refresh_learns_from_no_suspect_that_passed(score: float, wanted: list[str]) -> None:
    made: Callable[..., Rollout] = rollout
    found = made(completion="x", is_passed=bool(score), score=score, is_suspect=True, reward=None)
    task = Watched()
    problems = {problem.id: problem for problem in task.problems()}
    [group] = candidates_of(task, problems, {"step-000001.jsonl": [found]})
    assert [answer.completion for answer in pool_answers(group)] == wanted
