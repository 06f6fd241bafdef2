"""Where the tokens of one forward sit: their documents, their angles, their cache entries.

A call's tokens are flattened to T = B * S. Without packing every row is one document; with packing
cu_seqlens says where documents begin: attention stays inside them and positions restart.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dscoder.config import MlaConfig, ModelConfig
from dscoder.models.cache import Append, Cache
from dscoder.models.yarn import rotations


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """What every layer of one forward needs to know about its tokens."""

    num_sequences: int  # B
    length: int  # S
    cos_Tf: Tensor  # float32 [T, r / 2]
    sin_Tf: Tensor
    rows_T: Tensor  # int64, 0 .. T - 1: each token's row of cos and sin
    cu_seqlens: Tensor  # int32 [documents + 1]
    is_packed: bool
    cache: Cache | None
    append: Append | None
    never_dropped_T: Tensor | None  # bool: tokens whose experts may not drop them; None: nothing is dropped


def document_positions(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """int64 [T]: each token's distance from the start of its document; nothing waits for the device."""
    rows_T = torch.arange(num_tokens, device=cu_seqlens.device)
    documents_T = torch.searchsorted(cu_seqlens, rows_T, right=True) - 1
    return rows_T - cu_seqlens[documents_T]


def chosen_sequences(tokens_BS: Tensor, share: float) -> Tensor:
    """bool [B]: about `share` of all sequences, told by a hash of their tokens.

    So a sequence's lot is the same in every epoch, batch, rank and resumed run, and needs no state.
    """
    length = tokens_BS.shape[1]
    odd_S = torch.arange(length, device=tokens_BS.device) * 0x9E3779B1 * 2 + 1
    mixed_B = ((tokens_BS.long() + 1) * odd_S * 0x2545F4914F6CDD1D).sum(dim=1)
    return (mixed_B >> 32) % (1 << 24) < round(share * (1 << 24))


def place(
    config: ModelConfig,
    tokens_BS: Tensor,
    *,
    cu_seqlens: Tensor | None,
    cache: Cache | None,
    num_new_B: Tensor | None,
    drops_tokens: bool,
) -> Placement:
    """The placement of `tokens_BS`; ValueError for arguments that do not go together."""
    if tokens_BS.dim() != 2:
        raise ValueError(f"Transformer: tokens_BS must have 2 dimensions, got {tokens_BS.dim()}")
    if cache is not None and cu_seqlens is not None:
        raise ValueError("Transformer: cu_seqlens must be None with a cache, got both")
    if cache is None and num_new_B is not None:
        raise ValueError("Transformer: num_new_B must be None without a cache")
    num_sequences, length = tokens_BS.shape
    num_tokens, device = num_sequences * length, tokens_BS.device
    append = None if cache is None else cache.begin(tokens_BS, num_new_B)
    rows_T = torch.arange(num_tokens, device=device)
    if append is not None:
        positions_T = append.positions_BS.flatten()
    elif cu_seqlens is not None:
        positions_T = document_positions(cu_seqlens, num_tokens)
    else:
        positions_T = rows_T % length
    attention = config.attention
    rotated_dim = attention.rope_dim if isinstance(attention, MlaConfig) else attention.head_dim
    cos_Tf, sin_Tf = rotations(config.rope, rotated_dim, positions_T)
    row_ends = torch.arange(num_sequences + 1, dtype=torch.int32, device=device) * length
    never_dropped_T = None
    if drops_tokens and config.moe is not None:
        chosen_B = chosen_sequences(tokens_BS, config.moe.never_dropped_share)
        never_dropped_T = chosen_B.repeat_interleave(length)
    return Placement(
        num_sequences=num_sequences,
        length=length,
        cos_Tf=cos_Tf,
        sin_Tf=sin_Tf,
        rows_T=rows_T,
        cu_seqlens=row_ends if cu_seqlens is None else cu_seqlens,
        is_packed=cu_seqlens is not None,
        cache=cache,
        append=append,
        never_dropped_T=never_dropped_T,
    )
