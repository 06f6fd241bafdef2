"""The stage `grpo` in one process: it learns, resumes to the same rollouts and weights, says what it did."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dscoder.checkpoint import load_pretrained, save_pretrained
from dscoder.config.grpo import GrpoConfig, PolicyLossConfig, RewardsConfig, UpdateConfig
from dscoder.config.train import ScheduleConfig
from dscoder.infer.engine import Engine
from dscoder.models import ScalarModel, Transformer
from dscoder.runtime.artifact import read_manifest
from dscoder.sandbox.run import run as run_program
from dscoder.sandbox.verdict import Program, Verdict
from dscoder.tasks.problem import Grade, Problem, Prompt, Task
from dscoder.train import grpo
from dscoder.train.grpo import copy_weights
from dscoder.train.reward import RewardBatch
from dscoder.train.rollout import read_rollouts, written_steps
from dscoder.train.scoring import AnswerScorer
from tests.infer.stand_in import PROMPTS, ask
from tests.train.grpo_stand_in import TOKENIZER, FakeSampler, Letters, config_for, policy, save_policy


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("grpo"))


def busy(model_dir: Path, out: Path, **fields: Any) -> GrpoConfig:
    """All that a resumed run has to find again: a reset reference, several updates, dynamic sampling."""
    config = config_for(model_dir, out, num_steps=6, reset_every=2, **fields)
    return replace(
        config,
        update=UpdateConfig(passes=2, minibatches=2, micro=3),
        rollout=replace(config.rollout, max_rounds=3),
    )


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_pretrained(out / "model").state_dict()


class StopHereError(Exception):
    """Ends a run in place of a signal."""


def test_rewards_rise_and_the_run_leaves_what_it_made(model_dir: Path, tmp_path: Path) -> None:
    seen: list[Mapping[str, float]] = []
    config = config_for(model_dir, tmp_path / "run", num_steps=25)
    config = replace(config, rollout=replace(config.rollout, groups=4, group_size=8))
    out = grpo.run(config, Letters(), on_metrics=seen.append)
    rewards = [report["reward"] for report in seen]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.15
    assert {"seconds_sampling", "seconds_waiting", "kl", "entropy", "mismatch", "used"} <= set(seen[0])
    assert all(report["mismatch"] < 1e-4 for report in seen)
    assert written_steps(out) == list(range(1, 26))
    manifest = read_manifest(out, command="grpo")
    assert manifest["counts"]["steps"] == 25
    assert manifest["counts"]["sequences"] == 25 * 32
    assert set(manifest["inputs"]) == {"model", "problems"}
    tuned = Engine(load_pretrained(out / "model"), TOKENIZER)
    (answer,) = tuned.generate([ask(TOKENIZER.decode(TOKENIZER.encode("an")), max_new_tokens=3)])
    assert len(answer.tokens) > 0


def test_a_run_that_was_killed_goes_on_to_the_same_rollouts_and_weights(
    model_dir: Path, tmp_path: Path
) -> None:
    whole = grpo.run(busy(model_dir, tmp_path / "whole"), Letters())

    def stop(report: Mapping[str, float]) -> None:
        if report["step"] == 5:  # a step after the checkpoint at 4, whose rollouts are made again
            raise StopHereError

    with pytest.raises(StopHereError):
        grpo.run(busy(model_dir, tmp_path / "cut"), Letters(), on_metrics=stop)
    assert written_steps(tmp_path / "cut") == [1, 2, 3, 4, 5]
    resumed: list[float] = []
    cut = grpo.run(
        busy(model_dir, tmp_path / "cut"), Letters(), on_metrics=lambda report: resumed.append(report["step"])
    )
    assert resumed == [5, 6]
    for step in range(1, 7):
        assert read_rollouts(cut, step) == read_rollouts(whole, step)
    there, here = weights(whole), weights(cut)
    assert all(torch.equal(there[name], here[name]) for name in there)
    assert read_manifest(whole, command="grpo")["result"] == read_manifest(cut, command="grpo")["result"]


def test_rollouts_after_the_checkpoint_of_a_killed_run_are_forgotten(model_dir: Path, tmp_path: Path) -> None:
    def stop(report: Mapping[str, float]) -> None:
        if report["step"] == 3:
            raise StopHereError

    config = config_for(model_dir, tmp_path / "run")
    with pytest.raises(StopHereError):
        grpo.run(config, Letters(), on_metrics=stop)
    assert written_steps(tmp_path / "run") == [1, 2, 3]
    seen: list[list[int]] = []

    def texts(idx: int, request: Any) -> str:
        seen.append(written_steps(tmp_path / "run"))
        return "e" * (idx % 3)

    grpo.run(config, Letters(), make_sampler=lambda *_: FakeSampler(texts))
    assert seen[0] == [1, 2]


def test_a_finished_run_does_nothing(model_dir: Path, tmp_path: Path) -> None:
    config = config_for(model_dir, tmp_path / "run", num_steps=1)
    grpo.run(config, Letters())

    def never(*_: Any) -> Any:
        raise AssertionError("no sampler is needed")

    assert grpo.run(config, Letters(), make_sampler=never) == tmp_path / "run"
    with pytest.raises(ValueError, match="was made by another config"):
        grpo.run(config, Letters(num_problems=3))


def test_the_policy_becomes_the_reference_at_its_step(model_dir: Path, tmp_path: Path) -> None:
    def divergences(out: str, **fields: Any) -> list[float]:
        seen: list[float] = []
        config = config_for(model_dir, tmp_path / out, num_steps=5, **fields)
        grpo.run(config, Letters(), on_metrics=lambda report: seen.append(report.get("kl", 0.0)))
        return seen

    kept, reset = divergences("kept"), divergences("reset", reset_every=3)
    # After three steps the policy is the reference: the next step starts from no divergence at all.
    assert kept[:3] == reset[:3]
    assert reset[0] == pytest.approx(0, abs=1e-9)
    assert reset[3] == pytest.approx(0, abs=1e-9)
    assert kept[3] > 1e-5
    assert reset[4] > 1e-9


def test_a_hook_learns_from_the_rollouts_between_resets(model_dir: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, list[int]]] = []
    config = config_for(model_dir, tmp_path / "run", num_steps=5, reset_every=2)
    grpo.run(config, Letters(), on_reset=lambda step, where: seen.append((step, written_steps(where))))
    assert seen == [(2, [1, 2]), (4, [1, 2, 3, 4])]


class Refreshed:
    """A reward that changes with the reset: it likes answers as long as those of the steps before."""

    def __init__(self) -> None:
        self.wanted = 0.0

    def learn(self, step: int, directory: Path) -> None:
        seen = [r for number in range(1, step + 1) for r in read_rollouts(directory, number)]
        self.wanted = sum(len(r.completion) for r in seen) / len(seen)

    def __call__(self, batch: RewardBatch) -> list[float | None]:
        return [-abs(len(answer.completion) - self.wanted) for answer in batch.answers]


def test_a_reward_that_learns_at_resets_knows_as_much_after_a_kill(model_dir: Path, tmp_path: Path) -> None:
    def stop(report: Mapping[str, float]) -> None:
        if report["step"] == 4:
            raise StopHereError

    def go(out: str, **hooks: Any) -> Path:
        config = config_for(
            model_dir,
            tmp_path / out,
            num_steps=6,
            reset_every=3,
            rewards=RewardsConfig(functions=("learnt",)),
        )
        learnt = Refreshed()
        return grpo.run(config, Letters(), rewards={"learnt": learnt}, on_reset=learnt.learn, **hooks)

    whole = go("whole")
    with pytest.raises(StopHereError):
        go("cut", on_metrics=stop)
    again = go("cut")  # from step 2, before the reset
    with pytest.raises(StopHereError):
        go("later", on_metrics=lambda report: stop({"step": report["step"] - 1}))
    later = go("later")  # from step 4, after it
    for step in range(1, 7):
        assert read_rollouts(again, step) == read_rollouts(whole, step) == read_rollouts(later, step)


def test_a_reward_that_fails_is_left_out_and_counted(model_dir: Path, tmp_path: Path) -> None:
    def sometimes(batch: RewardBatch) -> list[float | None]:
        return [float("nan") if idx == 1 else 1.0 for idx in range(len(batch.answers))]

    seen: list[Mapping[str, float]] = []
    rewards = RewardsConfig(functions=("tests", "learnt"), weights=(1.0, 2.0))
    config = config_for(model_dir, tmp_path / "run", num_steps=1, rewards=rewards)
    out = grpo.run(config, Letters(), rewards={"learnt": sometimes}, on_metrics=seen.append)
    assert seen[0]["left_out learnt: not_finite"] == 2  # one an answer of the two groups
    rollouts = read_rollouts(out, 1)
    assert rollouts[1].failures == {"learnt": "not_finite: nan"}
    # The mean of the others stands for it.
    tests = [r.rewards["tests"] or 0.0 for r in rollouts]
    assert [r.reward for r in rollouts] == pytest.approx([share + 2.0 for share in tests])


def test_a_step_that_nobody_can_judge_ends_the_run(model_dir: Path, tmp_path: Path) -> None:
    class Broken(Letters):
        def grade(self, problem: Problem, completion: str, verdict: Verdict | None) -> Grade:
            raise KeyError("no such test")

    rewards = RewardsConfig(functions=("tests", "length"))
    config = config_for(model_dir, tmp_path / "run", num_steps=2, rewards=rewards)
    told = (
        "got none for all 8 (the first: the task could not grade: KeyError('no such test'); tests: no_answer)"
    )
    with pytest.raises(ValueError, match="of step 1 must have a reward, " + re.escape(told)):
        grpo.run(config, Broken())
    assert written_steps(tmp_path / "run") == [1]  # for whoever looks why


def test_a_directory_rewards_as_its_model_scores(model_dir: Path, tmp_path: Path) -> None:
    judge = ScalarModel(policy())
    torch.nn.init.normal_(judge.score.weight)
    save_pretrained(judge, tmp_path / "judge", tokenizer=model_dir)
    config = config_for(
        model_dir,
        tmp_path / "run",
        num_steps=1,
        reward_model=str(tmp_path / "judge"),
        rewards=RewardsConfig(functions=("reward_model",)),
    )
    out = grpo.run(config, Letters())
    scorer = AnswerScorer.load(tmp_path / "judge", device="cpu")
    for rollout in read_rollouts(out, 1):
        asked = Prompt(text=rollout.prompt, max_new_tokens=6)
        assert rollout.reward == pytest.approx(scorer.scores([(asked, rollout.completion)])[0], rel=1e-3)
    assert "reward_model" in read_manifest(out, command="grpo")["inputs"]
    with pytest.raises(ValueError, match="must have a trained scalar head, got a model with a vocabulary"):
        grpo.run(replace(config, out=str(tmp_path / "other"), reward_model=str(model_dir)), Letters())
    with pytest.raises(ValueError, match=r"reward_model must be among rewards.functions .* got tests and"):
        replace(config, rewards=RewardsConfig())


def test_a_hook_evaluates_the_policy(model_dir: Path, tmp_path: Path) -> None:
    seen: list[bool] = []

    def evaluate(model: Transformer) -> dict[str, float]:
        seen.append(model.training)
        return {"found": 0.5}

    config = config_for(model_dir, tmp_path / "run", num_steps=3)
    out = grpo.run(config, Letters(), evaluate=evaluate)
    assert seen == [False, False]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "found" in line] == [2, 3]


def test_a_step_without_a_group_to_learn_from_changes_no_weight(model_dir: Path, tmp_path: Path) -> None:
    config = config_for(model_dir, tmp_path / "run", num_steps=1)
    out = grpo.run(config, Letters(), make_sampler=lambda *_: FakeSampler(lambda *_: "e"))
    before = load_pretrained(model_dir).state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(out).items())
    assert {r.reason for r in read_rollouts(out, 1)} == {"equal_rewards"}


class Sums(Task):
    """Tests in the sandbox: the answer is a number that must be 2."""

    name = "sums"
    limits = replace(Letters.limits, time=10.0)

    def problems(self) -> list[Problem]:
        return [Problem(task=self.name, id="0", prompt="an", max_new_tokens=6)]

    def program(self, problem: Problem, completion: str) -> Program:
        return Program(source=f"assert ({completion}) == 2\n")


def test_answers_are_tested_in_the_sandbox(model_dir: Path, tmp_path: Path) -> None:
    probe = run_program(Program(source="pass"))
    if not probe.is_passed:
        pytest.skip(f"no full isolation here: {probe.detail}")
    texts = ["1 + 1", "3", "1 +", "2"]
    config = config_for(
        model_dir, tmp_path / "run", num_steps=1, rewards=RewardsConfig(functions=("tests", "compiler"))
    )
    config = replace(config, rollout=replace(config.rollout, groups=1))
    out = grpo.run(config, Sums(), make_sampler=lambda *_: FakeSampler(lambda idx, _: texts[idx]))
    rollouts = read_rollouts(out, 1)
    assert [r.rewards for r in rollouts] == [
        {"tests": 1.0, "compiler": 1.0},
        {"tests": 0.0, "compiler": 1.0},
        {"tests": 0.0, "compiler": 0.0},
        {"tests": 1.0, "compiler": 1.0},
    ]
    assert rollouts[1].verdict is not None
    assert rollouts[1].verdict["outcome"] == "failed"
    assert "SyntaxError" in (rollouts[2].verdict or {})["stderr"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reset_every": 2, "loss": PolicyLossConfig(kl=0.0)}, "reset_every must be 0 without a reference"),
        (
            {"rewards": RewardsConfig(functions=("length",), overlong_margin=7)},
            "rewards.overlong_margin must be <= 6, rollout.max_new_tokens, got 7",
        ),
        ({"rewards": RewardsConfig(functions=("no.such",))}, "reward function must be .* got 'no.such'"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_written(
    model_dir: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        grpo.run(config_for(model_dir, tmp_path / "run", **fields), Letters())
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_bfloat16_weights_move_by_their_float32_masters(model_dir: Path, tmp_path: Path) -> None:
    seen: list[Mapping[str, float]] = []
    config = config_for(model_dir, tmp_path / "run", precision="bf16", reset_every=2)
    out = grpo.run(config, Letters(), on_metrics=seen.append)
    assert seen[0]["mismatch"] < 0.05
    after = weights(out)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    before = load_pretrained(model_dir, dtype=torch.bfloat16).state_dict()
    assert any(not torch.equal(before[name], tensor) for name, tensor in after.items())


def test_weights_are_copied_in_place() -> None:
    source, target = policy(), policy()
    torch.nn.init.normal_(source.head.weight)
    places = [p.data_ptr() for p in target.parameters()]
    copy_weights(source, target)
    assert [p.data_ptr() for p in target.parameters()] == places
    assert all(
        torch.equal(a, b) and a is not b
        for a, b in zip(source.parameters(), target.parameters(), strict=True)
    )
    # An engine over the target answers as the source does.
    requests = [ask(bytes(prompt[:4]), max_new_tokens=4) for prompt in PROMPTS]
    answers = [Engine(model, TOKENIZER).generate(requests) for model in (source, target)]
    assert answers[0] == answers[1]


def test_the_rate_follows_its_schedule(model_dir: Path, tmp_path: Path) -> None:
    seen: list[float] = []
    schedule = ScheduleConfig(kind="cosine", max_lr=1e-3, warmup_steps=2)
    config = config_for(model_dir, tmp_path / "run", schedule=schedule)
    grpo.run(config, Letters(), on_metrics=lambda report: seen.append(report["lr"]))
    assert seen[:2] == pytest.approx([5e-4, 1e-3])
    assert seen[3] < seen[2] <= 1e-3
