"""moe_permute, forward and backward, beside the sort and gather of transformers' expert layers."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from dscoder import ops
from dscoder.testing import cases
from dscoder.testing.timing import Work, compare

SHAPES = {  # T, D, E, K
    "tiny_moe": (4096, 256, 16, 4),
    "v2_lite": (1024, 2048, 64, 6),
    "v2": (512, 5120, 160, 6),
}


def gather(x_TD: Tensor, idx_TK: Tensor) -> Tensor:
    _, perm = torch.sort(idx_TK.flatten(), stable=True)
    return x_TD[perm // idx_TK.shape[1]]


@pytest.mark.parametrize("name", SHAPES)
def test_forward_and_backward(benchmark: BenchmarkFixture, name: str) -> None:
    num_tokens, width, num_experts, num_topk = SHAPES[name]
    rng = cases.generator(name)
    x = cases.randn(rng, num_tokens, width).requires_grad_()
    idx = cases.routing(rng, num_tokens=num_tokens, num_experts=num_experts, num_topk=num_topk)
    grad = cases.randn(rng, num_tokens * num_topk, width)
    compare(
        benchmark,
        lambda: torch.autograd.grad(ops.moe_permute(x, idx, num_experts=num_experts)[0], x, grad),
        {"gather": lambda: torch.autograd.grad(gather(x, idx), x, grad)},
        # Forward reads T rows and writes T * K, backward the other way round.
        Work(shape=str(SHAPES[name]), num_bytes=4 * 2 * width * num_tokens * (num_topk + 1)),
    )
