"""TransformerEngine's router and permutation, with gradients.

Read: transformer_engine/pytorch/router.py and permutation.py, common/fused_router/*.cu and
common/permutation/permutation.cu at commit d0067d0 (2.20.0.dev0, August 2026).
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.common import largest_first, require
from dscoder.ops import PermuteHandle
from dscoder.testing.peer import Run


def gate(
    router: Any,
    logits_TE: Tensor,
    *,
    num_topk: int,
    num_groups: int = 1,
    num_groups_kept: int = 1,
    scale: float = 1.0,
    renormalize: bool = False,
) -> Run:
    """`fused_topk_with_score_function`, softmax before the choice, indices instead of a routing map.

    A group scores by its num_topk // num_groups_kept best experts: V2's rule only where that is 1, so V2
    itself (6 // 3) is refused. It writes the weights into a [T, E] map; to take K of them from it is left to
    `read`, whose gradient is part of a timed backward pass.
    """
    has_groups = num_groups_kept < num_groups
    if has_groups:
        num_scored = num_topk // num_groups_kept
        require(num_scored == 1, f"a group scores by its {num_scored} best experts here, not by the best")
    require(not renormalize, "renormalize is not among the options of softmax")

    def call() -> tuple[Tensor, Tensor]:
        idx_TK = torch.empty(len(logits_TE), num_topk, dtype=torch.int32, device=logits_TE.device)
        weight_TE, idx_TK = router.fused_topk_with_score_function(
            logits=logits_TE,
            topk=num_topk,
            use_pre_softmax=True,
            num_groups=num_groups if has_groups else None,
            group_topk=num_groups_kept if has_groups else None,
            scaling_factor=scale,
            score_function="softmax",
            expert_bias=None,
            topk_indices=idx_TK,
        )
        return idx_TK, weight_TE

    def read(raw: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        idx_TK, weight_TE = raw
        return largest_first(idx_TK, weight_TE.gather(1, idx_TK.long()))

    return Run(call=call, read=read)


def permute_by_index(permutation: Any, x_TD: Tensor, idx_TK: Tensor, *, num_experts: int) -> Run:
    """`moe_permute`, index map: a radix sort (stable) and a copy; returns no offsets."""

    def call() -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = permutation.moe_permute(
            x_TD, idx_TK, idx_TK.numel(), len(x_TD), map_type="index"
        )
        return out

    return Run(call=call, read=lambda raw: raw[0])


def permute_by_mask(permutation: Any, x_TD: Tensor, idx_TK: Tensor, *, num_experts: int) -> Run:
    """`moe_permute`, mask map, Megatron's default: the [T, E] mask, which its router makes, is not timed."""
    mask_TE = torch.zeros(len(x_TD), num_experts, dtype=torch.int32, device=x_TD.device)
    mask_TE.scatter_(1, idx_TK.long(), 1)

    def call() -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = permutation.moe_permute(
            x_TD, mask_TE, num_out_tokens=idx_TK.numel(), map_type="mask"
        )
        return out

    return Run(call=call, read=lambda raw: raw[0])


def unpermute(permutation: Any, y_MD: Tensor, weight_TK: Tensor, handle: PermuteHandle) -> Run:
    """`moe_unpermute`, index map, with weights and their gradient. Its map is ours, transposed."""
    row_KT = handle.row_TK.t().contiguous().flatten()

    def call() -> Tensor:
        out_TD: Tensor = permutation.moe_unpermute(y_MD, row_KT, weight_TK, map_type="index")
        return out_TD

    return Run(call=call)


def balance_loss(
    router: Any,
    probs_TE: Tensor,
    idx_TK: Tensor,
    *,
    num_sequences: int = 1,
    expert: float = 0.0,
    device: float = 0.0,
    communication: float = 0.0,
    **_groups: int,  # of the other two terms
) -> Run:
    """`fused_moe_aux_loss`, the expert-level term alone.

    Counting the choices is timed, as it is in ours. Sequences lie side by side in its columns
    ([S, B * E]), as in Megatron, arranged beforehand.
    """
    require(device == 0.0 and communication == 0.0, "fused_moe_aux_loss has the expert-level term alone")
    num_experts, num_topk = probs_TE.shape[1], idx_TK.shape[1]
    probs = probs_TE.unflatten(0, (num_sequences, -1)).transpose(0, 1).flatten(1).contiguous()
    sequence_T1 = torch.arange(num_sequences, device=idx_TK.device).repeat_interleave(len(probs)).unsqueeze(1)
    column = (sequence_T1 * num_experts + idx_TK).flatten()
    ones = torch.ones_like(column, dtype=torch.float32)

    def call() -> Tensor:
        counts = torch.zeros(probs.shape[1], device=probs.device).scatter_add_(0, column, ones)
        loss: Tensor = router.fused_moe_aux_loss(
            probs=probs,
            tokens_per_expert=counts,
            total_num_tokens=len(probs),
            num_experts=num_experts,
            topk=num_topk,
            coeff=expert / num_sequences,
        )
        return loss

    return Run(call=call)
