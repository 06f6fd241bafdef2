"""The ops of the expert layer in the fewest torch calls, eager, and compiled on a GPU.

No formula waits for the GPU: counts come from a search in the sorted indices (bincount asks the GPU for its
largest value), gathers are index_select, whose backward adds rows in place (indexing sorts them first).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dscoder.ops import PermuteHandle
from dscoder.testing.peer import Run

Adapter = Callable[..., Run]


def unchanged(raw: Any) -> Any:
    """The formula's result is our op's."""
    return raw


def first(raw: Any) -> Any:
    """The first of the formula's results is compared; the others are computed, as ours are."""
    return raw[0]


def eager(formula: Callable[..., Any], read: Callable[[Any], Any] = unchanged) -> Adapter:
    """The formula as it is."""

    def adapter(_: Any, *args: Any, **kwargs: Any) -> Run:
        return Run(call=functools.partial(formula, *args, **kwargs), read=read)

    return adapter


def compiled(formula: Callable[..., Any], read: Callable[[Any], Any] = unchanged) -> Adapter:
    """The formula under torch.compile, static shapes; compiled before it is timed.

    Buffers are not donated to the backward pass, which a benchmark runs again and again on one forward pass.
    """

    def adapter(_: Any, *args: Any, **kwargs: Any) -> Run:
        call = functools.partial(_compile(formula), *args, **kwargs)
        with (
            torch._functorch.config.patch(donated_buffer=False),
            torch._dynamo.config.patch(recompile_limit=256, fail_on_recompile_limit_hit=True),
        ):
            call()
        return Run(call=call, read=read)

    return adapter


@functools.cache
def _compile(formula: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(formula, fullgraph=True, dynamic=False)


def gate(
    logits_TE: Tensor,
    *,
    num_topk: int,
    num_groups: int = 1,
    num_groups_kept: int = 1,
    scale: float = 1.0,
    renormalize: bool = False,
) -> tuple[Tensor, Tensor]:
    """What DeepseekV2TopkRouter of transformers computes after its product, sorted."""
    probs_TE = logits_TE.softmax(dim=-1, dtype=torch.float32)
    candidates = probs_TE
    if num_groups_kept < num_groups:
        groups = probs_TE.view(len(probs_TE), num_groups, -1)
        kept = groups.amax(dim=-1).topk(num_groups_kept, dim=-1).indices
        is_kept = torch.zeros(groups.shape[:2], dtype=torch.bool, device=kept.device).scatter(1, kept, True)
        candidates = groups.masked_fill(~is_kept.unsqueeze(-1), 0.0).flatten(1)
    weight_TK, idx_TK = candidates.topk(num_topk, dim=-1)
    if renormalize:
        weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True)
    return idx_TK.to(torch.int32), weight_TK * scale


def maps(idx_TK: Tensor, *, num_experts: int) -> tuple[Tensor, Tensor]:
    """(offsets_E, row_TK) by a stable sort, a search and a scatter."""
    offsets_E, slot_M = _sorted_slots(idx_TK, num_experts)
    row_M = torch.empty_like(slot_M, dtype=torch.int32)
    row_M = row_M.scatter(0, slot_M, torch.arange(len(slot_M), dtype=torch.int32, device=slot_M.device))
    return offsets_E, row_M.view(idx_TK.shape)


def permute(x_TD: Tensor, idx_TK: Tensor, *, num_experts: int) -> tuple[Tensor, Tensor]:
    """x_MD (and offsets_E) by a stable sort and a gather, as the expert layers of transformers."""
    offsets_E, slot_M = _sorted_slots(idx_TK, num_experts)
    return x_TD.index_select(0, slot_M // idx_TK.shape[1]), offsets_E


def _sorted_slots(idx_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    expert_M, slot_M = idx_TK.flatten().sort(stable=True)
    experts = torch.arange(num_experts, dtype=torch.int32, device=idx_TK.device)
    return torch.searchsorted(expert_M, experts, right=True, out_int32=True), slot_M


def unpermute(y_MD: Tensor, weight_TK: Tensor, handle: PermuteHandle) -> Tensor:
    """Gather, weigh and sum; no choice may be dropped."""
    y_TKD = y_MD.index_select(0, handle.row_TK.flatten()).view(*weight_TK.shape, -1)
    return (y_TKD * weight_TK.unsqueeze(-1)).sum(dim=1).to(y_MD.dtype)


def balance_loss(
    probs_TE: Tensor,
    idx_TK: Tensor,
    *,
    num_sequences: int = 1,
    num_groups: int = 1,
    num_groups_kept: int = 1,
    expert: float = 0.0,
    device: float = 0.0,
    communication: float = 0.0,
) -> Tensor:
    """The three terms from a one-hot mask, gradients by autograd."""
    (num_tokens, num_experts), num_topk = probs_TE.shape, idx_TK.shape[1]
    by_sequence = (num_sequences, num_tokens // num_sequences, num_experts)
    chosen = torch.zeros_like(probs_TE, dtype=torch.float32).scatter(1, idx_TK.long(), 1.0).view(by_sequence)
    mean = probs_TE.view(by_sequence).mean(dim=1, dtype=torch.float32)
    load = chosen.mean(dim=1) * (num_experts / num_topk)
    group_mean = mean.unflatten(1, (num_groups, -1)).sum(dim=-1)
    group_load = load.unflatten(1, (num_groups, -1)).mean(dim=-1)
    sent = chosen.unflatten(2, (num_groups, -1)).amax(dim=-1).mean(dim=1) * (num_groups / num_groups_kept)
    loss = expert * (load * mean).sum(dim=-1)
    loss = loss + ((device * group_load + communication * sent) * group_mean).sum(dim=-1)
    return loss.mean()


def grouped_gemm(x_MK: Tensor, w_ENK: Tensor, offsets_E: Tensor) -> Tensor:
    """torch's own grouped product; on sm_90 a CUTLASS kernel for bfloat16."""
    return F.grouped_mm(x_MK, w_ENK.transpose(1, 2), offs=offsets_E)
