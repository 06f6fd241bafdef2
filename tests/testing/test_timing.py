"""Copies and rounds of a measurement, and both clocks: the GPU's on a torch.cuda that is made up."""

import contextlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dscoder.testing import timing
from dscoder.testing.timing import GpuClock, Runner, WallClock, copies_for, interleaved_medians, rounds_for

GIB = 2**30
CACHE = 50 * 2**20


def test_small_inputs_are_copied_until_the_limit() -> None:
    assert copies_for(35_000, cache_bytes=CACHE, free_bytes=100 * GIB) == timing.MAX_COPIES


def test_copies_are_together_four_times_the_cache() -> None:
    assert copies_for(10 * 2**20, cache_bytes=CACHE, free_bytes=100 * GIB) == 20


def test_large_inputs_still_take_turns() -> None:
    assert copies_for(GIB, cache_bytes=CACHE, free_bytes=100 * GIB) == timing.MIN_COPIES


def test_copies_keep_within_an_eighth_of_the_free_memory() -> None:
    assert copies_for(GIB, cache_bytes=CACHE, free_bytes=16 * GIB) == 2
    assert copies_for(GIB, cache_bytes=CACHE, free_bytes=GIB) == 1


def test_nothing_to_touch_divides_by_nothing() -> None:
    assert copies_for(0, cache_bytes=CACHE, free_bytes=GIB) == timing.MAX_COPIES


@pytest.mark.parametrize(
    ("round_seconds", "wanted"), [(0.01, 25), (0.02, 13), (10.0, 3), (1e-6, 51), (0.0, 51)]
)
def test_rounds_fill_the_budget_and_are_odd(round_seconds: float, wanted: int) -> None:
    assert rounds_for(round_seconds, 0.25) == wanted


def test_contenders_take_turns_and_medians_are_theirs() -> None:
    turns = []

    def runner(name: str, seconds: Iterator[float]) -> Runner:
        def run() -> float:
            turns.append(name)
            return next(seconds)

        return Runner(method="wall", seconds=run)

    slow_first = iter([9.0, *([1.0] * 100)])
    medians = interleaved_medians({"a": runner("a", slow_first), "b": runner("b", iter([2.0] * 101))}, 0.01)
    assert medians == {"a": 1.0, "b": 2.0}
    assert turns[::2] == ["a"] * (len(turns) // 2)
    assert turns[1::2] == ["b"] * (len(turns) // 2)


def test_a_round_over_the_budget_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([5.0, 1.0, 3.0])
    times = iter([0.0, 5.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(times))
    assert interleaved_medians({"": Runner(method="wall", seconds=lambda: next(seconds))}, 0.5) == {"": 3.0}


def test_wall_time_is_what_the_clock_on_the_wall_says(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 12.5])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(now))
    runner = WallClock().runner([lambda: None])
    assert (runner.method, runner.seconds()) == ("wall", 2.5)


def test_ceilings_of_this_machine_are_measured_once_in_a_while() -> None:
    clock = WallClock()
    found = clock.ceilings(torch.float32)
    assert found.flops_per_second > 1e8
    assert found.bytes_per_second > 1e8
    assert clock.ceilings(torch.float32) is found
    assert clock.ceilings(torch.int32) is found


def test_the_best_ceilings_stay_each_dtype_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    # Rounds of a product and of a copy, in turns: the first measurement is disturbed, the last one too.
    disturbed, calm, other = [4.0, 4.0] * 60, [4.0, 4.0, 1.0, 2.0] * 30, [8.0, 8.0] * 60
    seconds: list[float] = []
    clock = WallClock()
    clock._peaks = timing.Peaks(size=2, num_bytes=8, default=torch.float32)
    monkeypatch.setattr(clock, "runner", lambda _: Runner(method="wall", seconds=lambda: seconds.pop(0)))
    monkeypatch.setattr(timing, "RENEW_SECONDS", 0.0)
    found = []
    for rounds, dtype in (
        (disturbed, torch.float32),
        (calm, torch.float32),
        (disturbed, torch.float32),
        (other, torch.bfloat16),
    ):
        seconds[:] = rounds
        ceilings = clock.ceilings(dtype)
        found.append((ceilings.flops_per_second, ceilings.bytes_per_second))
    assert found == [(4.0, 4.0), (16.0, 8.0), (16.0, 8.0), (2.0, 2.0)]


def test_a_cpu_is_named_and_its_last_cache_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for level, size in enumerate(("32K", "1024K", "32768K")):
        (tmp_path / f"index{level}").mkdir()
        (tmp_path / f"index{level}" / "size").write_text(f"{size}\n")
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: Some CPU @ 3 GHz\n")
    monkeypatch.setattr(timing, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(timing, "CPU_CACHES", tmp_path)
    timing.cpu_name.cache_clear()
    timing.cpu_cache_bytes.cache_clear()
    try:
        assert timing.device_name(torch.device("cpu")).startswith("Some CPU @ 3 GHz, ")
        assert [WallClock().is_warm(2**25), WallClock().is_warm(2**25 + 1)] == [True, False]
    finally:
        timing.cpu_name.cache_clear()
        timing.cpu_cache_bytes.cache_clear()


START = 3.0  # milliseconds that starting a graph takes
TIMES = {"call": 2.0, "separator": 0.25}


class MadeUpCuda:
    """As much of torch.cuda as the clock calls; time is what calls add to `now`, in milliseconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []
        self.sync_mode = 0
        self.is_capturing = False
        made_up = self

        class Event:
            def __init__(self, *, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                made_up.log.append("event")
                self.time = made_up.now

            def synchronize(self) -> None: ...

            def elapsed_time(self, end: "Event") -> float:
                return end.time - self.time

        class CUDAGraph:
            def replay(self) -> None:
                """A call that follows another begins before that has ended; all else waits."""
                made_up.log.append("replay")
                made_up.now += START
                for previous, name in pairwise(["start", *self.captured]):
                    is_overlapping = previous == name == "call"
                    made_up.now += 0.5 if is_overlapping else TIMES[name]

        self.Event, self.CUDAGraph = Event, CUDAGraph

    def Stream(self, _: torch.device) -> SimpleNamespace:  # noqa: N802 - torch's name
        return SimpleNamespace(synchronize=lambda: None)

    def get_device_properties(self, _: torch.device) -> SimpleNamespace:
        return SimpleNamespace(L2_cache_size=CACHE)

    def mem_get_info(self, _: torch.device) -> tuple[int, int]:
        return 100 * GIB, 140 * GIB

    def synchronize(self, _: torch.device) -> None: ...

    def stream(self, _: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def graph(self, graph: SimpleNamespace, *, stream: object) -> Iterator[None]:
        self.is_capturing, self.captured = True, []
        try:
            yield
        finally:
            self.is_capturing = False
            graph.captured = self.captured

    def get_sync_debug_mode(self) -> int:
        return self.sync_mode

    def set_sync_debug_mode(self, mode: int | str) -> None:
        self.sync_mode = 2 if mode == "error" else int(mode)

    def call(self) -> None:
        """A kernel of two milliseconds."""
        self.log.append("call")
        self.launch("call")

    def launch(self, name: str) -> None:
        if self.is_capturing:
            self.captured.append(name)
        else:
            self.now += TIMES[name]

    def waiting_call(self) -> None:
        """The same, and the host waits for it."""
        if self.sync_mode == 2:
            raise RuntimeError("called a synchronizing CUDA operation")
        self.call()

    def uncapturable_call(self) -> None:
        """Does not wait by torch's reckoning, and yet cannot be captured."""
        if self.is_capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.call()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> MadeUpCuda:
    made_up = MadeUpCuda()
    monkeypatch.setattr(timing.torch, "cuda", made_up)
    monkeypatch.setattr(timing, "FLUSH_BYTES", 64)
    flush = torch.max

    def flushing(x: torch.Tensor) -> torch.Tensor:
        made_up.log.append("flush")
        made_up.now += 100.0
        return flush(x)

    def negate(x: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        made_up.launch("separator")
        return out

    monkeypatch.setattr(timing.torch, "max", flushing)
    monkeypatch.setattr(timing.torch, "neg", negate)
    return made_up


@pytest.fixture
def clock(cuda: MadeUpCuda) -> GpuClock:
    return GpuClock(torch.device("cpu"))


def test_a_graph_of_all_copies_is_replayed_behind_a_flush(cuda: MadeUpCuda, clock: GpuClock) -> None:
    runner = clock.runner([cuda.call] * 3)
    cuda.log.clear()
    assert (runner.method, runner.seconds()) == ("graph", pytest.approx(0.002))
    assert cuda.log == ["flush", "event", "replay", "event"]


@pytest.mark.parametrize("num_calls", [1, 7])
def test_calls_of_a_graph_do_not_overlap_and_its_own_cost_is_not_theirs(
    num_calls: int, cuda: MadeUpCuda, clock: GpuClock
) -> None:
    runner = clock.runner([cuda.call] * num_calls)
    assert cuda.captured == ["separator", *["separator"] * num_calls]  # the graph without calls came last
    assert runner.seconds() == pytest.approx(0.002)


def test_a_graph_without_calls_is_measured_once_a_length(cuda: MadeUpCuda, clock: GpuClock) -> None:
    for num_calls in (3, 3, 4, 3):
        clock.runner([cuda.call] * num_calls)
    assert cuda.log.count("replay") == 2 * timing.NUM_BLANK_ROUNDS


def test_a_call_of_nothing_takes_next_to_nothing(clock: GpuClock) -> None:
    assert clock.runner([lambda: None]).seconds() == timing.MIN_SECONDS


@pytest.mark.parametrize("kind", ["waiting_call", "uncapturable_call"])
def test_what_cannot_be_captured_is_timed_by_events(kind: str, cuda: MadeUpCuda, clock: GpuClock) -> None:
    runner = clock.runner([getattr(cuda, kind)] * 3)
    cuda.log.clear()
    assert (runner.method, runner.seconds()) == ("events", 0.002)
    assert cuda.log == ["flush", "event", "call", "event"]
    assert cuda.sync_mode == 0


def test_events_go_round_the_copies(cuda: MadeUpCuda, clock: GpuClock) -> None:
    seen = []
    calls = [lambda i=i: (seen.append(i), cuda.waiting_call()) for i in range(3)]
    runner = clock.runner(calls)
    seen.clear()
    for _ in range(4):
        runner.seconds()
    assert seen == [0, 1, 2, 0]


def test_eager_calls_are_divided_by_their_number(
    cuda: MadeUpCuda, clock: GpuClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing.time, "perf_counter", lambda: cuda.now / 1e3)
    assert clock.call_seconds([cuda.call] * 3) == pytest.approx(0.002)
    assert cuda.log == ["call"] * (1 + 5 * 10)


def test_copies_follow_the_memory_of_the_gpu(clock: GpuClock) -> None:
    assert clock.num_copies(10 * 2**20) == 20
