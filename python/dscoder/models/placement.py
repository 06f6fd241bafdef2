"""Where the tokens of one forward sit: their documents, their angles, their cache entries.

A call's tokens are flattened to T = B * S. Without packing every row is one document; with packing
cu_seqlens says where documents begin: attention stays inside them and positions restart.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dscoder.config import ModelConfig
from dscoder.models.cache import Append, Cache
from dscoder.models.yarn import rotations
from dscoder.ops.library import check_devices, check_tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """What every layer of one forward needs to know about its tokens."""

    num_sequences: int  # B
    length: int  # S
    cos_Lf: Tensor  # float32 [L, r / 2]: the angles of the cache's positions, else of each token
    sin_Lf: Tensor
    angles_T: Tensor  # int64: each token's row of cos and sin
    cu_seqlens: Tensor | None  # int32 [documents + 1]; None where the cache is what is attended
    is_packed: bool
    cache: Cache | None
    append: Append | None
    never_dropped_T: Tensor | None  # bool: tokens whose experts may not drop them; None: nothing is dropped
    has_balance: bool  # whether experts give balance terms outside training mode too


def check_documents(tokens_BS: Tensor, cu_seqlens: Tensor) -> None:
    """Refuse `cu_seqlens` that are not the ends of documents in the rows of `tokens_BS`.

    The values are read where that is free: not on a GPU, and not where there are none, while tracing.
    """
    op = "Transformer"
    check_tensor(op, "cu_seqlens", cu_seqlens, num_dims=1, dtypes=(torch.int32,))
    check_devices(op, tokens_BS=tokens_BS, cu_seqlens=cu_seqlens)
    if not len(cu_seqlens):
        raise ValueError(f"{op}: cu_seqlens must have at least one element, got {len(cu_seqlens)}")
    is_traced = torch.compiler.is_compiling() or type(cu_seqlens) is not Tensor  # a fake tensor
    if is_traced or cu_seqlens.device.type != "cpu":
        return
    ends = cu_seqlens.tolist()
    num_tokens, length = tokens_BS.numel(), tokens_BS.shape[1]
    if (ends[0], ends[-1]) != (0, num_tokens):
        raise ValueError(
            f"{op}: cu_seqlens must go from 0 to the {num_tokens} tokens, got {ends[0]} to {ends[-1]}"
        )
    for start, end in pairwise(ends):
        if end < start:
            raise ValueError(f"{op}: cu_seqlens must not descend, got {start} before {end}")
    missing = set(range(0, num_tokens, max(length, 1))).difference(ends)
    if missing:
        raise ValueError(
            f"{op}: cu_seqlens must hold the end of every row of {length} tokens, got none at {min(missing)}"
        )


def document_positions(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """int64 [T]: each token's distance from the start of its document; nothing waits for the device."""
    rows_T = torch.arange(num_tokens, device=cu_seqlens.device)
    documents_T = torch.searchsorted(cu_seqlens, rows_T, right=True) - 1
    return rows_T - cu_seqlens[documents_T]


def positions(tokens_BS: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """int64 [T]: each token's position in its document."""
    num_sequences, length = tokens_BS.shape
    if cu_seqlens is not None:
        return document_positions(cu_seqlens, num_sequences * length)
    return torch.arange(length, device=tokens_BS.device).repeat(num_sequences)


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
    has_balance: bool = False,
) -> Placement:
    """The placement of `tokens_BS`; ValueError for arguments that do not go together."""
    check_tensor("Transformer", "tokens_BS", tokens_BS, num_dims=2, dtypes=(torch.int32, torch.int64))
    if cache is not None and cu_seqlens is not None:
        raise ValueError("Transformer: cu_seqlens must be None with a cache, got both")
    if cache is None and num_new_B is not None:
        raise ValueError("Transformer: num_new_B must be None without a cache")
    if cu_seqlens is not None:
        check_documents(tokens_BS, cu_seqlens)
    num_sequences, length = tokens_BS.shape
    num_tokens, device = num_sequences * length, tokens_BS.device
    append = None if cache is None else cache.begin(tokens_BS, num_new_B)
    if cache is not None and append is not None:
        cos_Lf, sin_Lf = cache.cos_Lf, cache.sin_Lf
        angles_T = append.positions_BS.flatten()
        if append.max_len > cache.max_positions:  # padding
            angles_T = angles_T.clamp(max=cache.max_positions - 1)
    else:
        cos_Lf, sin_Lf = rotations(config.rope, config.rotated_dim, positions(tokens_BS, cu_seqlens))
        angles_T = torch.arange(num_tokens, device=device)
    ends = cu_seqlens
    if ends is None and (append is None or append.is_first):
        ends = torch.arange(num_sequences + 1, dtype=torch.int32, device=device) * length
    never_dropped_T = None
    if drops_tokens and config.moe is not None:
        chosen_B = chosen_sequences(tokens_BS, config.moe.never_dropped_share)
        never_dropped_T = chosen_B.repeat_interleave(length)
    return Placement(
        num_sequences=num_sequences,
        length=length,
        cos_Lf=cos_Lf,
        sin_Lf=sin_Lf,
        angles_T=angles_T,
        cu_seqlens=ends,
        is_packed=cu_seqlens is not None,
        cache=cache,
        append=append,
        never_dropped_T=never_dropped_T,
        has_balance=has_balance,
    )
