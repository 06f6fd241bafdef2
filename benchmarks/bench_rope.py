"""rope beside the formulas of transformers (complex numbers for interleaved pairs, halves for Llama's), eager
and compiled.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.shapes import DEVICE, DTYPE, IS_ON_GPU, ITEM
from dscoder import ops
from dscoder.testing import cases
from dscoder.testing.measure import Problem
from dscoder.testing.results import Case

SHAPES = {  # query heads, key heads, width, interleaved
    "v2_lite": (16, 1, 64, True),
    "v2": (128, 1, 64, True),
    "coder_33b": (56, 8, 128, False),
}
NUM_TOKENS = 8192 if IS_ON_GPU else 512


def rotated(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    if interleaved:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        turned = torch.view_as_real(pairs * torch.complex(cos, sin).unsqueeze(1)).flatten(-2)
        return turned.to(x.dtype)
    first, second = x.float().chunk(2, dim=-1)
    half = torch.cat([-second, first], dim=-1)
    both_cos, both_sin = (torch.cat([t, t], dim=-1).unsqueeze(1) for t in (cos, sin))
    return (x.float() * both_cos + half * both_sin).to(x.dtype)


def formula(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, interleaved: bool
) -> tuple[Tensor, Tensor]:
    q, k = (rotated(x, cos[positions], sin[positions], interleaved=interleaved) for x in (q, k))
    return q, k


COMPILED = torch.compile(formula, fullgraph=True, dynamic=False)


@pytest.mark.parametrize("step", ["forward", "backward", "forward + backward"])
@pytest.mark.parametrize("model", SHAPES)
def test_step(measure: Callable[..., None], model: str, step: str) -> None:
    num_heads, num_key_heads, width, interleaved = SHAPES[model]
    rng = cases.generator(model, DEVICE)
    q = cases.randn(rng, NUM_TOKENS, num_heads, width, dtype=DTYPE)
    k = cases.randn(rng, NUM_TOKENS, num_key_heads, width, dtype=DTYPE)
    frequency = 10000.0 ** -(torch.arange(0, width, 2, device=DEVICE) / width)
    positions = torch.arange(NUM_TOKENS, device=DEVICE)
    angle = positions[:, None] * frequency
    one_way = 2 * ITEM * NUM_TOKENS * width * (num_heads + num_key_heads) + 4 * NUM_TOKENS * width
    case = Case(
        op="rope",
        step=step,
        model=model,
        shape=f"T={NUM_TOKENS} H={num_heads}/{num_key_heads} r={width}",
        dtype=DTYPE,
        # Reads and writes every element, and reads the tables.
        num_bytes=one_way * (2 if step == "forward + backward" else 1),
    )
    problem = Problem(
        args=(q, k, angle.cos(), angle.sin(), positions),
        num_leaves=2,
        grads=(cases.randn(rng, *q.shape, dtype=DTYPE), cases.randn(rng, *k.shape, dtype=DTYPE)),
    )
    peers = {"transformers": partial(formula, interleaved=interleaved)}
    if IS_ON_GPU:
        peers["torch.compile"] = partial(COMPILED, interleaved=interleaved)
    measure(case, problem, partial(ops.rope, interleaved=interleaved), peers)
