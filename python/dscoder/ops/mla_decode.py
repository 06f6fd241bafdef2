"""mla_decode: absorbed latent attention over a paged cache (DeepSeek-V2 section 2.1 and appendix C).

The cache holds one row per token for all heads: the C-wide latent, then the r-wide rotated key. Queries
come multiplied into the latent space, so scores read whole rows and values are the rows' first C columns.
"""

import torch
from torch import Tensor

from dscoder.ops.library import (
    FLOATS,
    accumulate_dtype,
    check_at_least,
    check_devices,
    check_shape,
    check_tensor,
    define_op,
)

_BLOCK = 128  # new tokens multiplied with their sequence at once


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
    check_at_least(op, "num_pages", cache_PLd.shape[0], 1)
    check_at_least(op, "page_size", cache_PLd.shape[1], 1)
    check_shape(op, "page_table", page_table_BN, (num_sequences, page_table_BN.shape[1]))
    check_shape(op, "seq_lens", seq_lens_B, (num_sequences,))
    check_devices(op, q=q_BSHd, cache=cache_PLd, page_table=page_table_BN, seq_lens=seq_lens_B)
    check_at_least(op, "value_dim", value_dim, 1)
    if value_dim > width:
        raise ValueError(f"{op}: value_dim must be <= {width}, the width of q, got {value_dim}")
    out: Tensor
    lse: Tensor
    out, lse = torch.ops.dscoder.mla_decode.default(
        q_BSHd, cache_PLd, page_table_BN, seq_lens_B, value_dim, scale
    )
    return out, lse


def _gather_rows(cache_PLd: Tensor, page_table_BN: Tensor, seq_lens_B: Tensor, num_rows: int) -> Tensor:
    """The first `num_rows` rows of every sequence, [B, num_rows, d]; behind its end its last row again.

    So neither a wild slot of the table nor the NaN in an unused page is ever read.
    """
    num_pages, page_size, width = cache_PLd.shape
    position = torch.arange(num_rows, device=cache_PLd.device)
    position = torch.minimum(position, (seq_lens_B.unsqueeze(1) - 1).clamp(min=0)).long()
    page = page_table_BN.gather(1, position // page_size).long().clamp(0, num_pages - 1)
    row = page * page_size + position % page_size
    return cache_PLd.reshape(-1, width).index_select(0, row.flatten()).view(*row.shape, width)


def _forward(
    q_BSHd: Tensor,
    cache_PLd: Tensor,
    page_table_BN: Tensor,
    seq_lens_B: Tensor,
    value_dim: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(q_BSHd.dtype)
    num_new = q_BSHd.shape[1]
    seq_lens_B = seq_lens_B.clamp(0, page_table_BN.shape[1] * cache_PLd.shape[1])
    longest = max(seq_lens_B.tolist(), default=0)
    rows = _gather_rows(cache_PLd, page_table_BN, seq_lens_B, longest).to(dtype)
    out_BSHC = q_BSHd.new_zeros(*q_BSHd.shape[:3], value_dim)
    lse_BSH = q_BSHd.new_full(q_BSHd.shape[:3], -torch.inf, dtype=dtype)
    # Blocks of new tokens bound the memory of a long prompt's scores, and end at the last row they can see.
    for start in range(0, num_new, _BLOCK):
        end = min(start + _BLOCK, num_new)
        num_seen_BS = (seq_lens_B - num_new).unsqueeze(1) + torch.arange(
            start + 1, end + 1, device=rows.device
        )
        keys = rows[:, : max(longest - num_new + end, 0)]
        out, lse_BSH[:, start:end] = _attend(
            q_BSHd[:, start:end].to(dtype) * scale, keys, num_seen_BS, value_dim
        )
        out_BSHC[:, start:end] = out.to(out_BSHC.dtype)
    return out_BSHC, lse_BSH


def _attend(q_BSHd: Tensor, rows: Tensor, num_seen_BS: Tensor, value_dim: int) -> tuple[Tensor, Tensor]:
    """Attention of scaled queries over the first num_seen of the rows [B, rows, d] each."""
    shape = (*q_BSHd.shape[:3], rows.shape[1])
    position = torch.arange(shape[-1], device=q_BSHd.device)
    is_hidden = position >= num_seen_BS.unsqueeze(-1)
    scores = torch.bmm(q_BSHd.flatten(1, 2), rows.transpose(1, 2)).view(shape)
    scores.masked_fill_(is_hidden.unsqueeze(2), -torch.inf)
    lse_BSH = scores.logsumexp(dim=-1)
    probs = scores.sub_(lse_BSH.unsqueeze(-1)).exp_().flatten(1, 2)
    out = torch.bmm(probs, rows[..., :value_dim]).view(*shape[:3], value_dim)
    # A token that sees nothing has NaN probabilities, -inf - -inf.
    return out.masked_fill_((num_seen_BS <= 0)[..., None, None], 0), lse_BSH


def _fake(
    q_BSHd: Tensor, _cache: Tensor, _page_table: Tensor, _seq_lens: Tensor, value_dim: int, _scale: float
) -> tuple[Tensor, Tensor]:
    out = q_BSHd.new_empty(*q_BSHd.shape[:3], value_dim)
    return out, q_BSHd.new_empty(q_BSHd.shape[:3], dtype=accumulate_dtype(q_BSHd.dtype))


define_op(
    "mla_decode(Tensor q, Tensor cache, Tensor page_table, Tensor seq_lens, int value_dim, float scale)"
    " -> (Tensor out, Tensor lse)",
    reference=_forward,
    fake=_fake,
)
