"""mla_decode, and attention with it beside transformers' way: expand every cached latent, then attend."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import DEVICE, DTYPE, IS_ON_GPU, ITEM, peers_of
from dscoder import ops
from dscoder.testing import cases
from dscoder.testing.measure import Problem
from dscoder.testing.results import Case

PAGE_SIZE = 64
SHAPES = (  # B, S, H, n, r, v, C, cached rows
    {
        "v2_lite": (64, 1, 16, 128, 64, 128, 512, 4096),
        "v2": (16, 1, 128, 128, 64, 128, 512, 4096),
    }
    if IS_ON_GPU
    else {
        "tiny_moe": (16, 1, 4, 32, 16, 32, 64, 512),
        "v2_lite": (8, 1, 16, 128, 64, 128, 512, 512),
        "v2_lite_4_new": (8, 4, 16, 128, 64, 128, 512, 512),
        "v2": (2, 1, 128, 128, 64, 128, 512, 256),
    }
)


def expanded(q: Tensor, rows: Tensor, key_up: Tensor, value_up: Tensor, *, scale: float) -> Tensor:
    """q [B, S, H, n + r] over rows [B, R, C + r] -> [B, S, H, v], keys and values made on the way."""
    num_heads, _, latent_width = key_up.shape
    latent, rotated = rows[..., :latent_width], rows[..., None, latent_width:]
    kv = F.linear(latent, torch.cat([key_up, value_up], dim=1).flatten(0, 1))
    key, value = kv.unflatten(-1, (num_heads, -1)).split([key_up.shape[1], value_up.shape[1]], dim=-1)
    key = torch.cat([key, rotated.expand(-1, -1, num_heads, -1)], dim=-1)
    num_new, num_rows = q.shape[1], rows.shape[1]
    mask = torch.ones(num_new, num_rows, dtype=torch.bool, device=q.device).tril(num_rows - num_new)
    q, key, value = (x.transpose(1, 2) for x in (q, key, value))
    return F.scaled_dot_product_attention(q, key, value, attn_mask=mask, scale=scale).transpose(1, 2)


def latent_case(model: str, op: str) -> Case:
    """Scores and outputs in the latent space; every cached row is read once."""
    num_sequences, num_new, num_heads, _, rope, _, latent, length = SHAPES[model]
    return Case(
        op=op,
        step="forward",
        model=model,
        shape=f"B={num_sequences} S={num_new} H={num_heads} C={latent} r={rope} rows={length}",
        dtype=DTYPE,
        flops=2 * num_sequences * num_new * num_heads * length * (2 * latent + rope),
        num_bytes=ITEM * num_sequences * length * (latent + rope),
    )


def attended(*args: Tensor, value_dim: int, scale: float) -> Tensor:
    """The log-sum-exp is made too; not every peer gives it."""
    return ops.mla_decode(*args, value_dim=value_dim, scale=scale)[0]


@pytest.mark.parametrize("model", SHAPES)
def test_forward(measure: Callable[..., None], model: str) -> None:
    num_sequences, num_new, num_heads, nope, rope, _, latent, length = SHAPES[model]
    rng = cases.generator(model)
    rows = cases.randn(rng, num_sequences, length, latent + rope, dtype=DTYPE)
    cache, table = cases.paged(list(rows), page_size=PAGE_SIZE, num_spare_pages=3, rng=rng)
    q = cases.randn(rng, num_sequences, num_new, num_heads, latent + rope, dtype=DTYPE)
    seq_lens = torch.full((num_sequences,), length, dtype=torch.int32)
    problem = Problem(
        args=tuple(x.to(DEVICE) for x in (q, cache, table, seq_lens)),
        kwargs={"value_dim": latent, "scale": (nope + rope) ** -0.5},
    )
    measure(latent_case(model, "mla_decode"), problem, attended, peers_of("mla_decode", "forward"))


@pytest.mark.parametrize("model", SHAPES)
def test_whole_attention(measure: Callable[..., None], model: str) -> None:
    num_sequences, num_new, num_heads, nope, rope, value, latent, length = SHAPES[model]
    rng = cases.generator(model)
    rows = cases.randn(rng, num_sequences, length, latent + rope, dtype=DTYPE)
    cache, table = cases.paged(list(rows), page_size=PAGE_SIZE, num_spare_pages=3, rng=rng)
    q = cases.randn(rng, num_sequences, num_new, num_heads, nope + rope, dtype=DTYPE)
    key_up, value_up = (
        (cases.randn(rng, num_heads, w, latent) * latent**-0.5).to(DTYPE) for w in (nope, value)
    )
    seq_lens = torch.full((num_sequences,), length, dtype=torch.int32)
    scale = (nope + rope) ** -0.5

    def ours(
        q: Tensor, _rows: Tensor, key_up: Tensor, value_up: Tensor, cache: Tensor, table: Tensor, ends: Tensor
    ) -> Tensor:
        """With the products into and out of the latent space, which the absorbed form adds."""
        absorbed = torch.einsum("bshn,hnc->bshc", q[..., :nope], key_up)
        query = torch.cat([absorbed, q[..., nope:]], dim=-1)
        out, _ = ops.mla_decode(query, cache, table, ends, value_dim=latent, scale=scale)
        return torch.einsum("bshc,hvc->bshv", out, value_up)

    args = tuple(x.to(DEVICE) for x in (q, rows, key_up, value_up, cache, table, seq_lens))
    measure(
        latent_case(model, "mla_decode_attention"),
        Problem(args=args),
        ours,
        {"expanded": lambda *args: expanded(*args[:4], scale=scale)},
    )
