"""moe_unpermute: every token's weighted sum, and the gradients of rows and weights."""

from collections.abc import Callable

import pytest

from benchmarks.shapes import DEVICE, DTYPE, ITEM, LAYERS, ExpertLayer, peers_of, routed_cases
from dscoder import ops
from dscoder.testing import cases
from dscoder.testing.measure import Problem
from dscoder.testing.results import Case


def num_bytes(step: str, num_tokens: int, layer: ExpertLayer) -> float:
    """Forward reads T * K rows, weights and the map and writes T rows; backward reads T * K rows, T
    gradients, weights and the map and writes T * K gradients and the weights'.
    """
    row, choices = ITEM * layer.width, 4 * num_tokens * layer.num_topk
    forward = row * num_tokens * (layer.num_topk + 1) + 2 * choices
    return {"forward": forward, "backward": forward + row * num_tokens * layer.num_topk + choices}[step]


@pytest.mark.parametrize(("model", "num_tokens", "routing", "step"), routed_cases("forward", "backward"))
def test_step(measure: Callable[..., None], model: str, num_tokens: int, routing: str, step: str) -> None:
    layer = LAYERS[model]
    rng = cases.generator(f"{model} {routing}", DEVICE)
    idx = cases.routing(
        rng, num_tokens=num_tokens, num_experts=layer.num_experts, num_topk=layer.num_topk, kind=routing
    )
    handle = ops.moe_permute_maps(idx, num_experts=layer.num_experts)
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
        args=(y, weight, handle),
        num_leaves=2,
        grads=(cases.randn(rng, num_tokens, layer.width, dtype=DTYPE),),
    )
    measure(case, problem, ops.moe_unpermute, peers_of("moe_unpermute", step, num_tokens))
