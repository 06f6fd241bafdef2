"""Rollouts: the answers of a step with everything that was decided about them, one JSON line each.

A step's rollouts are one file, written whole before the policy moves on them. Whoever looks at a run finds
there what was asked, answered, run and rewarded, and why an answer was not trained on.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from dscoder.infer.request import FinishReason
from dscoder.runtime.artifact import write_bytes
from dscoder.sandbox.verdict import Verdict

ROLLOUTS = "rollouts"
_FILE = re.compile(r"step-(\d{6,})\.jsonl")
_MOST_OUTPUT = 2000  # characters kept of each stream of a program
_IF_THERE = ("steps", "is_suspect")  # written where an answer has steps, or is one

# Why an answer is not trained on; what concerns its group comes first.
Reason = Literal["", "too_few_rewards", "equal_rewards", "suspect", "no_reward", "truncated", "empty"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutStep:
    """One step of an answer, under process supervision.

    Attributes:
        end: tokens of the completion up to its end.
        text_end: the same in characters.
        rewards: by process function, None where it could not tell.
        reward: the mix; None if no function could tell.
        advantage: of each of its tokens; None where there is none.
    """

    end: int
    text_end: int
    rewards: Mapping[str, float | None]
    reward: float | None
    advantage: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One answer.

    Attributes:
        step: that it belongs to, from 1.
        group: place of its group in the step; the answers of a group are to the same problem.
        logprobs: of each token of the completion, by the sampler.
        verdict: what `verdict_record` keeps; None where no program was run.
        detail: of the grade: one line for a person.
        is_passed: by the task's rules, which a program that ran well may still fail; None: not judged.
        score: by those rules; None where `is_passed` is.
        is_suspect: whether it shows signs of cheating its tests; one with a score has no reward.
        steps: under process supervision, where they have the advantages that count.
        rewards: by function, None where it could not tell; `failures` say why not.
        reward: the mix; None if no function could tell.
        advantage: over the group, by `reward`; None where there is none.
        is_used: whether the policy is trained on it, and if not, `reason` says why.
    """

    step: int
    group: int
    task: str
    problem: str
    prompt: str
    prompt_ids: tuple[int, ...]
    completion: str
    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    verdict: Mapping[str, Any] | None
    detail: str
    rewards: Mapping[str, float | None]
    failures: Mapping[str, str]
    reward: float | None
    advantage: float | None
    is_used: bool
    reason: Reason
    is_passed: bool | None = None
    score: float | None = None
    is_suspect: bool = False
    steps: tuple[RolloutStep, ...] = ()

    @property
    def is_truncated(self) -> bool:
        """Whether the answer ended because there was no more room."""
        return self.finish_reason in ("length", "context")

    @property
    def token_advantages(self) -> list[float]:
        """Of a rollout that is used: one a token, or a single one for all of them."""
        if not self.steps:
            assert self.advantage is not None
            return [self.advantage]
        found: list[float] = []
        for step in self.steps:
            assert step.advantage is not None
            found += [step.advantage] * (step.end - len(found))
        return found


def _kept(text: str) -> str:
    """Both ends of a long output."""
    if len(text) <= _MOST_OUTPUT:
        return text
    half = _MOST_OUTPUT // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters ...\n{text[-half:]}"


def verdict_record(verdict: Verdict) -> dict[str, Any]:
    """A verdict as plain data, long outputs shortened."""
    compiling = verdict.compile
    return {
        "outcome": verdict.outcome,
        "detail": verdict.detail,
        "exit_code": verdict.exit_code,
        "signal": verdict.signal,
        "wall": verdict.wall,
        "cpu": verdict.cpu,
        "peak_memory": verdict.peak_memory,
        "isolation": verdict.isolation,
        "stdout": _kept(verdict.stdout),
        "stderr": _kept(verdict.stderr),
        "compiler": None if compiling is None else _kept(compiling.stderr.decode(errors="backslashreplace")),
    }


def step_file(directory: Path, step: int) -> Path:
    """Where the rollouts of a step of the run in `directory` lie."""
    return directory / ROLLOUTS / f"step-{step:06d}.jsonl"


def _record(rollout: Rollout) -> dict[str, Any]:
    return {key: value for key, value in asdict(rollout).items() if key not in _IF_THERE or value}


def write_rollouts(directory: Path, step: int, rollouts: Iterable[Rollout]) -> None:
    """Write the rollouts of a step, whole or not at all."""
    path = step_file(directory, step)
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps(_record(rollout), ensure_ascii=False) + "\n" for rollout in rollouts]
    # Texts of a model may hold halves of surrogate pairs.
    write_bytes(path, "".join(lines).encode("utf-8", errors="backslashreplace"))


def require_rewards(rollouts: Sequence[Rollout], *, has_outcome: bool = True) -> None:
    """ValueError if no answer of a step has a reward that counts: whatever judges them does not work.

    It does where the reward of a suspect is withheld. `has_outcome`: whether rewards of whole answers count.
    """
    if any(step.reward is not None for rollout in rollouts for step in rollout.steps):
        return
    if has_outcome and any(rollout.reward is not None for rollout in rollouts):
        return
    if any(rollout.is_suspect and rollout.score for rollout in rollouts):
        return
    first = rollouts[0]
    reasons = [f"{name}: {reason}" for name, reason in first.failures.items()]
    told = "; ".join([first.detail, *reasons] if first.detail else reasons)
    raise ValueError(
        f"grpo: some answer of step {first.step} must have a reward, got none for all {len(rollouts)} "
        f"(the first: {told})"
    )


def written_steps(directory: Path) -> list[int]:
    """The steps whose rollouts the run in `directory` has written, ascending."""
    folder = directory / ROLLOUTS
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := _FILE.fullmatch(name)))


def drop_rollouts_after(directory: Path, step: int) -> None:
    """Delete the rollouts of later steps: a run that goes on from `step` makes them again."""
    for later in written_steps(directory):
        if later > step:
            step_file(directory, later).unlink()


_FIELDS = frozenset(item.name for item in fields(Rollout))
_STEP_FIELDS = frozenset(item.name for item in fields(RolloutStep))
_TUPLES = ("prompt_ids", "completion_ids", "logprobs")


def _parse(line: str, path: Path, number: int) -> Rollout:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    is_whole = isinstance(record, dict) and {*record, *_IF_THERE} == _FIELDS
    if not is_whole or any(set(step) != _STEP_FIELDS for step in record.get("steps", ())):
        raise ValueError(f"{path}: line {number} must be a rollout, got {line[:80]!r}")
    steps = tuple(RolloutStep(**step) for step in record.get("steps", ()))
    return Rollout(**record | {name: tuple(record[name]) for name in _TUPLES} | {"steps": steps})


def read_rollouts(directory: Path, step: int) -> list[Rollout]:
    """The rollouts of a step of the run in `directory`; ValueError if there are none."""
    path = step_file(directory, step)
    if not path.is_file():
        raise ValueError(f"{directory} must hold rollouts of step {step}, got none at {path}")
    lines = path.read_text(encoding="utf-8").split("\n")
    return [_parse(line, path, number) for number, line in enumerate(lines, start=1) if line]


def by_group(rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
    """The rollouts of a step, a list a group, in the order of the groups."""
    groups: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.group, []).append(rollout)
    return [groups[number] for number in sorted(groups)]
