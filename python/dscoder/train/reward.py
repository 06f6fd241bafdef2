"""Rewards: what answers are worth, from functions that may fail, to one number an answer.

A reward function sees the answers of one group and gives a number for each, or None where it cannot tell. It
may be async, and all functions of a group run at once. One that raises, hangs, or answers with anything but
finite numbers gives None there, with a reason that is kept and counted.

The rule for None: that reward is left out of this answer's mix. The mix takes the mean of the group's others
in its place, so the answer is neither better nor worse than its group for it. (To add nothing would be to
count it as zero.) An answer without any reward has none, and is left out of its group.
"""

import asyncio
import inspect
import math
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from numbers import Real

from dscoder.infer.request import FinishReason
from dscoder.runtime.log import get_logger
from dscoder.tasks.problem import Grade, Problem
from dscoder.train.advantage import LARGEST_REWARD, group_mean

# Seconds in which a function that ran out of time may still end before it is asked again.
_GRACE = 1.0
_LONGEST_REASON = 200  # characters
_MIX = "mix"  # what failures of the sum are counted under
_LOG = get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One completion of a problem, judged.

    Attributes:
        tokens: its ids, the one that ended it included.
        grade: with the verdict of the sandbox, if it was asked; None where no function needs it.
    """

    problem: Problem
    prompt: str
    completion: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    max_tokens: int
    grade: Grade | None = None

    @property
    def is_truncated(self) -> bool:
        """Whether the answer ended because there was no more room."""
        return self.finish_reason in ("length", "context")


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardBatch:
    """What a reward function sees: the answers of one group, all to the same problem."""

    answers: tuple[Answer, ...]


RewardValues = Sequence[float | None]
RewardFunction = Callable[[RewardBatch], RewardValues | Awaitable[RewardValues]]


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardTerm:
    """One function of the mix.

    Attributes:
        time: seconds it may take for one group.
        is_required: a group for which it gives nothing at all is left out, whatever the others give.
    """

    name: str
    function: RewardFunction
    weight: float = 1.0
    time: float = 120.0
    is_required: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What one answer is worth.

    Attributes:
        rewards: by function; None where it could not tell.
        reasons: by function, why not.
        reward: the mix; None if no function could tell, or a required one could not for the whole group.
    """

    rewards: Mapping[str, float | None]
    reasons: Mapping[str, str]
    reward: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Result:
    """What one function gave for a group; `reasons` are of the values that are None."""

    values: tuple[float | None, ...]
    reasons: tuple[str, ...]


def _nothing(num_answers: int, reason: str) -> _Result:
    return _Result(values=(None,) * num_answers, reasons=(reason,) * num_answers)


class _HungError(Exception):
    """An async function ran out of time."""


async def _within(found: Awaitable[RewardValues], seconds: float) -> RewardValues:
    try:
        async with asyncio.timeout(seconds) as scope:
            return await found
    except TimeoutError:
        if scope.expired():
            raise _HungError from None
        raise


def _call(term: RewardTerm, batch: RewardBatch, done: "Future[RewardValues]") -> None:
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


def _checked(found: object, num_answers: int) -> _Result:
    if not isinstance(found, Sequence) or isinstance(found, str | bytes):
        return _nothing(num_answers, f"not_a_sequence: {type(found).__name__}")
    if len(found) != num_answers:
        return _nothing(num_answers, f"wrong_length: {len(found)} for {num_answers} answers")
    values, reasons = zip(*map(_value, found), strict=True) if found else ((), ())
    return _Result(values=values, reasons=reasons)


class _Call:
    """One call of a function, in a thread of its own."""

    def __init__(self, term: RewardTerm, batch: RewardBatch) -> None:
        self._term = term
        self._num_answers = len(batch.answers)
        self._done: Future[RewardValues] = Future()
        self._deadline = time.monotonic() + term.time
        self.thread = threading.Thread(
            target=_call, args=(term, batch, self._done), name=f"reward {term.name}", daemon=True
        )
        self.thread.start()

    def finish(self) -> _Result:
        """What the call gave; waits for it as long as its limit allows."""
        wait([self._done], timeout=max(0.0, self._deadline - time.monotonic()))
        error = self._done.exception() if self._done.done() else _HungError()
        if isinstance(error, _HungError):
            return _nothing(self._num_answers, f"hung: more than {self._term.time:g} s")
        if error is not None:
            return _nothing(self._num_answers, f"raised: {error!r}"[:_LONGEST_REASON])
        return _checked(self._done.result(), self._num_answers)


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

    def finish(self, call: _Call | None, num_answers: int) -> _Result:
        """What the call gave."""
        if call is None:
            return _nothing(num_answers, "hung: an earlier call still runs")
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
        num_answers = len(batch.answers)
        calls = [caller.start(batch) for caller in self._callers]
        results = {
            caller.term.name: caller.finish(call, num_answers)
            for caller, call in zip(self._callers, calls, strict=True)
        }
        scores = self._mixed(results, num_answers)
        self._tell(scores)
        return scores

    def _mixed(self, results: Mapping[str, _Result], num_answers: int) -> list[Score]:
        mixed = mix({name: result.values for name, result in results.items()}, self._weights)
        is_left_out = any(not _there(results[name].values) for name in self._required)
        scores = []
        for idx in range(num_answers):
            rewards = {name: result.values[idx] for name, result in results.items()}
            reasons = {name: result.reasons[idx] for name, result in results.items() if result.reasons[idx]}
            if mixed[idx] is None and _there(rewards.values()):
                reasons[_MIX] = f"not_finite: the sum is beyond {LARGEST_REWARD:g}"
            reward = None if is_left_out else mixed[idx]
            scores.append(Score(rewards=rewards, reasons=reasons, reward=reward))
        return scores

    def _tell(self, scores: Sequence[Score]) -> None:
        """Warn of each kind of failure once; that a function cannot tell is none."""
        for score in scores:
            for name, reason in score.reasons.items():
                kind = failure_kind(name, reason)
                if kind not in self._told and not reason.startswith("no_answer"):
                    _LOG.warning("reward function %s gave no reward (%s); it is left out", name, reason)
                self._told.add(kind)


def failure_kind(name: str, reason: str) -> str:
    """What failures of a function are counted under: "name: kind"."""
    return f"{name}: {reason.partition(':')[0]}"


def mix(
    values: Mapping[str, Sequence[float | None]], weights: Mapping[str, float]
) -> tuple[float | None, ...]:
    """One reward an answer: the weighted sum, a missing value counted as the mean of the group's others.

    A function without any value in the group is left out of the whole group; an answer without any value gets
    None, and so does one whose sum is too large to be compared.
    """
    means = {name: group_mean(there) for name, by_answer in values.items() if (there := _there(by_answer))}
    rows = zip(*values.values(), strict=True)
    return tuple(_mixed(dict(zip(values, row, strict=True)), means, weights) for row in rows)


def _there(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mixed(
    row: Mapping[str, float | None], means: Mapping[str, float], weights: Mapping[str, float]
) -> float | None:
    if not _there(row.values()):
        return None
    filled = {name: means[name] if (value := row[name]) is None else value for name in means}
    parts = [weights[name] * value for name, value in filled.items()]
    if any(abs(part) > LARGEST_REWARD for part in parts):  # their sum may be no number
        return None
    mixed = math.fsum(parts)
    return mixed if abs(mixed) <= LARGEST_REWARD else None
