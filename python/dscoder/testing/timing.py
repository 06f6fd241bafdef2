"""One op beside its peers in one run: interleaved, so that a noisy machine is noisy for all of them alike."""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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

    `benchmark.extra_info` gets the shape, the device, microseconds, TFLOP/s and GB/s of ours and, for every
    peer, how many times our time it takes.
    """
    results = [_as_tuple(call()) for call in (ours, *peers.values())]
    for result in results[1:]:
        for actual, wanted in zip(result, results[0], strict=True):
            assert_close(actual, wanted)
    device = results[0][0].device
    benchmark.pedantic(ours, rounds=num_rounds, warmup_rounds=1)  # type: ignore[no-untyped-call]
    if benchmark.disabled:
        return
    seconds = _median_seconds({"": ours, **peers}, num_rounds, is_cuda=device.type == "cuda")
    benchmark.extra_info.update(shape=work.shape, device=_name(device), us=round(seconds[""] * 1e6, 1))
    for unit, amount in (("TFLOP/s", work.flops / 1e12), ("GB/s", work.num_bytes / 1e9)):
        if amount:
            benchmark.extra_info[unit] = round(amount / seconds[""], 3)
    for peer in peers:
        benchmark.extra_info[f"{peer} / ours"] = round(seconds[peer] / seconds[""], 2)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _as_tuple(result: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _median_seconds(calls: Mapping[str, Call], num_rounds: int, *, is_cuda: bool) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(num_rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if is_cuda:
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: sorted(rounds)[num_rounds // 2] for name, rounds in seconds.items()}
