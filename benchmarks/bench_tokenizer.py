"""Training, encoding and decoding on real source code, on all cores (RAYON_NUM_THREADS limits them)."""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from dscoder.text.flavors import FLAVORS
from dscoder.text.tokenizer import Tokenizer

VOCAB_SIZE = 32000
NUM_TEXTS = 100


@pytest.fixture(scope="module")
def texts(source_texts: list[str]) -> list[str]:
    """Every few files of the library, so that one round takes a second or two."""
    return source_texts[:: max(1, len(source_texts) // NUM_TEXTS)]


@pytest.fixture(scope="module", params=sorted(FLAVORS))
def tokenizer(request: pytest.FixtureRequest, texts: list[str]) -> Tokenizer:
    return Tokenizer.train(texts, vocab_size=VOCAB_SIZE, flavor=request.param)


def record(benchmark: BenchmarkFixture, texts: list[str], **more: object) -> None:
    megabytes = sum(len(text.encode("utf-8")) for text in texts) / 1e6
    benchmark.extra_info.update({"MB": round(megabytes, 1), **more})
    if benchmark.stats is not None:
        benchmark.extra_info["MB/s"] = round(megabytes / benchmark.stats.stats.median, 2)


@pytest.mark.parametrize("flavor", sorted(FLAVORS))
def test_train(benchmark: BenchmarkFixture, texts: list[str], flavor: str) -> None:
    benchmark.pedantic(Tokenizer.train, (texts,), {"vocab_size": VOCAB_SIZE, "flavor": flavor}, rounds=1)
    record(benchmark, texts)


def test_encode(benchmark: BenchmarkFixture, tokenizer: Tokenizer, texts: list[str]) -> None:
    rows = benchmark.pedantic(tokenizer.encode_batch, (texts,), rounds=2, warmup_rounds=1)
    num_bytes = sum(len(text.encode("utf-8")) for text in texts)
    record(benchmark, texts, **{"bytes per token": round(num_bytes / sum(map(len, rows)), 2)})


def test_decode(benchmark: BenchmarkFixture, tokenizer: Tokenizer, texts: list[str]) -> None:
    rows = tokenizer.encode_batch(texts)

    def decode_all() -> list[str]:
        return [tokenizer.decode(row) for row in rows]

    assert benchmark.pedantic(decode_all, rounds=2, warmup_rounds=1) == texts
    record(benchmark, texts)
