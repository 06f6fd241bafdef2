"""The routed experts between gate and sum beside the same layer on torch's grouped product and transformers'.

Every contender moves the rows itself: by moe_permute_maps and moe_unpermute here, by sort and gather there.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import DEVICE, DTYPE, IS_ON_GPU, ITEM
from dscoder import ops
from dscoder.testing import cases
from dscoder.testing.measure import Contender, Problem
from dscoder.testing.results import Case

try:
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Experts
except ImportError:  # a peer like the others: left out where it is not installed
    DeepseekV2Config = DeepseekV2Experts = None

# D, F, E, K; V2 is one rank of eight; on a CPU the published widths with fewer experts
SHAPES = (
    {"v2_lite": (2048, 1408, 64, 6), "v2_ep8": (5120, 1536, 20, 6)}
    if IS_ON_GPU
    else {"tiny_moe": (256, 96, 16, 4), "v2_lite": (2048, 1408, 4, 2)}
)
TOKENS = {"v2_lite": 8192, "v2_ep8": 4096} if IS_ON_GPU else {"tiny_moe": 4096, "v2_lite": 256}
DECODE = 128 if IS_ON_GPU else 8
IMPLEMENTATIONS = ("eager", "grouped_mm")  # of transformers, that finish in seconds at these shapes
CASES = [
    *((model, DECODE, "uniform", "forward") for model in SHAPES),
    *(
        (model, TOKENS[model], "uniform", step)
        for model in SHAPES
        for step in ("forward", "forward + backward")
    ),
    *(
        (next(iter(SHAPES)), TOKENS[next(iter(SHAPES))], kind, "forward + backward")
        for kind in ("skewed", "one_hot")
    ),
]


def layer(
    x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, idx: Tensor, *, arch: str = "auto"
) -> Tensor:
    handle = ops.moe_permute_maps(idx, num_experts=len(down))
    return ops.moe_unpermute(ops.moe_experts(x, gate_up, down, handle, arch=arch), weight, handle)


def torch_layer(x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, idx: Tensor) -> Tensor:
    """The best that torch offers by itself: one sort, grouped_mm, and gathers there and back."""
    expert_M, slot_M = idx.flatten().sort(stable=True)
    experts = torch.arange(len(down), dtype=torch.int32, device=x.device)
    offsets = torch.searchsorted(expert_M, experts, right=True, out_int32=True)
    rows = x.index_select(0, slot_M // idx.shape[1])
    gate, up = F.grouped_mm(rows, gate_up.transpose(1, 2), offs=offsets).chunk(2, dim=-1)
    y = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=offsets)
    row = torch.empty_like(slot_M).scatter(0, slot_M, torch.arange(len(slot_M), device=x.device))
    y_TKD = y.index_select(0, row).view(*weight.shape, -1)
    return (y_TKD * weight.unsqueeze(-1)).sum(dim=1).to(x.dtype)


def their_layer(implementation: str, model: str) -> Callable[..., Tensor]:
    """transformers' expert layer as a function of its weights."""

    def run(x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, idx: Tensor) -> Tensor:
        weights = {"gate_up_proj": gate_up, "down_proj": down}
        return torch.func.functional_call(experts, weights, (x, idx.long(), weight))

    width, expert_width, num_experts, _ = SHAPES[model]
    config = DeepseekV2Config(
        hidden_size=width, moe_intermediate_size=expert_width, n_routed_experts=num_experts
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = DeepseekV2Experts(config)
    return run


def problem_of(model: str, num_tokens: int, routing: str, step: str) -> tuple[Case, Problem]:
    """A layer's case and the arguments of `layer`."""
    width, expert_width, num_experts, num_topk = SHAPES[model]
    rng = cases.generator(f"{model} {num_tokens} {routing}", DEVICE)
    idx = cases.routing(rng, num_tokens=num_tokens, num_experts=num_experts, num_topk=num_topk, kind=routing)
    gate_up = (cases.randn(rng, num_experts, 2 * expert_width, width) * width**-0.5).to(DTYPE)
    down = (cases.randn(rng, num_experts, width, expert_width) * expert_width**-0.5).to(DTYPE)
    x, grad = cases.randn(rng, 2, num_tokens, width, dtype=DTYPE)
    weight = cases.randn(rng, num_tokens, num_topk).softmax(dim=-1)
    num_passes = 1 if step == "forward" else 3  # the gradients are two products for each one
    num_used = len(idx.unique())
    case = Case(
        op="moe_experts",
        step=step,
        model=model,
        routing=routing,
        shape=f"T={num_tokens} D={width} F={expert_width} E={num_experts} K={num_topk}",
        dtype=DTYPE,
        flops=num_passes * 2.0 * num_tokens * num_topk * width * 3 * expert_width,
        num_bytes=num_passes * ITEM * num_used * 3 * expert_width * width,
    )
    return case, Problem(args=(x, weight, gate_up, down, idx), num_leaves=4, grads=(grad,))


@pytest.mark.parametrize(("model", "num_tokens", "routing", "step"), CASES)
def test_layer(measure: Callable[..., None], model: str, num_tokens: int, routing: str, step: str) -> None:
    case, problem = problem_of(model, num_tokens, routing, step)
    names = IMPLEMENTATIONS if DeepseekV2Experts is not None else ()
    peers: dict[str, Contender] = {f"transformers {name}": their_layer(name, model) for name in names}
    measure(case, problem, layer, {"torch": torch_layer, **peers})
