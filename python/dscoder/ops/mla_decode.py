"""mla_decode: absorbed latent attention over a paged cache (DeepSeek-V2 section 2.1 and appendix C).

The cache holds one row per token for all heads: the C-wide latent, then the r-wide rotated key. Queries
come multiplied into the latent space, so scores read whole rows and values are the rows' first C columns.
"""

import torch
from torch import Tensor

from dscoder.ops.library import FLOATS, accumulate_dtype, check_devices, check_shape, check_tensor, define_op


def mla_decode(
    q_BSHd: Tensor,
    cache_PLd: Tensor,
    page_table_BN: Tensor,
    seq_lens_B: Tensor,
    *,
    value_dim: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of S new tokens per sequence over the pages of that sequence.

    Row j of sequence b lies in page page_table_BN[b, j // L] of the cache (L rows a page), at j % L.
    `seq_lens_B` (int32) counts the rows, the S new tokens' included: token s sees the first
    seq_lens_B[b] - S + s + 1. Slots of the table behind a sequence's last page may hold anything, and so
    may rows behind its last row; neither is used. A length beyond N * L is taken as N * L.

    Returns:
        out_BSHC in q's dtype (C = value_dim) and lse_BSH (float32; float64 for float64 q). A token that
        sees nothing (length 0, or padding in front of a short sequence) has out 0 and lse -inf. No gradient.
    """
    op = "mla_decode"
    check_tensor(op, "q", q_BSHd, num_dims=4, dtypes=FLOATS)
    check_tensor(op, "cache", cache_PLd, num_dims=3, dtypes=(q_BSHd.dtype,))
    check_tensor(op, "page_table", page_table_BN, num_dims=2, dtypes=(torch.int32,))
    check_tensor(op, "seq_lens", seq_lens_B, num_dims=1, dtypes=(torch.int32,))
    num_sequences, _, _, width = q_BSHd.shape
    check_shape(op, "cache", cache_PLd, (*cache_PLd.shape[:2], width))
    check_shape(op, "page_table", page_table_BN, (num_sequences, page_table_BN.shape[1]))
    check_shape(op, "seq_lens", seq_lens_B, (num_sequences,))
    check_devices(op, q=q_BSHd, cache=cache_PLd, page_table=page_table_BN, seq_lens=seq_lens_B)
    if not 1 <= value_dim <= width:
        raise ValueError(f"{op}: value_dim must be in [1, {width}], got {value_dim}")
    out: Tensor
    lse: Tensor
    out, lse = torch.ops.dscoder.mla_decode.default(
        q_BSHd, cache_PLd, page_table_BN, seq_lens_B, value_dim, scale
    )
    return out, lse


def _gather_rows(cache_PLd: Tensor, page_table_BN: Tensor, seq_lens_B: Tensor) -> Tensor:
    """Every sequence's rows in order, [B, N * L, d]; rows behind the sequence's end are zero."""
    num_pages, page_size, width = cache_PLd.shape
    num_sequences, num_slots = page_table_BN.shape
    position = torch.arange(num_slots * page_size, device=cache_PLd.device)
    is_used = position < seq_lens_B.unsqueeze(1)
    # A wild slot must not reach the gather, and its stand-in's NaN must not reach the product.
    page = page_table_BN.long().clamp(0, max(num_pages - 1, 0))
    rows = cache_PLd[page].view(num_sequences, num_slots * page_size, width)
    return rows.masked_fill_(~is_used.unsqueeze(-1), 0)


def _forward(
    q_BSHd: Tensor,
    cache_PLd: Tensor,
    page_table_BN: Tensor,
    seq_lens_B: Tensor,
    value_dim: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(q_BSHd.dtype)
    num_sequences, num_new, num_heads, _ = q_BSHd.shape
    rows = _gather_rows(cache_PLd, page_table_BN, seq_lens_B).to(dtype)
    position = torch.arange(rows.shape[1], device=rows.device)
    last = seq_lens_B.unsqueeze(1) - num_new + torch.arange(num_new, device=rows.device)
    is_hidden = position > last.unsqueeze(-1)
    scores = torch.matmul(q_BSHd.to(dtype).flatten(1, 2), rows.transpose(1, 2)).mul_(scale)
    scores = scores.view(num_sequences, num_new, num_heads, -1)
    scores.masked_fill_(is_hidden.unsqueeze(2), float("-inf"))
    lse = scores.logsumexp(dim=-1)
    # exp(-inf - finite) = 0 where -inf - (-inf) would be NaN.
    probs = scores.sub_(lse.clamp(min=torch.finfo(dtype).min).unsqueeze(-1)).exp_()
    out = torch.matmul(probs.flatten(1, 2), rows[..., :value_dim])
    return out.view(num_sequences, num_new, num_heads, value_dim).to(q_BSHd.dtype), lse


def _fake(
    q_BSHd: Tensor,
    cache_PLd: Tensor,
    page_table_BN: Tensor,
    seq_lens_B: Tensor,
    value_dim: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    out = q_BSHd.new_empty(*q_BSHd.shape[:3], value_dim)
    return out, q_BSHd.new_empty(q_BSHd.shape[:3], dtype=accumulate_dtype(q_BSHd.dtype))


define_op(
    "mla_decode(Tensor q, Tensor cache, Tensor page_table, Tensor seq_lens, int value_dim, float scale)"
    " -> (Tensor out, Tensor lse)",
    reference=_forward,
    fake=_fake,
)
