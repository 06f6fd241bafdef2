import pytest
import torch

from dscoder.testing import cases


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    return cases.generator(request.node.nodeid)
