"""The reward functions that come with dscoder, and any others by their dotted path.

Whoever needs a verdict gets the one that the sandbox gave for the answer's program: it runs once for all
functions. An answer that was not judged (the sandbox failed, a toolchain is missing) gets None, never zero.
"""

import importlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from dscoder.config.grpo import RewardsConfig
from dscoder.sandbox.verdict import Verdict
from dscoder.train.reward import Answer, RewardBatch, RewardFunction, RewardTerm, StepRewardFunction

# Python compiles when it is run: what it cannot compile ends with one of these, before any traceback.
_SYNTAX_ERROR = re.compile(r"^(SyntaxError|IndentationError|TabError)\b", re.MULTILINE)
# Or, where answer and tests are two processes, with this in one: what is raised while it runs names no line.
_ANSWER_SYNTAX_ERROR = re.compile(
    r"^\w*Error: (.*\(answer\.py, line \d+\)|source code string cannot contain null bytes)$", re.MULTILINE
)


def passed_tests(batch: RewardBatch) -> list[float | None]:
    """What the task's rules give the answer: 1 passed, 0 not, or the share that passed."""
    return [None if answer.grade is None else answer.grade.score for answer in batch.answers]


def _compiles(language: str, verdict: Verdict) -> bool:
    if verdict.outcome == "compile_error" or (verdict.compile is not None and verdict.compile.exit_code != 0):
        return False
    if language != "python":
        return True
    is_traced = "Traceback (most recent call last)" in verdict.stderr
    return (_ANSWER_SYNTAX_ERROR if is_traced else _SYNTAX_ERROR).search(verdict.stderr) is None


def _compiler_reward(answer: Answer) -> float | None:
    grade = answer.grade
    if grade is None or grade.is_passed is None:
        return None
    if grade.verdict is None:
        # The rules decided without a program: an answer with no code in it, or one that is only compared.
        return None if grade.is_passed else 0.0
    return float(_compiles(answer.problem.language, grade.verdict))


def compiled(batch: RewardBatch) -> list[float | None]:
    """1 if the answer's program compiles (in Python: if its syntax is right), 0 if not."""
    return [_compiler_reward(answer) for answer in batch.answers]


def soft_overlong_penalty(num_tokens: int, *, max_tokens: int, margin: int) -> float:
    """0 up to `max_tokens - margin` tokens, then falling on a line to -1 at `max_tokens` (DAPO eq. 13)."""
    if not 0 <= margin <= max_tokens:
        raise ValueError(
            f"soft_overlong_penalty: margin must be in [0, {max_tokens}], max_tokens, got {margin}"
        )
    over = num_tokens - (max_tokens - margin)
    if over <= 0:
        return 0.0
    return -1.0 if num_tokens > max_tokens else -over / margin


def format_function(pattern: str) -> RewardFunction:
    """The function "format": 1 where an answer matches the regular expression somewhere, else 0."""
    try:
        wanted = re.compile(pattern, re.DOTALL | re.MULTILINE)
    except re.error as error:
        raise ValueError(f"format_pattern must be a regular expression, got {pattern!r}: {error}") from error

    def has_format(batch: RewardBatch) -> list[float | None]:
        return [float(wanted.search(answer.completion) is not None) for answer in batch.answers]

    return has_format


def length_function(margin: int) -> RewardFunction:
    """The function "length": `soft_overlong_penalty`; an answer cut off at its longest gets all of it."""

    def overlong(batch: RewardBatch) -> list[float | None]:
        return [
            -1.0
            if answer.is_truncated
            else soft_overlong_penalty(
                len(answer.tokens), max_tokens=answer.max_tokens, margin=min(margin, answer.max_tokens)
            )
            for answer in batch.answers
        ]

    return overlong


def load_function(path: str) -> RewardFunction:
    """The callable at `package.module.name`."""
    found: RewardFunction = _load(path, "tests, compiler, format, length or package.module.name")
    return found


def load_process_function(path: str) -> StepRewardFunction:
    """The same, of a function that rewards steps."""
    found: StepRewardFunction = _load(path, "reward_model (with a reward_model named) or package.module.name")
    return found


def _load(path: str, wanted: str) -> Callable[[RewardBatch], Any]:
    module_name, _, name = path.replace(":", ".").rpartition(".")
    if not module_name:
        raise ValueError(f"a reward function must be {wanted}, got {path!r}")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"a reward function must be {wanted}, got {path!r}: {error}") from error
    function = vars(module).get(name)
    if not callable(function):
        raise ValueError(f"a reward function must be callable, got {path!r}: {function!r}")
    loaded: Callable[[RewardBatch], Any] = function
    return loaded


def reward_terms(
    config: RewardsConfig,
    *,
    given: Mapping[str, RewardFunction] | None = None,
    given_process: Mapping[str, StepRewardFunction] | None = None,
) -> list[RewardTerm]:
    """The functions that a config names; those that reward steps are called "process.NAME".

    Args:
        given: functions that were made elsewhere (from a reward model, say), by the name that the config has
            for them; they come before those built in.
        given_process: the same, of those that reward steps.
    """
    built_in: dict[str, RewardFunction] = {
        "tests": passed_tests,
        "compiler": compiled,
        "length": length_function(config.overlong_margin),
    }
    if config.format_pattern:
        built_in["format"] = format_function(config.format_pattern)
    known = built_in | dict(given or {})
    terms = [
        RewardTerm(
            name=name,
            function=known[name] if name in known else load_function(name),
            weight=weight,
            time=config.time,
            is_required=config.is_required[name],
        )
        for name, weight in config.weight_of.items()
    ]
    if config.process is None:
        return terms
    known_process = dict(given_process or {})
    return terms + [
        RewardTerm(
            name=f"process.{name}",
            function=known_process[name] if name in known_process else load_process_function(name),
            weight=weight,
            time=config.time,
            is_process=True,
        )
        for name, weight in config.process.weight_of.items()
    ]
