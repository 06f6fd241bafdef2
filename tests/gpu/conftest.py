"""Every test in this folder needs a GPU; a file here says nothing about that itself."""

from pathlib import Path

import pytest
import torch

from dscoder.runtime import native
from dscoder.testing.cases import generator

HERE = Path(__file__).parent
NEEDS_GPU = pytest.mark.skipif(
    not (torch.cuda.is_available() and native.has_kernels()),
    reason="needs an NVIDIA GPU and a build with kernels",
)


@pytest.hookimpl(tryfirst=True)  # ahead of the choice by -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(NEEDS_GPU)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    return generator(request.node.nodeid)
