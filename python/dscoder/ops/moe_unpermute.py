"""moe_unpermute: every token's weighted sum over its experts' rows, the way back from moe_permute."""

from typing import Any

import torch
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


def _forward(y_MD: Tensor, weight_TK: Tensor, row_TK: Tensor) -> Tensor:
    num_tokens, num_topk = row_TK.shape
    out_TD = y_MD.new_zeros((num_tokens, y_MD.shape[1]), dtype=accumulate_dtype(y_MD.dtype))
    is_dropped_TK = row_TK < 0
    weight_TK = weight_TK.to(out_TD.dtype)
    row_TK = row_TK.clamp(min=0)
    for k in range(num_topk):
        # where, not a zero weight: the row a dropped choice is pointed at may hold NaN.
        chosen_TD = y_MD.index_select(0, row_TK[:, k]).masked_fill_(is_dropped_TK[:, k, None], 0)
        out_TD.addcmul_(chosen_TD.to(out_TD.dtype), weight_TK[:, k, None])
    return out_TD.to(y_MD.dtype)


def _backward(grad_TD: Tensor, y_MD: Tensor, weight_TK: Tensor, row_TK: Tensor) -> tuple[Tensor, Tensor]:
    num_rows, num_topk = row_TK.numel(), row_TK.shape[1]
    dtype = accumulate_dtype(y_MD.dtype)
    # One extra row takes what dropped choices scatter.
    row = torch.where(row_TK < 0, num_rows, row_TK).flatten().long()
    slot = torch.full((num_rows + 1,), -1, dtype=torch.int64, device=row.device)
    slot[row] = torch.arange(num_rows, device=row.device)
    slot_M = slot[:num_rows]
    is_unused_M = (slot_M < 0).unsqueeze(-1)
    slot_M = slot_M.clamp(min=0)
    grad_MD = grad_TD.to(dtype).index_select(0, slot_M // max(num_topk, 1)).masked_fill_(is_unused_M, 0)
    grad_weight_M = (grad_MD * y_MD.masked_fill(is_unused_M, 0)).sum(dim=-1)
    grad_weight = torch.cat([grad_weight_M, grad_weight_M.new_zeros(1)])[row].view(row_TK.shape)
    weight_M = weight_TK.flatten().to(dtype)[slot_M]
    grad_y = grad_MD.mul_(weight_M.unsqueeze(-1)).to(y_MD.dtype)
    return grad_y.masked_fill_(is_unused_M, 0), grad_weight.to(weight_TK.dtype)


def _forward_fake(y_MD: Tensor, weight_TK: Tensor, row_TK: Tensor) -> Tensor:
    return y_MD.new_empty(row_TK.shape[0], y_MD.shape[1])


def _backward_fake(grad_TD: Tensor, y_MD: Tensor, weight_TK: Tensor, row_TK: Tensor) -> tuple[Tensor, Tensor]:
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
