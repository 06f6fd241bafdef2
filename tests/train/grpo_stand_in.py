"""Tasks, samplers and sandboxes that answer by a script, and a policy small enough to train within a test."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dscoder.checkpoint import save_pretrained
from dscoder.config import preset
from dscoder.config.grpo import GrpoConfig, PolicyLossConfig, RolloutConfig
from dscoder.config.train import CheckpointConfig, OptimizerConfig, ReportConfig, ScheduleConfig
from dscoder.infer.request import Completion, FinishReason, Request
from dscoder.models import Transformer
from dscoder.sandbox.verdict import Limits, Program, Verdict
from dscoder.tasks.problem import Grade, Problem, Task
from dscoder.text.tokenizer import Tokenizer
from dscoder.train.rollout import Rollout

TOKENIZER = Tokenizer.train(["def f(x):\n    return x + 1\n", "an apple, a pear"] * 3, vocab_size=290)


class Letters(Task):
    """Answers are worth the share of letters "e" in them; nothing is run."""

    name = "letters"
    limits = Limits(time=2.0)

    def __init__(self, num_problems: int = 5, *, max_new_tokens: int = 6) -> None:
        self._problems = [
            Problem(task=self.name, id=f"p{i}", prompt="an apple"[: i + 1], max_new_tokens=max_new_tokens)
            for i in range(num_problems)
        ]

    def problems(self) -> Sequence[Problem]:
        return self._problems

    def program(self, problem: Problem, completion: str) -> Program | None:
        return None

    def grade(self, problem: Problem, completion: str, verdict: Verdict | None) -> Grade:
        share = completion.count("e") / max(1, len(completion))
        return Grade(is_passed=share > 0.5, score=share)


class Programs(Letters):
    """The answer is the program."""

    name = "programs"

    def program(self, problem: Problem, completion: str) -> Program | None:
        return Program(source=completion)

    grade = Task.grade


class FakePool:
    """A sandbox whose verdicts are a function of the source.

    With "never" they do not come, with "cancelled" they are called off, and an exception is raised: by the
    future, or at once if its text is "submit".
    """

    def __init__(self, outcome: Callable[[str], str | BaseException]) -> None:
        self.outcome = outcome
        self.sources: list[str] = []
        self.waiting: list[Future[Verdict]] = []

    def submit(self, program: Program, limits: Limits) -> "Future[Verdict]":
        self.sources.append(program.source or "")
        done: Future[Verdict] = Future()
        outcome = self.outcome(program.source or "")
        if isinstance(outcome, BaseException):
            if str(outcome) == "submit":
                raise outcome
            done.set_exception(outcome)
        elif outcome == "cancelled":
            done.cancel()
        elif outcome == "never":
            self.waiting.append(done)
        else:
            done.set_result(Verdict(outcome=outcome))  # type: ignore[arg-type]
        return done

    def cancel(self) -> None:
        for future in self.waiting:
            future.cancel()


def completion_of(text: str, *, reason: FinishReason = "eos") -> Completion:
    tokens = (*TOKENIZER.encode(text), *([TOKENIZER.require_id("eos")] if reason == "eos" else []))
    return Completion(tokens=tokens, text=text, finish_reason=reason, logprobs=(-1.0,) * len(tokens))


class FakeSampler:
    """Answers request `i` by `texts(i, request)`, the last request first within `window` requests."""

    def __init__(self, texts: Callable[[int, Request], str | Completion], *, window: int = 1) -> None:
        self.texts = texts
        self.window = window
        self.requests: list[Request] = []

    def sample(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        self.requests += requests
        for start in range(0, len(requests), self.window):
            for idx in reversed(range(start, min(start + self.window, len(requests)))):
                found = self.texts(idx, requests[idx])
                yield idx, completion_of(found) if isinstance(found, str) else found


def rollout(**fields: Any) -> Rollout:
    """A rollout with other `fields` where given."""
    whole = Rollout(
        step=1,
        group=0,
        task="letters",
        problem="p0",
        prompt="an",
        prompt_ids=(1, 2, 3),
        completion="e",
        completion_ids=(4, 5),
        logprobs=(-1.5, -0.5),
        finish_reason="eos",
        verdict=None,
        detail="",
        rewards={"tests": 1.0},
        failures={},
        reward=1.0,
        advantage=1.0,
        is_used=True,
        reason="",
    )
    return replace(whole, **fields)


def policy(name: str = "tiny_dense") -> Transformer:
    """Random weights, in evaluation mode."""
    config = replace(
        preset(name),
        vocab_size=TOKENIZER.vocab_size,
        width=32,
        num_layers=1,
        mlp_width=48,
        max_positions=32,
        bos_id=TOKENIZER.require_id("bos"),
        eos_id=TOKENIZER.require_id("eos"),
    )
    return Transformer(config).eval()


def save_policy(directory: Path, name: str = "tiny_dense") -> Path:
    """A model directory with a policy and its tokenizer."""
    TOKENIZER.save(directory / "tokenizer")
    torch.manual_seed(0)
    save_pretrained(policy(name), directory / "policy", tokenizer=directory / "tokenizer")
    return directory / "policy"


def config_for(model: Path, out: Path, **fields: Any) -> GrpoConfig:
    """Four steps of two groups of four answers, with other `fields` where given."""
    config = GrpoConfig(
        model=str(model),
        out=str(out),
        num_steps=4,
        loss=PolicyLossConfig(kl=0.01),
        rollout=RolloutConfig(groups=2, group_size=4, max_new_tokens=6, num_workers=1, num_scorers=2),
        schedule=ScheduleConfig(kind="constant", max_lr=1e-2, warmup_steps=0),
        optimizer=OptimizerConfig(weight_decay=0.0),
        checkpoint=CheckpointConfig(every=2),
        report=ReportConfig(log_every=1, eval_every=2, tensorboard="off", plot="off"),
        num_threads=1,
    )
    return replace(config, **fields)
