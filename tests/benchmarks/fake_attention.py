"""Stand-ins for the libraries of attention, as fake_libraries.py has them for the expert layer."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dscoder import ops


def get_mla_metadata(seq_lens: Tensor, num_rows: int, num_key_heads: int) -> tuple[list[int], None]:
    """FlashMLA's: filled by the first call."""
    return [], None


def flash_mla(
    q: Tensor,
    cache: Tensor,
    table: Tensor,
    seq_lens: Tensor,
    value_dim: int,
    metadata: list[int],
    num_splits: None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """FlashMLA's: one key head, log-sum-exp [B, H, S]."""
    assert cache.shape[1:] == (64, 1, 576)
    assert value_dim == 512
    assert num_splits is None
    assert options.keys() == {"softmax_scale", "causal"}
    assert options["causal"]
    metadata.append(1)
    scale = options["softmax_scale"]
    out, lse = ops.mla_decode(q, cache.squeeze(2), table, seq_lens, value_dim=value_dim, scale=scale)
    return out, lse.transpose(1, 2)


class LatentWrapper:
    """flashinfer's BatchMLAPagedAttentionWrapper."""

    def __init__(self, workspace: Tensor, *, backend: str) -> None:
        assert workspace.numel() == 128 * 2**20
        assert backend == "auto"

    def plan(self, **plan: Any) -> None:
        """What `run` needs."""
        assert all(plan[name].dtype == torch.int32 for name in ("qo_indptr", "kv_indptr", "kv_indices"))
        self.at = SimpleNamespace(**plan)

    def run(
        self, *, q_nope: Tensor, q_pe: Tensor, ckv_cache: Tensor, kpe_cache: Tensor, return_lse: bool
    ) -> tuple[Tensor, Tensor]:
        """Queries of all sequences one after the other, pages by a list with START offsets."""
        at = self.at
        assert return_lse
        assert (q_nope.shape[-1], q_pe.shape[-1]) == (at.head_dim_ckv, at.head_dim_kpe)
        q = torch.cat([q_nope, q_pe], dim=-1)
        cache = torch.cat([ckv_cache, kpe_cache], dim=-1)
        outs = []
        for b, length in enumerate(at.kv_len_arr):
            table = at.kv_indices[at.kv_indptr[b] : at.kv_indptr[b + 1]].unsqueeze(0)
            mine = q[at.qo_indptr[b] : at.qo_indptr[b + 1]].unsqueeze(0)
            out, _ = ops.mla_decode(
                mine, cache, table, length.view(1), value_dim=at.head_dim_ckv, scale=at.sm_scale
            )
            outs.append(out[0])
        return torch.cat(outs), torch.empty(0)


class RaggedWrapper:
    """flashinfer's BatchPrefillWithRaggedKVCacheWrapper."""

    def __init__(self, workspace: Tensor, layout: str, *, backend: str) -> None:
        assert workspace.numel() == 128 * 2**20
        assert layout == "NHD"
        assert backend == "auto"

    def plan(self, **plan: Any) -> None:
        """What `run` needs."""
        self.at = SimpleNamespace(**plan)

    def run(self, q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool) -> tuple[Tensor, Tensor]:
        """The plan's lengths."""
        at = self.at
        assert return_lse
        assert q.shape[1:] == (at.num_qo_heads, at.head_dim_qk)
        assert v.shape[1:] == (at.num_kv_heads, at.head_dim_vo)
        return ops.mla_prefill(q, k, v, at.qo_indptr, at.kv_indptr, scale=at.sm_scale, causal=at.causal)


def flash_attention_3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """FlashAttention 3's; log-sum-exp [H, T]."""
    assert options.keys() == {"softmax_scale", "causal", "return_attn_probs"}
    assert options["return_attn_probs"]
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    scale, causal = options["softmax_scale"], options["causal"]
    out, lse = ops.mla_prefill(q, k, v, cu_q, cu_k, scale=scale, causal=causal)
    return out, lse.t()


def flash_attention_2(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """FlashAttention 2's: values as wide as keys, a third result."""
    assert v.shape[2] == q.shape[2]
    return *flash_attention_3(q, k, v, *args, **kwargs), None


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype,
    **options: Any,
) -> tuple[Any, ...]:
    """FlashAttention 3's: what its call must agree with."""
    assert (num_heads_kv, headdim) == (1, 64)
    assert options.keys() == {"headdim_v", "page_size", "causal"}
    assert options["causal"]
    sizes = (batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, options["headdim_v"], options["page_size"])
    return *sizes, cache_seqlens.tolist(), qkv_dtype


def flash_attention_3_cached(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, qv: Tensor, **options: Any
) -> tuple[Tensor, ...]:
    """FlashAttention 3's over pages; log-sum-exp [B, H, S], and what its parts left."""
    table, seq_lens = options["page_table"], options["cache_seqlens"]
    assert options["causal"]
    assert options["return_softmax_lse"]
    assert all(x.stride(-1) == 1 for x in (q, k_cache, v_cache, qv, table))
    (num_sequences, num_new, num_heads, _), page_size = q.shape, k_cache.shape[1]
    sizes = (num_sequences, num_new, table.shape[1] * page_size, num_heads, v_cache.shape[-1], page_size)
    assert options["scheduler_metadata"] == (*sizes, seq_lens.tolist(), q.dtype)
    assert k_cache.shape[2] == v_cache.shape[2] == 1
    out, lse = ops.mla_decode(
        torch.cat([qv, q], dim=-1),
        torch.cat([v_cache, k_cache], dim=-1).squeeze(2),
        *(table, seq_lens),
        value_dim=v_cache.shape[-1],
        scale=options["softmax_scale"],
    )
    return out, lse.transpose(1, 2), torch.empty(0), torch.empty(0)
