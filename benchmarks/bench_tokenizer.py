"""Training, encoding and decoding on real source code, on all cores (RAYON_NUM_THREADS limits them)."""

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from dscoder.text.flavors import FLAVORS
from dscoder.text.tokenizer import Tokenizer

VOCAB_SIZE = 32000
NUM_TEXTS = 100

Store = Callable[..., None]


@pytest.fixture(scope="module")
def texts(source_texts: list[str]) -> list[str]:
    """Every few files of the library, so that one round takes a second or two."""
    return source_texts[:: max(1, len(source_texts) // NUM_TEXTS)]


@pytest.fixture(scope="module", params=sorted(FLAVORS))
def flavor(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def tokenizer(flavor: str, texts: list[str]) -> Tokenizer:
    return Tokenizer.train(texts, vocab_size=VOCAB_SIZE, flavor=flavor)


def megabytes(texts: list[str]) -> float:
    return sum(len(text.encode("utf-8")) for text in texts) / 1e6


def test_train(benchmark: BenchmarkFixture, store: Store, texts: list[str], flavor: str) -> None:
    benchmark.pedantic(Tokenizer.train, (texts,), {"vocab_size": VOCAB_SIZE, "flavor": flavor}, rounds=1)
    store("tokenizer", f"train {flavor}", f"V={VOCAB_SIZE}", {}, {"MB": megabytes(texts)})


def test_encode(
    benchmark: BenchmarkFixture, store: Store, tokenizer: Tokenizer, texts: list[str], flavor: str
) -> None:
    rows = benchmark.pedantic(tokenizer.encode_batch, (texts,), rounds=2, warmup_rounds=1)
    figures = {"bytes per token": round(1e6 * megabytes(texts) / sum(map(len, rows)), 2)}
    step = f"encode {flavor}"
    store("tokenizer", step, f"V={tokenizer.vocab_size}", figures, {"MB": megabytes(texts)})


def test_decode(
    benchmark: BenchmarkFixture, store: Store, tokenizer: Tokenizer, texts: list[str], flavor: str
) -> None:
    rows = tokenizer.encode_batch(texts)

    def decode_all() -> list[str]:
        return [tokenizer.decode(row) for row in rows]

    assert benchmark.pedantic(decode_all, rounds=2, warmup_rounds=1) == texts
    step = f"decode {flavor}"
    store("tokenizer", step, f"V={tokenizer.vocab_size}", {}, {"MB": megabytes(texts)})
