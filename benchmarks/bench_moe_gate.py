"""moe_gate on logits that lead to each kind of routing."""

from collections.abc import Callable

import pytest
import torch

from benchmarks.shapes import DEVICE, LAYERS, ExpertLayer, peers_of, routed_cases
from dscoder import ops
from dscoder.testing import cases
from dscoder.testing.measure import Problem
from dscoder.testing.results import Case


def num_bytes(step: str, num_tokens: int, layer: ExpertLayer) -> float:
    """Forward reads the logits and writes K indices and weights; backward reads the logits, the indices and
    the weights' gradients and writes a gradient for each logit.
    """
    logits, chosen = 4 * num_tokens * layer.num_experts, 4 * num_tokens * layer.num_topk
    forward, backward = logits + 2 * chosen, 2 * logits + 2 * chosen
    return {"forward": forward, "backward": backward, "forward + backward": forward + backward}[step]


@pytest.mark.parametrize(
    ("model", "num_tokens", "routing", "step"),
    routed_cases("forward", "backward", "forward + backward", many=True),
)
def test_step(measure: Callable[..., None], model: str, num_tokens: int, routing: str, step: str) -> None:
    layer = LAYERS[model]
    rng = cases.generator(f"{model} {routing}", DEVICE)
    logits = cases.routing_logits(
        rng, num_tokens=num_tokens, num_experts=layer.num_experts, num_topk=layer.num_topk, kind=routing
    )
    case = Case(
        op="moe_gate",
        step=step,
        model=model,
        routing=routing,
        shape=layer.shape(num_tokens, width=False),
        dtype=torch.float32,
        num_bytes=num_bytes(step, num_tokens, layer),
    )
    problem = Problem(
        args=(logits,),
        kwargs={
            "num_topk": layer.num_topk,
            "num_groups": layer.num_groups,
            "num_groups_kept": layer.num_groups_kept,
            "scale": layer.scale,
        },
        num_leaves=1,
        grads=(cases.randn(rng, num_tokens, layer.num_topk),),
    )
    measure(case, problem, ops.moe_gate, peers_of("moe_gate", step, num_tokens))
