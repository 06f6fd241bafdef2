"""moe_permute: its maps alone, the rows with them, and the way back."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.shapes import DEVICE, DTYPE, ITEM, LAYERS, ExpertLayer, peers_of, routed_cases
from dscoder import ops
from dscoder.testing import cases
from dscoder.testing.measure import Problem
from dscoder.testing.results import Case


def rows(x_TD: Tensor, idx_TK: Tensor, *, num_experts: int) -> Tensor:
    """The maps are made too, and not compared: every library has its own."""
    return ops.moe_permute(x_TD, idx_TK, num_experts=num_experts)[0]


def maps(idx_TK: Tensor, *, num_experts: int) -> tuple[Tensor, Tensor]:
    """The tokens of the rows are made too, and not compared: peers do not make them."""
    handle = ops.moe_permute_maps(idx_TK, num_experts=num_experts)
    return handle.offsets_E, handle.row_TK


def num_bytes(step: str, num_tokens: int, layer: ExpertLayer) -> float:
    """Forward reads the indices and T rows and writes both row maps, the offsets and T * K rows; backward
    reads the map and T * K rows and writes T.
    """
    rows = ITEM * num_tokens * (layer.num_topk + 1) * layer.width
    indices = 4 * num_tokens * layer.num_topk
    return {"forward": rows + 3 * indices + 4 * layer.num_experts, "backward": rows + indices}[step]


@pytest.mark.parametrize(("model", "num_tokens", "routing", "step"), routed_cases("maps", many=True))
def test_maps(measure: Callable[..., None], model: str, num_tokens: int, routing: str, step: str) -> None:
    """END offsets, the row of every choice and the token of every row."""
    layer = LAYERS[model]
    rng = cases.generator(f"{model} {routing}", DEVICE)
    idx = cases.routing(
        rng, num_tokens=num_tokens, num_experts=layer.num_experts, num_topk=layer.num_topk, kind=routing
    )
    case = Case(
        op="moe_permute",
        step=step,
        model=model,
        routing=routing,
        shape=layer.shape(num_tokens, width=False),
        dtype=torch.int32,
        # Reads an index and writes a row and its token for every choice, and the offsets.
        num_bytes=4 * (3 * idx.numel() + layer.num_experts),
    )
    problem = Problem(args=(idx,), kwargs={"num_experts": layer.num_experts})
    measure(case, problem, maps, peers_of("moe_permute", step, num_tokens))


@pytest.mark.parametrize(("model", "num_tokens", "routing", "step"), routed_cases("forward", "backward"))
def test_step(measure: Callable[..., None], model: str, num_tokens: int, routing: str, step: str) -> None:
    layer = LAYERS[model]
    rng = cases.generator(f"{model} {routing}", DEVICE)
    idx = cases.routing(
        rng, num_tokens=num_tokens, num_experts=layer.num_experts, num_topk=layer.num_topk, kind=routing
    )
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
        kwargs={"num_experts": layer.num_experts},
        num_leaves=1,
        grads=(cases.randn(rng, num_tokens * layer.num_topk, layer.width, dtype=DTYPE),),
    )
    measure(case, problem, rows, peers_of("moe_permute", step, num_tokens))
