"""moe_balance_loss beside the same terms from a one-hot mask and autograd, eager and compiled."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import DEVICE, IS_ON_GPU, LAYERS, TOKENS, ExpertLayer, routed_sizes
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


def one_hot_loss(
    probs_TE: Tensor,
    idx_TK: Tensor,
    *,
    num_sequences: int,
    num_groups: int,
    num_groups_kept: int,
    expert: float,
    device: float,
    communication: float,
) -> Tensor:
    num_experts, num_topk = probs_TE.shape[1], idx_TK.shape[1]
    chosen = F.one_hot(idx_TK.view(num_sequences, -1, num_topk).long(), num_experts).sum(dim=2).float()
    mean = probs_TE.view(num_sequences, -1, num_experts).mean(dim=1)
    load = chosen.mean(dim=1) * (num_experts / num_topk)
    group_mean = mean.view(num_sequences, num_groups, -1).sum(dim=-1)
    group_load = load.view(num_sequences, num_groups, -1).mean(dim=-1)
    sent = chosen.unflatten(2, (num_groups, -1)).amax(dim=-1).mean(dim=1) * (num_groups / num_groups_kept)
    expert_term = (load * mean).sum(dim=-1).mean()
    device_term = (group_load * group_mean).sum(dim=-1).mean()
    sent_term = (sent * group_mean).sum(dim=-1).mean()
    return expert_term * expert + device_term * device + sent_term * communication


COMPILED = torch.compile(one_hot_loss, fullgraph=True, dynamic=False)


def num_bytes(step: str, num_tokens: int, layer: ExpertLayer) -> float:
    """Forward reads the probabilities and the indices; backward writes a gradient for each probability."""
    probs, indices = 4 * num_tokens * layer.num_experts, 4 * num_tokens * layer.num_topk
    forward, backward = probs + indices, probs
    return {"forward": forward, "backward": backward, "forward + backward": forward + backward}[step]


@pytest.mark.parametrize("step", ["forward", "backward", "forward + backward"])
@pytest.mark.parametrize(("model", "num_tokens", "routing"), routed_sizes())
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
    others = {"torch": one_hot_loss}
    if IS_ON_GPU and num_tokens == TOKENS:
        others["torch.compile"] = COMPILED
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
        args=(logits.softmax(dim=-1), idx), num_leaves=1, grads=(cases.randn(rng, 1).squeeze(0),)
    )
    settings = options(layer, num_tokens)
    bound = {name: partial(function, **settings) for name, function in others.items()}
    measure(case, problem, partial(ops.moe_balance_loss, **settings), bound)
