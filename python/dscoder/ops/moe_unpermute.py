"""moe_unpermute: every token's weighted sum over its experts' rows, the way back from moe_permute."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dscoder.ops.library import (
    FLOATS,
    accumulate_dtype,
    check_devices,
    check_shape,
    check_tensor,
    define_gradient,
    define_op,
)
from dscoder.ops.moe_permute import PermuteHandle


def moe_unpermute(y_MD: Tensor, weight_TK: Tensor, handle: PermuteHandle) -> Tensor:
    """out[t] = sum over k of weight[t, k] * y[handle.row[t, k]].

    Summed in float32 in the order of k (deterministic) and rounded once to y's dtype. A dropped choice adds
    nothing, whatever its weight; rows that no choice points at are not read. Differentiable in y and weight.
    """
    op = "moe_unpermute"
    row_TK = handle.row_TK
    check_tensor(op, "y", y_MD, num_dims=2, dtypes=FLOATS)
    check_tensor(op, "weight", weight_TK, num_dims=2, dtypes=(torch.float32, torch.float64))
    check_shape(op, "weight", weight_TK, tuple(row_TK.shape))
    check_shape(op, "y", y_MD, (row_TK.numel(), y_MD.shape[1]))
    check_devices(op, y=y_MD, weight=weight_TK, row=row_TK)
    out_TD: Tensor = torch.ops.dscoder.moe_unpermute.default(y_MD, weight_TK, row_TK)
    return out_TD


def _kept(row_TK: Tensor) -> tuple[Tensor, Tensor]:
    """The flat positions in row_TK of the choices that were not dropped, and their rows."""
    slot = (row_TK.flatten() >= 0).nonzero().squeeze(1)
    return slot, row_TK.flatten()[slot].long()


def _forward(y_MD: Tensor, weight_TK: Tensor, row_TK: Tensor) -> Tensor:
    dtype = accumulate_dtype(y_MD.dtype)
    slot, row = _kept(row_TK)
    num_kept_T = (row_TK >= 0).sum(dim=1)
    out_TD = F.embedding_bag(
        row,
        y_MD.to(dtype).contiguous(),
        offsets=num_kept_T.cumsum(0) - num_kept_T,
        mode="sum",
        per_sample_weights=weight_TK.flatten()[slot].to(dtype),
    )
    return out_TD.to(y_MD.dtype)


def _backward(grad_TD: Tensor, y_MD: Tensor, weight_TK: Tensor, row_TK: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(y_MD.dtype)
    slot, row = _kept(row_TK)
    num_kept = len(row)
    slot_by_row = torch.empty_like(slot)
    slot_by_row[row] = slot
    grad_y = y_MD.new_empty(y_MD.shape, dtype=dtype)
    grad_y[num_kept:] = 0
    grad_rows = grad_y[:num_kept]
    torch.index_select(grad_TD.to(dtype), 0, slot_by_row // max(row_TK.shape[1], 1), out=grad_rows)
    grad_weight = weight_TK.new_zeros(weight_TK.numel())
    grad_weight[slot_by_row] = torch.linalg.vecdot(grad_rows, y_MD[:num_kept].to(dtype)).to(weight_TK.dtype)
    grad_rows.mul_(weight_TK.flatten()[slot_by_row].to(dtype).unsqueeze(1))
    return grad_y.to(y_MD.dtype), grad_weight.view(weight_TK.shape)


def _forward_fake(y_MD: Tensor, weight_TK: Tensor, row_TK: Tensor) -> Tensor:
    return y_MD.new_empty(row_TK.shape[0], y_MD.shape[1])


def _backward_fake(_grad: Tensor, y_MD: Tensor, weight_TK: Tensor, _row: Tensor) -> tuple[Tensor, Tensor]:
    return y_MD.new_empty(y_MD.shape), weight_TK.new_empty(weight_TK.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
    grad_y, grad_weight = torch.ops.dscoder.moe_unpermute_backward.default(grad_TD, *ctx.saved_tensors)
    return grad_y, grad_weight, None


define_op(
    "moe_unpermute(Tensor y, Tensor weight, Tensor row) -> Tensor", reference=_forward, fake=_forward_fake
)
define_op(
    "moe_unpermute_backward(Tensor grad, Tensor y, Tensor weight, Tensor row) -> (Tensor, Tensor)",
    reference=_backward,
    fake=_backward_fake,
)
define_gradient("moe_unpermute", save=_save, backward=_differentiate)
