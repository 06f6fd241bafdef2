"""Rewards: what answers are worth, from functions that may fail, to one number an answer.

A reward function sees the answers of one group and gives a number for each, or None where it cannot tell. It
may be async, and all functions of a group run at once. One that raises, hangs, or answers with anything but
finite numbers gives None there, with a reason that is kept and counted.

The rule for None: that reward is left out of this answer's mix. The mix takes the mean of the group's others
in its place, so the answer is neither better nor worse than its group for it. (To add nothing would be to
count it as zero.) An answer without any reward has none, and is left out of its group.

A suspect, an answer that its grade gives something for what looks like cheating its tests, has no reward from
any function, and what functions gave for it is in no mean. One that failed all the same has its failure: or a
sign of cheating would spare it.

A process reward function gives for each answer a number for each of its steps, or None where it cannot tell:
for a step, or for a whole answer. The same rule holds among all steps of the group.
"""

import asyncio
import inspect
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from numbers import Real

from dscoder.infer.request import FinishReason
from dscoder.runtime.log import get_logger
from dscoder.tasks.problem import Grade, Problem
from dscoder.train.advantage import LARGEST_REWARD
from dscoder.train.reward_mix import mix, told

# Seconds in which a function that ran out of time may still end before it is asked again.
_GRACE = 1.0
_LONGEST_REASON = 200  # characters
_MIX = "mix"  # what failures of the sum are counted under
_TOO_LARGE = f"not_finite: the sum is beyond {LARGEST_REWARD:g}"
_SUSPECT = "suspect"
_LOG = get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One completion of a problem, judged.

    Attributes:
        tokens: its ids, the one that ended it included.
        grade: with the verdict of the sandbox, if it was asked; None where no function needs it.
        steps: the completion cut into pieces, under process supervision.
    """

    problem: Problem
    prompt: str
    completion: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    max_tokens: int
    grade: Grade | None = None
    steps: tuple[str, ...] = ()

    @property
    def is_truncated(self) -> bool:
        """Whether the answer ended because there was no more room."""
        return self.finish_reason in ("length", "context")

    @property
    def is_withheld(self) -> bool:
        """Whether it is a suspect that would gain by it, and so has no reward."""
        return self.grade is not None and self.grade.is_suspect and bool(self.grade.score)


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardBatch:
    """What a reward function sees: the answers of one group, all to the same problem."""

    answers: tuple[Answer, ...]


RewardValues = Sequence[float | None]
RewardFunction = Callable[[RewardBatch], RewardValues | Awaitable[RewardValues]]
# A number a step for each answer.
StepRewardValues = Sequence[RewardValues | None]
StepRewardFunction = Callable[[RewardBatch], StepRewardValues | Awaitable[StepRewardValues]]


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardTerm:
    """One function of the mix.

    Attributes:
        time: seconds it may take for one group.
        is_required: a group for which it gives nothing at all is left out, whatever the others give.
        is_process: whether it rewards steps.
    """

    name: str
    function: RewardFunction | StepRewardFunction
    weight: float = 1.0
    time: float = 120.0
    is_required: bool = False
    is_process: bool = False

    def num_values(self, batch: RewardBatch) -> int:
        """How many rewards it gives for a group."""
        return sum(len(answer.steps) for answer in batch.answers) if self.is_process else len(batch.answers)


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What one answer is worth.

    Attributes:
        rewards: by function; None where it could not tell.
        reasons: by function, why not (of its steps: the first of them that it could not tell of).
        reward: the mix; None if no function could tell, or a required one could not for the whole group.
        step_rewards: by process function, one a step.
        steps: their mix, one a step; None as for `reward`.
    """

    rewards: Mapping[str, float | None]
    reasons: Mapping[str, str]
    reward: float | None
    step_rewards: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    steps: tuple[float | None, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Result:
    """What one function gave for a group, of all steps one behind the other; `reasons` are of the Nones."""

    values: tuple[float | None, ...]
    reasons: tuple[str, ...]


_Found = RewardValues | StepRewardValues


def _without_suspects(result: _Result, batch: RewardBatch, *, is_process: bool) -> _Result:
    """The same without what was given for answers that have no reward."""
    kept = [not a.is_withheld for a in batch.answers for _ in (a.steps if is_process else (a,))]
    return _Result(
        values=tuple(value if keep else None for value, keep in zip(result.values, kept, strict=True)),
        reasons=tuple(reason if keep else "" for reason, keep in zip(result.reasons, kept, strict=True)),
    )


def _nothing(num_values: int, reason: str) -> _Result:
    return _Result(values=(None,) * num_values, reasons=(reason,) * num_values)


class _HungError(Exception):
    """An async function ran out of time."""


async def _within(found: Awaitable[_Found], seconds: float) -> _Found:
    try:
        async with asyncio.timeout(seconds) as scope:
            return await found
    except TimeoutError:
        if scope.expired():
            raise _HungError from None
        raise


def _call(term: RewardTerm, batch: RewardBatch, done: "Future[_Found]") -> None:
    """The body of a thread: run the function, async or not, and say how it went."""
    try:
        found = term.function(batch)
        if inspect.isawaitable(found):
            found = asyncio.run(_within(found, term.time))
        done.set_result(found)
    except BaseException as error:  # SystemExit too: it must be counted, not end the thread silently
        done.set_exception(error)


def _value(found: object) -> tuple[float | None, str]:
    if found is None:
        return None, "no_answer"
    if not isinstance(found, Real):
        return None, f"not_a_number: {type(found).__name__}"
    try:
        value = float(found)
    except OverflowError:  # of an integer; its digits may be too many to be shown
        return None, f"not_finite: more than {sys.float_info.max:.0e}"
    return (value, "") if abs(value) <= LARGEST_REWARD else (None, f"not_finite: {value}")


def _misfit(found: object, wanted: int, what: str) -> str:
    """Why `found` is not `wanted` values; empty if it is."""
    if not isinstance(found, Sequence) or isinstance(found, str | bytes):
        return f"not_a_sequence: {type(found).__name__}"
    return "" if len(found) == wanted else f"wrong_length: {len(found)} for {wanted} {what}"


def _checked(found: object, wanted: int, what: str) -> _Result:
    reason = _misfit(found, wanted, what)
    if reason:
        return _nothing(wanted, reason)
    assert isinstance(found, Sequence)
    values, reasons = zip(*map(_value, found), strict=True) if found else ((), ())
    return _Result(values=values, reasons=reasons)


def _checked_steps(found: object, batch: RewardBatch) -> _Result:
    sizes = [len(answer.steps) for answer in batch.answers]
    reason = _misfit(found, len(sizes), "answers")
    if reason:
        return _nothing(sum(sizes), reason)
    assert isinstance(found, Sequence)
    parts = [
        _nothing(size, "no_answer") if values is None else _checked(values, size, "steps")
        for values, size in zip(found, sizes, strict=True)
    ]
    return _Result(
        values=tuple(value for part in parts for value in part.values),
        reasons=tuple(reason for part in parts for reason in part.reasons),
    )


class _Call:
    """One call of a function, in a thread of its own."""

    def __init__(self, term: RewardTerm, batch: RewardBatch) -> None:
        self._term = term
        self._batch = batch
        self._done: Future[_Found] = Future()
        self._deadline = time.monotonic() + term.time
        self.thread = threading.Thread(
            target=_call, args=(term, batch, self._done), name=f"reward {term.name}", daemon=True
        )
        self.thread.start()

    def finish(self) -> _Result:
        """What the call gave; waits for it as long as its limit allows."""
        wait([self._done], timeout=max(0.0, self._deadline - time.monotonic()))
        error = self._done.exception() if self._done.done() else _HungError()
        num_values = self._term.num_values(self._batch)
        if isinstance(error, _HungError):
            return _nothing(num_values, f"hung: more than {self._term.time:g} s")
        if error is not None:
            return _nothing(num_values, f"raised: {error!r}"[:_LONGEST_REASON])
        found = self._done.result()
        if self._term.is_process:
            return _checked_steps(found, self._batch)
        return _checked(found, num_values, "answers")


def _outlasts(thread: threading.Thread, seconds: float) -> bool:
    thread.join(seconds)
    return thread.is_alive()


class _Caller:
    """Calls one function for any number of groups at once.

    Threads cannot be killed: one that hangs is left behind as a daemon, which keeps no process from ending.
    While such a one lives the function is not called again, so that they do not pile up.
    """

    def __init__(self, term: RewardTerm) -> None:
        self.term = term
        self._left: list[threading.Thread] = []
        self._lock = threading.Lock()  # of `_left`: groups are scored by several threads at once

    def _still_hangs(self) -> bool:
        with self._lock:
            left = tuple(self._left)
        is_hung = any(_outlasts(thread, _GRACE) for thread in left)
        with self._lock:
            self._left = [thread for thread in self._left if thread.is_alive()]
        return is_hung

    def start(self, batch: RewardBatch) -> _Call | None:
        """Begin a call; None if an earlier one still hangs."""
        return None if self._still_hangs() else _Call(self.term, batch)

    def finish(self, call: _Call | None, batch: RewardBatch) -> _Result:
        """What the call gave."""
        if call is None:
            return _nothing(self.term.num_values(batch), "hung: an earlier call still runs")
        result = call.finish()
        if call.thread.is_alive() and any(reason.startswith("hung") for reason in result.reasons):
            with self._lock:
                self._left.append(call.thread)
        return result


class Rewards:
    """The functions of a run and their mix; groups may be scored by several threads at once."""

    def __init__(self, terms: Sequence[RewardTerm]) -> None:
        names = [term.name for term in terms]
        if not names or len(set(names)) != len(names) or _MIX in names:
            raise ValueError(f"Rewards: terms must be some, each name once and none {_MIX!r}, got {names}")
        self._callers = [_Caller(term) for term in terms]
        self._weights = {term.name: term.weight for term in terms}
        self._required = [term.name for term in terms if term.is_required]
        self._told: set[str] = set()  # failures that the log has already

    def score(self, batch: RewardBatch) -> list[Score]:
        """The score of each answer of a group; all functions run at once."""
        calls = [caller.start(batch) for caller in self._callers]
        results = {
            caller.term.name: _without_suspects(
                caller.finish(call, batch), batch, is_process=caller.term.is_process
            )
            for caller, call in zip(self._callers, calls, strict=True)
        }
        process = {c.term.name: results.pop(c.term.name) for c in self._callers if c.term.is_process}
        is_left_out = any(not told(results[name].values) for name in self._required)
        scores = self._mixed(results, batch, is_left_out=is_left_out)
        if process:
            scores = self._with_steps(scores, process, batch, is_left_out=is_left_out)
        self._tell(scores)
        return scores

    def _mixed(self, results: Mapping[str, _Result], batch: RewardBatch, *, is_left_out: bool) -> list[Score]:
        mixed = mix({name: result.values for name, result in results.items()}, self._weights)
        scores = []
        for idx, answer in enumerate(batch.answers):
            rewards = {name: result.values[idx] for name, result in results.items()}
            reasons = {name: result.reasons[idx] for name, result in results.items() if result.reasons[idx]}
            reward = mixed[idx] if mixed else None
            if reward is None and told(rewards.values()):
                reasons[_MIX] = _TOO_LARGE
            if answer.is_withheld:
                reasons[_MIX] = _SUSPECT
            scores.append(Score(rewards=rewards, reasons=reasons, reward=None if is_left_out else reward))
        return scores

    def _with_steps(
        self,
        scores: Sequence[Score],
        results: Mapping[str, _Result],
        batch: RewardBatch,
        *,
        is_left_out: bool,
    ) -> list[Score]:
        """The same with what the process functions gave for each step."""
        mixed = mix({name: result.values for name, result in results.items()}, self._weights)
        bounds = pairwise(accumulate((len(answer.steps) for answer in batch.answers), initial=0))
        found = []
        for score, own in zip(scores, (slice(*bound) for bound in bounds), strict=True):
            whys = {name: next(filter(None, result.reasons[own]), "") for name, result in results.items()}
            by_step = zip(*(result.values[own] for result in results.values()), strict=True)
            if any(told(values) and step is None for values, step in zip(by_step, mixed[own], strict=True)):
                whys[_MIX] = _TOO_LARGE
            found.append(
                replace(
                    score,
                    reasons={**score.reasons, **{name: why for name, why in whys.items() if why}},
                    step_rewards={name: result.values[own] for name, result in results.items()},
                    steps=(None,) * len(mixed[own]) if is_left_out else mixed[own],
                )
            )
        return found

    def _tell(self, scores: Sequence[Score]) -> None:
        """Warn of each kind of failure once; that a function cannot tell, or a suspect has none, is none."""
        for score in scores:
            for name, reason in score.reasons.items():
                kind = failure_kind(name, reason)
                if kind not in self._told and not reason.startswith(("no_answer", _SUSPECT)):
                    _LOG.warning("reward function %s gave no reward (%s); it is left out", name, reason)
                self._told.add(kind)


def failure_kind(name: str, reason: str) -> str:
    """What failures of a function are counted under: "name: kind"."""
    return f"{name}: {reason.partition(':')[0]}"
