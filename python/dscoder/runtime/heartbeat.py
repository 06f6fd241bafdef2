"""How a rank tells the others that it lives, and how they find out which one does not.

Every rank has a key in the store of torchrun's rendezvous and counts up in it from a thread of its own. Who
wants to know which ranks are gone reads all keys twice. A rank that leaves says why in the same key, so that
the rank that failed first is named, not those that ended because of it.

Each rank also watches the next one. Communication on a GPU does not end when a peer dies, so the watch ends
the process where the main thread has not noticed.
"""

import os
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from dscoder.runtime.log import get_logger

_PERIOD = 0.5  # seconds between two beats
_SILENCE = 6.0  # seconds without a beat after which a rank counts as gone
_WATCH = 30.0  # the same for the watch, which nothing has alarmed
_NOTICE = 20.0  # seconds that the main thread has to notice a loss by itself
_STORE_TIMEOUT = timedelta(seconds=30)
_EXIT_STATUS = 70  # EX_SOFTWARE
_ALIVE, _DONE, _FAILED, _FOLLOWED = "alive", "done", "failed", "followed"
_MAX_REASON = 300  # characters of a failed rank's error that the others see
# What gloo and sockets say; NCCL and the store raise DistError.
_LINK_WORDS = re.compile(r"gloo|connection (closed|reset|refused)|broken pipe|socket timeout", re.IGNORECASE)
_LOG = get_logger(__name__)


class CommunicationError(RuntimeError):
    """An exchange between ranks did not end as it must; the peer may be gone."""


class LostRankError(RuntimeError):
    """Other ranks of the run are gone."""

    def __init__(self, ranks: Sequence[int], message: str) -> None:
        """Say which, and what is known."""
        super().__init__(message)
        self.ranks = tuple(ranks)


def is_communication_error(error: BaseException) -> bool:
    """Whether `error`, or what it was raised from, comes from the links between ranks."""
    seen: BaseException | None = error
    while seen is not None:
        is_link = isinstance(seen, RuntimeError) and _LINK_WORDS.search(str(seen)) is not None
        if isinstance(seen, DistError | CommunicationError) or is_link:
            return True
        seen = seen.__cause__
    return False


@dataclass(frozen=True, kw_only=True, slots=True)
class _Beat:
    count: int
    state: str
    reason: str  # of a failure


def _read_beat(value: bytes) -> _Beat:
    count, state, reason = value.decode().split(" ", 2)
    return _Beat(count=int(count), state=state, reason=reason)


class Heartbeat:
    """This rank's beat and what it knows of the others."""

    def __init__(
        self, *, host: str, port: int, prefix: str, host_rank: int | None, rank: int, world_size: int
    ) -> None:
        """Connect to the store at host:port, and begin to beat.

        Args:
            prefix: of the keys; another one for the ranks of each start that meet in the same store.
            host_rank: the rank that keeps the store; None: none of them does.
        """
        self._address = f"{host}:{port}"
        self._host_rank = host_rank
        # A connection of its own: a wait of the main thread must not hold up the beats.
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=_STORE_TIMEOUT)
        self._store: Store = PrefixStore(prefix, store)
        self._rank = rank
        self._keys = [f"beat/{other}" for other in range(world_size)]
        self._lock = threading.Lock()  # around this rank's key
        self._count, self._state, self._reason = 0, _ALIVE, ""
        self._stopped = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def meet(self, timeout: float) -> None:
        """Wait for the first beat of every rank; LostRankError names those that do not come."""
        try:
            self._store.wait(self._keys, timedelta(seconds=timeout))
        except RuntimeError as error:
            absent = [rank for rank, beat in enumerate(self._read_all()) if beat is None]
            named = ", ".join(map(str, absent))
            raise LostRankError(absent, f"ranks that did not come within {timeout:g} s: {named}") from error

    def lost(self) -> dict[int, str]:
        """What happened to the ranks that are gone, by rank; those that left because of others are not there.

        Takes a few seconds where no rank said that it failed.

        Raises:
            LostRankError: the store does not answer.
        """
        try:
            before = after = self._read_all()
            deadline = time.monotonic() + _SILENCE
            while not _failures(after) and time.monotonic() < deadline:
                time.sleep(_PERIOD)
                after = self._read_all()
        except RuntimeError as error:
            raise self._store_loss() from error
        losses = _failures(after) or _silences(before, after)
        return {rank: loss for rank, loss in losses.items() if rank != self._rank}

    def leave(self, error: BaseException | None) -> None:
        """Beat for the last time, and say whether this rank is done, failed or followed others that did."""
        self._stopped.set()
        self._thread.join()
        self._state = _DONE
        if error is not None:
            self._state = _FOLLOWED if isinstance(error, LostRankError) else _FAILED
            self._reason = f"{type(error).__name__}: {error}"[:_MAX_REASON]
        try:
            self._beat()
            if self._state == _FOLLOWED and self._host_rank == self._rank:
                self._wait_for_others()
        except RuntimeError:
            _LOG.debug("the store is gone, so nobody reads the last beat")

    def _wait_for_others(self) -> None:
        """Keep the store until all others that live have read in it what happened."""
        deadline = time.monotonic() + 2 * _SILENCE
        while time.monotonic() < deadline:
            beats = self._read_all()
            time.sleep(2 * _PERIOD)
            if not any(_lives(*pair) for pair in zip(beats, self._read_all(), strict=True)):
                return

    def _store_loss(self) -> LostRankError:
        gone = f"the store at {self._address}, which every rank needs, does not answer"
        if self._host_rank is None:
            return LostRankError((), f"{gone}: torchrun's first agent or its machine is gone")
        return LostRankError((self._host_rank,), f"{gone}: rank {self._host_rank}, which keeps it, is gone")

    def _beat(self) -> None:
        with self._lock:
            self._count += 1
            self._store.set(self._keys[self._rank], f"{self._count} {self._state} {self._reason}")

    def _read(self, rank: int) -> _Beat | None:
        """The latest beat of `rank`; None before its first."""
        key = self._keys[rank]
        return _read_beat(self._store.get(key)) if self._store.check([key]) else None

    def _read_all(self) -> list[_Beat | None]:
        if self._store.check(self._keys):  # one question for all, once everybody is there
            return [_read_beat(value) for value in self._store.multi_get(self._keys)]
        return [self._read(rank) for rank in range(len(self._keys))]

    def _run(self) -> None:
        """Beat and watch until told to stop, or until the main thread has had its time to notice a loss."""
        watched = (self._rank + 1) % len(self._keys)
        last, changed_at, lost_at = None, time.monotonic(), None
        while not self._stopped.wait(_PERIOD):
            now = time.monotonic()
            try:
                self._beat()  # during the time to notice too: others may be counting beats
                beat = self._read(watched)
            except RuntimeError:
                loss = str(self._store_loss())
            else:
                if beat is None or beat != last or beat.state == _DONE:
                    last, changed_at = beat, now
                has_left = beat is not None and beat.state in (_FAILED, _FOLLOWED)
                loss = f"rank {watched} is gone" if has_left or now - changed_at > _WATCH else ""
            if not loss:
                lost_at = None
            elif lost_at is None:
                lost_at = now
            elif now - lost_at > _NOTICE:
                _LOG.critical("rank %d still runs although %s; ending it", self._rank, loss)
                self._say_followed(loss)
                os._exit(_EXIT_STATUS)

    def _say_followed(self, loss: str) -> None:
        """So that nobody takes this rank, which the watch ends, for the first to go."""
        self._state, self._reason = _FOLLOWED, loss
        try:
            self._beat()
        except RuntimeError:
            _LOG.debug("the store is gone, so nobody reads the last beat")


def _lives(before: _Beat | None, after: _Beat | None) -> bool:
    return after is not None and after.state == _ALIVE and after != before


def _failures(beats: Sequence[_Beat | None]) -> dict[int, str]:
    return {
        rank: f"failed with {beat.reason}"
        for rank, beat in enumerate(beats)
        if beat is not None and beat.state == _FAILED
    }


def _silences(before: Sequence[_Beat | None], after: Sequence[_Beat | None]) -> dict[int, str]:
    losses = {}
    for rank, (first, last) in enumerate(zip(before, after, strict=True)):
        if last is not None and last == first and last.state == _ALIVE:
            losses[rank] = "is gone: its heartbeat stopped"
    return losses
