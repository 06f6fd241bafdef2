"""flashinfer's latent attention, FA3 backend on Hopper, and its rotation, forward only.

Read: flashinfer/mla/_core.py, flashinfer/prefill.py and flashinfer/rope.py at commit fb28d72 (0.6.18, August
2026); what flashinfer/mla/_batch_mla/_wrapper.py has become since takes the same arguments by name. `plan`,
one for all layers of a step, waits for the GPU and is not timed.

Not compared: `fused_topk_deepseek` (sigmoid, bias, a group's two best experts: V3's rule) and
`trtllm_gen_routing` (sm_100 on).
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dscoder.testing.peer import Run

WORKSPACE_BYTES = 128 * 2**20  # what the documentation asks for


@functools.cache
def _workspace(device: torch.device) -> Tensor:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def mla_decode(
    mla: Any,
    q_BSHd: Tensor,
    cache_PLd: Tensor,
    page_table_BN: Tensor,
    seq_lens_B: Tensor,
    *,
    value_dim: int,
    scale: float,
) -> Run:
    """`BatchMLAPagedAttentionWrapper`; the latent and the rotated key are slices of one cache."""
    num_sequences, num_new, num_heads, width = q_BSHd.shape
    page_size, device = cache_PLd.shape[1], q_BSHd.device
    num_pages_B = (seq_lens_B + page_size - 1) // page_size
    slot = torch.arange(page_table_BN.shape[1], device=device)
    pages = page_table_BN[slot < num_pages_B.unsqueeze(1)]  # each sequence's pages, one after the other
    wrapper = mla.BatchMLAPagedAttentionWrapper(_workspace(device), backend="auto")
    wrapper.plan(
        qo_indptr=torch.arange(num_sequences + 1, dtype=torch.int32, device=device) * num_new,
        kv_indptr=F.pad(num_pages_B.cumsum(0), (1, 0)).to(torch.int32),
        kv_indices=pages,
        kv_len_arr=seq_lens_B,
        num_heads=num_heads,
        head_dim_ckv=value_dim,
        head_dim_kpe=width - value_dim,
        page_size=page_size,
        causal=True,
        sm_scale=scale,
        q_data_type=q_BSHd.dtype,
        kv_data_type=cache_PLd.dtype,
    )
    q_latent, q_rotated = q_BSHd.flatten(0, 1).split([value_dim, width - value_dim], dim=-1)
    latent, rotated = cache_PLd.split([value_dim, width - value_dim], dim=-1)

    def call() -> Any:
        return wrapper.run(
            q_nope=q_latent, q_pe=q_rotated, ckv_cache=latent, kpe_cache=rotated, return_lse=True
        )

    return Run(call=call, read=lambda raw: raw[0].unflatten(0, (num_sequences, num_new)))


def mla_prefill(
    prefill: Any,
    q_THd: Tensor,
    k_THd: Tensor,
    v_THv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    scale: float,
    causal: bool = True,
) -> Run:
    """`BatchPrefillWithRaggedKVCacheWrapper`."""
    wrapper = prefill.BatchPrefillWithRaggedKVCacheWrapper(_workspace(q_THd.device), "NHD", backend="auto")
    wrapper.plan(
        qo_indptr=cu_seqlens_q,
        kv_indptr=cu_seqlens_k,
        num_qo_heads=q_THd.shape[1],
        num_kv_heads=k_THd.shape[1],
        head_dim_qk=q_THd.shape[2],
        head_dim_vo=v_THv.shape[2],
        causal=causal,
        sm_scale=scale,
        q_data_type=q_THd.dtype,
        kv_data_type=k_THd.dtype,
    )

    def call() -> Any:
        return wrapper.run(q_THd, k_THd, v_THv, return_lse=True)

    return Run(call=call, read=lambda raw: raw[0])


def rope(
    module: Any,
    q_THr: Tensor,
    k_TGr: Tensor,
    cos_Lf: Tensor,
    sin_Lf: Tensor,
    positions_T: Tensor,
    *,
    interleaved: bool = True,
) -> Run:
    """`apply_rope_with_cos_sin_cache`, out of place; the joined table is made beforehand."""
    width, tables = q_THr.shape[-1], torch.cat([cos_Lf, sin_Lf], dim=-1)

    def call() -> tuple[Tensor, Tensor]:
        q, k = module.apply_rope_with_cos_sin_cache(
            positions_T, q_THr.flatten(1), k_TGr.flatten(1), width, tables, is_neox=not interleaved
        )
        return q.view(q_THr.shape), k.view(k_TGr.shape)

    return Run(call=call)
