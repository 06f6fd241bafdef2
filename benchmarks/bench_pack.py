"""Packing of real document lengths, one core. Wanted: well over 100 MB/s of the text behind them."""

from bisect import bisect_left, insort
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

from dscoder.text.pack import pack

BYTES_PER_TOKEN = 3  # of source code, about; see bench_tokenizer.py
NUM_RESAMPLED = 1_000_000

Store = Callable[..., None]


@pytest.fixture(scope="module", params=["files", "million"])
def lengths(request: pytest.FixtureRequest, source_texts: list[str]) -> NDArray[np.int64]:
    """Tokens of the standard library's files, and a million documents drawn from them."""
    real = np.array([len(text.encode("utf-8")) // BYTES_PER_TOKEN for text in source_texts])
    if request.param == "files":
        return real
    return np.random.default_rng(0).choice(real, NUM_RESAMPLED)


def next_fit_padding(lengths: NDArray[np.int64], window: int) -> float:
    num_windows, room = 0, 0
    for length in lengths.tolist():
        num_windows += length // window
        rest = length % window
        if rest > room:
            num_windows, room = num_windows + 1, window
        room -= rest
    return 1 - int(lengths.sum()) / (num_windows * window)


@pytest.mark.parametrize("window", [4096, 16384])
def test_best_fit(benchmark: BenchmarkFixture, store: Store, lengths: NDArray[np.int64], window: int) -> None:
    plan = benchmark(pack, lengths, window=window)
    figures = {
        "padding": f"{plan.padding_share:.5%}",
        "padding of next-fit": f"{next_fit_padding(lengths, window):.3%}",
    }
    megabytes = plan.num_tokens * BYTES_PER_TOKEN / 1e6
    shape = f"documents={len(lengths)} window={window}"
    store("pack", "best fit", shape, figures, {"MB": megabytes, "documents": len(lengths)})


def python_best_fit(lengths: list[int], window: int) -> int:
    """The same packing with a sorted list of rooms; gives the number of windows."""
    rooms: list[int] = []
    num_windows = sum(length // window for length in lengths)
    for rest in sorted((length % window for length in lengths), reverse=True):
        place = bisect_left(rooms, rest)
        if place < len(rooms):
            room = rooms.pop(place)
        else:
            room, num_windows = window, num_windows + 1
        if room > rest > 0:
            insort(rooms, room - rest)
    return num_windows


@pytest.mark.parametrize("window", [4096, 16384])
def test_baseline_in_python(
    benchmark: BenchmarkFixture, store: Store, source_texts: list[str], window: int
) -> None:
    lengths = [len(text.encode("utf-8")) // BYTES_PER_TOKEN for text in source_texts]
    benchmark(python_best_fit, lengths, window)
    megabytes = sum(lengths) * BYTES_PER_TOKEN / 1e6
    shape = f"documents={len(lengths)} window={window}"
    store("pack", "in Python", shape, {}, {"MB": megabytes, "documents": len(lengths)})
