"""Every test in this folder needs a GPU; a file here says nothing about that itself."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dscoder.runtime import native
from dscoder.testing import gpu
from dscoder.testing.aside import Aside
from dscoder.testing.cases import generator

HERE = Path(__file__).parent
NEEDS_GPU = pytest.mark.skipif(
    not (torch.cuda.is_available() and native.has_kernels()),
    reason="needs an NVIDIA GPU and a build with kernels",
)
MOST_HANGS = 2  # of one test's cases; what hung that often is not tried on

Apart = Callable[..., None]


@pytest.hookimpl(tryfirst=True)  # ahead of the choice by -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(NEEDS_GPU)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    return generator(request.node.nodeid)


@pytest.fixture(scope="module")
def aside(request: pytest.FixtureRequest) -> Iterator[Aside]:
    """The other process of a file, which says in LIMIT_S how long one check may take."""
    found = Aside(gpu.wake, limit_s=request.module.LIMIT_S)
    yield found
    found.close()


@pytest.fixture(scope="module")
def hangs() -> Counter[str]:
    """How often each test's cases hung."""
    return Counter()


@pytest.fixture
def apart(request: pytest.FixtureRequest, aside: Aside, hangs: Counter[str]) -> Apart:
    """`apart(check, *args)` runs check(name, *args), the test's own name, in the other process.

    compute-sanitizer looks into the process that it starts alone, so that runs the check itself.
    """
    test: str = request.node.originalname

    def run(check: Apart, *args: object) -> None:
        if request.config.getoption("--check-tool", default=None):
            return check(request.node.nodeid, *args)
        if hangs[test] >= MOST_HANGS:
            pytest.fail(f"not run: {test} hung {hangs[test]} times")
        try:
            aside.run(check, request.node.nodeid, *args)
        except TimeoutError:
            hangs[test] += 1
            raise
        except AssertionError as error:  # a wait without an end traps, while no GPU has run a kernel
            hangs[test] += "CUDA error" in str(error)
            raise

    return run
