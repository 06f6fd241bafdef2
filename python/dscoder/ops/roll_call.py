"""Agreement of a process group's ranks over its store, on the host: what each brought, and who is gone.

The store outlives a broken collective, so it can tell which rank no longer answers when gloo or NCCL only
say that something failed.
"""

import json
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from dscoder.runtime.heartbeat import CommunicationError

OP = "expert_parallel"
_PREFIX = f"dscoder/{OP}"
PATIENCE = 5.0  # seconds in which a rank that lives leaves its mark after a failure
_POLL = 0.05  # seconds between two looks


class ExchangeError(CommunicationError):
    """An exchange that did not end: a rank is gone, or a wait lasted too long.

    Ranks count within the expert-parallel group; what is not known is None. `slot` is the flag that a kernel
    waited for: its phase (csrc/comm/comm.h) and the peer that writes it, as in "dispatch_arrival[1]".
    """

    def __init__(
        self,
        message: str,
        *,
        rank: int | None = None,
        peer: int | None = None,
        slot: str | None = None,
        expected: int | None = None,
        seen: int | None = None,
    ) -> None:
        super().__init__(message)
        self.rank, self.peer, self.slot, self.expected, self.seen = rank, peer, slot, expected, seen


class RollCall:
    """One meeting place of a group's ranks; every rank makes the same ones in the same order."""

    def __init__(self, process_group: ProcessGroup, *, timeout: float) -> None:
        self.rank = process_group.rank()
        self.num_ranks = process_group.size()
        self._timeout = timeout
        self._global_ranks = dist.get_process_group_ranks(process_group)
        self._store = process_group.get_group_store()
        # A meeting ends when all ranks are there, so a rank's next one is never counted into this one.
        arrivals = self._store.add(f"{_PREFIX}/arrivals", 1)
        self._key = f"{_PREFIX}/{(arrivals - 1) // self.num_ranks}"

    def share(self, subject: str, value: Any) -> list[Any]:
        """Every rank's `value`, by rank, sent as JSON. ExchangeError names the ranks that bring none."""
        self.tell(subject, value)
        keys = self._keys(subject)
        try:
            self._store.wait(keys, timedelta(seconds=self._timeout))
            return [json.loads(self._store.get(key)) for key in keys]
        except RuntimeError as error:
            raise self._no_show(subject, keys) from error

    def tell(self, subject: str, value: Any) -> None:
        """Brings this rank's `value` without waiting for the others."""
        try:
            self._store.set(self._keys(subject)[self.rank], json.dumps(value))
        except RuntimeError as error:
            raise self._no_show(subject, self._keys(subject)) from error

    def heard(self, subject: str) -> list[Any]:
        """Every rank's `value`, by rank, as far as it is there: None else. It does not wait."""
        keys = self._keys(subject)
        try:
            return [json.loads(self._store.get(key)) if self._store.check([key]) else None for key in keys]
        except RuntimeError as error:
            raise self._no_show(subject, keys) from error

    def lost_ranks(self) -> list[int]:
        """The ranks that do not meet this one here within a few seconds; to be called after a failure.

        A rank that lives but has not met the failure by then counts among them. Where the store goes while
        this looks (a rank that served it has looked long enough, and left) the last look counts.
        """
        keys = self._keys("alive")
        self._store.set(keys[self.rank], "")
        absent = self._absent(keys)
        deadline = time.monotonic() + PATIENCE
        while absent and time.monotonic() < deadline:
            time.sleep(_POLL)
            try:
                absent = self._absent(keys)
            except RuntimeError:
                break
        return absent

    def _no_show(self, subject: str, keys: list[str]) -> ExchangeError:
        message = f"{OP}: rank {self.rank} waited for the {subject} of "
        try:
            absent = self._absent(keys)
        except RuntimeError:
            return ExchangeError(f"{message}all ranks, and the group's store is gone", rank=self.rank)
        if not absent:
            return ExchangeError(f"{message}all ranks, which the group's store did not give", rank=self.rank)
        message += f"{self.names(absent)} for {self._timeout:g} s"
        return ExchangeError(message, rank=self.rank, peer=absent[0])

    def _keys(self, subject: str) -> list[str]:
        return [f"{self._key}/{subject}/{rank}" for rank in range(self.num_ranks)]

    def _absent(self, keys: list[str]) -> list[int]:
        return [rank for rank, key in enumerate(keys) if not self._store.check([key])]

    def failure(self, doing: str, error: BaseException) -> ExchangeError:
        """What to raise for a collective that failed with `error`: it names the ranks that are gone."""
        found, peer = self.who_is_lost()
        return ExchangeError(
            f"{OP}: {found}; rank {self.rank} failed to {doing}: {_first_line(error)}",
            rank=self.rank,
            peer=peer,
        )

    def who_is_lost(self) -> tuple[str, int | None]:
        """`lost_ranks` in words, and the first of them."""
        try:
            lost = self.lost_ranks()
        except RuntimeError as error:  # the rank that served the store was the one to go
            return (
                f"the group's store is gone (by default global rank 0 serves it: {_first_line(error)})",
                None,
            )
        if not lost:
            return "every rank answers", None
        return f"{self.names(lost)} did not answer for {PATIENCE:g} s", lost[0]

    def names(self, ranks: list[int]) -> str:
        """The ranks in words, with their global numbers where those differ."""
        listed = ", ".join(str(rank) for rank in ranks)
        named = f"rank{'s' if len(ranks) > 1 else ''} {listed}"
        globally = [self._global_ranks[rank] for rank in ranks]
        if globally != ranks:
            named += f" (globally {', '.join(str(rank) for rank in globally)})"
        return named


def _first_line(error: BaseException) -> str:
    """Without the frames of C++ that torch appends, and without the good wishes of gloo."""
    line = str(error).partition("\n")[0].partition("GLHF")[0]
    return line.encode("ascii", "ignore").decode().rstrip()
