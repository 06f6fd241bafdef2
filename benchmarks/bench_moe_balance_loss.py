"""moe_balance_loss of what the gate chose: alone, and fused into the gate beside both one after the other."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.shapes import DEVICE, LAYERS, ExpertLayer, peers_of, routed_cases
from dscoder import ops
from dscoder.testing import cases
from dscoder.testing.measure import Problem
from dscoder.testing.results import Case

MAX_LENGTH = 4096  # of a sequence, as in pre-training
TERMS = {"expert": 0.003, "device": 0.05, "communication": 0.02}  # DeepSeek-V2 section 3.1.2


def options(layer: ExpertLayer, num_tokens: int) -> dict[str, int | float]:
    return {
        "num_sequences": max(num_tokens // MAX_LENGTH, 1),
        "num_groups": layer.num_groups,
        "num_groups_kept": layer.num_groups_kept,
        **TERMS,
    }


def num_bytes(step: str, num_tokens: int, layer: ExpertLayer) -> float:
    """Forward reads the probabilities and the indices; backward writes a gradient for each probability."""
    probs, indices = 4 * num_tokens * layer.num_experts, 4 * num_tokens * layer.num_topk
    forward, backward = probs + indices, probs
    return {"forward": forward, "backward": backward, "forward + backward": forward + backward}[step]


@pytest.mark.parametrize(
    ("model", "num_tokens", "routing", "step"), routed_cases("forward", "backward", "forward + backward")
)
def test_step(measure: Callable[..., None], model: str, num_tokens: int, routing: str, step: str) -> None:
    layer = LAYERS[model]
    rng = cases.generator(f"{model} {routing}", DEVICE)
    logits = cases.routing_logits(
        rng, num_tokens=num_tokens, num_experts=layer.num_experts, num_topk=layer.num_topk, kind=routing
    )
    idx, _ = ops.moe_gate(
        logits,
        num_topk=layer.num_topk,
        num_groups=layer.num_groups,
        num_groups_kept=layer.num_groups_kept,
    )
    case = Case(
        op="moe_balance_loss",
        step=step,
        model=model,
        routing=routing,
        shape=layer.shape(num_tokens, width=False),
        dtype=torch.float32,
        num_bytes=num_bytes(step, num_tokens, layer),
    )
    problem = Problem(
        args=(logits.softmax(dim=-1), idx),
        kwargs=options(layer, num_tokens),
        num_leaves=1,
        grads=(cases.randn(rng, 1).squeeze(0),),
    )
    measure(case, problem, ops.moe_balance_loss, peers_of("moe_balance_loss", step, num_tokens))


def one_after_the_other(
    logits_TE: Tensor,
    *,
    num_sequences: int,
    num_groups: int,
    num_groups_kept: int,
    num_topk: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `moe_gate_with_balance` does in one pass."""
    groups = {"num_groups": num_groups, "num_groups_kept": num_groups_kept}
    idx_TK, weight_TK = ops.moe_gate(logits_TE, num_topk=num_topk, scale=scale, **groups)
    probs_TE = logits_TE.softmax(dim=-1)
    return idx_TK, weight_TK, ops.moe_balance_terms(probs_TE, idx_TK, num_sequences=num_sequences, **groups)


@pytest.mark.parametrize(
    ("model", "num_tokens", "routing", "step"),
    routed_cases("forward", "backward", "forward + backward", kinds=["uniform"]),
)
def test_with_gate(
    measure: Callable[..., None], model: str, num_tokens: int, routing: str, step: str
) -> None:
    layer = LAYERS[model]
    rng = cases.generator(f"{model} {routing}", DEVICE)
    logits = cases.routing_logits(
        rng, num_tokens=num_tokens, num_experts=layer.num_experts, num_topk=layer.num_topk, kind=routing
    )
    # As the gate alone: the terms add twelve bytes.
    chosen = 4 * num_tokens * layer.num_topk
    forward, backward = logits.nbytes + 2 * chosen, 2 * logits.nbytes + 2 * chosen
    case = Case(
        op="moe_gate_with_balance",
        step=step,
        model=model,
        routing=routing,
        shape=layer.shape(num_tokens, width=False),
        dtype=torch.float32,
        num_bytes={"forward": forward, "backward": backward}.get(step, forward + backward),
    )
    problem = Problem(
        args=(logits,),
        kwargs={
            "num_sequences": max(num_tokens // MAX_LENGTH, 1),
            "num_groups": layer.num_groups,
            "num_groups_kept": layer.num_groups_kept,
            "num_topk": layer.num_topk,
            "scale": layer.scale,
        },
        num_leaves=1,
        grads=(cases.randn(rng, num_tokens, layer.num_topk), cases.randn(rng, 3)),
    )
    measure(case, problem, ops.moe_gate_with_balance, {"gate, then balance": one_after_the_other})
