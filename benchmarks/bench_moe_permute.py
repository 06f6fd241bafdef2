"""moe_permute beside the sort and gather of transformers' expert layers, eager and compiled."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.shapes import DEVICE, DTYPE, IS_ON_GPU, ITEM, LAYERS, TOKENS, ExpertLayer, routed_sizes
from dscoder import ops
from dscoder.testing import cases
from dscoder.testing.measure import Problem
from dscoder.testing.results import Case


def ours(x_TD: Tensor, idx_TK: Tensor, *, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    x_MD, handle = ops.moe_permute(x_TD, idx_TK, num_experts=num_experts)
    return x_MD, handle.offsets_E, handle.row_TK


def sorted_maps(idx_TK: Tensor, *, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """END offsets, the row of every choice, and the choice of every row, by torch's sort."""
    expert_M, choice_M = idx_TK.flatten().sort(stable=True)
    experts = torch.arange(num_experts, dtype=torch.int32, device=idx_TK.device)
    offsets_E = torch.searchsorted(expert_M, experts, right=True, out_int32=True)
    rows = torch.arange(len(choice_M), dtype=torch.int32, device=idx_TK.device)
    row_TK = torch.empty_like(rows).scatter_(0, choice_M, rows).view(idx_TK.shape)
    return offsets_E, row_TK, choice_M


def gather(x_TD: Tensor, idx_TK: Tensor, *, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    offsets_E, row_TK, choice_M = sorted_maps(idx_TK, num_experts=num_experts)
    return x_TD[choice_M // idx_TK.shape[1]], offsets_E, row_TK


COMPILED = torch.compile(gather, fullgraph=True, dynamic=False)


def num_bytes(step: str, num_tokens: int, layer: ExpertLayer) -> float:
    """Forward reads the indices and T rows and writes the row map, the offsets and T * K rows; backward
    reads the map and T * K rows and writes T.
    """
    rows = ITEM * num_tokens * (layer.num_topk + 1) * layer.width
    indices = 4 * num_tokens * layer.num_topk
    return {"forward": rows + 2 * indices + 4 * layer.num_experts, "backward": rows + indices}[step]


@pytest.mark.parametrize("step", ["forward", "backward"])
@pytest.mark.parametrize(("model", "num_tokens", "routing"), routed_sizes())
def test_step(measure: Callable[..., None], model: str, num_tokens: int, routing: str, step: str) -> None:
    layer = LAYERS[model]
    rng = cases.generator(f"{model} {routing}", DEVICE)
    idx = cases.routing(
        rng, num_tokens=num_tokens, num_experts=layer.num_experts, num_topk=layer.num_topk, kind=routing
    )
    others = {"torch": gather}
    if IS_ON_GPU and num_tokens == TOKENS:
        others["torch.compile"] = COMPILED
    case = Case(
        op="moe_permute",
        step=step,
        model=model,
        routing=routing,
        shape=layer.shape(num_tokens),
        dtype=DTYPE,
        num_bytes=num_bytes(step, num_tokens, layer),
    )
    problem = Problem(
        args=(cases.randn(rng, num_tokens, layer.width, dtype=DTYPE), idx),
        num_leaves=1,
        grads=(cases.randn(rng, num_tokens * layer.num_topk, layer.width, dtype=DTYPE),),
    )
    bound = {name: partial(function, num_experts=layer.num_experts) for name, function in others.items()}
    measure(case, problem, partial(ours, num_experts=layer.num_experts), bound)
