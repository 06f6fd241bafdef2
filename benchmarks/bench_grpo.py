"""A step of GRPO beside TRL's GRPOTrainer: the same tiny model, prompts, rewards and objective, float32, CPU.

A step samples groups of answers, rewards them and moves the policy once, with a reference model. The two
take turns in one process, step by step. Random weights seldom end an answer, so both make as many tokens.
Ours goes through GrpoSteps as `dscoder grpo` does, its rollouts written; its balance loss comes on top.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.peers import trl_trainer
from benchmarks.peers.trl_trainer import StepTimes, TextReward
from dscoder.checkpoint import load_pretrained, save_pretrained
from dscoder.config import preset
from dscoder.config.grpo import GrpoConfig, RewardsConfig, RolloutConfig, UpdateConfig
from dscoder.infer.engine import Engine
from dscoder.models import Transformer
from dscoder.models.init import init_weights
from dscoder.runtime.seed import deterministic, random_state, restore_random_state
from dscoder.sandbox.pool import Pool
from dscoder.sandbox.run import run
from dscoder.sandbox.verdict import Limits, Program, Verdict
from dscoder.tasks.problem import Grade, Problem, Task, grade_verdict, graded
from dscoder.testing.timing import device_name
from dscoder.text.tokenizer import Tokenizer
from dscoder.train.explore import EngineSampler, Explorer, Judge, make_questions
from dscoder.train.grpo import GrpoSteps
from dscoder.train.optimizer import MasterAdamW
from dscoder.train.prompts import PromptEncoder
from dscoder.train.reward import RewardBatch, Rewards
from dscoder.train.reward_functions import reward_terms

MODELS = ("tiny_dense", "tiny_moe")
VOCAB_SIZE = preset("tiny_moe").vocab_size
NUM_TEXTS = 100  # that the tokenizer learns from
NUM_ROUNDS = 5  # steps of each, after one that is not counted
GROUPS, GROUP_SIZE, NEW_TOKENS = 4, 8, 64
SMALL = (2, 2, 4)  # the same where nothing is timed
SHORTEST, LONGER = 200, 100  # characters of the first prompt, and of each more than of the one before
TOKENS_APART = 0.05  # share by which the tokens of a step may differ: an answer may end by itself
LIMITS = Limits()
TESTS = "answer = {answer!r}\nassert len(answer) % 2 == 0\n"


def mean_code(text: str) -> float:
    """A reward that costs nothing and differs within a group, so that every group is trained on."""
    return sum(map(ord, text)) / max(1, len(text))


def program_of(answer: str) -> Program:
    """Passes for about every second answer."""
    return Program(source=TESTS.format(answer=answer))


class Continuations(Task):
    """Source code to go on with; with tests, an answer's program is run."""

    name = "continuations"
    limits = LIMITS

    def __init__(self, prompts: Sequence[str], *, has_tests: bool) -> None:
        self._has_tests = has_tests
        self._problems = [
            Problem(task=self.name, id=f"p{i}", prompt=prompt, max_new_tokens=NEW_TOKENS)
            for i, prompt in enumerate(prompts)
        ]

    def problems(self) -> Sequence[Problem]:
        """A group of answers to each makes a step."""
        return self._problems

    def program(self, problem: Problem, completion: str) -> Program | None:
        """None without tests."""
        return program_of(completion) if self._has_tests else None

    def grade(self, problem: Problem, completion: str, verdict: Verdict | None) -> Grade:
        """By the tests, where there are some."""
        return grade_verdict(verdict) if self._has_tests else graded(True)


def rewards_of(batch: RewardBatch) -> list[float | None]:
    """`mean_code` as a reward function of ours."""
    return [mean_code(answer.completion) for answer in batch.answers]


def text_reward(pool: Pool, *, has_tests: bool) -> TextReward:
    """The same rewards for a peer: all answers of a step at once."""

    def reward(texts: Sequence[str]) -> list[float]:
        if not has_tests:
            return [mean_code(text) for text in texts]
        verdicts = pool.run_many([program_of(text) for text in texts], LIMITS)
        return [mean_code(text) + verdict.is_passed for text, verdict in zip(texts, verdicts, strict=True)]

    return reward


@contextmanager
def as_before() -> Iterator[None]:
    """Leaves torch's generators as they were: a peer draws from them."""
    state = random_state()
    try:
        yield
    finally:
        restore_random_state(state)


class OurSteps:
    """A run of GRPO, a step at a time."""

    def __init__(self, config: GrpoConfig, task: Task, *, pool: Pool) -> None:
        tokenizer = Tokenizer.load(config.model)
        model = load_pretrained(config.model, dtype=torch.float32)
        encoder = PromptEncoder(tokenizer=tokenizer, max_positions=model.config.max_positions)
        self.questions = make_questions(task, encoder, max_new_tokens=config.rollout.max_new_tokens)
        explorer = Explorer(
            self.questions,
            sampler=EngineSampler(Engine(model, tokenizer, batch=config.rollout.batch)),
            judge=Judge(task, pool),
            rewards=Rewards(reward_terms(config.rewards, given={"mean_code": rewards_of})),
            config=config,
        )
        num_ids = min(model.config.vocab_size, tokenizer.vocab_size)
        self._steps = GrpoSteps(
            model, explorer=explorer, config=config, num_ids=num_ids, directory=Path(config.out)
        )
        self._optimizer = MasterAdamW(model, config.optimizer)
        self._config = config
        self.times: list[StepTimes] = []

    def step(self) -> None:
        """The next one; its times go to `times`."""
        step, threads = len(self.times), torch.get_num_threads()
        with as_before(), deterministic(seed=self._config.seed, num_threads=threads):
            began, used = time.perf_counter(), time.process_time()
            done = self._steps.train_step(self._optimizer, step, self._steps.learning_rate(step))
            total, processor = time.perf_counter() - began, time.process_time() - used
        assert done.figures["used"] == 1.0, f"every group must be trained on, got {done.figures}"
        found = {name: done.figures[f"seconds_{name}"] for name in ("sampling", "waiting", "training")}
        self.times.append(
            StepTimes(total=total, processor=processor, num_tokens=done.num_tokens, **found),
        )


def median_times(times: Sequence[StepTimes]) -> StepTimes:
    """Each figure's median by itself."""
    columns = zip(*(asdict(one).values() for one in times), strict=True)
    medians = dict(zip(asdict(times[0]), map(statistics.median, columns), strict=True))
    return StepTimes(**{**medians, "num_tokens": round(medians["num_tokens"])})


def figures_of(times: StepTimes) -> dict[str, float]:
    """What a record says of one contender's step."""
    parts = ("sampling", "waiting", "training", "processor")
    seconds = {f"{name}_s": round(getattr(times, name), 4) for name in parts}
    return {"us": float(f"{times.total * 1e6:.4g}"), "tokens": times.num_tokens, **seconds}


def record_of(ours: StepTimes, theirs: StepTimes | None) -> dict[str, Any]:
    """The figures of both; a peer's step must have made as many tokens, nearly."""
    kept: dict[str, Any] = {
        **figures_of(ours),
        "tokens/s": float(f"{ours.num_tokens / ours.total:.4g}"),
        "peers": {},
    }
    if theirs is None:
        return kept
    if abs(theirs.num_tokens - ours.num_tokens) > TOKENS_APART * ours.num_tokens:
        kept["peers"]["trl"] = {"error": f"made {theirs.num_tokens} tokens, ours {ours.num_tokens}"}
        return kept
    kept["peers"]["trl"] = {
        **figures_of(theirs),
        "ratio": float(f"{theirs.total / ours.total:.4g}"),
        "processor_ratio": float(f"{theirs.processor / ours.processor:.4g}"),
    }
    return kept


def config_for(model: Path, out: Path, *, sizes: tuple[int, int, int], has_tests: bool) -> GrpoConfig:
    """One update a step; the other settings are the defaults of both sides, which are the same."""
    groups, group_size, new_tokens = sizes
    functions = ("mean_code", *(("tests",) if has_tests else ()))
    return GrpoConfig(
        model=str(model),
        out=str(out),
        rewards=RewardsConfig(functions=functions),
        rollout=RolloutConfig(groups=groups, group_size=group_size, max_new_tokens=new_tokens),
        update=UpdateConfig(micro=8),
        device="cpu",
    )


def contest(
    config: GrpoConfig, prompts: Sequence[str], *, num_rounds: int, has_tests: bool
) -> dict[str, Any]:
    """Steps in turns, the first of each not counted; the record."""
    with Pool() as pool:
        ours = OurSteps(config, Continuations(prompts, has_tests=has_tests), pool=pool)
        theirs: list[StepTimes] = []
        if trl_trainer.HAS_TRL:
            theirs = trl_trainer.train(
                config,
                prompts,
                text_reward(pool, has_tests=has_tests),
                num_steps=1 + num_rounds,
                between=ours.step,
                prompt_ids=[question.request.prompt for question in ours.questions],
            )
        else:
            for _ in range(1 + num_rounds):
                ours.step()
    return record_of(median_times(ours.times[1:]), median_times(theirs[1:]) if theirs else None)


@pytest.fixture(scope="module")
def models(source_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A directory with random weights and a tokenizer, made when it is asked for."""
    home = tmp_path_factory.mktemp("models")
    tokenizer = Tokenizer.train(
        source_texts[:: max(1, len(source_texts) // NUM_TEXTS)], vocab_size=VOCAB_SIZE
    )
    tokenizer.save(home / "tokenizer")
    ends = {"bos_id": tokenizer.require_id("bos"), "eos_id": tokenizer.require_id("eos")}

    def made(name: str) -> Path:
        if not (home / name).exists():
            model = Transformer(replace(preset(name), **ends)).eval()
            init_weights(model, seed=0)
            save_pretrained(model, home / name, tokenizer=home / "tokenizer")
        return home / name

    return made


@pytest.mark.parametrize("rewards", ["python", "tests"])
@pytest.mark.parametrize("name", MODELS)
def test_step(
    benchmark: BenchmarkFixture,
    models: Callable[[str], Path],
    source_texts: list[str],
    tmp_path: Path,
    name: str,
    rewards: str,
) -> None:
    has_tests = rewards == "tests"
    if has_tests and not (verdict := run(Program(source="pass"))).is_answer:
        pytest.skip(verdict.detail)
    sizes = SMALL if benchmark.disabled else (GROUPS, GROUP_SIZE, NEW_TOKENS)
    long = [text for text in source_texts if len(text) > SHORTEST + LONGER * GROUPS]
    prompts = [long[i][: SHORTEST + LONGER * i] for i in range(sizes[0])]
    config = config_for(models(name), tmp_path / "run", sizes=sizes, has_tests=has_tests)
    num_rounds = 1 if benchmark.disabled else NUM_ROUNDS
    found: list[dict[str, Any]] = []
    benchmark.pedantic(
        lambda: found.append(contest(config, prompts, num_rounds=num_rounds, has_tests=has_tests)), rounds=1
    )
    benchmark.extra_info.update(
        op="grpo",
        step=f"step, rewards by {rewards}",
        model=name,
        shape=f"groups={sizes[0]} answers={sizes[1]} new={sizes[2]}",
        dtype="float32",
        device=device_name(torch.device("cpu")),
        method="wall",
        has_kernel=False,
        **found[0],
    )
