"""rope, forward and backward, beside transformers' functions for both pairings."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from transformers.models.deepseek_v2.modeling_deepseek_v2 import apply_rotary_emb
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from dscoder import ops
from dscoder.testing import cases
from dscoder.testing.timing import Work, compare

SHAPES = {  # T, query heads, key heads, width, interleaved
    "tiny_moe": (4096, 4, 1, 16, True),
    "v2_lite": (4096, 16, 1, 64, True),
    "v2": (1024, 128, 1, 64, True),
    "coder_33b": (1024, 56, 8, 128, False),
}


def theirs(q: Tensor, k: Tensor, angle: Tensor, *, interleaved: bool) -> tuple[Tensor, Tensor]:
    q, k = (x.transpose(0, 1).unsqueeze(0) for x in (q, k))  # [1, heads, T, r]
    if interleaved:
        out = apply_rotary_emb(q, k, torch.polar(torch.ones_like(angle), angle).unsqueeze(0))
    else:
        both = torch.cat([angle, angle], dim=-1).unsqueeze(0)
        out = apply_rotary_pos_emb(q, k, both.cos(), both.sin())
    q, k = (x.squeeze(0).transpose(0, 1) for x in out)
    return q, k


@pytest.mark.parametrize("name", SHAPES)
def test_forward_and_backward(benchmark: BenchmarkFixture, name: str) -> None:
    num_tokens, num_heads, num_key_heads, width, interleaved = SHAPES[name]
    rng = cases.generator(name)
    q = cases.randn(rng, num_tokens, num_heads, width).requires_grad_()
    k = cases.randn(rng, num_tokens, num_key_heads, width).requires_grad_()
    grads = [cases.randn(rng, *x.shape) for x in (q, k)]
    frequency = 10000.0 ** -(torch.arange(0, width, 2) / width)
    positions = torch.arange(num_tokens)
    angle = positions[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    compare(
        benchmark,
        lambda: torch.autograd.grad(
            ops.rope(q, k, cos, sin, positions, interleaved=interleaved), (q, k), grads
        ),
        {
            "transformers": lambda: torch.autograd.grad(
                theirs(q, k, angle, interleaved=interleaved), (q, k), grads
            )
        },
        Work(shape=str(SHAPES[name]), num_bytes=4 * 4 * num_tokens * width * (num_heads + num_key_heads)),
    )
