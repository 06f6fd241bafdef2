"""The ranks of a run: what they agree on, and errors that all of them learn of.

One process alone is its own first rank: every method does there what it does on many, without a word.
"""

import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from dscoder.runtime.mesh import Mesh

T = TypeVar("T")
Count = int | Tensor  # a tensor where reading it would be a wait for the device

ALONE = {"replicate": 1, "expert_shard": 1, "expert": 1}  # the layout of one process


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
    error: Exception | None = (
        None  # on its own rank: not every exception can be sent, and none with its causes
    )
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


class Note(IntEnum):
    """What a rank lets all others know with the figures of a step."""

    INTERRUPTED = 0
    TERMINATED = 1
    UNSAVED = 2  # a checkpoint could not be written


STOPS = {signal.SIGINT: Note.INTERRUPTED, signal.SIGTERM: Note.TERMINATED}


class Ranks(Agreement):
    """The ranks of a run, how they are laid out, and the sums and notes of each step."""

    def __init__(self, mesh: Mesh | None = None, *, sums_each_batch: bool = False) -> None:
        """`mesh`: None for one process without torchrun. `sums_each_batch`: as in ParallelConfig."""
        super().__init__(None if mesh is None else mesh.control)
        self.mesh = mesh
        self.sums_each_batch = sums_each_batch
        self.background = Agreement(None if mesh is None else mesh.background)  # for one other thread
        self.forget()

    def layout(self) -> dict[str, int]:
        """How many ranks there are along each dimension."""
        if self.mesh is None:
            return dict(ALONE)
        mesh = self.mesh
        return {"replicate": mesh.replicate, "expert_shard": mesh.expert_shard, "expert": mesh.expert}

    def num_neighbours(self) -> int:
        """How many of the ranks share this machine's cores, this one among them."""
        return self.gather(socket.gethostname()).count(socket.gethostname())

    def totals(self, *counts: int) -> Sequence[Count]:
        """Each count summed over all ranks, at least 1; of many ranks on the device, without a wait."""
        if self.mesh is None:
            return [max(1, count) for count in counts]
        sums_N = torch.tensor(counts, dtype=torch.int64).to(self.mesh.device, non_blocking=True)
        return list(self.mesh.all_sum(sums_N).clamp(min=1).unbind())

    def add_up(self, figures_N: Tensor) -> Tensor:
        """The sums of `figures_N` over all ranks and, with many ranks, behind them what the ranks told."""
        if self.mesh is None:
            return figures_N
        told_N = torch.tensor(self._told, dtype=figures_N.dtype).to(figures_N.device, non_blocking=True)
        return self.mesh.all_sum(torch.cat([figures_N, told_N]))

    def forget(self) -> None:
        """Begin anew: what was told and heard belongs to a run before."""
        self._told = [0.0] * len(Note)
        self._heard = [0.0] * len(Note)

    def tell(self, note: Note) -> None:
        """Let every rank know with the next step; may be called in a signal handler."""
        self._told[note] = 1.0

    def hear(self, notes: Sequence[float]) -> None:
        """Take what stood behind the sums of a step."""
        self._heard = list(notes)

    def heard(self, note: Note) -> bool:
        """Whether any rank told `note` up to the last step; the same on all ranks."""
        return (self._told if self.mesh is None else self._heard)[note] > 0
