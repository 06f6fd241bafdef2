"""grouped_gemm beside torch's grouped product and a loop, and whole expert layers beside transformers'
implementations of them.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import DEVICE, DTYPE, IS_ON_GPU, ITEM, peers_of
from dscoder import ops
from dscoder.testing import cases
from dscoder.testing.measure import Problem
from dscoder.testing.results import Case

try:
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Experts
except ImportError:  # a peer like the others: left out where it is not installed
    DeepseekV2Config = DeepseekV2Experts = None

# T, D, F, E, K; on a CPU the published widths with fewer experts and tokens
SHAPES = (
    {"v2_lite": (8192, 2048, 1408, 64, 6), "v2": (8192, 5120, 1536, 40, 6)}
    if IS_ON_GPU
    else {
        "tiny_moe": (4096, 256, 96, 16, 4),
        "v2_lite": (256, 2048, 1408, 4, 2),
        "v2": (64, 5120, 1536, 4, 2),
    }
)
DTYPES = [DTYPE] if IS_ON_GPU else [torch.float32, torch.bfloat16]
NUM_PRODUCTS = {"forward": 1, "backward": 2}
IMPLEMENTATIONS = ("eager", "grouped_mm")  # of transformers, that finish in seconds at these shapes


def shape_text(model: str) -> str:
    num_tokens, width, expert_width, num_experts, num_topk = SHAPES[model]
    return f"T={num_tokens} D={width} F={expert_width} E={num_experts} K={num_topk}"


def loop(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    pieces = x.tensor_split(offsets[:-1].long().cpu())
    return torch.cat([F.linear(piece, w_e) for piece, w_e in zip(pieces, w, strict=True)])


@pytest.mark.parametrize("step", NUM_PRODUCTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", SHAPES)
def test_step(measure: Callable[..., None], model: str, dtype: torch.dtype, step: str) -> None:
    num_tokens, width, expert_width, num_experts, num_topk = SHAPES[model]
    rng = cases.generator(model, DEVICE)
    idx = cases.routing(rng, num_tokens=num_tokens, num_experts=num_experts, num_topk=num_topk)
    tokens = cases.randn(rng, num_tokens, width, dtype=dtype)
    rows, handle = ops.moe_permute(tokens, idx, num_experts=num_experts)
    w = cases.randn(rng, num_experts, 2 * expert_width, width, dtype=dtype)
    grad = cases.randn(rng, len(rows), 2 * expert_width, dtype=dtype)
    one_product = rows.numel() + w.numel() + grad.numel()
    case = Case(
        op="grouped_gemm",
        step=step,
        model=model,
        routing="uniform",
        shape=shape_text(model),
        dtype=dtype,
        # Each product reads two of rows, weights and results and writes the third.
        flops=NUM_PRODUCTS[step] * 2 * len(rows) * width * 2 * expert_width,
        num_bytes=NUM_PRODUCTS[step] * dtype.itemsize * one_product,
    )
    problem = Problem(args=(rows, w, handle.offsets_E), num_leaves=2, grads=(grad,))
    measure(case, problem, ops.grouped_gemm, {**peers_of("grouped_gemm", step), "loop": loop})


def expert_layer(x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, idx: Tensor) -> Tensor:
    rows, handle = ops.moe_permute(x, idx, num_experts=len(down))
    gate, up = ops.grouped_gemm(rows, gate_up, handle.offsets_E).chunk(2, dim=-1)
    y = ops.grouped_gemm(F.silu(gate) * up, down, handle.offsets_E)
    return ops.moe_unpermute(y, weight, handle)


def their_layer(implementation: str, model: str) -> Callable[..., Tensor]:
    """transformers' expert layer as a function of its weights."""

    def run(x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, idx: Tensor) -> Tensor:
        weights = {"gate_up_proj": gate_up, "down_proj": down}
        return torch.func.functional_call(experts, weights, (x, idx.long(), weight))

    _, width, expert_width, num_experts, _ = SHAPES[model]
    config = DeepseekV2Config(
        hidden_size=width, moe_intermediate_size=expert_width, n_routed_experts=num_experts
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = DeepseekV2Experts(config)
    return run


@pytest.mark.parametrize("model", SHAPES)
def test_expert_layer(measure: Callable[..., None], model: str) -> None:
    num_tokens, width, expert_width, num_experts, num_topk = SHAPES[model]
    rng = cases.generator(model, DEVICE)
    idx = cases.routing(rng, num_tokens=num_tokens, num_experts=num_experts, num_topk=num_topk)
    gate_up = cases.randn(rng, num_experts, 2 * expert_width, width) * 0.02
    down = cases.randn(rng, num_experts, width, expert_width) * 0.02
    x, grad = cases.randn(rng, 2, num_tokens, width, dtype=DTYPE)
    weight = cases.randn(rng, num_tokens, num_topk).softmax(dim=-1)
    case = Case(
        op="expert_layer",
        step="forward + backward",
        model=model,
        routing="uniform",
        shape=shape_text(model),
        dtype=DTYPE,
        flops=3 * 2 * num_tokens * num_topk * width * 3 * expert_width,
        num_bytes=3 * ITEM * (gate_up.numel() + down.numel()),
    )
    problem = Problem(args=(x, weight, gate_up.to(DTYPE), down.to(DTYPE), idx), num_leaves=4, grads=(grad,))
    names = IMPLEMENTATIONS if DeepseekV2Experts is not None else ()
    peers = {f"transformers {name}": their_layer(name, model) for name in names}
    measure(case, problem, expert_layer, peers)
