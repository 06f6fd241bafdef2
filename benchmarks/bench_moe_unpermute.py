"""moe_unpermute, forward and backward, beside transformers' weighted gather and sum."""

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


def weigh_and_gather(y_MD: Tensor, weight_TK: Tensor, row_TK: Tensor) -> Tensor:
    inverse = row_TK.flatten().long()
    perm = torch.empty_like(inverse)
    perm[inverse] = torch.arange(len(inverse))
    weighted = y_MD * weight_TK.flatten()[perm].unsqueeze(-1)
    return weighted[inverse].view(*row_TK.shape, -1).sum(dim=1)


@pytest.mark.parametrize("name", SHAPES)
def test_forward_and_backward(benchmark: BenchmarkFixture, name: str) -> None:
    num_tokens, width, num_experts, num_topk = SHAPES[name]
    rng = cases.generator(name)
    idx = cases.routing(rng, num_tokens=num_tokens, num_experts=num_experts, num_topk=num_topk)
    _, handle = ops.moe_permute(torch.zeros(num_tokens, 1), idx, num_experts=num_experts)
    y = cases.randn(rng, num_tokens * num_topk, width).requires_grad_()
    weight = cases.randn(rng, num_tokens, num_topk).requires_grad_()
    grad = cases.randn(rng, num_tokens, width)
    row = handle.row_TK
    compare(
        benchmark,
        lambda: torch.autograd.grad(ops.moe_unpermute(y, weight, handle), (y, weight), grad),
        {
            "weigh_and_gather": lambda: torch.autograd.grad(
                weigh_and_gather(y, weight, row), (y, weight), grad
            )
        },
        # Forward reads T * K rows and writes T; backward reads T * K and T, and writes T * K.
        Work(shape=str(SHAPES[name]), num_bytes=4 * width * num_tokens * (3 * num_topk + 2)),
    )
