"""FlashAttention 3 (built for Hopper, installed as flash_attn_interface), and 2 for packed sequences.

Read: hopper/flash_attn_interface.py, hopper/flash_api.cpp and flash_attn/flash_attn_interface.py at commit
0251105 (2.8.3.post1 and 3.0.0b1, August 2026), hopper/benchmark_mla_decode.py at commit 067029a. All align
a causal mask at the ends, as ours.

Not timed: reading the longest lengths, which a trainer knows.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers.common import require
from dscoder.testing.peer import Run

LATENT_HEAD = (64, 512)  # the widest head that can have a query for values (`qv`), and their width


def _longest(cu_seqlens: Tensor) -> int:
    return int(cu_seqlens.diff().max())


def mla_prefill_3(
    flash_attention: Any,
    q_THd: Tensor,
    k_THd: Tensor,
    v_THv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    scale: float,
    causal: bool = True,
) -> Run:
    """Values narrower than keys as they are (192 / 128); its backward pass computes on 192 for both."""
    longest = (_longest(cu_seqlens_q), _longest(cu_seqlens_k))

    def call() -> Any:
        return flash_attention.flash_attn_varlen_func(
            q_THd,
            k_THd,
            v_THv,
            cu_seqlens_q,
            cu_seqlens_k,
            *longest,
            softmax_scale=scale,
            causal=causal,
            return_attn_probs=True,  # the log-sum-exp alone
        )

    return Run(call=call, read=lambda raw: raw[0])


def mla_prefill_2(
    flash_attention: Any,
    q_THd: Tensor,
    k_THd: Tensor,
    v_THv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    scale: float,
    causal: bool = True,
) -> Run:
    """Values as wide as keys only: padding them and cutting the output is timed, as models have to do it."""
    longest = (_longest(cu_seqlens_q), _longest(cu_seqlens_k))
    value_dim = v_THv.shape[2]

    def call() -> Any:
        out, *_ = flash_attention.flash_attn_varlen_func(
            q_THd,
            k_THd,
            F.pad(v_THv, (0, q_THd.shape[2] - value_dim)),
            cu_seqlens_q,
            cu_seqlens_k,
            *longest,
            softmax_scale=scale,
            causal=causal,
            return_attn_probs=True,  # the log-sum-exp: there is no dropout
        )
        return out[..., :value_dim]

    return Run(call=call)


def mla_decode(
    flash_attention: Any,
    q_BSHd: Tensor,
    cache_PLd: Tensor,
    page_table_BN: Tensor,
    seq_lens_B: Tensor,
    *,
    value_dim: int,
    scale: float,
) -> Run:
    """`flash_attn_with_kvcache`: rotated heads of 64, and a query for the values, the latents (`qv`).

    Latent and rotated key are slices of one cache. Its plan (`get_scheduler_metadata`), one for all layers
    of a step, is not timed.
    """
    num_sequences, num_new, num_heads, width = q_BSHd.shape
    widths = (width - value_dim, value_dim)
    require(widths == LATENT_HEAD, f"widths must be {LATENT_HEAD}, got {widths}")
    page_size = cache_PLd.shape[1]
    q_latent, q_rotated = q_BSHd.split([value_dim, width - value_dim], dim=-1)
    latent, rotated = cache_PLd.unsqueeze(2).split([value_dim, width - value_dim], dim=-1)
    metadata = flash_attention.get_scheduler_metadata(
        num_sequences,
        num_new,
        page_table_BN.shape[1] * page_size,
        num_heads,
        1,
        width - value_dim,
        seq_lens_B,
        q_BSHd.dtype,
        headdim_v=value_dim,
        page_size=page_size,
        causal=True,
    )

    def call() -> Any:
        return flash_attention.flash_attn_with_kvcache(
            q_rotated,
            rotated,
            latent,
            qv=q_latent,
            cache_seqlens=seq_lens_B,
            page_table=page_table_BN,
            softmax_scale=scale,
            causal=True,
            scheduler_metadata=metadata,
            return_softmax_lse=True,
        )

    return Run(call=call, read=lambda raw: raw[0])
