"""Fill-in-the-middle on real source code, one core. Wanted: well over 100 MB/s."""

import random
from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from dscoder.config.text import FimConfig
from dscoder.text.fim import apply_fim, plan_fim
from dscoder.text.flavors import FIM_SENTINELS

CONFIGS = {
    "default": FimConfig(),
    "every_document": FimConfig(rate=1.0),
    "every_document_at_lines": FimConfig(rate=1.0, cut="line"),
}


Store = Callable[..., None]


@pytest.mark.parametrize("name", CONFIGS)
def test_plan(
    benchmark: BenchmarkFixture, store: Store, source_texts: list[str], source_megabytes: float, name: str
) -> None:
    ids = range(len(source_texts))
    plan = benchmark(plan_fim, source_texts, document_ids=ids, config=CONFIGS[name], seed=0)
    store("fim", f"plan {name}", f"files={len(source_texts)}", plan.counts(), {"MB": source_megabytes})


@pytest.mark.parametrize("name", CONFIGS)
def test_apply(
    benchmark: BenchmarkFixture, store: Store, source_texts: list[str], source_megabytes: float, name: str
) -> None:
    ids = range(len(source_texts))
    benchmark(apply_fim, source_texts, document_ids=ids, config=CONFIGS[name], seed=0)
    store("fim", f"apply {name}", f"files={len(source_texts)}", {}, {"MB": source_megabytes})


def python_fim(texts: list[str]) -> list[tuple[str, str, str]]:
    """What a pipeline does without the extension, at rate 1 and between characters."""
    rows = []
    for idx, text in enumerate(texts):
        draws = random.Random(idx)
        if any(sentinel in text for sentinel in FIM_SENTINELS):
            rows.append((text, "", ""))
            continue
        begin, end = sorted((draws.randint(0, len(text)), draws.randint(0, len(text))))
        rows.append((text[:begin], text[begin:end], text[end:]))
    return rows


def test_baseline_in_python(
    benchmark: BenchmarkFixture, store: Store, source_texts: list[str], source_megabytes: float
) -> None:
    benchmark(python_fim, source_texts)
    store("fim", "in Python", f"files={len(source_texts)}", {}, {"MB": source_megabytes})
