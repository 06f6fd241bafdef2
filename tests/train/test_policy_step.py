"""Updates of a policy on made-up rollouts, and the figures of a step."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dscoder.config import BalanceConfig
from dscoder.config.grpo import GrpoConfig, PolicyLossConfig, ProcessConfig, RewardsConfig, UpdateConfig
from dscoder.config.train import OptimizerConfig
from dscoder.models import Transformer
from dscoder.train.logprobs import PromptAndAnswer, answer_logprobs
from dscoder.train.loop import LossError
from dscoder.train.optimizer import MasterAdamW
from dscoder.train.policy_step import PolicyUpdates, rollout_figures
from dscoder.train.rollout import Rollout, RolloutStep
from tests.train.grpo_stand_in import TOKENIZER, config_for, policy, rollout

NUM_IDS = TOKENIZER.vocab_size


def logprobs(model: Transformer, *rollouts: Rollout) -> torch.Tensor:
    texts = [PromptAndAnswer(prompt=r.prompt_ids, answer=r.completion_ids) for r in rollouts]
    with torch.no_grad():
        return answer_logprobs(model, texts, temperature=1.0, num_ids=NUM_IDS).logprobs_BS


def group(model: Transformer) -> list[Rollout]:
    """Four answers, the first better than the others, one left out; log-probabilities by the model itself."""
    made = [
        rollout(completion_ids=(4, 5, 6), advantage=1.5),
        rollout(completion_ids=(7,), advantage=-0.5),
        rollout(completion_ids=(8, 9), advantage=-1.0),
        rollout(completion_ids=(10, 11), advantage=None, is_used=False, reason="no_reward", reward=None),
    ]
    found_BS = logprobs(model, *made)
    return [
        replace(r, logprobs=tuple(row[: len(r.completion_ids)].tolist()))
        for r, row in zip(made, found_BS, strict=True)
    ]


def moved(
    model: Transformer, *, rollouts: list[Rollout] | None = None, lr: float = 1e-3, **fields: Any
) -> tuple[Transformer, dict[str, float]]:
    """A copy of the model after a step, and the step's figures."""
    config: GrpoConfig = config_for(Path("m"), Path("o"), **({"loss": PolicyLossConfig(kl=0.0)} | fields))
    copied = copy.deepcopy(model)
    reference = copy.deepcopy(model) if config.loss.kl else None
    updates = PolicyUpdates(copied, reference=reference, config=config, num_ids=NUM_IDS)
    optimizer = MasterAdamW(copied, OptimizerConfig(weight_decay=0.0))
    figures = updates.update(optimizer, group(model) if rollouts is None else rollouts, step=1, lr=lr)
    return copied, figures


def weights(model: Transformer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", ["tiny_dense", "tiny_moe"])
def test_better_answers_become_likelier_and_worse_ones_less_likely(name: str) -> None:
    model = policy(name)
    rollouts = group(model)
    after, figures = moved(model)
    change_B = (logprobs(after, *rollouts) - logprobs(model, *rollouts)).sum(dim=1)
    assert change_B[0] > 0 > change_B[2]
    assert figures["updates"] == 1
    assert figures["mismatch"] == pytest.approx(0, abs=1e-5)
    mean = -sum(sum(r.logprobs) for r in rollouts[:3]) / 6
    assert figures["entropy"] == pytest.approx(mean, rel=1e-5)


def test_the_loss_of_one_update_is_that_of_its_advantages() -> None:
    # Ratios are 1: minus the mean over answers of their advantages.
    _, figures = moved(policy())
    assert figures["loss"] == pytest.approx(-(1.5 - 0.5 - 1.0) / 3, abs=1e-6)
    _, figures = moved(policy(), loss=PolicyLossConfig(kl=0.0, objective="dapo"))
    assert figures["loss"] == pytest.approx(-(3 * 1.5 - 0.5 - 2 * 1.0) / 6)
    assert figures["ratio_error"] == 0


@pytest.mark.parametrize("objective", ["sequence", "grpo", "dapo"])
def test_micro_batches_change_no_weight(objective: str) -> None:
    model = policy()
    loss = PolicyLossConfig(objective=objective)  # type: ignore[arg-type]
    one, figures = moved(model, loss=loss, update=UpdateConfig(micro=8))
    cut, figures_cut = moved(model, loss=loss, update=UpdateConfig(micro=1))
    # A wrong scale moves no weight, since Adam divides it out.
    for name in ("loss", "grad_norm"):
        assert figures_cut[name] == pytest.approx(figures[name], rel=1e-4)
    assert figures["grad_norm"] > 1e-3
    torch.testing.assert_close(weights(one), weights(cut), rtol=0, atol=2e-5)


def test_several_updates_measure_ratios_to_the_policy_that_answered() -> None:
    model = policy()
    one, first = moved(model, update=UpdateConfig(passes=1))
    three, figures = moved(model, update=UpdateConfig(passes=3))
    assert first["ratio_error"] == 0
    assert figures["updates"] == 3
    assert figures["ratio_error"] > 1e-4
    assert not torch.equal(weights(one), weights(three))


def test_clipping_stops_what_has_moved_far() -> None:
    model = policy()
    tight = PolicyLossConfig(kl=0.0, clip_low=1e-6, clip_high=1e-6)
    _, figures = moved(model, loss=tight, update=UpdateConfig(passes=4))
    assert figures["clipped_low"] > 0.1
    assert figures["clipped_high"] > 0.1


def test_minibatches_are_updates_of_their_own() -> None:
    _, figures = moved(policy(), update=UpdateConfig(minibatches=2))
    assert figures["updates"] == 2
    _, figures = moved(policy(), update=UpdateConfig(minibatches=7))  # of three answers
    assert figures["updates"] == 3


def test_the_reference_holds_the_policy_back() -> None:
    model = policy()
    passes = UpdateConfig(passes=20)
    free, _ = moved(model, update=passes, lr=1e-2)
    held, figures = moved(model, update=passes, lr=1e-2, loss=PolicyLossConfig(kl=50.0))
    rollouts = group(model)
    far, near = (
        (logprobs(m, *rollouts) - logprobs(model, *rollouts)).abs().sum().item() for m in (free, held)
    )
    assert near < far / 2
    assert figures["kl"] > 0


def test_the_mismatch_of_sampler_and_trainer_is_measured_and_corrected() -> None:
    model = policy()
    shifted = [replace(r, logprobs=tuple(p - 1.0 for p in r.logprobs)) for r in group(model)]
    _, figures = moved(model, rollouts=shifted)
    assert figures["mismatch"] == pytest.approx(1.0, rel=1e-4)
    assert figures["correction"] == pytest.approx(1.0)
    corrected = PolicyLossConfig(kl=0.0, objective="dapo", correction="token", correction_cap=2.0)
    _, figures = moved(model, rollouts=shifted, loss=corrected)
    assert figures["correction"] == pytest.approx(2.0)  # e, truncated
    assert figures["loss"] == pytest.approx(-2.0 * (3 * 1.5 - 0.5 - 2 * 1.0) / 6, rel=1e-4)


def test_without_a_used_answer_nothing_moves() -> None:
    model = policy()
    left_out = [replace(r, is_used=False, reason="equal_rewards") for r in group(model)]
    after, figures = moved(model, rollouts=left_out)
    assert torch.equal(weights(after), weights(model))
    assert figures == {"updates": 0.0}  # there is no loss


def test_a_loss_that_is_no_number_is_named() -> None:
    model = policy()
    rollouts = [replace(r, advantage=float("nan")) for r in group(model)[:3]]
    with pytest.raises(
        LossError, match=r"step 1: loss, balance loss and gradient norm must be finite, got nan"
    ):
        moved(model, rollouts=rollouts)


def test_figures_tell_rewards_and_what_was_left_out() -> None:
    def left_out(reason: str, **fields: Any) -> Rollout:
        return rollout(is_used=False, advantage=None, reason=reason, **fields)

    failed = {"rewards": {"tests": None, "format": 0.5}, "failures": {"tests": "hung: more than 1 s"}}
    found = rollout_figures(
        [
            rollout(reward=1.0),
            rollout(reward=0.0, rewards={"tests": 0.0}, finish_reason="length"),
            left_out("equal_rewards", group=1, reward=0.5, **failed),
            left_out("equal_rewards", group=1, reward=0.5, **failed),
            left_out(
                "too_few_rewards", group=2, reward=None, rewards={"tests": None}, completion_ids=(1,) * 7
            ),
        ]
    )
    assert found == pytest.approx(
        {
            "reward": 0.5,
            "reward_std": 0.5**0.5 / 2,
            "length": 3.0,
            "truncated": 0.2,
            "suspect": 0.0,
            "used": 0.4,
            "groups": 3.0,
            "groups_equal": 1.0,
            "groups_too_few": 1.0,
            "groups_unjudged": 1.0,
            "reward_tests": 0.5,
            "reward_format": 0.5,
            "left_out tests: hung": 2.0,
        }
    )


def test_figures_leave_out_what_nobody_could_tell() -> None:
    unknown = rollout(is_used=False, advantage=None, reason="no_reward", reward=None, rewards={"tests": None})
    found = rollout_figures([unknown, unknown])
    assert found["groups_unjudged"] == 1
    assert not {"reward", "reward_std", "reward_tests"} & set(found)


def test_experts_are_balanced_as_the_config_says() -> None:
    config = replace(policy("tiny_moe").config, num_layers=2)  # the first has no experts
    assert config.moe is not None

    def gates(weight: float) -> tuple[torch.Tensor, dict[str, float]]:
        """The gates after a step whose answers all teach nothing."""
        moe = replace(config.moe, balance=BalanceConfig(expert=weight), capacity_factor=0.5)
        weighted = Transformer(replace(config, moe=moe)).eval()
        after, figures = moved(weighted, rollouts=[replace(r, advantage=0.0) for r in group(weighted)[:3]])
        assert not after.training
        found = [p.detach().flatten() for name, p in after.named_parameters() if ".gate." in name]
        return torch.cat(found), figures

    balanced, figures = gates(0.5)
    free, figures_free = gates(0.0)
    assert figures["balance"] > 0.1
    assert figures_free["balance"] == 0
    assert figures["mismatch"] == figures_free["mismatch"]  # the answers are as likely as without
    assert (balanced - free).abs().max() > 1e-4


def stepwise(reward: float, *advantages: float) -> tuple[RolloutStep, ...]:
    """A step a token."""
    return tuple(
        RolloutStep(end=end, text_end=end, rewards={"process.f": reward}, reward=reward, advantage=advantage)
        for end, advantage in enumerate(advantages, start=1)
    )


PROCESS = RewardsConfig(process=ProcessConfig(functions=("f",)))


@pytest.mark.parametrize("objective", ["grpo", "dr_grpo", "dapo", "bnpo"])
def test_tokens_of_good_steps_become_likelier_than_those_of_bad_ones(objective: str) -> None:
    model = policy()
    rollouts = [rollout(completion_ids=(4, 5, 6), advantage=None, steps=stepwise(1.0, 1.0, -1.0, -2.0))]
    loss = PolicyLossConfig(objective=objective, kl=0.0)  # type: ignore[arg-type]
    rollouts = [replace(rollouts[0], logprobs=(-1.0, -1.0, -1.0))]
    after, figures = moved(model, rollouts=rollouts, rewards=PROCESS, loss=loss)
    (change_S,) = logprobs(after, *rollouts) - logprobs(model, *rollouts)
    assert change_S[0] > 0 > change_S[1]
    # Ratios are 1: minus the sum of the advantages, by what each objective divides.
    share = 6 if objective == "dr_grpo" else 3
    assert figures["loss"] == pytest.approx(2.0 / share, rel=1e-5)


def test_one_advantage_a_step_is_what_one_an_answer_is_where_they_are_equal() -> None:
    model = policy()
    plain = group(model)
    advantages = [r.advantage or 0.0 for r in plain]
    same = [
        replace(r, steps=stepwise(1.0, *([a] * len(r.completion_ids))))
        for r, a in zip(plain, advantages, strict=True)
    ]
    one, _ = moved(model, rollouts=plain)
    other, _ = moved(model, rollouts=same, rewards=PROCESS)
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=0)


def test_figures_tell_of_steps() -> None:
    figures = rollout_figures([rollout(steps=stepwise(1.0, 0.5, 0.5)), rollout(steps=stepwise(4.0, 1.0))])
    assert figures["steps"] == 1.5
    assert figures["reward_process.f"] == 2.0
    assert "steps" not in rollout_figures([rollout()])
