"""A small corpus and the two tokenizers trained on it."""

import json
from pathlib import Path

import pytest
from hypothesis import settings

from dscoder.text.flavors import FLAVORS
from dscoder.text.tokenizer import Tokenizer

VOCAB_SIZE = 600

# A busy machine is no fault of the code.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    sources = [path.read_text(encoding="utf-8") for path in sorted(Path(json.__file__).parent.glob("*.py"))]
    return [*sources, "\u4f60\u597d\u4e16\u754c\uff0cpython\u4f60\u597d abc\u4e16\u754c\r\n" * 20]


@pytest.fixture(scope="session", params=sorted(FLAVORS))
def flavor(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def tokenizers_by_flavor(corpus: list[str]) -> dict[str, Tokenizer]:
    return {name: Tokenizer.train(corpus, vocab_size=VOCAB_SIZE, flavor=name) for name in FLAVORS}


@pytest.fixture(scope="session")
def tokenizer(tokenizers_by_flavor: dict[str, Tokenizer], flavor: str) -> Tokenizer:
    """Each of the two in turn."""
    return tokenizers_by_flavor[flavor]


@pytest.fixture(scope="session")
def v2(tokenizers_by_flavor: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers_by_flavor["v2"]
