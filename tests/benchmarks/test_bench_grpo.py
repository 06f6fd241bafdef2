"""The benchmark of a step of GRPO: what it asks of TRL, how it takes turns, what it stores."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_grpo
from benchmarks.bench_grpo import (
    OurSteps,
    config_for,
    contest,
    mean_code,
    median_times,
    program_of,
    record_of,
    text_reward,
)
from benchmarks.peers import trl_trainer
from benchmarks.peers.trl_trainer import StepTimes, arguments
from dscoder.config.grpo import GrpoConfig, UpdateConfig
from dscoder.train.rollout import read_rollouts, written_steps
from tests.train.grpo_stand_in import FakePool, save_policy

PROMPTS = ("an apple", "a pear")
TIMES = StepTimes(total=4.0, sampling=1.0, waiting=0.5, training=2.5, processor=3.0, num_tokens=100)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("grpo"))


def config(model: Path, out: Path, *, has_tests: bool = False) -> GrpoConfig:
    return config_for(model, out, sizes=(2, 3, 4), has_tests=has_tests)


def test_trl_is_asked_for_the_same_run(tmp_path: Path) -> None:
    asked = arguments(config(tmp_path, tmp_path), num_steps=7)
    wanted = {
        "max_steps": 7,
        "num_generations": 3,
        "max_completion_length": 4,
        "loss_type": "grpo",
        "beta": 0.04,
        "epsilon": 0.2,
        "learning_rate": 1e-6,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "temperature": 1.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_strategy": "no",
        "save_strategy": "no",
    }
    assert {name: asked[name] for name in wanted} == wanted


@pytest.mark.parametrize(("micro", "parts"), [(8, 1), (3, 2), (2, 3), (1, 6)])
def test_one_update_of_trl_takes_all_answers_of_a_step(tmp_path: Path, micro: int, parts: int) -> None:
    asked = arguments(replace(config(tmp_path, tmp_path), update=UpdateConfig(micro=micro)), num_steps=1)
    assert asked["gradient_accumulation_steps"] == parts
    assert asked["gradient_accumulation_steps"] * asked["per_device_train_batch_size"] == 6


def test_every_figure_is_a_median_by_itself() -> None:
    times = [replace(TIMES, total=total, sampling=7.0 - total) for total in (1.0, 2.0, 6.0)]
    assert median_times(times) == replace(TIMES, total=2.0, sampling=5.0)


def test_the_record_says_how_many_times_as_long_trl_takes() -> None:
    kept = record_of(TIMES, replace(TIMES, total=6.0, processor=4.0, num_tokens=104))
    assert kept["us"] == 4e6
    assert kept["tokens/s"] == 25.0
    assert kept["sampling_s"] == 1.0
    trl = kept["peers"]["trl"]
    assert (trl["ratio"], trl["processor_ratio"], trl["tokens"]) == (1.5, 1.333, 104)


def test_steps_of_other_lengths_are_not_compared() -> None:
    assert record_of(TIMES, replace(TIMES, num_tokens=94))["peers"] == {
        "trl": {"error": "made 94 tokens, ours 100"}
    }


def test_both_are_rewarded_alike() -> None:
    pool: Any = FakePool(lambda source: "passed" if "'ab'" in source else "failed")
    pool.run_many = lambda programs, limits: [pool.submit(one, limits).result() for one in programs]
    assert text_reward(pool, has_tests=False)(["ab", "a"]) == [97.5, 97.0]
    assert text_reward(pool, has_tests=True)(["ab", "a"]) == [98.5, 97.0]
    assert mean_code("") == 0.0


@pytest.mark.parametrize(("answer", "is_passed"), [("", True), ("a", False), ("'\\\n", False), ('"\\', True)])
def test_programs_are_right_for_every_second_length(answer: str, is_passed: bool) -> None:
    source = program_of(answer).source
    assert source is not None
    if is_passed:
        exec(source, {})
    else:
        with pytest.raises(AssertionError):
            exec(source, {})


@pytest.mark.parametrize("has_tests", [False, True])
def test_our_steps_are_those_of_a_run(model: Path, tmp_path: Path, has_tests: bool) -> None:
    pool: Any = FakePool(lambda source: "passed")
    task = bench_grpo.Continuations(PROMPTS, has_tests=has_tests)
    steps = OurSteps(config(model, tmp_path, has_tests=has_tests), task, pool=pool)
    steps.step()
    steps.step()
    assert written_steps(tmp_path) == [1, 2]
    assert len(pool.sources) == (12 if has_tests else 0)
    found = read_rollouts(tmp_path, 2)
    assert sum(len(one.completion_ids) for one in found) == steps.times[1].num_tokens
    assert {one.prompt for one in found} == set(PROMPTS)
    for one in found:
        assert one.reward == pytest.approx(mean_code(one.completion) + has_tests)


def taking_turns(log: list[str]) -> Callable[..., list[StepTimes]]:
    """In the place of TRL: steps of ten seconds, the first of a hundred."""

    def train(
        config: GrpoConfig,
        prompts: Sequence[str],
        reward: trl_trainer.TextReward,
        *,
        num_steps: int,
        between: Callable[[], None],
        prompt_ids: Sequence[Sequence[int]],
    ) -> list[StepTimes]:
        assert len(prompts) == len(prompt_ids) == 2
        for _ in range(num_steps):
            log.append("theirs")
            between()
        return [replace(TIMES, total=100.0 if idx == 0 else 10.0, num_tokens=24) for idx in range(num_steps)]

    return train


def test_both_take_turns_and_the_first_round_does_not_count(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []

    def step(self: OurSteps) -> None:
        log.append("ours")
        self.times.append(replace(TIMES, total=50.0 if not self.times else 5.0, num_tokens=24))

    monkeypatch.setattr(OurSteps, "step", step)
    monkeypatch.setattr(trl_trainer, "HAS_TRL", True)
    monkeypatch.setattr(trl_trainer, "train", taking_turns(log))
    kept = contest(config(model, tmp_path), PROMPTS, num_rounds=2, has_tests=False)
    assert log == ["theirs", "ours"] * 3
    assert kept["us"] == 5e6
    assert kept["peers"]["trl"]["ratio"] == 2.0


def test_without_trl_ours_is_measured_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trl_trainer, "HAS_TRL", False)
    kept = contest(config(model, tmp_path), PROMPTS, num_rounds=1, has_tests=False)
    assert kept["peers"] == {}
    assert kept["tokens"] > 0
    assert written_steps(tmp_path) == [1, 2]


def test_trl_takes_the_same_steps(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    kept = contest(config(model, tmp_path), PROMPTS, num_rounds=1, has_tests=False)
    assert "us" in kept["peers"]["trl"] or "tokens" in kept["peers"]["trl"]["error"]
