"""rope in both pairings: the V2 models' interleaved one and Llama's halves."""

from collections.abc import Callable

import pytest
import torch

from benchmarks.shapes import DEVICE, DTYPE, IS_ON_GPU, ITEM, peers_of
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
        kwargs={"interleaved": interleaved},
        num_leaves=2,
        grads=(cases.randn(rng, *q.shape, dtype=DTYPE), cases.randn(rng, *k.shape, dtype=DTYPE)),
    )
    measure(case, problem, ops.rope, peers_of("rope", step))
