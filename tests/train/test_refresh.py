"""Iterative GRPO: the reward model learns from the rollouts since the last reset, and rewards the next."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dscoder.checkpoint import load_pretrained, load_scalar_model, save_pretrained
from dscoder.config.grpo import GrpoConfig, PolicyLossConfig, ProcessConfig, RewardsConfig
from dscoder.config.reward import PreferConfig, RefreshConfig
from dscoder.config.train import BatchConfig, CheckpointConfig, ScheduleConfig
from dscoder.models import ScalarModel
from dscoder.sandbox.verdict import Verdict
from dscoder.tasks.problem import Prompt
from dscoder.train import grpo, preferences
from dscoder.train.pairs import pool_answers
from dscoder.train.refresh import candidates_of, done_resets, reset_directory
from dscoder.train.reward_data import is_held_out_prompt
from dscoder.train.reward_model import RewardSteps
from dscoder.train.rollout import Rollout, read_rollouts, verdict_record
from dscoder.train.scoring import AnswerScorer
from tests.train.grpo_stand_in import FakeSampler, Letters, Programs, config_for, policy, rollout, save_policy

SHARE = 0.4  # of the prompts held out
TEXTS = ["ee", "xe", "xx", "zx", "e", "xz", "eex", "zz"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("refresh"))


@pytest.fixture(scope="module")
def judge_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("judge") / "model"
    torch.manual_seed(1)
    judge = ScalarModel(policy())
    torch.nn.init.normal_(judge.score.weight)
    with torch.no_grad():
        judge.score.weight.neg_()  # it finds "e" bad at first
    save_pretrained(judge, directory, tokenizer=model_dir)
    return directory


REFRESH = RefreshConfig(
    replay_share=0.25,
    held_out_share=SHARE,
    num_steps=8,
    batch=BatchConfig(sequences=8, micro=8),
    schedule=ScheduleConfig(kind="constant", max_lr=1e-2, warmup_steps=0),
    checkpoint=CheckpointConfig(every=3),
)


def config(model_dir: Path, judge_dir: Path, out: Path, **fields: Any) -> GrpoConfig:
    """Five steps with resets after two and four."""
    refresh = fields.pop("refresh", REFRESH)
    rewards = RewardsConfig(functions=("tests", "reward_model"), weights=(0.1, 1.0), refresh=refresh)
    made = config_for(
        model_dir,
        out,
        **{"num_steps": 5, "reset_every": 2, "reward_model": str(judge_dir), "rewards": rewards} | fields,
    )
    return replace(made, rollout=replace(made.rollout, groups=4, group_size=4))


def task() -> Letters:
    return Letters(8)


def sampler(*_: Any) -> FakeSampler:
    return FakeSampler(lambda idx, _: TEXTS[idx % len(TEXTS)])


def reward_weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    return load_scalar_model(reset_directory(out, step) / "reward" / "model").state_dict()


def is_same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_prompts_of_these_tests_are_on_both_sides() -> None:
    held = [is_held_out_prompt(problem.prompt, "", share=SHARE) for problem in task().problems()]
    assert 2 <= sum(held) <= 6


def test_each_reset_learns_from_what_was_written_since_with_some_of_what_came_before(
    model_dir: Path, judge_dir: Path, tmp_path: Path
) -> None:
    seen: list[Mapping[str, float]] = []
    made = config(model_dir, judge_dir, tmp_path / "run")
    out = grpo.run(made, task(), make_sampler=sampler, on_metrics=seen.append)
    assert done_resets(out) == [2, 4]
    for reset, steps in ((2, (1, 2)), (4, (3, 4))):
        lines = (reset_directory(out, reset) / "preferences" / "graded.jsonl").read_text().splitlines()
        sources = {source for line in lines for source, _ in json.loads(line)["candidates"]}
        assert sources == {f"step-{step:06d}.jsonl" for step in steps}
    figures = {int(report["step"]): report for report in seen}
    assert [step for step, report in figures.items() if "refresh_accuracy" in report] == [3, 5]
    first, second = figures[3], figures[5]
    # A quarter of what is learnt from is old, where there is something old.
    assert first["refresh_replayed"] == 0
    assert second["refresh_replayed"] > 0
    new = second["refresh_pairs"] - second["refresh_replayed"]
    assert second["refresh_replayed"] == round(new / 3)
    held = json.loads((reset_directory(out, 2) / "reward" / "held_out.json").read_text())
    assert first["refresh_accuracy"] == held["accuracy"]
    assert first["refresh_accuracy_before"] == held["before"]["held_out_accuracy"]
    # It learns that "e" is good, which holds for the prompts that are held out.
    assert first["refresh_accuracy_before"] < 0.3
    assert first["refresh_accuracy"] > 0.9


def test_each_step_is_scored_by_the_model_of_the_last_reset(
    model_dir: Path, judge_dir: Path, tmp_path: Path
) -> None:
    out = grpo.run(config(model_dir, judge_dir, tmp_path / "run"), task(), make_sampler=sampler)
    models = {1: judge_dir, 2: judge_dir}
    models |= {step: reset_directory(out, 2) / "reward" / "model" for step in (3, 4)}
    models[5] = reset_directory(out, 4) / "reward" / "model"
    for step, where in models.items():
        rollouts = read_rollouts(out, step)
        scores = AnswerScorer.load(where, device="cpu").scores(
            [(Prompt(text=r.prompt, max_new_tokens=6), r.completion) for r in rollouts]
        )
        found = [r.rewards["reward_model"] for r in rollouts]
        assert found == pytest.approx(scores, rel=1e-3, abs=1e-4)


def test_the_later_model_begins_where_the_earlier_one_ended(
    model_dir: Path, judge_dir: Path, tmp_path: Path
) -> None:
    still = replace(REFRESH, schedule=ScheduleConfig(kind="constant", max_lr=1e-12, warmup_steps=0))
    out = grpo.run(config(model_dir, judge_dir, tmp_path / "still", refresh=still), task())
    before = load_scalar_model(judge_dir).state_dict()
    for step in (2, 4):
        after = reward_weights(out, step)
        assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


class KilledError(Exception):
    """Ends a run in place of a signal."""


def outcome(out: Path) -> tuple[list[list[Rollout]], list[dict[str, torch.Tensor]]]:
    rollouts = [read_rollouts(out, step) for step in range(1, 6)]
    return rollouts, [load_pretrained(out / "model").state_dict(), *(reward_weights(out, n) for n in (2, 4))]


@pytest.fixture(scope="module")
def whole(
    model_dir: Path, judge_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[list[Rollout]], list[dict[str, torch.Tensor]]]:
    out = tmp_path_factory.mktemp("whole") / "run"
    return outcome(grpo.run(config(model_dir, judge_dir, out), task()))


def assert_same_as(whole: Any, out: Path) -> None:
    rollouts, weights = outcome(out)
    assert rollouts == whole[0]
    assert all(is_same(one, other) for one, other in zip(whole[1], weights, strict=True))


# A checkpoint at each reset, or between the two; killed before, between and after them.
@pytest.mark.parametrize(("every", "step"), [(3, 1), (1, 3), (2, 4), (3, 5)])
def test_a_run_killed_before_or_after_a_reset_goes_on_exactly(
    every: int, step: int, whole: Any, model_dir: Path, judge_dir: Path, tmp_path: Path
) -> None:
    def kill(report: Mapping[str, float]) -> None:
        if report["step"] == step:
            raise KilledError

    made = config(model_dir, judge_dir, tmp_path / "run", checkpoint=CheckpointConfig(every=every))
    with pytest.raises(KilledError):
        grpo.run(made, task(), on_metrics=kill)
    assert_same_as(whole, grpo.run(made, task()))


@pytest.mark.parametrize(("every", "reset", "at"), [(1, 2, 0), (3, 2, 5), (1, 4, 4), (3, 4, 7)])
def test_a_run_killed_while_the_reward_model_learns_goes_on_exactly(
    every: int,
    reset: int,
    at: int,
    whole: Any,
    model_dir: Path,
    judge_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = RewardSteps.train_step
    taken: list[int] = []

    def mortal(self: RewardSteps, optimizer: Any, step: int, lr: float) -> Any:
        if len(done_resets(tmp_path / "run")) == (reset == 4) and step == at:
            raise KilledError
        taken.append(step)
        return real(self, optimizer, step, lr)

    made = config(model_dir, judge_dir, tmp_path / "run", checkpoint=CheckpointConfig(every=every))
    with monkeypatch.context() as patched:
        patched.setattr(RewardSteps, "train_step", mortal)
        with pytest.raises(KilledError):
            grpo.run(made, task())
    assert taken[-1:] == ([at - 1] if at else [7] * (reset == 4))
    assert_same_as(whole, grpo.run(made, task()))


@pytest.mark.parametrize("is_other", [False, True])
def test_a_reset_is_done_again_if_it_learnt_from_other_answers(
    is_other: bool, model_dir: Path, judge_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(make_sampler: Any = sampler, **hooks: Any) -> Path:
        made = config(model_dir, judge_dir, tmp_path / "run", checkpoint=CheckpointConfig(every=3))
        return grpo.run(made, task(), make_sampler=make_sampler, **hooks)

    def kill(report: Mapping[str, float]) -> None:
        if report["step"] == 5:  # after the second reset; the checkpoint is of step 3
            raise KilledError

    def others(*_: Any) -> FakeSampler:
        return FakeSampler(lambda idx, _: TEXTS[(idx + idx // 4) % len(TEXTS)])

    real, taken = RewardSteps.train_step, []

    def counted(self: RewardSteps, optimizer: Any, step: int, lr: float) -> Any:
        taken.append(step)
        return real(self, optimizer, step, lr)

    with pytest.raises(KilledError):
        run(on_metrics=kill)
    before = reward_weights(tmp_path / "run", 4)
    monkeypatch.setattr(RewardSteps, "train_step", counted)
    out = run(others if is_other else sampler)
    assert len(taken) == (8 if is_other else 0)
    assert is_same(before, reward_weights(out, 4)) != is_other


def test_a_reset_that_was_deleted_is_made_again(
    whole: Any, model_dir: Path, judge_dir: Path, tmp_path: Path
) -> None:
    def kill(report: Mapping[str, float]) -> None:
        if report["step"] == 4:
            raise KilledError

    made = config(model_dir, judge_dir, tmp_path / "run", checkpoint=CheckpointConfig(every=1))
    with pytest.raises(KilledError):
        grpo.run(made, task(), on_metrics=kill)
    shutil.rmtree(reset_directory(tmp_path / "run", 2))
    assert_same_as(whole, grpo.run(made, task()))
    assert done_resets(tmp_path / "run") == [2, 4]


def test_a_reset_without_a_pair_leaves_the_model_and_its_rollouts_to_the_next(
    model_dir: Path, judge_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def alike(idx: int, request: Any) -> str:
        calls.append(idx)
        return "e" if len(calls) <= 2 * 16 else TEXTS[idx % len(TEXTS)]

    def run(**hooks: Any) -> Path:
        calls.clear()
        made = config(model_dir, judge_dir, tmp_path / "run", checkpoint=CheckpointConfig(every=3))
        return grpo.run(made, task(), make_sampler=lambda *_: FakeSampler(alike), **hooks)

    calls: list[int] = []
    seen: list[Mapping[str, float]] = []

    def kill(report: Mapping[str, float]) -> None:
        seen.append(report)
        if report["step"] == 4:
            raise KilledError

    with caplog.at_level("WARNING", logger="dscoder"), pytest.raises(KilledError):
        run(on_metrics=kill)
    assert [report.get("refresh_skipped") for report in seen] == [None, None, 1.0, None]
    assert any("the reward model learns nothing at this reset" in text for text in caplog.messages)
    calls = [0] * 48  # steps 1 to 3 are done
    made = config(model_dir, judge_dir, tmp_path / "run", checkpoint=CheckpointConfig(every=3))
    out = grpo.run(made, task(), make_sampler=lambda *_: FakeSampler(lambda idx, _: TEXTS[idx % len(TEXTS)]))
    assert done_resets(out) == [4]
    lines = (reset_directory(out, 4) / "preferences" / "graded.jsonl").read_text().splitlines()
    sources = {source for line in lines for source, _ in json.loads(line)["candidates"]}
    assert sources == {f"step-{step:06d}.jsonl" for step in (1, 2, 3, 4)}


def test_earlier_preferences_are_replayed_at_the_first_reset(
    model_dir: Path, judge_dir: Path, tmp_path: Path
) -> None:
    records = [{"problem": problem.id, "completion": text} for problem in task().problems() for text in TEXTS]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    earlier = preferences.run(
        PreferConfig(out=str(tmp_path / "earlier"), candidates=(str(tmp_path / "c.jsonl"),)), task=task()
    )
    seen: list[Mapping[str, float]] = []
    refresh = replace(REFRESH, preferences=(str(earlier),))
    made = config(model_dir, judge_dir, tmp_path / "run", num_steps=3, refresh=refresh)
    grpo.run(made, task(), make_sampler=sampler, on_metrics=seen.append)
    figures = seen[2]
    assert (
        figures["refresh_replayed"] == round((figures["refresh_pairs"] - figures["refresh_replayed"]) / 3) > 0
    )
    # Earlier ones without a pair to learn from would skip every reset: that is told at once.
    with pytest.raises(ValueError, match=r"the training prompts must have a pair, .*too_long_pairs"):
        grpo.run(
            config(model_dir, judge_dir, tmp_path / "none", refresh=replace(refresh, max_length=1)), task()
        )


def test_the_reward_model_of_steps_is_refreshed_too(model_dir: Path, judge_dir: Path, tmp_path: Path) -> None:
    process = ProcessConfig(steps=r"[\s\S]")
    rewards = RewardsConfig(process=process, refresh=REFRESH)
    loss = PolicyLossConfig(kl=0.0)  # there is no reference to reset
    made = config(model_dir, judge_dir, tmp_path / "run", num_steps=3, rewards=rewards, loss=loss)
    out = grpo.run(made, task(), make_sampler=sampler)
    scorer = AnswerScorer.load(reset_directory(out, 2) / "reward" / "model", device="cpu")
    for found in read_rollouts(out, 3):
        asked = Prompt(text=found.prompt, max_new_tokens=6)
        (wanted,) = scorer.scores([(asked, found.completion)])
        assert found.steps[-1].reward == pytest.approx(wanted, rel=1e-3, abs=1e-4)


def test_rollouts_become_candidates_by_the_verdicts_they_have() -> None:
    def judged(outcome: Any, **fields: Any) -> Rollout:
        return rollout(verdict=verdict_record(Verdict(outcome=outcome)), **fields)

    problems = {problem.id: problem for problem in Programs().problems()}
    found = candidates_of(
        Programs(),
        problems,
        {
            "step-000001.jsonl": [
                judged("passed", completion="x = 1", is_passed=True, score=1.0),
                judged("passed", completion="x  =  1  # same", is_passed=False, score=0.0),
                judged("compile_error", completion="x =", is_passed=False, score=0.0, problem="p1"),
                rollout(completion="", is_passed=False, score=0.0, detail="no program", problem="p1"),
            ],
            "step-000002.jsonl": [
                judged(
                    "sandbox_error", completion="x = 2", is_passed=None, score=None, detail="sandbox_error"
                )
            ],
        },
    )
    assert [[candidate.problem for candidate in group] for group in found] == [["p0"] * 3, ["p1"] * 2]
    outcomes = [[candidate.outcome for candidate in group] for group in found]
    assert outcomes == [["passed", "failed", "sandbox_error"], ["compile_error", "no_program"]]
    assert [candidate.source for candidate in found[0]] == ["step-000001.jsonl"] * 2 + ["step-000002.jsonl"]
    # The same program twice is one answer; what nobody judged is none.
    (answer,) = pool_answers(found[0])
    assert (answer.pass_rate, len(answer.candidates)) == (0.5, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reward_model": ""}, "rewards.refresh must go with a reward_model and reset_every >= 1"),
        ({"reset_every": 0}, "rewards.refresh must go with a reward_model and reset_every >= 1"),
    ],
)
def test_a_refresh_needs_a_model_and_resets(
    fields: dict[str, Any], message: str, model_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        config(model_dir, Path("judge"), tmp_path / "run", **fields)


def test_what_a_reset_would_refuse_is_named_at_once(model_dir: Path, judge_dir: Path, tmp_path: Path) -> None:
    def run(**refresh: Any) -> Path:
        made = config(model_dir, judge_dir, tmp_path / "run", refresh=replace(REFRESH, **refresh))
        return grpo.run(made, task())

    with pytest.raises(ValueError, match=r"held_out_share must part the prompts .* got 0 of 8 held out with"):
        run(held_out_share=1e-6)
    with pytest.raises(ValueError, match=r"max_length must be <= 32, the model's max_positions, got 33"):
        run(max_length=33)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="`dscoder prefer` has not finished there"):
        run(preferences=(str(tmp_path / "none"),))
    with pytest.raises(ValueError, match="must hold no function reward_model with"):
        grpo.run(config(model_dir, judge_dir, tmp_path / "run"), task(), rewards={"reward_model": len})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"replay_share": 1.0}, r"share must be in \(0, 1\), got 1.0"),
        ({"held_out_share": 0.0}, r"held_out_share must be in \(0, 1\), got 0.0"),
        ({"num_steps": 0}, "num_steps must be >= 1, got 0"),
        ({"max_length": 0}, "max_length must be >= 1, got 0"),
    ],
)
def test_a_refresh_that_makes_no_sense_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RefreshConfig(**fields)
