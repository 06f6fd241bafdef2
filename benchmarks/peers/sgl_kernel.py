"""sgl-kernel, SGLang's kernels: CUDA, forward only.

Read: sgl-kernel/python/sgl_kernel/moe.py, main of summer 2026 (moe_align_block_size with a cumsum buffer and
an optional ignore_invalid_expert), and SGLang's own test of it for the sizes of its buffers.

Not compared: `moe_fused_gate` (sigmoid, bias, a group's two best experts: V3's rule).
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.common import maps_of_segments, require
from dscoder.testing.peer import Run

BLOCK_SIZE = 64


def gate(
    kernels: Any,
    logits_TE: Tensor,
    *,
    num_topk: int,
    num_groups: int = 1,
    num_groups_kept: int = 1,
    scale: float = 1.0,
    renormalize: bool = False,
) -> Run:
    """`topk_softmax`, for one group and no scale; fused for powers of two."""
    require(num_groups == num_groups_kept, f"topk_softmax has no groups, got {num_groups}")
    require(scale == 1.0, f"topk_softmax has no scale, got {scale}")
    shape = (len(logits_TE), num_topk)

    def call() -> tuple[Tensor, Tensor]:
        weight_TK = torch.empty(shape, dtype=torch.float32, device=logits_TE.device)
        idx_TK = torch.empty(shape, dtype=torch.int32, device=logits_TE.device)
        kernels.topk_softmax(
            topk_weights=weight_TK, topk_ids=idx_TK, gating_output=logits_TE, renormalize=renormalize
        )
        return idx_TK, weight_TK

    return Run(call=call)


def maps(kernels: Any, idx_TK: Tensor, *, num_experts: int) -> Run:
    """`moe_align_block_size`, with SGLang's own buffers: one expert more, for choices of none.

    Padded segments, in which the slots of an expert may come in any order; it fills a list of blocks too,
    which our maps do not have; the row of each choice is left to `read`.
    """
    num_padded_at_most = idx_TK.numel() + (num_experts + 1) * (BLOCK_SIZE - 1)

    def empty(count: int) -> Tensor:
        return torch.empty(count, dtype=torch.int32, device=idx_TK.device)

    def call() -> tuple[Tensor, Tensor]:
        sorted_slots, num_padded = empty(num_padded_at_most), empty(1)
        block_expert = empty(-(-num_padded_at_most // BLOCK_SIZE))
        cumsum = empty(num_experts + 2)
        kernels.moe_align_block_size(
            idx_TK, num_experts + 1, BLOCK_SIZE, sorted_slots, block_expert, num_padded, cumsum, True
        )
        return sorted_slots, num_padded

    def read(raw: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        sorted_slots, num_padded = raw
        return maps_of_segments(sorted_slots[: int(num_padded)], idx_TK, num_experts)

    return Run(call=call, read=read)
