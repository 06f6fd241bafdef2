"""moe_unpermute beside transformers' weighted gather and sum, eager and compiled."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.shapes import DEVICE, DTYPE, IS_ON_GPU, ITEM, LAYERS, TOKENS, ExpertLayer, routed_sizes
from dscoder import ops
from dscoder.ops import PermuteHandle
from dscoder.testing import cases
from dscoder.testing.measure import Problem
from dscoder.testing.results import Case

Unpermute = Callable[[Tensor, Tensor, PermuteHandle], Tensor]


def weigh_and_sum(y_MD: Tensor, weight_TK: Tensor, handle: PermuteHandle) -> Tensor:
    rows_TKD = y_MD[handle.row_TK.long()]
    return (rows_TKD * weight_TK.unsqueeze(-1)).sum(dim=1).to(y_MD.dtype)


COMPILED = torch.compile(weigh_and_sum, fullgraph=True, dynamic=False)


def flat(function: Unpermute) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """With the handle's tensors as arguments of their own, so that they are copied like the others."""
    return lambda y, weight, offsets, row: function(y, weight, PermuteHandle(offsets_E=offsets, row_TK=row))


def num_bytes(step: str, num_tokens: int, layer: ExpertLayer) -> float:
    """Forward reads T * K rows, weights and the map and writes T rows; backward reads T * K rows, T
    gradients, weights and the map and writes T * K gradients and the weights'.
    """
    row, choices = ITEM * layer.width, 4 * num_tokens * layer.num_topk
    forward = row * num_tokens * (layer.num_topk + 1) + 2 * choices
    return {"forward": forward, "backward": forward + row * num_tokens * layer.num_topk + choices}[step]


@pytest.mark.parametrize("step", ["forward", "backward"])
@pytest.mark.parametrize(("model", "num_tokens", "routing"), routed_sizes())
def test_step(measure: Callable[..., None], model: str, num_tokens: int, routing: str, step: str) -> None:
    layer = LAYERS[model]
    rng = cases.generator(f"{model} {routing}", DEVICE)
    idx = cases.routing(
        rng, num_tokens=num_tokens, num_experts=layer.num_experts, num_topk=layer.num_topk, kind=routing
    )
    x = cases.randn(rng, num_tokens, 8, dtype=DTYPE)
    _, handle = ops.moe_permute(x, idx, num_experts=layer.num_experts)
    others: dict[str, Unpermute] = {"torch": weigh_and_sum}
    if IS_ON_GPU and num_tokens == TOKENS:
        others["torch.compile"] = COMPILED
    case = Case(
        op="moe_unpermute",
        step=step,
        model=model,
        routing=routing,
        shape=layer.shape(num_tokens),
        dtype=DTYPE,
        num_bytes=num_bytes(step, num_tokens, layer),
    )
    y = cases.randn(rng, num_tokens * layer.num_topk, layer.width, dtype=DTYPE)
    weight = cases.randn(rng, num_tokens, layer.num_topk).softmax(dim=-1)
    problem = Problem(
        args=(y, weight, handle.offsets_E, handle.row_TK),
        num_leaves=2,
        grads=(cases.randn(rng, num_tokens, layer.width, dtype=DTYPE),),
    )
    measure(
        case,
        problem,
        flat(ops.moe_unpermute),
        {name: flat(function) for name, function in others.items()},
    )
