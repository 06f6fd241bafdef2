"""mla_prefill beside torch's attention, which transformers calls, on the same rows.

The peers see every sequence of one length as a batch; where sequences differ, torch has only a mask over
the whole window. "fused" is torch's fused attention, which wants values as wide as keys: padded.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import DEVICE, DTYPE, IS_ON_GPU, ITEM
from dscoder import ops
from dscoder.testing import cases
from dscoder.testing.measure import Problem
from dscoder.testing.results import Case

WINDOW = 512  # that sequences of different lengths are packed into
SHAPES: dict[str, tuple[int, int, int, list[int]]] = (  # heads, key width, value width, lengths
    {
        "v2_lite": (16, 192, 128, [4096] * 2),
        "v2_lite_packed": (16, 192, 128, [112, 37, 240, 123] * 16),
        "v2": (128, 192, 128, [2048] * 2),
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


def batched(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], *, pad: bool) -> Tensor:
    """Windows under a mask if the lengths differ, else one batch."""
    window = lengths[0] if len(set(lengths)) == 1 else WINDOW
    q_B, k_B, v_B = (x.view(-1, window, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    if pad:
        v_B = F.pad(v_B, (0, q.shape[2] - v.shape[2]))
    mask = None
    if window != lengths[0]:
        document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).view(-1, window)
        mask = (document[:, None, :, None] == document[:, None, None, :]).tril().to(q.device)
    out = F.scaled_dot_product_attention(q_B, k_B, v_B, attn_mask=mask, is_causal=mask is None)
    return out[..., : v.shape[2]].transpose(1, 2).reshape(v.shape)


def ours(q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> Tensor:
    return ops.mla_prefill(q, k, v, ends, ends, scale=q.shape[2] ** -0.5)[0]


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
        shape=f"T={num_tokens} B={len(lengths)} H={num_heads} d={width}/{value_width}",
        dtype=DTYPE,
        # Half of all pairs.
        flops=num_heads * products * sum(n * n for n in lengths),
        num_bytes=ITEM * elements * 2 * (width + value_width),
    )
    problem = Problem(args=(*inputs, cases.cu_seqlens(lengths).to(DEVICE)), num_leaves=3, grads=(grad,))
    peers = {
        name: partial(lambda q, k, v, _, pad: batched(q, k, v, lengths, pad=pad), pad=pad)
        for name, pad in (("torch", False), ("fused", True))
    }
    measure(case, problem, ours, peers)
