"""Batches from windows on disk: reading in shuffled order, and seeking far into a run."""

from collections.abc import Callable

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from dscoder.data.loader import shuffled_batch, window_order
from dscoder.data.shards import Windows, write_shard
from dscoder.text.pack import pack

WINDOW = 4096
NUM_TOKENS = 2**24
SEQUENCES = 16


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Windows:
    """Documents of 20 to 3000 tokens, about six in a window."""
    directory = tmp_path_factory.mktemp("windows")
    random = np.random.default_rng(0)
    lengths = random.integers(20, 3000, NUM_TOKENS // 1510)
    documents = [random.integers(0, 50_000, length).astype(np.uint16) for length in lengths]
    write_shard(directory, 0, documents=documents, plan=pack(lengths, window=WINDOW), fill=0)
    return Windows(directory)


def test_shuffled_batch(benchmark: BenchmarkFixture, store: Callable[..., None], windows: Windows) -> None:
    batch = benchmark(shuffled_batch, windows, position=12345, count=SEQUENCES, seed=0)
    store("loader", "batch", f"B={SEQUENCES} S={WINDOW}", {}, {"tokens": batch.tokens_BS.numel()})


@pytest.mark.parametrize("size", [10**3, 10**9])
def test_seek(benchmark: BenchmarkFixture, store: Callable[..., None], size: int) -> None:
    """The order of one batch of an epoch of `size` windows, ten epochs into a run."""
    order = benchmark(window_order, 10 * size + size // 2, SEQUENCES, size=size, seed=0)
    assert len(order) == SEQUENCES
    store("loader", "seek", f"B={SEQUENCES} windows={size}", {}, {})
