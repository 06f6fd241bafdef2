"""mla_prefill, forward and backward, beside torch's attention, which transformers calls, on the same rows.

The peers see every sequence of one length as a batch; where sequences differ, torch has only a mask over
the whole window. "fused" is torch's fused CPU attention, which wants values as wide as keys: padded.
"""

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from dscoder import ops
from dscoder.testing import cases
from dscoder.testing.timing import Work, compare

SHAPES: dict[str, tuple[int, int, int, list[int]]] = {  # heads, key width, value width, lengths
    "tiny_moe": (4, 48, 32, [512] * 8),
    "tiny_moe_packed": (4, 48, 32, [112, 37, 240, 123] * 8),
    "v2_lite": (16, 192, 128, [512] * 2),
    "v2_lite_long": (16, 192, 128, [2048]),
    "v2": (128, 192, 128, [256]),
}


def batched(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], *, pad: bool) -> Tensor:
    """Windows of 512 under a mask if the lengths differ, else one batch."""
    window = lengths[0] if len(set(lengths)) == 1 else 512
    q_B, k_B, v_B = (x.view(-1, window, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    if pad:
        v_B = F.pad(v_B, (0, q.shape[2] - v.shape[2]))
    mask = None
    if window != lengths[0]:
        document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).view(-1, window)
        mask = (document[:, None, :, None] == document[:, None, None, :]).tril()
    out = F.scaled_dot_product_attention(q_B, k_B, v_B, attn_mask=mask, is_causal=mask is None)
    return out[..., : v.shape[2]].transpose(1, 2).reshape(v.shape)


@pytest.mark.parametrize("direction", ["forward", "forward_and_backward"])
@pytest.mark.parametrize("name", SHAPES)
def test_causal(benchmark: BenchmarkFixture, name: str, direction: str) -> None:
    num_heads, width, value_width, lengths = SHAPES[name]
    rng = cases.generator(name)
    has_backward = direction != "forward"
    inputs = tuple(
        cases.randn(rng, sum(lengths), num_heads, w).requires_grad_(has_backward)
        for w in (width, width, value_width)
    )
    grad = cases.randn(rng, *inputs[2].shape)
    ends = cases.cu_seqlens(lengths)

    def run(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, inputs, grad) if has_backward else (out,)

    products = (width + value_width) if not has_backward else (4 * width + 3 * value_width)
    compare(
        benchmark,
        lambda: run(ops.mla_prefill(*inputs, ends, ends, scale=width**-0.5)[0]),
        {
            "torch": lambda: run(batched(*inputs, lengths, pad=False)),
            "fused": lambda: run(batched(*inputs, lengths, pad=True)),
        },
        # Half of all pairs; backward multiplies the scores again.
        Work(shape=str(SHAPES[name]), flops=num_heads * products * sum(n * n for n in lengths)),
        num_rounds=5,
    )
