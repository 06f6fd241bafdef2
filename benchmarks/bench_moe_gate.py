"""moe_gate, forward and with backward, beside transformers' router (its formula, eager and compiled)."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from dscoder import ops
from dscoder.runtime import native
from dscoder.testing import cases
from dscoder.testing.timing import Call, Work, compare

IS_ON_GPU = torch.cuda.is_available() and native.has_kernels()
DEVICE = "cuda" if IS_ON_GPU else "cpu"
TOKENS = (128, 8192, 131072) if IS_ON_GPU else (128, 8192)


@dataclass(frozen=True, kw_only=True, slots=True)
class Router:
    num_experts: int
    num_topk: int = 6
    num_groups: int = 1
    num_groups_kept: int = 1
    scale: float = 1.0

    def ours(self, logits_TE: Tensor) -> Tensor:
        return ops.moe_gate(
            logits_TE,
            num_topk=self.num_topk,
            num_groups=self.num_groups,
            num_groups_kept=self.num_groups_kept,
            scale=self.scale,
        )[1]

    def transformers(self, logits_TE: Tensor) -> Tensor:
        """What DeepseekV2TopkRouter computes after its projection; sorted, so that weights compare."""
        scores = logits_TE.softmax(dim=-1, dtype=torch.float32)
        if self.num_groups_kept < self.num_groups:
            groups = scores.view(len(scores), self.num_groups, -1)
            best = groups.max(dim=-1).values.topk(self.num_groups_kept, dim=-1).indices
            mask = torch.zeros(groups.shape[:2], device=scores.device).scatter_(1, best, 1)
            scores = groups.masked_fill(mask.unsqueeze(-1) == 0, 0.0).flatten(1)
        return scores.topk(self.num_topk, dim=-1).values * self.scale


ROUTERS = {
    "v2_lite": Router(num_experts=64),
    "v2": Router(num_experts=160, num_groups=8, num_groups_kept=3, scale=16.0),
}


def run(benchmark: BenchmarkFixture, name: str, num_tokens: int, *, is_training: bool) -> None:
    router = ROUTERS[name]
    logits = cases.randn(cases.generator(name), num_tokens, router.num_experts).to(DEVICE)
    grad = torch.ones(num_tokens, router.num_topk, device=DEVICE)

    def call(function: Callable[[Tensor], Tensor]) -> Call:
        if not is_training:
            return lambda: function(logits)
        leaf = logits.detach().requires_grad_()
        return lambda: torch.autograd.grad(function(leaf), leaf, grad)

    peers = {"transformers": call(router.transformers)}
    if IS_ON_GPU:
        peers["compiled"] = call(torch.compile(router.transformers, fullgraph=True))
    # Forward reads the logits and writes K indices and weights; backward reads both and as many gradients,
    # and writes one for each logit.
    elements = num_tokens * (router.num_experts + 2 * router.num_topk)
    elements += is_training * num_tokens * (2 * router.num_experts + 2 * router.num_topk)
    shape = f"T {num_tokens}, E {router.num_experts}, K {router.num_topk}, groups {router.num_groups}"
    compare(benchmark, call(router.ours), peers, Work(shape=shape, num_bytes=4.0 * elements))


@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("name", ROUTERS)
def test_forward(benchmark: BenchmarkFixture, name: str, num_tokens: int) -> None:
    run(benchmark, name, num_tokens, is_training=False)


@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("name", ROUTERS)
def test_forward_and_backward(benchmark: BenchmarkFixture, name: str, num_tokens: int) -> None:
    run(benchmark, name, num_tokens, is_training=True)
