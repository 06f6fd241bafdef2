"""What an expert-parallel exchange moved and how long it took, counted where it happens and read later."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dscoder.ops.exchange_transport import COMBINE, DISPATCH, ExchangeSizes, Routes

_MAX_SPANS = 4096  # unread pairs of events; older ones are read or, where they still run, waited for


@dataclass(frozen=True, kw_only=True, slots=True)
class ExchangeStatistics:
    """Totals of one rank since it was built, what recomputation and gradients moved included.

    "dispatch" counts what goes from tokens to slots (so the gradient of combine, too), "combine" what goes
    back. Logical bytes are those of every token-rank pair, remote bytes without this rank's pairs with
    itself; padding counts as neither. Seconds are those that the stream (on a CPU, the thread) of the caller
    spent in starting and waiting: what overlaps with computation is not among them.
    """

    num_tokens: int
    num_pairs: int  # one for each token and rank that it went to, in forward direction
    num_remote_pairs: int
    dispatch_bytes: int
    dispatch_remote_bytes: int
    dispatch_seconds: float
    combine_bytes: int
    combine_remote_bytes: int
    combine_seconds: float


class Meter:
    """Counts on the device, by destination and behind the sends; only `read` adds up, and waits for it."""

    def __init__(self, sizes: ExchangeSizes, device: torch.device) -> None:
        self._device = device
        self._rank = sizes.rank
        self._num_tokens = torch.zeros((), dtype=torch.int64, device=device)
        self._pairs_R = torch.zeros(sizes.num_ranks, dtype=torch.int64, device=device)
        self._bytes_R = {kind: torch.zeros_like(self._pairs_R) for kind in (DISPATCH, COMBINE)}
        self._seconds = {DISPATCH: 0.0, COMBINE: 0.0}
        self._spans: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    def count_tokens(self, routes: Routes) -> None:
        """A dispatch of these tokens."""
        self._num_tokens.add_(routes.slot_TR.shape[0])  # on the device, where replays of a graph count too
        self._pairs_R.add_(routes.counts_R)

    def count_bytes(self, kind: str, routes: Routes, row_bytes: int) -> None:
        """A movement of `row_bytes` for every pair."""
        self._bytes_R[kind].add_(routes.counts_R, alpha=row_bytes)

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Adds the time of the block."""
        if self._device.type != "cuda":
            begin = time.perf_counter()
            try:
                yield
            finally:
                self._seconds[kind] += time.perf_counter() - begin
            return
        if torch.cuda.is_current_stream_capturing():  # an event of a graph has no time
            yield
            return
        events = _new_event(), _new_event()
        stream = torch.cuda.current_stream(self._device)  # of the tensors; another device may be current
        events[0].record(stream)
        yield
        events[1].record(stream)
        self._spans.append((kind, *events))
        if len(self._spans) > _MAX_SPANS:
            self._take_span()

    def read(self) -> ExchangeStatistics:
        """The totals; on a GPU the host waits until it has counted all that was launched."""
        while self._spans:
            self._take_span()
        num_pairs, num_remote_pairs = self._totals(self._pairs_R)
        dispatch_bytes, dispatch_remote_bytes = self._totals(self._bytes_R[DISPATCH])
        combine_bytes, combine_remote_bytes = self._totals(self._bytes_R[COMBINE])
        return ExchangeStatistics(
            num_tokens=int(self._num_tokens),
            num_pairs=num_pairs,
            num_remote_pairs=num_remote_pairs,
            dispatch_bytes=dispatch_bytes,
            dispatch_remote_bytes=dispatch_remote_bytes,
            dispatch_seconds=self._seconds[DISPATCH],
            combine_bytes=combine_bytes,
            combine_remote_bytes=combine_remote_bytes,
            combine_seconds=self._seconds[COMBINE],
        )

    def _totals(self, count_R: Tensor) -> tuple[int, int]:
        """All of it, and what went to other ranks than this."""
        counts = count_R.tolist()
        return sum(counts), sum(counts) - counts[self._rank]

    def _take_span(self) -> None:
        kind, begin, end = self._spans.popleft()
        end.synchronize()
        self._seconds[kind] += begin.elapsed_time(end) / 1000


def _new_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def row_bytes(*tensors: Tensor | None) -> int:
    """Bytes of one row of each."""
    return sum(tensor.element_size() * tensor.shape[1] for tensor in tensors if tensor is not None)
