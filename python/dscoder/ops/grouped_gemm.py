"""grouped_gemm: one matrix product per expert over rows in expert order, any number of rows each."""

from typing import Any

import torch
from torch import Tensor

from dscoder.ops.library import (
    FLOATS,
    check_devices,
    check_shape,
    check_tensor,
    define_gradient,
    define_op,
)


def grouped_gemm(x_MK: Tensor, w_ENK: Tensor, offsets_E: Tensor) -> Tensor:
    """y[m] = x[m] @ w[e].T for the rows m of expert e: offsets[e - 1] <= m < offsets[e].

    `offsets_E` (int32) holds ascending end offsets; it is read on the device. Rows from offsets_E[-1] on
    are not read and come out zero.

    Returns:
        y_MN in x's dtype. Differentiable in x and w; an expert without rows gets a zero weight gradient.
    """
    op = "grouped_gemm"
    check_tensor(op, "x", x_MK, num_dims=2, dtypes=FLOATS)
    check_tensor(op, "w", w_ENK, num_dims=3, dtypes=(x_MK.dtype,))
    check_tensor(op, "offsets", offsets_E, num_dims=1, dtypes=(torch.int32,))
    check_shape(op, "w", w_ENK, (*w_ENK.shape[:2], x_MK.shape[1]))
    check_shape(op, "offsets", offsets_E, (w_ENK.shape[0],))
    check_devices(op, x=x_MK, w=w_ENK, offsets=offsets_E)
    y_MN: Tensor = torch.ops.dscoder.grouped_gemm.default(x_MK, w_ENK, offsets_E)
    return y_MN


def _row_counts(offsets_E: Tensor, num_rows: int) -> list[int]:
    """Rows of each expert, then the rows that belong to none; wild offsets are clamped to the rows."""
    counts = []
    start = 0
    for offset in offsets_E.tolist():
        end = min(max(offset, start), num_rows)
        counts.append(end - start)
        start = end
    return [*counts, num_rows - start]


def _forward(x_MK: Tensor, w_ENK: Tensor, offsets_E: Tensor) -> Tensor:
    y_MN = x_MK.new_empty(x_MK.shape[0], w_ENK.shape[1])
    counts = _row_counts(offsets_E, x_MK.shape[0])
    *x_by_expert, _ = torch.split(x_MK, counts)
    *y_by_expert, y_of_none = torch.split(y_MN, counts)
    weights = w_ENK.transpose(1, 2).unbind()
    for count, x, w, y in zip(counts[:-1], x_by_expert, weights, y_by_expert, strict=True):
        if count:
            torch.mm(x, w, out=y)
    y_of_none.zero_()
    return y_MN


def _weight_gradient(grad_MN: Tensor, x_MK: Tensor, offsets_E: Tensor) -> Tensor:
    grad_ENK = x_MK.new_empty(offsets_E.shape[0], grad_MN.shape[1], x_MK.shape[1])
    counts = _row_counts(offsets_E, x_MK.shape[0])
    *x_by_expert, _ = torch.split(x_MK, counts)
    *grad_by_expert, _ = torch.split(grad_MN.t(), counts, dim=1)
    grads_w = grad_ENK.unbind()
    for count, grad, x, grad_w in zip(counts[:-1], grad_by_expert, x_by_expert, grads_w, strict=True):
        if count:
            torch.mm(grad, x, out=grad_w)
        else:
            grad_w.zero_()
    return grad_ENK


def _forward_fake(x_MK: Tensor, w_ENK: Tensor, offsets_E: Tensor) -> Tensor:
    return x_MK.new_empty(x_MK.shape[0], w_ENK.shape[1])


def _weight_gradient_fake(grad_MN: Tensor, x_MK: Tensor, offsets_E: Tensor) -> Tensor:
    return x_MK.new_empty(offsets_E.shape[0], grad_MN.shape[1], x_MK.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad_MN: Tensor) -> tuple[Tensor | None, ...]:
    x_MK, w_ENK, offsets_E = ctx.saved_tensors
    grad_x = grad_w = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.dscoder.grouped_gemm.default(grad_MN, w_ENK.transpose(1, 2), offsets_E)
    if ctx.needs_input_grad[1]:
        grad_w = torch.ops.dscoder.grouped_gemm_weight_gradient.default(grad_MN, x_MK, offsets_E)
    return grad_x, grad_w, None


define_op(
    "grouped_gemm(Tensor x, Tensor w, Tensor offsets) -> Tensor", reference=_forward, fake=_forward_fake
)
define_op(
    "grouped_gemm_weight_gradient(Tensor grad, Tensor x, Tensor offsets) -> Tensor",
    reference=_weight_gradient,
    fake=_weight_gradient_fake,
)
define_gradient("grouped_gemm", save=_save, backward=_differentiate)
