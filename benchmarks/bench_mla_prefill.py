"""mla_prefill on sequences of one length and on packed ones."""

from collections.abc import Callable

import pytest
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import DEVICE, DTYPE, IS_ON_GPU, ITEM, peers_of
from dscoder import ops
from dscoder.testing import cases
from dscoder.testing.measure import Contender, Problem
from dscoder.testing.results import Case

# Heads, key width, value width, lengths; on a GPU packed ones with a mean of 1024 tokens and of 2112.
SHAPES: dict[str, tuple[int, int, int, list[int]]] = (
    {
        "v2_lite": (16, 192, 128, [8192] * 4),
        "v2": (128, 192, 128, [4096] * 2),
        "v2_lite_packed": (16, 192, 128, [*range(128, 1921, 128), 1024]),
        "v2_lite_long": (16, 192, 128, [32768]),
        "v2_lite_many": (16, 192, 128, [2048] * 16),
        "v2_lite_ragged": (16, 192, 128, [128 + 3968 * i // 15 for i in range(16)]),
        "coder_6_7b": (32, 128, 128, [4096] * 2),
    }
    if IS_ON_GPU
    else {
        "tiny_moe": (4, 48, 32, [512] * 8),
        "tiny_moe_packed": (4, 48, 32, [112, 37, 240, 123] * 8),
        "v2_lite": (16, 192, 128, [512] * 2),
        "v2_lite_long": (16, 192, 128, [1024]),
        "v2": (128, 192, 128, [256]),
    }
)


def shape_of(model: str) -> str:
    """As a record holds it."""
    num_heads, width, value_width, lengths = SHAPES[model]
    return f"T={sum(lengths)} B={len(lengths)} H={num_heads} d={width}/{value_width}"


def padded(q: Tensor, k: Tensor, v: Tensor, *_: Tensor, num_sequences: int, scale: float) -> Tensor:
    """Values as wide as the keys, with which torch has a fused CPU kernel; sequences of one length."""
    wide = F.pad(v, (0, q.shape[2] - v.shape[2]))
    batches = (x.unflatten(0, (num_sequences, -1)).transpose(1, 2) for x in (q, k, wide))
    out = F.scaled_dot_product_attention(*batches, is_causal=True, scale=scale)
    return out[..., : v.shape[2]].transpose(1, 2).flatten(0, 1)


def attention(q: Tensor, k: Tensor, v: Tensor, *ends: Tensor, scale: float) -> Tensor:
    """The log-sum-exp is made too; not every peer gives it."""
    return ops.mla_prefill(q, k, v, *ends, scale=scale)[0]


@pytest.mark.parametrize("step", ["forward", "backward"])
@pytest.mark.parametrize("model", SHAPES)
def test_step(measure: Callable[..., None], model: str, step: str) -> None:
    num_heads, width, value_width, lengths = SHAPES[model]
    rng = cases.generator(model, DEVICE)
    num_tokens = sum(lengths)
    inputs = tuple(
        cases.randn(rng, num_tokens, num_heads, w, dtype=DTYPE) for w in (width, width, value_width)
    )
    grad = cases.randn(rng, *inputs[2].shape, dtype=DTYPE)
    # Forward: scores and outputs. Backward: the scores again, and a gradient for each of five operands.
    forward = width + value_width
    backward = 3 * width + 2 * value_width
    products = {"forward": forward, "backward": backward}[step]
    elements = {"forward": 1, "backward": 2}[step] * num_tokens * num_heads
    case = Case(
        op="mla_prefill",
        step=step,
        model=model,
        shape=shape_of(model),
        dtype=DTYPE,
        # Half of all pairs.
        flops=num_heads * products * sum(n * n for n in lengths),
        num_bytes=ITEM * elements * 2 * (width + value_width),
    )
    ends = cases.cu_seqlens(lengths).to(DEVICE)
    scale = width**-0.5
    problem = Problem(args=(*inputs, ends, ends), kwargs={"scale": scale}, num_leaves=3, grads=(grad,))
    others: dict[str, Contender] = dict(peers_of("mla_prefill", step))
    if len(set(lengths)) == 1:
        others["torch padded"] = lambda *x, scale: padded(*x, num_sequences=len(lengths), scale=scale)
    measure(case, problem, attention, others)
