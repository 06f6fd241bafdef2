"""What the tests of tasks share: the real records, and whether this machine can run programs."""

from pathlib import Path

import pytest

from dscoder.sandbox.run import run
from dscoder.sandbox.verdict import Program

# Data files of public repositories, kept beside a checkout; `docs/tasks.md` says where they come from.
_RECORDS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "eval"


@pytest.fixture(scope="session")
def records() -> Path:
    """The directory of real records; skips where they are not."""
    if not _RECORDS.is_dir():
        pytest.skip("the records of the benchmarks are not beside this checkout")
    return _RECORDS


@pytest.fixture(scope="session")
def sandbox() -> None:
    """Skips where the sandbox itself cannot run a program."""
    verdict = run(Program(source="pass"))
    if not verdict.is_answer:
        pytest.skip(f"no sandbox here: {verdict.detail}")
