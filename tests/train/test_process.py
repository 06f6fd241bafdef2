"""Process supervision in the stage `grpo`: what only steps tell is learnt, written down and resumed."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dscoder.checkpoint import load_pretrained, save_pretrained
from dscoder.config.grpo import GrpoConfig, PolicyLossConfig, ProcessConfig, RewardsConfig, UpdateConfig
from dscoder.models import ScalarModel
from dscoder.sandbox.verdict import Verdict
from dscoder.tasks.problem import Grade, Problem
from dscoder.train import grpo
from dscoder.train.advantage import process_advantages
from dscoder.train.reward import RewardBatch
from dscoder.train.rollout import read_rollouts
from tests.train.grpo_stand_in import FakeSampler, Letters, config_for, policy, save_policy

EACH = r"[\s\S]"  # every character is a step


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("process"))


class Fine(Letters):
    """Every answer is right: whole answers tell nothing."""

    def grade(self, problem: Problem, completion: str, verdict: Verdict | None) -> Grade:
        return Grade(is_passed=True, score=1.0)


def vowels(batch: RewardBatch) -> list[list[float | None] | None]:
    """1 for each step that is an "e", else 0."""
    return [[float("e" in step) for step in answer.steps] for answer in batch.answers]


def config(model_dir: Path, out: Path, **fields: Any) -> GrpoConfig:
    process = {"functions": ("vowels",), "steps": EACH} | fields.pop("process", {})
    rewards = RewardsConfig(process=ProcessConfig(**process))
    return config_for(model_dir, out, rewards=rewards, **fields)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_pretrained(out / "model").state_dict()


def test_what_only_steps_tell_is_learnt(model_dir: Path, tmp_path: Path) -> None:
    seen: list[Mapping[str, float]] = []
    made = config(model_dir, tmp_path / "run", num_steps=25)
    made = replace(made, rollout=replace(made.rollout, groups=4, group_size=8))
    grpo.run(made, Fine(), process_rewards={"vowels": vowels}, on_metrics=seen.append)
    found = [report["reward_process.vowels"] for report in seen]
    assert sum(found[-5:]) / 5 > sum(found[:5]) / 5 + 0.15
    assert all(report["reward"] == 1 for report in seen)
    # By whole answers nothing is learnt at all: no group has a difference.
    plain = replace(made, out=str(tmp_path / "plain"), rewards=RewardsConfig(), num_steps=2)
    before = load_pretrained(model_dir).state_dict()
    after = weights(grpo.run(plain, Fine()))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_rollouts_hold_the_closed_form(model_dir: Path, tmp_path: Path) -> None:
    made = config(model_dir, tmp_path / "run", num_steps=1)
    texts = ["ae", "eae", "e", "xy"]
    out = grpo.run(
        made,
        Fine(),
        process_rewards={"vowels": vowels},
        make_sampler=lambda *_: FakeSampler(lambda idx, _: texts[idx % 4]),
    )
    group = read_rollouts(out, 1)[:4]
    rewards = [[step.reward for step in r.steps] for r in group]
    assert rewards == [[0.0, 1.0], [1.0, 0.0, 1.0], [1.0], [0.0, 0.0]]
    assert [[step.rewards for step in r.steps] for r in group][2] == [{"process.vowels": 1.0}]
    # Mean and deviation of all eight steps; a token counts those that end at or after it.
    mean, std = 0.5, (8 * 0.25 / 7) ** 0.5
    good, bad = (1 - mean) / std, -mean / std
    for rollout, wanted in zip(
        group,
        [[good + bad, good], [good + bad + good, bad + good, good], [good], [bad + bad, bad]],
        strict=True,
    ):
        assert [step.advantage for step in rollout.steps] == pytest.approx(wanted)
        assert rollout.steps[-1].end == len(rollout.completion_ids)
        assert rollout.steps[-1].text_end == len(rollout.completion)
        assert rollout.is_used
    by_token, _ = process_advantages(
        rewards,
        [[step.end for step in r.steps] for r in group],
        num_tokens=[len(r.completion_ids) for r in group],
    )
    assert [list(values or ()) for values in by_token] == [r.token_advantages for r in group]


def test_a_missing_step_is_no_zero_and_an_answer_without_any_is_left_out(
    model_dir: Path, tmp_path: Path
) -> None:
    def some(batch: RewardBatch) -> list[Any]:
        return [[None, 1.0], [4.0, 7.0], None, [float("nan"), float("nan")]]

    out = grpo.run(
        config(model_dir, tmp_path / "run", num_steps=1),
        Fine(),
        process_rewards={"vowels": some},
        make_sampler=lambda *_: FakeSampler(lambda *_: "ab"),
    )
    group = read_rollouts(out, 1)[:4]
    assert [r.reason for r in group] == ["", "", "no_reward", "no_reward"]
    assert [[step.advantage for step in r.steps] for r in group[:2]] == [[-1.0, -1.0], [1.0, 1.0]]
    assert [step.advantage for step in group[2].steps] == [None, None]
    assert [r.failures.get("process.vowels") for r in group] == [
        "no_answer",
        None,
        "no_answer",
        "not_finite: nan",
    ]


def test_groups_whose_steps_are_all_alike_are_replaced(model_dir: Path, tmp_path: Path) -> None:
    made = config(model_dir, tmp_path / "run", num_steps=1)
    made = replace(made, rollout=replace(made.rollout, max_rounds=3))
    calls: list[int] = []

    def texts(idx: int, _: Any) -> str:
        calls.append(idx)
        return "ee" if len(calls) <= 4 or idx % 2 else "ea"  # the first group alone is all alike

    out = grpo.run(
        made, Fine(), process_rewards={"vowels": vowels}, make_sampler=lambda *_: FakeSampler(texts)
    )
    rollouts = read_rollouts(out, 1)
    assert [rollouts[idx].reason for idx in (0, 4, 8)] == ["equal_rewards", "", ""]
    assert [step.advantage for step in rollouts[0].steps] == [None, None]


def test_the_whole_answer_may_count_beside_its_steps(model_dir: Path, tmp_path: Path) -> None:
    texts = ["ea", "ae", "ee", "aa"]

    def run(name: str, outcome: float, task: Letters) -> list[list[float | None]]:
        made = config(model_dir, tmp_path / name, num_steps=1, process={"outcome": outcome})
        out = grpo.run(
            made,
            task,
            process_rewards={"vowels": vowels},
            make_sampler=lambda *_: FakeSampler(lambda idx, _: texts[idx % 4]),
        )
        group = read_rollouts(out, 1)[:4]
        own = [r.advantage or 0.0 for r in group]
        assert [r.reward for r in group] == ([0.5, 0.5, 1.0, 0.0] if type(task) is Letters else [1.0] * 4)
        return [
            [(step.advantage or 0.0) - outcome * advantage for step in r.steps]
            for r, advantage in zip(group, own, strict=True)
        ]

    alone, mixed = run("alone", 0.0, Letters()), run("mixed", 2.0, Letters())
    for one, other in zip(alone, mixed, strict=True):
        assert one == pytest.approx(other)
    assert run("equal", 2.0, Fine()) == alone  # whole answers that are all alike add nothing


class StopHereError(Exception):
    """Ends a run in place of a signal."""


def test_a_run_that_was_killed_goes_on_to_the_same_rollouts_and_weights(
    model_dir: Path, tmp_path: Path
) -> None:
    def run(name: str, **hooks: Any) -> Path:
        made = config(model_dir, tmp_path / name, num_steps=5, process={"outcome": 0.5})
        made = replace(
            made,
            update=UpdateConfig(passes=2, minibatches=2, micro=3),
            rollout=replace(made.rollout, max_rounds=2),
        )
        return grpo.run(made, Letters(), process_rewards={"vowels": vowels}, **hooks)

    def stop(report: Mapping[str, float]) -> None:
        if report["step"] == 3:
            raise StopHereError

    whole = run("whole")
    with pytest.raises(StopHereError):
        run("cut", on_metrics=stop)
    cut = run("cut")
    for step in range(1, 6):
        assert read_rollouts(cut, step) == read_rollouts(whole, step)
    there, here = weights(whole), weights(cut)
    assert all(torch.equal(there[name], here[name]) for name in there)


def test_the_reward_model_is_read_at_every_step(model_dir: Path, tmp_path: Path) -> None:
    judge = ScalarModel(policy())
    torch.nn.init.normal_(judge.score.weight)
    save_pretrained(judge, tmp_path / "judge", tokenizer=model_dir)
    rewards = RewardsConfig(functions=("tests", "reward_model"), process=ProcessConfig(steps=EACH))
    made = config_for(
        model_dir, tmp_path / "run", num_steps=1, reward_model=str(tmp_path / "judge"), rewards=rewards
    )
    rollouts = read_rollouts(grpo.run(made, Letters()), 1)
    assert max(len(r.steps) for r in rollouts) > 2
    for rollout in rollouts:
        # The last step ends where the whole answer is scored.
        assert rollout.steps[-1].reward == pytest.approx(rollout.rewards["reward_model"], rel=1e-3, abs=1e-5)
    several = [r for r in rollouts if len(r.steps) > 1]
    assert all(len({step.reward for step in r.steps}) > 1 for r in several)


def test_a_process_function_that_never_tells_ends_the_run(model_dir: Path, tmp_path: Path) -> None:
    def fails(_: RewardBatch) -> list[list[float]]:
        raise KeyError("verifier")

    with pytest.raises(ValueError, match=r"of step 1 must have a reward, .*process.vowels: raised: KeyError"):
        grpo.run(config(model_dir, tmp_path / "run"), Fine(), process_rewards={"vowels": fails})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss": PolicyLossConfig(objective="sequence")}, "must go with an objective and a ratio a token"),
        ({"loss": PolicyLossConfig(ratio="geometric_mean")}, ".*got grpo and geometric_mean"),
        ({"advantage": "rloo"}, "advantage must be group or mean with rewards.process .* got rloo"),
    ],
)
def test_what_would_lose_the_steps_is_refused(
    fields: dict[str, Any], message: str, model_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"GrpoConfig: .*{message}"):
        config(model_dir, tmp_path / "run", **fields)


@pytest.mark.parametrize("objective", ["grpo", "dr_grpo", "dapo", "bnpo"])
@pytest.mark.parametrize("advantage", ["group", "mean"])
def test_steps_go_with_every_objective_a_token(
    objective: Any, advantage: Any, model_dir: Path, tmp_path: Path
) -> None:
    loss = PolicyLossConfig(objective=objective, correction="token", clip_high=0.28)
    made = config(model_dir, tmp_path / "run", num_steps=1, loss=loss, advantage=advantage)
    out = grpo.run(made, Fine(), process_rewards={"vowels": vowels})
    assert any(r.is_used for r in read_rollouts(out, 1))


def test_what_cannot_be_found_is_named_before_anything_is_sampled(model_dir: Path, tmp_path: Path) -> None:
    for process, message in (
        ({"functions": ("reward_model",)}, r"must be reward_model \(with a reward_model named\) or package"),
        ({"steps": "("}, r"rewards.process.steps must be lines, .* got '\('"),
    ):
        made = config(model_dir, tmp_path / "run", process=process)
        with pytest.raises(ValueError, match=message):
            grpo.run(made, Fine(), process_rewards={"vowels": vowels})
