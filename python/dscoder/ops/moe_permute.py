"""moe_permute: copy every token once per chosen expert, in expert order, as grouped_gemm wants its rows."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dscoder.ops.library import (
    FLOATS,
    INT32_MAX,
    accumulate_dtype,
    aligned,
    check_at_least,
    check_at_most,
    check_devices,
    check_shape,
    check_tensor,
    define_gradient,
    define_op,
    refuse_second_derivative,
)
from dscoder.runtime import native


@dataclass(frozen=True, kw_only=True, slots=True)
class PermuteHandle:
    """Where the rows of a permutation lie; `moe_unpermute` and `grouped_gemm` read it on the device.

    Each row below offsets_E[-1] is one choice's. Who drops a choice after the fact sets its weight to 0 and
    leaves its row: a row of nobody among them would have no gradient.
    """

    offsets_E: Tensor  # int32, row after the last one of each expert
    row_TK: Tensor  # int32, row of each token's k-th choice; -1: dropped
    token_M: Tensor  # int32, token of each row; 0 from offsets_E[-1] on


def moe_permute(x_TD: Tensor, idx_TK: Tensor, *, num_experts: int) -> tuple[Tensor, PermuteHandle]:
    """Rows of `x_TD` in expert order.

    Row `handle.row_TK[t, k]` of the result is token t, for expert `idx_TK[t, k]`. An expert's rows keep the
    order of the tokens. An index outside [0, num_experts), -1 by custom, drops the choice: it gets no row.

    Returns:
        x_MD with M = T * K always (rows from `handle.offsets_E[-1]` on are zero), and the handle.
        Differentiable in x, once: a token's gradient is the sum over its rows.
    """
    op = "moe_permute"
    check_tensor(op, "x", x_TD, num_dims=2, dtypes=FLOATS)
    check_tensor(op, "idx", idx_TK, num_dims=2, dtypes=(torch.int32,))
    check_shape(op, "idx", idx_TK, (x_TD.shape[0], idx_TK.shape[1]))
    check_devices(op, x=x_TD, idx=idx_TK)
    _check_num_experts(op, num_experts)
    x_MD: Tensor
    x_MD, offsets_E, row_TK, token_M = torch.ops.dscoder.moe_permute.default(x_TD, idx_TK, num_experts)
    return x_MD, PermuteHandle(offsets_E=offsets_E, row_TK=row_TK, token_M=token_M)


def moe_permute_maps(idx_TK: Tensor, *, num_experts: int) -> PermuteHandle:
    """The handle that `moe_permute` returns for these choices, for callers that move the rows themselves."""
    op = "moe_permute_maps"
    check_tensor(op, "idx", idx_TK, num_dims=2, dtypes=(torch.int32,))
    _check_num_experts(op, num_experts)
    offsets_E, row_TK, token_M = torch.ops.dscoder.moe_permute_maps.default(idx_TK, num_experts)
    return PermuteHandle(offsets_E=offsets_E, row_TK=row_TK, token_M=token_M)


def _check_num_experts(op: str, num_experts: int) -> None:
    check_at_least(op, "num_experts", num_experts, 1)
    check_at_most(op, "num_experts", num_experts, INT32_MAX)  # an expert is an int32


# ---- references ----


def _maps(idx_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    is_dropped_TK = (idx_TK < 0) | (idx_TK >= num_experts)
    # Dropped choices sort behind the last expert.
    expert_M, slot_M = idx_TK.masked_fill(is_dropped_TK, num_experts).flatten().sort(stable=True)
    experts = torch.arange(num_experts, dtype=torch.int32, device=idx_TK.device)
    offsets_E = torch.searchsorted(expert_M, experts, right=True, out_int32=True)
    rows = torch.arange(idx_TK.numel(), dtype=torch.int32, device=idx_TK.device)
    row_M = torch.empty_like(rows)
    row_M[slot_M] = rows
    token_M = (slot_M // max(idx_TK.shape[1], 1)).to(torch.int32).masked_fill_(rows >= offsets_E[-1], 0)
    return offsets_E, row_M.view(idx_TK.shape).masked_fill_(is_dropped_TK, -1), token_M


def _forward(x_TD: Tensor, idx_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    offsets_E, row_TK, token_M = _maps(idx_TK, num_experts)
    x_MD = x_TD.index_select(0, token_M)
    x_MD[int(offsets_E[-1]) :] = 0
    return x_MD, offsets_E, row_TK, token_M


def kept_slots(row_TK: Tensor) -> Tensor:
    """The flat positions of the choices that were not dropped; how many they are is read on the host."""
    return (row_TK.flatten() >= 0).nonzero().squeeze(1)


def sum_rows(y_MD: Tensor, row_TK: Tensor, weight_TK: Tensor | None = None) -> Tensor:
    """The reference of moe_unpermute and, without weights, of the gradient of moe_permute."""
    if not y_MD.numel():  # embedding_bag reads wild indices from a table without elements
        return y_MD.new_zeros(row_TK.shape[0], y_MD.shape[1])
    dtype = accumulate_dtype(y_MD.dtype)
    slot = kept_slots(row_TK)
    num_kept_T = (row_TK >= 0).sum(dim=1)
    out_TD = F.embedding_bag(
        row_TK.flatten()[slot].long(),
        y_MD.to(dtype).contiguous(),
        offsets=num_kept_T.cumsum(0) - num_kept_T,
        mode="sum",
        per_sample_weights=None if weight_TK is None else weight_TK.flatten()[slot].to(dtype),
    )
    return out_TD.to(y_MD.dtype)


# ---- on a GPU: kernels, and for float64 plain torch that reads no size on the host ----


def gather_rows(y_MD: Tensor, row_TK: Tensor) -> Tensor:
    """[T, K, D]: each choice's row, zero where it was dropped."""
    rows = y_MD.new_zeros(y_MD.shape[0] + 1, y_MD.shape[1])
    rows[:-1] = y_MD
    return rows[row_TK.long()]  # -1 is the row of zeros


def _forward_wide(x_TD: Tensor, idx_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    offsets_E, row_TK, token_M = _maps(idx_TK, num_experts)
    x_MD = x_TD.index_select(0, token_M)
    is_unused_M = torch.arange(len(x_MD), device=x_MD.device) >= offsets_E[-1]
    return x_MD.masked_fill_(is_unused_M[:, None], 0), offsets_E, row_TK, token_M


def _counts(idx_TK: Tensor, num_experts: int) -> Tensor:
    """Scratch in which the kernels count the experts of each chunk of choices."""
    return idx_TK.new_empty(native._C.moe_permute_num_counts(idx_TK.numel()), num_experts)


def _maps_kernel(idx_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    idx_TK = idx_TK.contiguous()
    maps = _maps_fake(idx_TK, num_experts)
    native._C.moe_permute_maps_forward(idx_TK, *maps, _counts(idx_TK, num_experts))
    return maps


def _forward_kernel(x_TD: Tensor, idx_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if x_TD.dtype == torch.float64:
        return _forward_wide(x_TD, idx_TK, num_experts)
    idx_TK = idx_TK.contiguous()
    x_MD, offsets_E, row_TK, token_M = _fake(x_TD, idx_TK, num_experts)
    counts = _counts(idx_TK, num_experts)
    native._C.moe_permute_forward(aligned(x_TD), idx_TK, x_MD, offsets_E, row_TK, token_M, counts)
    return x_MD, offsets_E, row_TK, token_M


def _backward_kernel(grad_MD: Tensor, row_TK: Tensor) -> Tensor:
    if grad_MD.dtype == torch.float64:
        return gather_rows(grad_MD, row_TK).sum(dim=1)
    grad_TD = _backward_fake(grad_MD, row_TK)
    native._C.moe_permute_backward(aligned(grad_MD), row_TK.contiguous(), grad_TD)
    return grad_TD


def _maps_fake(idx_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    num_rows = idx_TK.shape[0] * idx_TK.shape[1]
    return idx_TK.new_empty(num_experts), idx_TK.new_empty(idx_TK.shape), idx_TK.new_empty(num_rows)


def _fake(x_TD: Tensor, idx_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    offsets_E, row_TK, token_M = _maps_fake(idx_TK, num_experts)
    return x_TD.new_empty(token_M.shape[0], x_TD.shape[1]), offsets_E, row_TK, token_M


def _backward_fake(grad_MD: Tensor, row_TK: Tensor) -> Tensor:
    return grad_MD.new_empty(row_TK.shape[0], grad_MD.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[2])


def _differentiate(ctx: Any, grad_MD: Tensor, *_maps: None) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("moe_permute")
    (row_TK,) = ctx.saved_tensors
    return torch.ops.dscoder.moe_permute_backward.default(grad_MD, row_TK), None, None


define_op(
    "moe_permute(Tensor x, Tensor idx, int num_experts)"
    " -> (Tensor x, Tensor offsets, Tensor row, Tensor token)",
    reference=_forward,
    kernel=_forward_kernel,
    fake=_fake,
)
define_op(
    "moe_permute_maps(Tensor idx, int num_experts) -> (Tensor offsets, Tensor row, Tensor token)",
    reference=_maps,
    kernel=_maps_kernel,
    fake=_maps_fake,
)
define_op(
    "moe_permute_backward(Tensor grad, Tensor row) -> Tensor",
    reference=sum_rows,
    kernel=_backward_kernel,
    fake=_backward_fake,
)
define_gradient("moe_permute", save=_save, backward=_differentiate)
