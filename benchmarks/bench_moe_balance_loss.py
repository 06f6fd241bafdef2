"""moe_balance_loss, forward and backward, beside the same terms from a one-hot mask and autograd."""

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from dscoder import ops
from dscoder.testing import cases
from dscoder.testing.timing import Work, compare

SHAPES = {  # B, S, E, K, groups, kept
    "tiny_moe": (8, 512, 16, 4, 1, 1),
    "v2_lite": (4, 1024, 64, 6, 1, 1),
    "v2": (4, 1024, 160, 6, 8, 3),
}


def one_hot_loss(probs: Tensor, idx: Tensor, shape: tuple[int, ...]) -> Tensor:
    num_sequences, length, num_experts, num_topk, num_groups, num_kept = shape
    chosen = F.one_hot(idx.view(num_sequences, length, num_topk).long(), num_experts).sum(dim=2).float()
    mean = probs.view(num_sequences, length, num_experts).mean(dim=1)
    load = chosen.mean(dim=1) * (num_experts / num_topk)
    group_mean = mean.view(num_sequences, num_groups, -1).sum(dim=-1)
    group_load = load.view(num_sequences, num_groups, -1).mean(dim=-1)
    sent = chosen.view(num_sequences, length, num_groups, -1).amax(dim=-1).mean(dim=1)
    terms = torch.stack(
        [
            (load * mean).sum(dim=-1),
            (group_load * group_mean).sum(dim=-1),
            (sent * (num_groups / num_kept) * group_mean).sum(dim=-1),
        ]
    )
    return terms.mean(dim=1) @ torch.tensor([0.003, 0.05, 0.02])


@pytest.mark.parametrize("name", SHAPES)
def test_forward_and_backward(benchmark: BenchmarkFixture, name: str) -> None:
    num_sequences, length, num_experts, num_topk, num_groups, num_kept = SHAPES[name]
    rng = cases.generator(name)
    num_tokens = num_sequences * length
    probs = cases.randn(rng, num_tokens, num_experts).softmax(dim=-1).requires_grad_()
    idx = cases.routing(rng, num_tokens=num_tokens, num_experts=num_experts, num_topk=num_topk)

    def ours() -> tuple[Tensor, ...]:
        loss = ops.moe_balance_loss(
            probs,
            idx,
            num_sequences=num_sequences,
            num_groups=num_groups,
            num_groups_kept=num_kept,
            expert=0.003,
            device=0.05,
            communication=0.02,
        )
        return torch.autograd.grad(loss, probs)

    compare(
        benchmark,
        ours,
        {"one_hot": lambda: torch.autograd.grad(one_hot_loss(probs, idx, SHAPES[name]), probs)},
        Work(shape=str(SHAPES[name]), num_bytes=4 * num_tokens * (2 * num_experts + num_topk)),
    )
