"""moe_gate beside transformers' router (its formula, eager and compiled)."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.shapes import DEVICE, IS_ON_GPU, LAYERS, TOKENS, ExpertLayer, routed_sizes
from dscoder import ops
from dscoder.testing import cases
from dscoder.testing.measure import Problem
from dscoder.testing.results import Case


def options(layer: ExpertLayer) -> dict[str, int | float]:
    return {
        "num_topk": layer.num_topk,
        "num_groups": layer.num_groups,
        "num_groups_kept": layer.num_groups_kept,
        "scale": layer.scale,
    }


def formula(
    logits_TE: Tensor, *, num_topk: int, num_groups: int, num_groups_kept: int, scale: float
) -> tuple[Tensor, Tensor]:
    """What transformers' DeepseekV2TopkRouter computes after its projection; sorted, to be compared."""
    scores = logits_TE.softmax(dim=-1, dtype=torch.float32)
    if num_groups_kept < num_groups:
        groups = scores.view(len(scores), num_groups, -1)
        best = groups.max(dim=-1).values.topk(num_groups_kept, dim=-1).indices
        mask = torch.zeros(groups.shape[:2], device=scores.device).scatter_(1, best, 1)
        scores = groups.masked_fill(mask.unsqueeze(-1) == 0, 0.0).flatten(1)
    weight_TK, idx_TK = scores.topk(num_topk, dim=-1)
    return idx_TK.to(torch.int32), weight_TK * scale


COMPILED = torch.compile(formula, fullgraph=True, dynamic=False)


def num_bytes(step: str, num_tokens: int, layer: ExpertLayer) -> float:
    """Forward reads the logits and writes K indices and weights; backward reads the logits, the indices and
    the weights' gradients and writes a gradient for each logit.
    """
    logits, chosen = 4 * num_tokens * layer.num_experts, 4 * num_tokens * layer.num_topk
    forward, backward = logits + 2 * chosen, 2 * logits + 2 * chosen
    return {"forward": forward, "backward": backward, "forward + backward": forward + backward}[step]


@pytest.mark.parametrize("step", ["forward", "backward", "forward + backward"])
@pytest.mark.parametrize(("model", "num_tokens", "routing"), routed_sizes(many=True))
def test_step(measure: Callable[..., None], model: str, num_tokens: int, routing: str, step: str) -> None:
    layer = LAYERS[model]
    rng = cases.generator(f"{model} {routing}", DEVICE)
    logits = cases.routing_logits(
        rng, num_tokens=num_tokens, num_experts=layer.num_experts, num_topk=layer.num_topk, kind=routing
    )
    others = {"transformers": formula}
    if IS_ON_GPU and num_tokens == TOKENS:
        others["torch.compile"] = COMPILED
    case = Case(
        op="moe_gate",
        step=step,
        model=model,
        routing=routing,
        shape=layer.shape(num_tokens, width=False),
        dtype=torch.float32,
        num_bytes=num_bytes(step, num_tokens, layer),
    )
    grad = cases.randn(rng, num_tokens, layer.num_topk)
    problem = Problem(args=(logits,), num_leaves=1, grads=(grad,))
    bound = {name: partial(function, **options(layer)) for name, function in others.items()}
    measure(case, problem, partial(ops.moe_gate, **options(layer)), bound)
