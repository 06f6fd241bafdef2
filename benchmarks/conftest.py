"""What several benchmarks measure on: real source code."""

import sysconfig
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def source_texts() -> list[str]:
    """The Python files of the standard library, without what is installed beside it."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(library.rglob("*.py")):
        if {"site-packages", "dist-packages"} & set(path.parts):
            continue
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:  # test files in other encodings
            continue
    return texts


@pytest.fixture(scope="session")
def source_megabytes(source_texts: list[str]) -> float:
    """Their size in UTF-8."""
    return sum(len(text.encode("utf-8")) for text in source_texts) / 1e6
