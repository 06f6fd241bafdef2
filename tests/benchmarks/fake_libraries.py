"""Stand-ins for the libraries of benchmarks.peers: their signatures and layouts, computed by torch.

Each refuses what the library refuses and writes what it writes, from the sources that the adapters name.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dscoder import ops
from tests.benchmarks.fake_attention import (
    LatentWrapper,
    RaggedWrapper,
    flash_attention_2,
    flash_attention_3,
    flash_attention_3_cached,
    flash_mla,
    get_mla_metadata,
    get_scheduler_metadata,
)


def topk_softmax(weight: Tensor, idx: Tensor, source: Tensor, logits: Tensor, renormalize: bool) -> None:
    """vLLM's, with positional arguments."""
    assert (weight.dtype, idx.dtype, source.dtype) == (torch.float32, torch.int32, torch.int32)
    weights, chosen = logits.float().softmax(dim=-1).topk(idx.shape[1])
    weight.copy_(weights / weights.sum(dim=1, keepdim=True) if renormalize else weights)
    idx.copy_(chosen)


def grouped_topk(
    *,
    hidden_states: Tensor,
    gating_output: Tensor,
    topk: int,
    renormalize: bool,
    num_expert_group: int,
    topk_group: int,
    scoring_func: str,
    routed_scaling_factor: float,
) -> tuple[Tensor, Tensor]:
    """vLLM's without a bias: weights first, smallest first here, as its order is not promised."""
    assert scoring_func == "softmax"
    assert len(hidden_states) == len(gating_output)
    idx, weight = ops.moe_gate(
        gating_output,
        num_topk=topk,
        num_groups=num_expert_group,
        num_groups_kept=topk_group,
        scale=routed_scaling_factor,
        renormalize=renormalize,
    )
    return weight.flip(1), idx.flip(1)


def segments(idx: Tensor, block_size: int, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every expert's choices, last first, padded to the block with an index past the last choice."""
    slots: list[int] = []
    blocks = []
    for expert in range(num_experts):
        slots += (idx.flatten() == expert).nonzero().flatten().flip(0).tolist()
        num_padding = -len(slots) % block_size
        slots += [idx.numel()] * num_padding
        blocks += [expert] * (len(slots) // block_size - len(blocks))
    wild = [-(2**31)] * block_size  # behind the end nothing is written
    return (
        torch.tensor(slots + wild, dtype=torch.int32),
        torch.tensor(blocks, dtype=torch.int32),
        torch.tensor([len(slots)], dtype=torch.int32),
    )


def sgl_topk_softmax(
    topk_weights: Tensor, topk_ids: Tensor, gating_output: Tensor, renormalize: bool = False
) -> None:
    """sgl-kernel's: no third output."""
    topk_softmax(topk_weights, topk_ids, topk_ids.clone(), gating_output, renormalize)


def sgl_align(
    idx: Tensor,
    num_experts: int,
    block_size: int,
    sorted_slots: Tensor,
    block_expert: Tensor,
    num_padded: Tensor,
    cumsum: Tensor,
    pad_sorted_token_ids: bool,
) -> None:
    """sgl-kernel's: outputs come in; expert 0 is for choices of none, so there is one more."""
    assert len(cumsum) == num_experts + 1
    assert pad_sorted_token_ids
    slots, blocks, count = segments(idx, block_size, num_experts - 1)
    assert len(sorted_slots) >= int(count)
    assert len(block_expert) >= len(blocks)
    sorted_slots.fill_(idx.numel())
    sorted_slots[: int(count)] = slots[: int(count)]
    num_padded.copy_(count)


def vllm_permute(
    hidden_states: Tensor,
    a1q_scale: Tensor | None,
    topk_ids: Tensor,
    n_expert: int,
    scratch: object | None = None,
) -> tuple[Any, ...]:
    """Rows, scales, START offsets in int64, the row of each choice, the choice of each row."""
    assert a1q_scale is None
    assert scratch == ("scratch", n_expert)
    x_MD, handle = ops.moe_permute(hidden_states, topk_ids, num_experts=n_expert)
    starts = F.pad(handle.offsets_E.long(), (1, 0))
    return x_MD, None, starts, handle.row_TK.flatten(), handle.row_TK.flatten().argsort()


def vllm_unpermute(out: Tensor, y: Tensor, weight: Tensor, row: Tensor, starts: Tensor) -> None:
    """The output comes in."""
    assert starts.dtype == torch.int64
    assert starts[0] == 0
    assert starts[-1] == len(y)
    rows = y[row.long()].view(*weight.shape, -1)
    out.copy_((rows * weight.unsqueeze(-1)).sum(dim=1))


def fused_topk(
    *,
    logits: Tensor,
    topk: int,
    num_groups: int | None,
    group_topk: int | None,
    scaling_factor: float,
    topk_indices: Tensor,
    **softmax: Any,
) -> tuple[Tensor, Tensor]:
    """TransformerEngine's: a [T, E] map of weights; the indices in no order."""
    assert softmax == {"use_pre_softmax": True, "score_function": "softmax", "expert_bias": None}
    assert num_groups is None or topk // (group_topk or 1) == 1, "another rule than V2's"
    groups = (num_groups or 1, group_topk or 1)
    idx, weight = ops.moe_gate(
        logits, num_topk=topk, num_groups=groups[0], num_groups_kept=groups[1], scale=scaling_factor
    )
    topk_indices.copy_(idx.flip(1))
    return torch.zeros_like(logits).scatter(1, idx.long(), weight), topk_indices


def te_permute(
    inp: Tensor, routing_map: Tensor, num_out_tokens: int, max_token_num: int = -1, map_type: str = "mask"
) -> tuple[Tensor, Tensor]:
    """TransformerEngine's, both kinds of map."""
    assert routing_map.dtype == torch.int32
    assert num_out_tokens > 0
    if map_type == "mask":
        expert, token = routing_map.t().nonzero(as_tuple=True)
        assert len(expert) == num_out_tokens
        return inp[token], torch.empty(0)
    x_MD, handle = ops.moe_permute(inp, routing_map, num_experts=int(routing_map.max()) + 1)
    return x_MD, handle.row_TK.t().flatten()


def te_unpermute(inp: Tensor, row_id_map: Tensor, merging_probs: Tensor, *, map_type: str) -> Tensor:
    """TransformerEngine's index map: all first choices first."""
    assert map_type == "index"
    assert merging_probs.dtype == torch.float32
    assert row_id_map.is_contiguous()
    rows = inp[row_id_map.long()].view(merging_probs.shape[1], len(merging_probs), -1)
    return (rows * merging_probs.t().unsqueeze(-1)).sum(dim=0)


def fused_aux_loss(
    *,
    probs: Tensor,
    tokens_per_expert: Tensor,
    total_num_tokens: int,
    num_experts: int,
    topk: int,
    coeff: float,
) -> Tensor:
    """TransformerEngine's; more columns than experts are more sequences."""
    assert probs.is_contiguous()
    assert probs.shape[1] % num_experts == 0
    factor = num_experts * coeff / topk / total_num_tokens / total_num_tokens
    return factor * (probs.sum(dim=0) * tokens_per_expert).sum()


def m_grouped_gemm(a: Tensor, b: Tensor, d: Tensor, layout: Tensor) -> None:
    """DeepGEMM's: a block of 128 rows belongs to its first row's expert, -1 is skipped."""
    assert a.dtype == b.dtype == d.dtype == torch.bfloat16
    assert layout.dtype == torch.int32
    assert len(a) % 128 == 0
    for start in range(0, len(a), 128):
        block = slice(start, start + 128)
        expert = int(layout[start])
        assert set(layout[block].tolist()) <= {expert, -1}
        d[block] = a[block] @ b[expert].t()


# ---- rotation ----


def rotated(x: Tensor, angles: Tensor, *, is_neox: bool) -> Tensor:
    """Heads [T, H, r] turned by rows of (cos, sin)."""
    cos, sin = (part.unsqueeze(1) for part in angles.chunk(2, dim=-1))
    a, b = x.chunk(2, dim=-1) if is_neox else (x[..., ::2], x[..., 1::2])
    pairs = (a * cos - b * sin, b * cos + a * sin)
    return torch.cat(pairs, dim=-1) if is_neox else torch.stack(pairs, dim=-1).flatten(-2)


def flashinfer_rope(
    positions: Tensor, query: Tensor, key: Tensor, head_size: int, cos_sin_cache: Tensor, is_neox: bool = True
) -> tuple[Tensor, Tensor]:
    """`flashinfer.rope.apply_rope_with_cos_sin_cache`: heads flattened, tables float32."""
    assert cos_sin_cache.dtype == torch.float32
    angles = cos_sin_cache[positions]
    q, k = (rotated(x.unflatten(1, (-1, head_size)), angles, is_neox=is_neox) for x in (query, key))
    return q.flatten(1), k.flatten(1)


def vllm_rms_norm(out: Tensor, x: Tensor, weight: Tensor, epsilon: float) -> None:
    """`vllm._custom_ops.rms_norm`."""
    assert x.is_contiguous()
    out.copy_(torch.nn.functional.rms_norm(x, weight.shape, weight, epsilon))


def vllm_concat_and_cache_mla_rope_fused(
    positions: Tensor, q_pe: Tensor, k_pe: Tensor, kv_c: Tensor, cos_sin_cache: Tensor, *rest: Any
) -> None:
    """`vllm._custom_ops.concat_and_cache_mla_rope_fused`: rotates in place and writes the rows."""
    is_neox, slot_mapping, kv_cache, kv_cache_dtype, _ = rest
    assert kv_cache_dtype == "auto"
    assert cos_sin_cache.dtype == q_pe.dtype
    angles = cos_sin_cache[positions]
    q_pe.copy_(rotated(q_pe, angles, is_neox=is_neox))
    k_pe.copy_(rotated(k_pe[:, None], angles, is_neox=is_neox)[:, 0])
    kv_cache.flatten(0, 1)[slot_mapping] = torch.cat([kv_c, k_pe], dim=-1)


_VLLM = "vllm.model_executor.layers.fused_moe"
MODULES: dict[str, dict[str, Any]] = {
    "vllm._custom_ops": {
        "topk_softmax": topk_softmax,
        "rms_norm": vllm_rms_norm,
        "concat_and_cache_mla_rope_fused": vllm_concat_and_cache_mla_rope_fused,
    },
    "flashinfer.rope": {"apply_rope_with_cos_sin_cache": flashinfer_rope},
    f"{_VLLM}.router.grouped_topk_router": {"grouped_topk": grouped_topk},
    f"{_VLLM}.moe_align_block_size": {"moe_align_block_size": segments},
    f"{_VLLM}.moe_permute_unpermute": {
        "moe_permute": vllm_permute,
        "moe_unpermute": vllm_unpermute,
        "get_moe_permute_scratch": lambda num_experts, num_local_experts, device: ("scratch", num_experts),
    },
    "sgl_kernel": {"topk_softmax": sgl_topk_softmax, "moe_align_block_size": sgl_align},
    "transformer_engine.pytorch.router": {
        "fused_topk_with_score_function": fused_topk,
        "fused_moe_aux_loss": fused_aux_loss,
    },
    "transformer_engine.pytorch.permutation": {"moe_permute": te_permute, "moe_unpermute": te_unpermute},
    "deep_gemm": {
        "m_grouped_bf16_gemm_nt_contiguous": m_grouped_gemm,
        "get_mk_alignment_for_contiguous_layout": lambda: 128,
    },
    "flash_mla": {"flash_mla_with_kvcache": flash_mla, "get_mla_metadata": get_mla_metadata},
    "flashinfer.mla": {"BatchMLAPagedAttentionWrapper": LatentWrapper},
    "flashinfer.prefill": {"BatchPrefillWithRaggedKVCacheWrapper": RaggedWrapper},
    "flash_attn_interface": {
        "flash_attn_varlen_func": flash_attention_3,
        "flash_attn_with_kvcache": flash_attention_3_cached,
        "get_scheduler_metadata": get_scheduler_metadata,
    },
    "flash_attn": {"flash_attn_varlen_func": flash_attention_2},
}
