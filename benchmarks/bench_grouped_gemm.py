"""grouped_gemm, forward and backward, beside torch's grouped product, and whole expert layers beside
transformers' implementations of them.
"""

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from transformers import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Experts

from dscoder import ops
from dscoder.testing import cases
from dscoder.testing.timing import Work, compare

SHAPES = {  # T, D, F, E, K; the published widths with fewer experts and tokens
    "tiny_moe": (4096, 256, 96, 16, 4),
    "v2_lite": (256, 2048, 1408, 8, 4),
    "v2": (64, 5120, 1536, 4, 2),
}
PEERS = ("eager", "grouped_mm")  # transformers' implementations that finish in seconds at these shapes


def loop(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    pieces = x.tensor_split(offsets[:-1].long())
    return torch.cat([F.linear(piece, w_e) for piece, w_e in zip(pieces, w, strict=True)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_forward_and_backward(benchmark: BenchmarkFixture, name: str, dtype: torch.dtype) -> None:
    num_tokens, width, expert_width, num_experts, num_topk = SHAPES[name]
    rng = cases.generator(name)
    idx = cases.routing(rng, num_tokens=num_tokens, num_experts=num_experts, num_topk=num_topk)
    tokens = cases.randn(rng, num_tokens, width, dtype=dtype)
    rows, handle = ops.moe_permute(tokens, idx, num_experts=num_experts)
    offsets = handle.offsets_E
    inputs = (
        rows.requires_grad_(),
        cases.randn(rng, num_experts, 2 * expert_width, width, dtype=dtype).requires_grad_(),
    )
    grad = cases.randn(rng, len(rows), 2 * expert_width, dtype=dtype)

    def gradients(y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, inputs, grad)

    compare(
        benchmark,
        lambda: gradients(ops.grouped_gemm(*inputs, offsets)),
        {
            "torch": lambda: gradients(F.grouped_mm(inputs[0], inputs[1].transpose(1, 2), offs=offsets)),
            "loop": lambda: gradients(loop(*inputs, offsets)),
        },
        Work(shape=str(SHAPES[name]), flops=3 * 2 * len(rows) * width * 2 * expert_width),
        num_rounds=5,
    )


def expert_layer(x: Tensor, idx: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    rows, handle = ops.moe_permute(x, idx, num_experts=len(down))
    gate, up = ops.grouped_gemm(rows, gate_up, handle.offsets_E).chunk(2, dim=-1)
    y = ops.grouped_gemm(F.silu(gate) * up, down, handle.offsets_E)
    return ops.moe_unpermute(y, weight, handle)


@pytest.mark.parametrize("name", SHAPES)
def test_expert_layer(benchmark: BenchmarkFixture, name: str) -> None:
    num_tokens, width, expert_width, num_experts, num_topk = SHAPES[name]
    rng = cases.generator(name)
    config = DeepseekV2Config(
        hidden_size=width, moe_intermediate_size=expert_width, n_routed_experts=num_experts
    )
    experts = DeepseekV2Experts(config)
    for parameter in experts.parameters():
        parameter.data = cases.randn(rng, *parameter.shape) * 0.02
    x = cases.randn(rng, num_tokens, width).requires_grad_()
    idx = cases.routing(rng, num_tokens=num_tokens, num_experts=num_experts, num_topk=num_topk)
    weight = torch.rand(num_tokens, num_topk, generator=rng).requires_grad_()
    inputs = (x, weight, experts.gate_up_proj, experts.down_proj)
    grad = cases.randn(rng, num_tokens, width)

    def theirs(implementation: str) -> tuple[Tensor, ...]:
        config._experts_implementation = implementation
        return torch.autograd.grad(experts(x, idx.long(), weight), inputs, grad)

    compare(
        benchmark,
        lambda: torch.autograd.grad(expert_layer(x, idx, *inputs[1:]), inputs, grad),
        {f"transformers_{peer}": lambda peer=peer: theirs(peer) for peer in PEERS},
        Work(shape=str(SHAPES[name]), flops=3 * 2 * num_tokens * num_topk * width * 3 * expert_width),
        num_rounds=5,
    )
