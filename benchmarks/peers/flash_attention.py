"""FlashAttention for packed sequences: 3 (built for Hopper, installed as flash_attn_interface) and 2.

Read: hopper/flash_attn_interface.py, hopper/flash_api.cpp and flash_attn/flash_attn_interface.py at commit
0251105 (2.8.3.post1 and 3.0.0b1, August 2026). Both align a causal mask at the ends, as ours.

Not timed: reading the longest lengths, which a trainer knows.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from dscoder.testing.peer import Run


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
