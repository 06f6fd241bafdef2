"""vLLM's expert kernels, and its cache write: CUDA, forward only.

Read: vllm/_custom_ops.py and, below vllm/model_executor/layers/fused_moe/, router/grouped_topk_router.py,
moe_align_block_size.py and moe_permute_unpermute.py, main of summer 2026 (with MoEPermuteScratch).

Not compared: `_custom_ops.grouped_topk`, the fused router, scores a group by its two best experts and wants
a bias (V3's rule).
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.common import largest_first, maps_of_segments, require
from dscoder.ops import PermuteHandle
from dscoder.testing.peer import Run

BLOCK_SIZE = 64  # rows an expert's segment is padded to, vLLM's own choice for many tokens


def gate(
    custom_ops: Any,
    logits_TE: Tensor,
    *,
    num_topk: int,
    num_groups: int = 1,
    num_groups_kept: int = 1,
    scale: float = 1.0,
    renormalize: bool = False,
) -> Run:
    """`topk_softmax`, for one group and no scale; one launch for powers of two."""
    require(num_groups == num_groups_kept, f"topk_softmax has no groups, got {num_groups}")
    require(scale == 1.0, f"topk_softmax has no scale, got {scale}")
    shape = (len(logits_TE), num_topk)

    def call() -> tuple[Tensor, Tensor]:
        weight_TK = torch.empty(shape, dtype=torch.float32, device=logits_TE.device)
        idx_TK = torch.empty(shape, dtype=torch.int32, device=logits_TE.device)
        source_TK = torch.empty_like(idx_TK)
        custom_ops.topk_softmax(weight_TK, idx_TK, source_TK, logits_TE, renormalize)
        return idx_TK, weight_TK

    return Run(call=call)


def grouped_gate(
    router: Any,
    logits_TE: Tensor,
    *,
    num_topk: int,
    num_groups: int = 1,
    num_groups_kept: int = 1,
    scale: float = 1.0,
    renormalize: bool = False,
) -> Run:
    """`grouped_topk`, what vLLM serves DeepSeek-V2 with: torch code that it compiles; K in any order."""
    require(num_groups > 1, f"grouped_topk is for groups, got {num_groups}")

    def call() -> tuple[Tensor, Tensor]:
        weight_TK, idx_TK = router.grouped_topk(
            hidden_states=logits_TE,  # only its length is read
            gating_output=logits_TE,
            topk=num_topk,
            renormalize=renormalize,
            num_expert_group=num_groups,
            topk_group=num_groups_kept,
            scoring_func="softmax",
            routed_scaling_factor=scale,
        )
        return idx_TK, weight_TK

    call()  # compiles
    return Run(call=call, read=lambda raw: largest_first(*raw))


def maps(align: Any, idx_TK: Tensor, *, num_experts: int) -> Run:
    """`moe_align_block_size`: padded segments, in which the slots of an expert may come in any order.

    It fills a list of blocks too, which our maps do not have; the row of each choice is left to `read`.
    """

    def call() -> Any:
        return align.moe_align_block_size(idx_TK, BLOCK_SIZE, num_experts)

    def read(raw: Any) -> tuple[Tensor, Tensor]:
        sorted_slots, _, num_padded = raw
        return maps_of_segments(sorted_slots[: int(num_padded)], idx_TK, num_experts)

    return Run(call=call, read=read)


def permute(kernels: Any, x_TD: Tensor, idx_TK: Tensor, *, num_experts: int) -> Run:
    """`moe_permute`, its maps (a radix sort) included; buffers reused from call to call where it can."""
    options = {}
    make_scratch = getattr(kernels, "get_moe_permute_scratch", None)  # absent before summer 2026
    if make_scratch is not None:
        options["scratch"] = make_scratch(
            num_experts=num_experts, num_local_experts=num_experts, device=x_TD.device
        )

    def call() -> Any:
        return kernels.moe_permute(
            hidden_states=x_TD, a1q_scale=None, topk_ids=idx_TK, n_expert=num_experts, **options
        )

    return Run(call=call, read=lambda raw: raw[0])


def unpermute(kernels: Any, y_MD: Tensor, weight_TK: Tensor, handle: PermuteHandle) -> Run:
    """`moe_unpermute`; it wants START offsets in int64, made beforehand."""
    starts = torch.nn.functional.pad(handle.offsets_E.long(), (1, 0))
    row_M = handle.row_TK.flatten()

    def call() -> Tensor:
        out_TD = y_MD.new_empty(len(weight_TK), y_MD.shape[1])
        kernels.moe_unpermute(out_TD, y_MD, weight_TK, row_M, starts)
        return out_TD

    return Run(call=call)


def latent_append(
    custom_ops: Any,
    query_THd: Tensor,
    latent_Td: Tensor,
    weight_C: Tensor,
    *angles_and_target: Any,
    eps: float,
) -> Run:
    """`rms_norm`, then rotation and cache write in one launch, `concat_and_cache_mla_rope_fused`.

    It rotates in place, so query and key are copied first, the query to beside its latent part, where
    vLLM's model concatenates it later. Its tables are of the query's dtype, made beforehand.
    """
    cos_Lf, sin_Lf, positions_T, target = angles_and_target
    width, rotated = len(weight_C), 2 * cos_Lf.shape[1]
    tables = torch.cat([cos_Lf, sin_Lf], dim=-1).to(query_THd.dtype)
    scale = torch.ones(1, device=query_THd.device)  # for caches of float8
    latent_TC, key_Tr = latent_Td.split([width, rotated], dim=-1)
    query_out_THr = target.query_out_THd[..., width:]

    def call() -> tuple[Tensor, Tensor]:
        normed_TC = torch.empty_like(latent_TC, memory_format=torch.contiguous_format)
        custom_ops.rms_norm(normed_TC, latent_TC.contiguous(), weight_C, eps)
        query_out_THr.copy_(query_THd[..., -rotated:])
        custom_ops.concat_and_cache_mla_rope_fused(
            positions_T,
            query_out_THr,
            key_Tr.clone(memory_format=torch.contiguous_format),
            normed_TC,
            tables,
            False,
            target.slots_T,
            target.cache_PLd,
            "auto",
            scale,
        )
        return target.cache_PLd, target.query_out_THd

    return Run(call=call)
