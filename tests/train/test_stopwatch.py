"""What steps took, by a clock that the tests set."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from dscoder.ops import ExchangeStatistics
from dscoder.runtime.agreement import Agreement
from dscoder.train import stopwatch
from dscoder.train.stopwatch import Stopwatch

H200 = torch.device("cuda")
NOTHING_SENT = ExchangeStatistics(
    num_tokens=0,
    num_pairs=0,
    num_remote_pairs=0,
    dispatch_bytes=0,
    dispatch_remote_bytes=0,
    dispatch_seconds=0.0,
    combine_bytes=0,
    combine_remote_bytes=0,
    combine_seconds=0.0,
)


class Clock:
    """Stands for `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


class ManyRanks(Agreement):
    """Three ranks that measure what this one does, the others times two and three."""

    def __init__(self) -> None:
        super().__init__(None)
        self.calls = 0

    def gather(self, value: Any) -> list[Any]:
        self.calls += 1
        return [
            replace(
                value,
                memory=value.memory * factor,
                dispatch_seconds=value.dispatch_seconds * factor,
                combine_seconds=value.combine_seconds * factor,
            )
            for factor in (1, 2, 3)
        ]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(stopwatch, "time", found)
    return found


@pytest.fixture
def _an_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 3 * 2**29)


@pytest.mark.usefixtures("_an_h200")
def test_mfu_is_the_share_of_the_peak(clock: Clock) -> None:
    watch = Stopwatch(H200, torch.bfloat16)
    for _ in range(2):
        clock.now += 5.0
        watch.step_done(num_tokens=1000, flops=989 * 10**12)
    assert watch.figures() == {"tokens_per_second": 200.0, "mfu": 0.2, "peak_memory_gib": 1.5}


@pytest.mark.usefixtures("_an_h200")
def test_many_ranks_have_many_peaks_and_the_largest_memory(clock: Clock) -> None:
    ranks = ManyRanks()
    watch = Stopwatch(H200, torch.bfloat16, ranks=ranks)
    clock.now += 10.0
    watch.step_done(num_tokens=1000, flops=3 * 989 * 10**12)
    assert ranks.calls == 0
    assert watch.figures() == {"tokens_per_second": 100.0, "mfu": 0.1, "peak_memory_gib": 4.5}
    assert ranks.calls == 1


@pytest.mark.usefixtures("_an_h200")
@pytest.mark.parametrize(
    ("device", "dtype", "flops"),
    [
        (torch.device("cpu"), torch.bfloat16, 10**15),
        (H200, torch.float32, 10**15),
        (H200, torch.bfloat16, 0),
    ],
)
def test_no_mfu_is_made_up(clock: Clock, device: torch.device, dtype: torch.dtype, flops: int) -> None:
    watch = Stopwatch(device, dtype)
    clock.now += 1.0
    watch.step_done(num_tokens=1, flops=flops)
    assert set(watch.figures()) == {"tokens_per_second", "peak_memory_gib"}


def test_breaks_do_not_count(clock: Clock) -> None:
    watch = Stopwatch()
    clock.now += 1.0
    paused = watch.pause()
    clock.now += 50.0
    watch.resume(paused)
    clock.now += 1.0
    watch.step_done(num_tokens=8, flops=0)
    assert watch.figures()["tokens_per_second"] == 4.0


def test_every_report_begins_anew(clock: Clock) -> None:
    watch = Stopwatch()
    clock.now += 1.0
    watch.step_done(num_tokens=8, flops=0)
    watch.figures()
    clock.now += 2.0
    watch.step_done(num_tokens=8, flops=0)
    assert watch.figures()["tokens_per_second"] == 4.0


def test_the_exchange_has_its_share_since_the_last_report(clock: Clock) -> None:
    sent = [replace(NOTHING_SENT, dispatch_seconds=7.0, combine_seconds=9.0)]
    watch = Stopwatch(ranks=ManyRanks(), read_exchange=lambda: sent[-1])
    for dispatch, combine in ((0.5, 0.25), (1.0, 0.5)):
        clock.now += 10.0
        watch.step_done(num_tokens=8, flops=0)
        earlier = sent[-1]
        sent.append(
            replace(
                earlier,
                dispatch_seconds=earlier.dispatch_seconds + dispatch,
                combine_seconds=earlier.combine_seconds + combine,
            )
        )
        figures = watch.figures()  # the ranks take once, twice and three times as long: twice on average
        assert figures["dispatch_share"] == pytest.approx(2 * dispatch / 10)
        assert figures["combine_share"] == pytest.approx(2 * combine / 10)


def test_what_a_break_exchanges_has_no_share(clock: Clock) -> None:
    sent = [replace(NOTHING_SENT, dispatch_seconds=7.0, combine_seconds=9.0)]
    watch = Stopwatch(read_exchange=lambda: sent[-1])

    def spend(dispatch: float, combine: float) -> None:
        earlier = sent[-1]
        sent.append(
            replace(
                earlier,
                dispatch_seconds=earlier.dispatch_seconds + dispatch,
                combine_seconds=earlier.combine_seconds + combine,
            )
        )
        clock.now += dispatch + combine

    spend(0.5, 0.25)
    paused = watch.pause()
    with watch.aside():
        spend(30.0, 20.0)
    watch.resume(paused)
    clock.now += 0.25
    watch.step_done(num_tokens=8, flops=0)
    figures = watch.figures()
    assert (figures["dispatch_share"], figures["combine_share"]) == (0.5, 0.25)


def test_a_host_that_does_not_tell_its_memory_has_no_figure(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopwatch, "peak_memory", lambda _: None)
    watch = Stopwatch()
    clock.now += 1.0
    assert watch.figures() == {"tokens_per_second": 0.0}
