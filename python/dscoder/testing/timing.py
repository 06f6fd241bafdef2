"""Clocks: how long a call takes on this machine, and the ceilings that it is measured against.

On a GPU a call is captured into a CUDA graph, several times on inputs of its own, and a replay is timed
behind a read of memory much larger than the L2 cache: every call finds its inputs and outputs in DRAM, the
launches cost nothing on the host, and the read leaves no dirty lines for the call to write back. Before,
between and after the calls stands a kernel that does next to nothing: no call begins before the one before it
has ended, whatever its launches allow (ours begin early, by programmatic dependent launch). What a graph of
these kernels alone takes is taken off. What cannot be captured (it waits for the GPU) is timed by events
behind the same read. On a CPU it is wall time.
"""

import functools
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

Call = Callable[[], Any]
Made = TypeVar("Made")

FLUSH_BYTES = 2**30
MAX_COPIES = 64
MIN_COPIES = 4
MAX_ROUNDS = 50
MIN_ROUNDS = 3
NUM_BLANK_ROUNDS = 21  # replays of a graph without calls
MIN_SECONDS = 1e-8  # of a call: less is the noise of two times' difference
RENEW_SECONDS = 20.0  # after which the ceilings are looked at again
CPU_INFO = Path("/proc/cpuinfo")
CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
MAX_EAGER_CALLS = 50
EAGER_SECONDS = 0.02  # that queued calls take in all, about


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """What this machine reaches: a large matrix product, and a large copy (bytes read and written)."""

    flops_per_second: float
    bytes_per_second: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Runner:
    """A call made ready: `seconds` runs it and gives the time of one call."""

    method: str  # "graph", "events" or "wall"
    seconds: Callable[[], float]


class Clock(Protocol):
    """What `measure` needs of a device."""

    device: torch.device
    budget: float  # seconds that the rounds of one benchmark may take

    def num_copies(self, num_bytes: int) -> int:
        """How many copies of inputs and outputs of `num_bytes` a measurement goes through."""

    def prepare(self, make: Callable[[], Made]) -> Made:
        """`make()`, run where its calls will run."""

    def run(self, call: Call) -> Any:
        """The result of one call, finished."""

    def runner(self, calls: Sequence[Call]) -> Runner:
        """Times the calls, each of which does the same work on a copy of its own."""

    def call_seconds(self, calls: Sequence[Call]) -> float | None:
        """Wall time of one eager call, launches included; None where the runner's time is that already."""

    def ceilings(self, dtype: torch.dtype) -> Ceilings:
        """The best so far; the product in this dtype, if it is one of floats."""

    def is_warm(self, num_bytes: int) -> bool:
        """Whether a call that touches so much finds it in a cache."""


def device_name(device: torch.device) -> str:
    """The name of a GPU; of a CPU its name and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


@functools.cache
def cpu_name() -> str:
    """The brand, where Linux tells; else the kind."""
    lines = CPU_INFO.read_text(encoding="utf-8").splitlines() if CPU_INFO.is_file() else []
    brands = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return brands[0] if brands and brands[0] else platform.processor() or platform.machine()


@functools.cache
def cpu_cache_bytes() -> int:
    """The last cache of a CPU before memory; 0 where Linux does not tell."""
    sizes = [path.read_text(encoding="utf-8").strip() for path in CPU_CACHES.glob("index*/size")]
    return max((int(size[:-1]) * 1024 for size in sizes if size.endswith("K")), default=0)


def copies_for(num_bytes: int, *, cache_bytes: int, free_bytes: int) -> int:
    """Copies in one graph: four times the cache in all, so that starting the graph weighs little.

    No more than fit into an eighth of the free memory.
    """
    wanted = max(MIN_COPIES, min(MAX_COPIES, -(-4 * cache_bytes // max(num_bytes, 1))))
    return max(1, min(wanted, free_bytes // 8 // max(num_bytes, 1)))


def rounds_for(round_seconds: float, budget: float) -> int:
    """As many rounds as the budget allows, an odd number so that the median is one of them."""
    affordable = int(budget / round_seconds) if round_seconds > 0 else MAX_ROUNDS
    return max(MIN_ROUNDS, min(MAX_ROUNDS, affordable)) | 1


def interleaved_rounds(runners: Mapping[str, Runner], budget: float) -> dict[str, list[float]]:
    """Seconds of each, measured in turns: a noisy machine is noisy for all of them alike.

    How long the first round took says how many fit into `budget` seconds; it counts only where it alone
    exceeds the budget, and where waking up caches and clocks does not matter.
    """
    start = time.perf_counter()
    seconds = {name: [runner.seconds()] for name, runner in runners.items()}
    round_seconds = time.perf_counter() - start
    num_rounds = rounds_for(round_seconds, budget)
    if round_seconds < budget:
        seconds = {name: [] for name in runners}
    while len(next(iter(seconds.values()))) < num_rounds:
        for name, runner in runners.items():
            seconds[name].append(runner.seconds())
    return seconds


def interleaved_medians(runners: Mapping[str, Runner], budget: float) -> dict[str, float]:
    """The medians of `interleaved_rounds`."""
    rounds = interleaved_rounds(runners, budget)
    return {name: statistics.median(seconds) for name, seconds in rounds.items()}


@dataclass(kw_only=True, slots=True)
class Peaks:
    """The best that a machine was seen to do, by dtype; looked at again now and then.

    One disturbed moment would else make every share of a run too large.
    """

    size: int  # of the square matrices
    num_bytes: int  # of the copy
    default: torch.dtype  # of the product, for what is no float
    _found: dict[torch.dtype, tuple[Ceilings, float]] = field(default_factory=dict)

    def of(self, clock: Clock, dtype: torch.dtype) -> Ceilings:
        """The best so far."""
        dtype = dtype if dtype.is_floating_point else self.default
        best, when = self._found.get(dtype, (Ceilings(flops_per_second=0.0, bytes_per_second=0.0), 0.0))
        if dtype in self._found and time.monotonic() - when < RENEW_SECONDS:
            return best
        seen = self._measured(clock, dtype)
        best = Ceilings(
            flops_per_second=max(best.flops_per_second, seen.flops_per_second),
            bytes_per_second=max(best.bytes_per_second, seen.bytes_per_second),
        )
        self._found[dtype] = best, time.monotonic()
        return best

    def _measured(self, clock: Clock, dtype: torch.dtype) -> Ceilings:
        a, b = torch.randn(2, self.size, self.size, device=clock.device, dtype=dtype)
        source = torch.randint(0, 256, (self.num_bytes,), dtype=torch.uint8, device=clock.device)
        target = torch.empty_like(source)
        product, copy = clock.prepare(lambda: (lambda: a @ b, lambda: target.copy_(source)))
        runners = {"product": clock.runner([product]), "copy": clock.runner([copy])}
        seconds = {name: min(rounds) for name, rounds in interleaved_rounds(runners, 0.5).items()}
        return Ceilings(
            flops_per_second=2 * self.size**3 / seconds["product"],
            bytes_per_second=2 * self.num_bytes / seconds["copy"],
        )


class WallClock:
    """Wall time on the CPU; inputs are as warm as the machine's caches keep them from call to call."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.budget = 0.5
        self._peaks = Peaks(size=1024, num_bytes=2**27, default=torch.float32)

    def num_copies(self, num_bytes: int) -> int:
        """One: a caller on a CPU has its inputs in the cache too."""
        return 1

    def prepare(self, make: Callable[[], Made]) -> Made:
        """`make()`."""
        return make()

    def run(self, call: Call) -> Any:
        """The result of one call."""
        return call()

    def runner(self, calls: Sequence[Call]) -> Runner:
        """Times the first call."""
        call = calls[0]

        def seconds() -> float:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        return Runner(method="wall", seconds=seconds)

    def call_seconds(self, calls: Sequence[Call]) -> float | None:
        """None: the wall time is what a caller sees."""
        return None

    def ceilings(self, dtype: torch.dtype) -> Ceilings:
        """A product of 1024 x 1024 matrices and a copy of 128 MiB."""
        return self._peaks.of(self, dtype)

    def is_warm(self, num_bytes: int) -> bool:
        """What fits the last cache stays there from call to call."""
        return num_bytes <= cpu_cache_bytes()


class GpuClock:
    """GPU time of calls that find nothing of their own in L2, all on one stream of the clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.budget = 0.1
        self._cache_bytes: int = torch.cuda.get_device_properties(device).L2_cache_size
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._flushed = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device=device)
        self._flag = torch.zeros(1, device=device)
        self._peaks = Peaks(size=8192, num_bytes=2**30, default=torch.bfloat16)
        self._blank_times: dict[int, float] = {}
        self._separate()  # loads the kernel, which capturing forbids
        torch.cuda.synchronize(device)

    def num_copies(self, num_bytes: int) -> int:
        """See `copies_for`."""
        free_bytes, _ = torch.cuda.mem_get_info(self.device)
        return copies_for(num_bytes, cache_bytes=self._cache_bytes, free_bytes=free_bytes)

    def prepare(self, make: Callable[[], Made]) -> Made:
        """`make()` on the clock's stream: a backward pass runs on the stream of its forward pass."""
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self._stream):
            return make()

    def run(self, call: Call) -> Any:
        """The result of one call on the clock's stream, finished."""
        with torch.cuda.stream(self._stream):
            result = call()
        self._stream.synchronize()
        return result

    def runner(self, calls: Sequence[Call]) -> Runner:
        """Replays of a graph of all the calls; events round one call a time if they cannot be captured."""
        replay = None if self._waits(calls[0]) else self._captured(calls)
        if replay is not None:
            blank = self._blank_seconds(len(calls))
            return Runner(
                method="graph",
                seconds=lambda: max((self._seconds(replay) - blank) / len(calls), MIN_SECONDS),
            )
        turn = iter(range(2**62))
        return Runner(method="events", seconds=lambda: self._seconds(calls[next(turn) % len(calls)]))

    def call_seconds(self, calls: Sequence[Call]) -> float | None:
        """Calls queued one after the other with no graph, divided by their number; median of five."""

        def seconds(num_calls: int) -> float:
            start = time.perf_counter()
            for i in range(num_calls):
                calls[i % len(calls)]()
            self._stream.synchronize()
            return (time.perf_counter() - start) / num_calls

        with torch.cuda.stream(self._stream):
            num_calls = max(1, min(MAX_EAGER_CALLS, int(EAGER_SECONDS / seconds(1))))
            return statistics.median(seconds(num_calls) for _ in range(5))

    def ceilings(self, dtype: torch.dtype) -> Ceilings:
        """A product of 8192 x 8192 matrices by cuBLAS and a copy of 1 GiB."""
        return self._peaks.of(self, dtype)

    def is_warm(self, num_bytes: int) -> bool:
        """Never: the caches are flushed."""
        return False

    def _seconds(self, work: Call) -> float:
        events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        start, end = events
        with torch.cuda.stream(self._stream):
            # Takes long enough for the host to queue the work behind it.
            torch.max(self._flushed)
            start.record()
            work()
            end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def _separate(self) -> None:
        """A launch that waits for the one before it, and that the next waits for."""
        torch.neg(self._flag, out=self._flag)

    def _blank_seconds(self, num_calls: int) -> float:
        """Median time of a graph with as many separators as one of `num_calls`, and no calls."""
        if num_calls not in self._blank_times:
            replay = self._captured([lambda: None] * num_calls)
            assert replay is not None, "a graph of separators can be captured"
            rounds = [self._seconds(replay) for _ in range(NUM_BLANK_ROUNDS)]
            self._blank_times[num_calls] = statistics.median(rounds)
        return self._blank_times[num_calls]

    def _captured(self, calls: Sequence[Call]) -> Call | None:
        """Replays the calls, separated; their results stay alive, so that each writes memory of its own."""
        graph, results = torch.cuda.CUDAGraph(), []
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._separate()
                for call in calls:
                    results.append(call())
                    self._separate()
        except RuntimeError:
            torch.cuda.synchronize(self.device)
            return None

        def replay() -> list[Any]:
            graph.replay()
            return results

        return replay

    def _waits(self, call: Call) -> bool:
        """Whether the call makes the host wait for the GPU, which a capture would fail at."""
        previous = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(self._stream):
                call()
        except RuntimeError:
            return True
        finally:
            torch.cuda.set_sync_debug_mode(previous)
        return False


@functools.cache
def clock_for(device: torch.device) -> Clock:
    """The clock of `device`, one for the whole run."""
    return GpuClock(device) if device.type == "cuda" else WallClock()
