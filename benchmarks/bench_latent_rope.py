"""latent_rope: the norm of the latent, and the rotation of keys and queries, for training and prefill."""

from collections.abc import Callable

import pytest
import torch

from benchmarks.shapes import DEVICE, DTYPE, ITEM, TOKENS, peers_of
from dscoder import ops
from dscoder.testing import cases
from dscoder.testing.measure import Problem
from dscoder.testing.results import Case

HEADS = {"v2_lite": 16, "v2": 128}
NOPE, ROPE, LATENT = 128, 64, 512
EPS = 1e-6


def num_bytes(step: str, num_tokens: int, num_heads: int) -> float:
    """Every element is read and written; backward reads the latents again. Tables, positions, 1 / rms."""
    angles = num_tokens * (4 * ROPE + 8 + 4)
    row, query = ITEM * num_tokens * (LATENT + ROPE), ITEM * num_tokens * num_heads * (NOPE + ROPE)
    forward = 2 * (row + query) + angles
    backward = forward + ITEM * num_tokens * LATENT
    return {"forward": forward, "backward": backward, "forward + backward": forward + backward}[step]


@pytest.mark.parametrize("step", ["forward", "backward", "forward + backward"])
@pytest.mark.parametrize("model", HEADS)
def test_step(measure: Callable[..., None], model: str, step: str) -> None:
    num_heads = HEADS[model]
    rng = cases.generator(model, DEVICE)
    query, latent, weight, *_ = cases.latent_case(
        rng,
        TOKENS,
        num_heads=num_heads,
        nope_width=NOPE,
        rope_width=ROPE,
        latent_width=LATENT,
        dtype=DTYPE,
    )
    frequency = 10000.0 ** -(torch.arange(0, ROPE, 2, device=DEVICE) / ROPE)
    positions = torch.arange(TOKENS, device=DEVICE)
    angle = positions[:, None] * frequency
    case = Case(
        op="latent_rope",
        step=step,
        model=model,
        shape=f"T={TOKENS} H={num_heads} d={NOPE + ROPE} C={LATENT} r={ROPE}",
        dtype=DTYPE,
        num_bytes=num_bytes(step, TOKENS, num_heads),
    )
    problem = Problem(
        args=(query, latent, weight, angle.cos(), angle.sin(), positions),
        kwargs={"eps": EPS},
        num_leaves=3,
        grads=(cases.randn(rng, *query.shape, dtype=DTYPE), cases.randn(rng, *latent.shape, dtype=DTYPE)),
    )
    measure(case, problem, ops.latent_rope, peers_of("latent_rope", step))
