"""What the configs of GRPO refuse."""

from typing import Any

import pytest

from dscoder.config.grpo import (
    GrpoConfig,
    PolicyLossConfig,
    ProcessConfig,
    RewardsConfig,
    RolloutConfig,
    UpdateConfig,
)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clip_low": 1.5}, "clip_low must be in .0, 1. and clip_high finite and >= 0, got 1.5 and 0.2"),
        ({"clip_high": float("nan")}, "clip_high finite and >= 0, got 0.2 and nan"),
        ({"ratio_cap": 1.1}, "ratio_cap must be > 1.2, 1 . clip_high, got 1.1"),
        ({"kl": -0.1}, "kl must be finite and >= 0, got -0.1"),
        ({"correction_cap": 0.5}, "correction_cap >= 1, got 0.0 and 0.5"),
        ({"correction_floor": 1.5}, "correction_floor must be in .0, 1. and .* got 1.5 and 3.0"),
        (
            {"objective": "sequence", "ratio": "geometric_mean"},
            "has no term a token: .* geometric_mean and none",
        ),
        ({"objective": "sequence", "correction": "token"}, "be none or sequence, got token and token"),
    ],
)
def test_an_objective_that_makes_no_sense_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"PolicyLossConfig: .*{message}"):
        PolicyLossConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"functions": ()}, "functions must be some, each once"),
        ({"functions": ("tests", "tests")}, "functions must be some, each once"),
        ({"weights": (1.0, 2.0)}, "weights must be as many as functions, 1, got 2"),
        ({"weights": (0.0,)}, "weights must be finite and not 0"),
        ({"time": 0.0}, "time must be positive, got 0.0"),
        ({"overlong_margin": -1}, "overlong_margin must be >= 0, got -1"),
        ({"functions": ("format",)}, "format and format_pattern go together, got format and ''"),
        ({"format_pattern": "a"}, "format and format_pattern go together, got tests and 'a'"),
    ],
)
def test_rewards_that_make_no_sense_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"RewardsConfig: .*{message}"):
        RewardsConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"functions": ()}, "functions must be some, each once"),
        ({"weights": (1.0, 2.0)}, "weights must be as many as functions, 1, got 2"),
        ({"outcome": -1.0}, "outcome must be finite and >= 0, got -1.0"),
        ({"steps": ""}, "steps must be a name or a regular expression, got nothing"),
    ],
)
def test_process_supervision_that_makes_no_sense_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"ProcessConfig: {message}"):
        ProcessConfig(**fields)


def test_what_only_tells_is_not_required() -> None:
    assert RewardsConfig().is_required == {"tests": True}
    assert RewardsConfig(process=ProcessConfig(outcome=0.5)).is_required == {"tests": True}
    assert RewardsConfig(process=ProcessConfig()).is_required == {"tests": False}
    with pytest.raises(ValueError, match=r"required must be empty where process.outcome is 0 .* got tests"):
        RewardsConfig(process=ProcessConfig(), required=("tests",))


def test_a_reward_model_may_reward_steps_alone() -> None:
    rewards = RewardsConfig(process=ProcessConfig())
    assert GrpoConfig(model="m", out="o", reward_model="r", rewards=rewards).rewards.has_reward_model
    with pytest.raises(ValueError, match=r"must be among rewards.functions or rewards.process"):
        GrpoConfig(model="m", out="o", reward_model="r")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"groups": 0}, "groups must be >= 1, got 0"),
        ({"group_size": 1}, "group_size must be >= 2, got 1"),
        ({"max_rounds": 0}, "max_rounds must be >= 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
        ({"num_workers": 0}, "num_workers must be >= 1, got 0"),
        ({"num_scorers": 0}, "num_scorers must be >= 1, got 0"),
        ({"temperature": 0.0}, "temperature must be > 0 .* got 0.0"),
    ],
)
def test_rollouts_that_make_no_sense_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"RolloutConfig: {message}"):
        RolloutConfig(**fields)


def test_how_answers_are_drawn_is_checked_at_once() -> None:
    with pytest.raises(ValueError, match="SamplingConfig: top_p must be in"):
        RolloutConfig(top_p=0.0)
    sampling = RolloutConfig(temperature=0.7, top_k=5).sampling(seed=3)
    assert (sampling.temperature, sampling.top_k, sampling.seed) == (0.7, 5, 3)


def test_updates_and_runs_that_make_no_sense_are_named() -> None:
    with pytest.raises(ValueError, match="passes, minibatches and micro must be >= 1, got 1, 0 and 8"):
        UpdateConfig(minibatches=0)
    for fields in ({"num_steps": 0}, {"reset_every": -1}):
        with pytest.raises(ValueError, match="num_steps must be >= 1 and reset_every >= 0"):
            GrpoConfig(model="m", out="o", **fields)
    with pytest.raises(ValueError, match="GrpoConfig: num_threads must be >= 1, got 0"):
        GrpoConfig(model="m", out="o", num_threads=0)
