"""One op beside its peers in one run: interleaved, so that a noisy machine is noisy for all of them alike.

On a GPU a call is timed by events, behind a flush of the L2 cache that also hides the launch. The roofline
is measured on the machine itself: a large copy and a large matrix product (bfloat16 on a GPU, else float32).
"""

import functools
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from dscoder.testing.compare import assert_close

Call = Callable[[], Tensor | Sequence[Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What one call has to do at the least."""

    shape: str
    flops: float = 0.0
    num_bytes: float = 0.0


def compare(
    benchmark: BenchmarkFixture, ours: Call, peers: Mapping[str, Call], work: Work, *, num_rounds: int = 9
) -> None:
    """Check that the peers compute what `ours` does, time all, store the medians and the ratios.

    `benchmark.extra_info` gets the shape, the device, microseconds, TFLOP/s, GB/s and share of the roofline
    of ours and, for every peer, how many times our time it takes.
    """
    results = [_as_tuple(call()) for call in (ours, *peers.values())]
    for result in results[1:]:
        for actual, wanted in zip(result, results[0], strict=True):
            assert_close(actual, wanted)
    device = results[0][0].device
    benchmark.pedantic(ours, rounds=num_rounds, warmup_rounds=1)  # type: ignore[no-untyped-call]
    if benchmark.disabled:
        return
    seconds = _median_seconds({"": ours, **peers}, num_rounds, device)
    benchmark.extra_info.update(shape=work.shape, device=device_name(device), us=round(seconds[""] * 1e6, 1))
    for unit, amount in (("TFLOP/s", work.flops / 1e12), ("GB/s", work.num_bytes / 1e9)):
        if amount:
            benchmark.extra_info[unit] = round(amount / seconds[""], 3)
    flops_a_second, bytes_a_second = _peaks(device)
    at_best = max(work.flops / flops_a_second, work.num_bytes / bytes_a_second)
    if at_best:
        benchmark.extra_info["% of roofline"] = round(100 * at_best / seconds[""], 1)
    for peer in peers:
        benchmark.extra_info[f"{peer} / ours"] = round(seconds[peer] / seconds[""], 2)


def device_name(device: torch.device) -> str:
    """The name of a GPU; of a CPU its kind and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _as_tuple(result: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _cpu_seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _gpu_seconds(call: Call, device: torch.device) -> float:
    """GPU time of one call that finds nothing of its own in L2."""
    events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
    start, end = events
    torch.empty(2**30, dtype=torch.uint8, device=device).zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _median_seconds(calls: Mapping[str, Call], num_rounds: int, device: torch.device) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(num_rounds):
        for name, call in calls.items():
            is_cuda = device.type == "cuda"
            seconds[name].append(_gpu_seconds(call, device) if is_cuda else _cpu_seconds(call))
    return {name: sorted(rounds)[num_rounds // 2] for name, rounds in seconds.items()}


@functools.cache
def _peaks(device: torch.device) -> tuple[float, float]:
    """(floating-point operations, bytes) a second that this machine reaches."""
    is_cuda = device.type == "cuda"
    size, num_bytes = (8192, 2**30) if is_cuda else (1024, 2**26)
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if is_cuda else torch.float32)
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    calls: dict[str, Call] = {"product": lambda: a @ a, "copy": lambda: target.copy_(source)}
    seconds = _median_seconds(calls, 9, device)
    return 2 * size**3 / seconds["product"], 2 * num_bytes / seconds["copy"]
