"""moe_unpermute: every token's weighted sum over its experts' rows, the way back from moe_permute."""

from typing import Any

import torch
from torch import Tensor

from dscoder.ops.library import (
    FLOATS,
    accumulate_dtype,
    aligned,
    check_at_least,
    check_devices,
    check_shape,
    check_tensor,
    define_gradient,
    define_op,
    refuse_second_derivative,
)
from dscoder.ops.moe_permute import PermuteHandle, gather_rows, kept_slots, sum_rows
from dscoder.runtime import native


def moe_unpermute(y_MD: Tensor, weight_TK: Tensor, handle: PermuteHandle) -> Tensor:
    """out[t] = sum over k of weight[t, k] * y[handle.row[t, k]].

    Summed in float32 in the order of k (deterministic) and rounded once to y's dtype. A dropped choice adds
    nothing, whatever its weight; rows from handle.offsets_E[-1] on are not read. The handle is as
    `moe_permute` returned it: to drop a choice later set its weight to 0, not its row to -1. A handle whose
    choices do not have one row each is refused where its values are on the host.
    Differentiable in y and weight, once.
    """
    op = "moe_unpermute"
    if not isinstance(handle, PermuteHandle):
        raise TypeError(f"{op}: handle must be a PermuteHandle, got {type(handle).__name__}")
    row_TK, offsets_E = handle.row_TK, handle.offsets_E
    check_tensor(op, "y", y_MD, num_dims=2, dtypes=FLOATS)
    check_tensor(op, "weight", weight_TK, num_dims=2, dtypes=(torch.float32, torch.float64))
    check_tensor(op, "row", row_TK, num_dims=2, dtypes=(torch.int32,))
    check_tensor(op, "offsets", offsets_E, num_dims=1, dtypes=(torch.int32,))
    check_at_least(op, "num_experts", offsets_E.shape[0], 1)
    check_shape(op, "weight", weight_TK, tuple(row_TK.shape))
    check_shape(op, "y", y_MD, (row_TK.numel(), y_MD.shape[1]))
    check_devices(op, y=y_MD, weight=weight_TK, row=row_TK, offsets=offsets_E)
    out_TD: Tensor = torch.ops.dscoder.moe_unpermute.default(y_MD, weight_TK, row_TK, offsets_E)
    return out_TD


# ---- references ----


def _check_rows(row_TK: Tensor, offsets_E: Tensor) -> None:
    """ValueError unless the choices that were not dropped have the rows below offsets_E[-1], one each."""
    num_used = int(offsets_E[-1])
    kept = row_TK.flatten()[kept_slots(row_TK)].sort().values
    if len(kept) != num_used or not torch.equal(kept, torch.arange(len(kept), dtype=kept.dtype)):
        last = int(kept[-1]) if len(kept) else -1
        raise ValueError(
            f"moe_unpermute: row must name each row below offsets[-1] once, {num_used} rows,"
            f" got {len(kept)} choices of {len(set(kept.tolist()))} rows up to {last}"
        )


def _forward(y_MD: Tensor, weight_TK: Tensor, row_TK: Tensor, offsets_E: Tensor) -> Tensor:
    _check_rows(row_TK, offsets_E)
    return sum_rows(y_MD, row_TK, weight_TK)


def _backward(
    grad_TD: Tensor, y_MD: Tensor, weight_TK: Tensor, row_TK: Tensor, _offsets: Tensor
) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(y_MD.dtype)
    slot = kept_slots(row_TK)
    num_kept = len(slot)
    slot_by_row = torch.empty_like(slot)
    slot_by_row[row_TK.flatten()[slot].long()] = slot
    grad_y = y_MD.new_empty(y_MD.shape, dtype=dtype)
    grad_y[num_kept:] = 0
    grad_rows = grad_y[:num_kept]
    torch.index_select(grad_TD.to(dtype), 0, slot_by_row // max(row_TK.shape[1], 1), out=grad_rows)
    grad_weight = weight_TK.new_zeros(weight_TK.numel())
    grad_weight[slot_by_row] = torch.linalg.vecdot(grad_rows, y_MD[:num_kept].to(dtype)).to(weight_TK.dtype)
    grad_rows.mul_(weight_TK.flatten()[slot_by_row].to(dtype).unsqueeze(1))
    return grad_y.to(y_MD.dtype), grad_weight.view(weight_TK.shape)


# ---- on a GPU: kernels, and for float64 plain torch that reads no size on the host ----


def _kept_weight(weight_TK: Tensor, row_TK: Tensor) -> Tensor:
    return weight_TK.masked_fill(row_TK < 0, 0.0).double()


def _forward_wide(y_MD: Tensor, weight_TK: Tensor, row_TK: Tensor) -> Tensor:
    return (gather_rows(y_MD, row_TK) * _kept_weight(weight_TK, row_TK)[..., None]).sum(dim=1)


def _backward_wide(grad_TD: Tensor, y_MD: Tensor, weight_TK: Tensor, row_TK: Tensor) -> tuple[Tensor, Tensor]:
    grad_weight = (gather_rows(y_MD, row_TK) * grad_TD[:, None]).sum(dim=2)
    grad_rows = grad_TD[:, None] * _kept_weight(weight_TK, row_TK)[..., None]
    grad_y = y_MD.new_zeros(y_MD.shape[0] + 1, y_MD.shape[1])  # the last row takes what was dropped
    grad_y[row_TK.long()] = grad_rows
    return grad_y[:-1].contiguous(), grad_weight.to(weight_TK.dtype)


def _forward_kernel(y_MD: Tensor, weight_TK: Tensor, row_TK: Tensor, _offsets: Tensor) -> Tensor:
    if y_MD.dtype == torch.float64:
        return _forward_wide(y_MD, weight_TK, row_TK)
    out_TD = _forward_fake(y_MD, weight_TK, row_TK)
    weight = weight_TK.float().contiguous()
    native._C.moe_unpermute_forward(aligned(y_MD), weight, row_TK.contiguous(), out_TD)
    return out_TD


def _backward_kernel(
    grad_TD: Tensor, y_MD: Tensor, weight_TK: Tensor, row_TK: Tensor, offsets_E: Tensor
) -> tuple[Tensor, Tensor]:
    if y_MD.dtype == torch.float64:
        return _backward_wide(grad_TD, y_MD, weight_TK, row_TK)
    weight = weight_TK.float().contiguous()
    grad_y, grad_weight = _backward_fake(grad_TD, y_MD, weight)
    native._C.moe_unpermute_backward(
        *(aligned(grad_TD), aligned(y_MD), weight, row_TK.contiguous(), offsets_E.contiguous()),
        *(grad_y, grad_weight),
    )
    return grad_y, grad_weight.to(weight_TK.dtype)


def _forward_fake(y_MD: Tensor, _weight: Tensor, row_TK: Tensor, *_: Any) -> Tensor:
    return y_MD.new_empty(row_TK.shape[0], y_MD.shape[1])


def _backward_fake(_grad: Tensor, y_MD: Tensor, weight_TK: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return y_MD.new_empty(y_MD.shape), weight_TK.new_empty(weight_TK.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("moe_unpermute")
    grad_y, grad_weight = torch.ops.dscoder.moe_unpermute_backward.default(grad_TD, *ctx.saved_tensors)
    return grad_y, grad_weight, None, None


define_op(
    # offsets: the rows behind them have no choice, and get a gradient of zero.
    "moe_unpermute(Tensor y, Tensor weight, Tensor row, Tensor offsets) -> Tensor",
    reference=_forward,
    kernel=_forward_kernel,
    fake=_forward_fake,
)
define_op(
    "moe_unpermute_backward(Tensor grad, Tensor y, Tensor weight, Tensor row, Tensor offsets)"
    " -> (Tensor, Tensor)",
    reference=_backward,
    kernel=_backward_kernel,
    fake=_backward_fake,
)
define_gradient("moe_unpermute", save=_save, backward=_differentiate)
