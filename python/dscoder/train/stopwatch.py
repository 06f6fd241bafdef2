"""What the steps between two reports took: tokens a second, MFU, memory, time in the exchange of tokens."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dscoder.ops import ExchangeStatistics
from dscoder.runtime.agreement import Agreement
from dscoder.runtime.device import device_peak_flops, peak_memory

_GIB = 2**30

ReadExchange = Callable[[], ExchangeStatistics]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Measured:
    """Of one rank."""

    memory: int | None
    dispatch_seconds: float
    combine_seconds: float


class Stopwatch:
    """Measures one process and, with the other ranks, all of them."""

    def __init__(
        self,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        ranks: Agreement | None = None,
        read_exchange: ReadExchange | None = None,
    ) -> None:
        """Start now.

        Args:
            device: that this rank computes on; None: the CPU.
            dtype: of the weights, whose products the peak rate is of.
            ranks: all of the run; None: this process alone.
            read_exchange: ExpertParallel.statistics of a run whose experts are on several ranks.
        """
        self._device = torch.device("cpu") if device is None else device
        self._ranks = Agreement(None) if ranks is None else ranks
        self._peak_flops = device_peak_flops(self._device, dtype)
        self._read_exchange = read_exchange
        self._exchange_seconds = self._totals()
        self.start()

    def start(self) -> None:
        """Measure from here."""
        self._num_tokens, self._flops = 0, 0
        self._since = time.perf_counter()

    def step_done(self, *, num_tokens: int, flops: int) -> None:
        """Count a step of all ranks together; `flops` of 0 are unknown ones."""
        self._num_tokens += num_tokens
        self._flops += flops

    def pause(self) -> float:
        """When a break begins that is no training time; give it back to `resume`."""
        return time.perf_counter()

    def resume(self, paused: float) -> None:
        """Take the break since `paused` out of the measured time."""
        self._since += time.perf_counter() - paused

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is exchanged in the block is not the steps'; the host waits for the device at both ends."""
        before = self._totals()
        yield
        seconds = zip(self._exchange_seconds, before, self._totals(), strict=True)
        dispatch, combine = (counted + end - begin for counted, begin, end in seconds)
        self._exchange_seconds = dispatch, combine

    def figures(self) -> dict[str, float]:
        """Of the time since the last call; every rank calls this. A figure that nobody knows is left out."""
        seconds = time.perf_counter() - self._since
        dispatch, combine = self._totals()
        dispatch_before, combine_before = self._exchange_seconds
        self._exchange_seconds = dispatch, combine
        by_rank = self._ranks.gather(
            _Measured(
                memory=peak_memory(self._device),
                dispatch_seconds=dispatch - dispatch_before,
                combine_seconds=combine - combine_before,
            )
        )
        found = {"tokens_per_second": self._num_tokens / seconds}
        if self._flops and self._peak_flops is not None:
            found["mfu"] = self._flops / (seconds * self._peak_flops * len(by_rank))
        memory = [measured.memory for measured in by_rank if measured.memory is not None]
        if memory:
            found["peak_memory_gib"] = max(memory) / _GIB
        if self._read_exchange is not None:
            whole = seconds * len(by_rank)
            found["dispatch_share"] = sum(measured.dispatch_seconds for measured in by_rank) / whole
            found["combine_share"] = sum(measured.combine_seconds for measured in by_rank) / whole
        self.start()
        return found

    def _totals(self) -> tuple[float, float]:
        """Seconds in dispatch and combine so far."""
        if self._read_exchange is None:
            return 0.0, 0.0
        statistics = self._read_exchange()
        return statistics.dispatch_seconds, statistics.combine_seconds
