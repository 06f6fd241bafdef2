"""mla_decode beside transformers' way: expand every cached latent to keys and values, then attend."""

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from dscoder import ops
from dscoder.testing import cases
from dscoder.testing.timing import Work, compare

PAGE_SIZE = 64
SHAPES = {  # B, S, H, n, r, v, C, cached rows
    "tiny_moe": (16, 1, 4, 32, 16, 32, 64, 512),
    "v2_lite": (8, 1, 16, 128, 64, 128, 512, 512),
    "v2_lite_4_new": (8, 4, 16, 128, 64, 128, 512, 512),
    "v2": (2, 1, 128, 128, 64, 128, 512, 256),
}


def expanded(q: Tensor, rows: Tensor, up: tuple[Tensor, Tensor], scale: float) -> Tensor:
    """q [B, S, H, n + r] over rows [B, R, C + r] -> [B, S, H, v], keys and values made on the way."""
    key_up, value_up = up
    num_heads, _, latent_width = key_up.shape
    latent, rotated = rows[..., :latent_width], rows[..., None, latent_width:]
    kv = F.linear(latent, torch.cat([key_up, value_up], dim=1).flatten(0, 1))
    key, value = kv.unflatten(-1, (num_heads, -1)).split([key_up.shape[1], value_up.shape[1]], dim=-1)
    key = torch.cat([key, rotated.expand(-1, -1, num_heads, -1)], dim=-1)
    num_new, num_rows = q.shape[1], rows.shape[1]
    mask = torch.ones(num_new, num_rows, dtype=torch.bool).tril(num_rows - num_new)
    q, key, value = (x.transpose(1, 2) for x in (q, key, value))
    return F.scaled_dot_product_attention(q, key, value, attn_mask=mask, scale=scale).transpose(1, 2)


@pytest.mark.parametrize("name", SHAPES)
def test_forward(benchmark: BenchmarkFixture, name: str) -> None:
    num_sequences, num_new, num_heads, nope, rope, value, latent, length = SHAPES[name]
    rng = cases.generator(name)
    rows = cases.randn(rng, num_sequences, length, latent + rope)
    cache, table = cases.paged(list(rows), page_size=PAGE_SIZE, num_spare_pages=3, rng=rng)
    seq_lens = torch.full((num_sequences,), length, dtype=torch.int32)
    q = cases.randn(rng, num_sequences, num_new, num_heads, nope + rope)
    up = tuple(cases.randn(rng, num_heads, w, latent) * latent**-0.5 for w in (nope, value))
    scale = (nope + rope) ** -0.5

    def ours() -> Tensor:
        """With the products into and out of the latent space, which the absorbed form adds."""
        absorbed = torch.einsum("bshn,hnc->bshc", q[..., :nope], up[0])
        out, _ = ops.mla_decode(
            torch.cat([absorbed, q[..., nope:]], dim=-1),
            cache,
            table,
            seq_lens,
            value_dim=latent,
            scale=scale,
        )
        return torch.einsum("bshc,hvc->bshv", out, up[1])

    compare(
        benchmark,
        ours,
        {"expanded": lambda: expanded(q, rows, up, scale)},
        Work(
            shape=str(SHAPES[name]),
            flops=2 * num_sequences * num_new * num_heads * length * (2 * latent + rope),
            num_bytes=4 * num_sequences * length * (latent + rope),
        ),
    )
