"""latent_append: the norm, both rotations and the write to the paged cache, while decoding and in bulk."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.shapes import DECODE, DEVICE, DTYPE, IS_ON_GPU, ITEM, TOKENS, peers_of
from dscoder import ops
from dscoder.testing import cases
from dscoder.testing.measure import Problem
from dscoder.testing.results import Case

HEADS = {"v2_lite": 16, "v2": 128}
NOPE, ROPE, LATENT = 128, 64, 512
WIDTH, PAGE_SIZE = LATENT + ROPE, 64
NUM_POSITIONS = 8192 if IS_ON_GPU else 512
EPS = 1e-6


def num_bytes(num_tokens: int, num_heads: int) -> float:
    """Rows and the rotated part of queries are read and written; tables, positions and slots are read."""
    values = num_tokens * (WIDTH + num_heads * ROPE)
    return 2 * ITEM * values + num_tokens * (4 * ROPE + 16)


def appended(*args: Any, eps: float) -> tuple[Tensor, Tensor]:
    """What was written to, the last argument: every copy of the problem has its own."""
    *tensors, target = args
    ops.latent_append(*tensors, eps=eps, target=target)
    return target.cache_PLd, target.query_out_THd


@pytest.mark.parametrize("num_tokens", [TOKENS, DECODE, 1])
@pytest.mark.parametrize("model", HEADS)
def test_forward(measure: Callable[..., None], model: str, num_tokens: int) -> None:
    num_heads = HEADS[model]
    rng = cases.generator(f"{model} {num_tokens}", DEVICE)
    query, latent, weight, *_ = cases.latent_case(
        rng,
        num_tokens,
        num_heads=num_heads,
        nope_width=NOPE,
        rope_width=ROPE,
        latent_width=LATENT,
        dtype=DTYPE,
    )
    frequency = 10000.0 ** -(torch.arange(0, ROPE, 2, device=DEVICE) / ROPE)
    angle = torch.arange(NUM_POSITIONS, device=DEVICE)[:, None] * frequency
    positions = torch.randint(NUM_POSITIONS, (num_tokens,), generator=rng, device=DEVICE)
    num_pages = -(-num_tokens // PAGE_SIZE)
    order = torch.randperm(num_pages * PAGE_SIZE, generator=rng, device=DEVICE)
    target = ops.AppendTarget(
        slots_T=order[:num_tokens],
        cache_PLd=torch.zeros(num_pages, PAGE_SIZE, WIDTH, dtype=DTYPE, device=DEVICE),
        query_out_THd=torch.zeros(num_tokens, num_heads, WIDTH, dtype=DTYPE, device=DEVICE),
    )
    case = Case(
        op="latent_append",
        step="forward",
        model=model,
        shape=f"T={num_tokens} H={num_heads} C={LATENT} r={ROPE}",
        dtype=DTYPE,
        num_bytes=num_bytes(num_tokens, num_heads),
    )
    args = (query, latent, weight, angle.cos(), angle.sin(), positions, target)
    problem = Problem(args=args, kwargs={"eps": EPS})
    measure(case, problem, appended, peers_of("latent_append", "forward", num_tokens))
