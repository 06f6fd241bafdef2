"""Attention and rotation in the fewest torch calls; what eager.py is for the expert layer."""

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.peers.common import require
from dscoder.ops import AppendTarget
from dscoder.testing.peer import Run


def mla_decode(
    q_BSHd: Tensor,
    cache_PLd: Tensor,
    page_table_BN: Tensor,
    seq_lens_B: Tensor,
    *,
    value_dim: int,
    scale: float,
) -> Tensor:
    """Gather every sequence's pages, then two products and a softmax in q's dtype."""
    num_new = q_BSHd.shape[1]
    rows = cache_PLd[page_table_BN.clamp(0, len(cache_PLd) - 1).long()].flatten(1, 2)
    position = torch.arange(rows.shape[1], device=rows.device)
    rows = rows.masked_fill((position >= seq_lens_B.unsqueeze(1)).unsqueeze(-1), 0)
    num_seen_BS = seq_lens_B.unsqueeze(1) - num_new + 1 + torch.arange(num_new, device=rows.device)
    scores = torch.einsum("bshd,brd->bshr", q_BSHd, rows).float() * scale
    scores = scores.masked_fill((position >= num_seen_BS.unsqueeze(-1)).unsqueeze(2), -torch.inf)
    probs = scores.softmax(dim=-1).to(rows.dtype)
    return torch.einsum("bshr,brc->bshc", probs, rows[..., :value_dim])


def rope(
    q_THr: Tensor,
    k_TGr: Tensor,
    cos_Lf: Tensor,
    sin_Lf: Tensor,
    positions_T: Tensor,
    *,
    interleaved: bool = True,
) -> tuple[Tensor, Tensor]:
    """Two products and a sum on the halves of each pair, in float32."""
    cos, sin = cos_Lf[positions_T].unsqueeze(1), sin_Lf[positions_T].unsqueeze(1)

    def rotated(x: Tensor) -> Tensor:
        left, right = x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, dim=-1)
        halves = (left * cos - right * sin, right * cos + left * sin)
        both = torch.stack(halves, dim=-1).flatten(-2) if interleaved else torch.cat(halves, dim=-1)
        return both.to(x.dtype)

    return rotated(q_THr), rotated(k_TGr)


def latent_rope(
    query_THd: Tensor, latent_Td: Tensor, weight_C: Tensor, *angles: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """torch's fused norm, `rope` as above, and two concatenations."""
    width = len(weight_C)
    first = query_THd.shape[-1] - latent_Td.shape[-1] + width
    turned, key_T1r = rope(query_THd[..., first:], latent_Td[:, None, width:], *angles)
    normed = F.rms_norm(latent_Td[:, :width], (width,), weight_C, eps)
    return (
        torch.cat([query_THd[..., :first], turned], dim=-1),
        torch.cat([normed, key_T1r[:, 0]], dim=-1),
    )


def latent_append(
    query_THd: Tensor,
    latent_Td: Tensor,
    weight_C: Tensor,
    cos_Lf: Tensor,
    sin_Lf: Tensor,
    positions_T: Tensor,
    target: AppendTarget,
    *,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The same for the query's rotated part alone, written with an indexed store; all slots are inside."""
    width = len(weight_C)
    first = query_THd.shape[-1] - latent_Td.shape[-1] + width
    angles = (cos_Lf, sin_Lf, positions_T)
    turned, row_Td = latent_rope(query_THd[..., first:], latent_Td, weight_C, *angles, eps=eps)
    target.query_out_THd[..., width:] = turned
    target.cache_PLd.flatten(0, 1)[target.slots_T] = row_Td
    return target.cache_PLd, target.query_out_THd


def mla_prefill(backend: SDPBackend | None = None, *, is_padded: bool = False) -> Callable[..., Run]:
    """torch's fused attention: one batch where all sequences are equally long, else one masked window.

    Reading the lengths and making the mask is not timed. It computes no log-sum-exp.

    Args:
        backend: one of torch's kernels, where that takes the case; None: the one that torch chooses.
        is_padded: for a kernel that takes values as wide as keys alone. Padding them and cutting the output
            is timed, as models have to do it.
    """
    choose = nullcontext if backend is None else partial(sdpa_kernel, backend)

    def prepare(
        _: Any,
        q_THd: Tensor,
        k_THd: Tensor,
        v_THv: Tensor,
        *ends: Tensor,
        scale: float,
        causal: bool = True,
    ) -> Run:
        num_sequences, mask = _batch(q_THd, *ends, causal=causal)
        options = {"attn_mask": mask, "is_causal": causal and mask is None, "scale": scale}
        value_width = v_THv.shape[2]
        num_missing = q_THd.shape[2] - value_width if is_padded else 0

        def call() -> Tensor:
            values = F.pad(v_THv, (0, num_missing)) if num_missing else v_THv
            q, k, v = (x.unflatten(0, (num_sequences, -1)).transpose(1, 2) for x in (q_THd, k_THd, values))
            with choose():
                out = F.scaled_dot_product_attention(q, k, v, **options)
            return out[..., :value_width].transpose(1, 2).flatten(0, 1)

        try:
            call()
        except RuntimeError as error:
            is_refused = str(error).startswith(("No available kernel", "No viable backend"))
            require(not is_refused, f"{backend} does not take the case")
            raise
        return Run(call=call)

    return prepare


def _batch(
    q_THd: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, causal: bool
) -> tuple[int, Tensor | None]:
    """Rows of one length and no mask, or one row and its mask."""
    ends = cu_seqlens_q.tolist()
    require(ends == cu_seqlens_k.tolist(), "sequences must be as long in q as in k")
    lengths = {end - start for start, end in itertools.pairwise(ends)}
    if len(lengths) == 1:
        return len(ends) - 1, None
    row = torch.arange(len(q_THd), device=q_THd.device)
    document = torch.searchsorted(cu_seqlens_q, row, right=True)
    mask = document.unsqueeze(1) == document
    return 1, mask.tril() if causal else mask
