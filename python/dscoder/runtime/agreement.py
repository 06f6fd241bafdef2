"""What all ranks do together ends well on all of them, or with an error on all of them.

One process alone is its own first rank: every method does there what it does on many, without a word.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

T = TypeVar("T")


class RankError(RuntimeError):
    """Another rank of the run failed at what all of them were doing."""

    def __init__(self, rank: int, what: str, error_number: int | None) -> None:
        """Say which and why; `error_number` is the failure's errno, if it has one."""
        super().__init__(f"rank {rank} failed: {what}")
        self.rank = rank
        self.error_number = error_number


def error_number_of(error: BaseException) -> int | None:
    """The errno behind `error`, or behind what it came from."""
    seen: BaseException | None = error
    while seen is not None:
        number = seen.errno if isinstance(seen, OSError) else None
        if isinstance(seen, RankError):
            number = seen.error_number
        if number:
            return number
        seen = seen.__cause__ or seen.__context__
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Outcome(Generic[T]):
    """What became of a deed on one rank: a value, or an error."""

    value: T | None = None
    # On its own rank alone: not every exception can be sent, and none with its causes.
    error: Exception | None = None
    what: str | None = None  # the error as the others see it
    error_number: int | None = None

    def sent(self) -> "_Outcome[T]":
        return replace(self, error=None)

    def told(self) -> "_Outcome[None]":
        return _Outcome(what=self.what, error_number=self.error_number)

    def raise_error(self) -> None:
        if self.error is not None:
            raise self.error

    def result(self, rank: int) -> T:
        if self.what is not None:
            raise RankError(rank, self.what, self.error_number)
        return self.value  # type: ignore[return-value]  # None only where T has it


def _attempt(do: Callable[[], T]) -> _Outcome[T]:
    try:
        return _Outcome(value=do())
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        return _Outcome(error=error, what=what, error_number=error_number_of(error))


class Agreement:
    """What all ranks do together over one group: from one thread of each, and in the same order."""

    def __init__(self, group: ProcessGroup | None) -> None:
        """`group`: of all ranks, on the host; None: this process is alone."""
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @property
    def is_first(self) -> bool:
        """Whether this rank does what is done once."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's picklable `value`, by rank."""
        if self.group is None:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def share(self, value: T) -> T:
        """Rank 0's picklable `value`."""
        if self.group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group, device=torch.device("cpu"))
        return values[0]

    def each(self, do: Callable[[], T]) -> T:
        """What `do`, which does not communicate, gives on this rank, once it has ended well on every rank.

        Where it failed its error is raised, and RankError on all other ranks.
        """
        if self.group is None:
            return do()
        own = _attempt(do)
        outcomes = self.gather(own.told())
        own.raise_error()
        for rank, outcome in enumerate(outcomes):
            outcome.result(rank)
        return own.result(self.rank)

    def first(self, do: Callable[[], T]) -> T:
        """What `do`, which does not communicate, gives on rank 0; its error there, RankError elsewhere."""
        if self.group is None:
            return do()
        own: _Outcome[T] = _attempt(do) if self.is_first else _Outcome()
        outcome = self.share(own.sent())
        own.raise_error()
        return outcome.result(0)
