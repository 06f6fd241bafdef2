"""What several adapters need."""

import torch
from torch import Tensor

from dscoder.testing.peer import UnsupportedError


def require(is_supported: bool, message: str) -> None:
    """Refuse a case the peer does not have."""
    if not is_supported:
        raise UnsupportedError(message)


def largest_first(idx_TK: Tensor, weight_TK: Tensor) -> tuple[Tensor, Tensor]:
    """A gate's result in moe_gate's order, from a peer that returns the K experts in any order."""
    weight_TK, order = weight_TK.sort(dim=1, descending=True)
    return idx_TK.gather(1, order), weight_TK


def maps_of_segments(sorted_slots: Tensor, idx_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(offsets_E, row_TK) from slots (t * K + k) in expert order, padded with slots >= T * K.

    The slots of one expert may come in any order; moe_permute keeps the order of the tokens.
    """
    slot_M = sorted_slots[sorted_slots < idx_TK.numel()].long()
    expert_M = idx_TK.flatten()[slot_M]
    segment_M = (expert_M.diff(prepend=expert_M[:1]) != 0).cumsum(0)  # of the peer's order, right or wrong
    slot_M = slot_M[(segment_M * idx_TK.numel() + slot_M).argsort()]
    row_TK = torch.full_like(idx_TK, -1)
    row_TK.view(-1)[slot_M] = torch.arange(len(slot_M), dtype=row_TK.dtype, device=row_TK.device)
    counts_E = torch.bincount(expert_M, minlength=num_experts)
    return counts_E.cumsum(0).to(torch.int32), row_TK
