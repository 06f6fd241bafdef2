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


def _row_ranges(offsets_E: Tensor, num_rows: int) -> list[tuple[int, int, int]]:
    """(expert, first row, end row) of every expert that has rows; wild offsets are clamped to the rows."""
    ranges = []
    start = 0
    for expert, offset in enumerate(offsets_E.tolist()):
        end = min(max(offset, start), num_rows)
        if end > start:
            ranges.append((expert, start, end))
        start = end
    return ranges


def _forward(x_MK: Tensor, w_ENK: Tensor, offsets_E: Tensor) -> Tensor:
    y_MN = x_MK.new_empty(x_MK.shape[0], w_ENK.shape[1])
    end = 0
    for expert, start, end in _row_ranges(offsets_E, x_MK.shape[0]):
        torch.mm(x_MK[start:end], w_ENK[expert].t(), out=y_MN[start:end])
    y_MN[end:].zero_()
    return y_MN


def _weight_gradient(grad_MN: Tensor, x_MK: Tensor, offsets_E: Tensor) -> Tensor:
    shape = (offsets_E.shape[0], grad_MN.shape[1], x_MK.shape[1])
    ranges = _row_ranges(offsets_E, x_MK.shape[0])
    grad_ENK = x_MK.new_empty(shape) if len(ranges) == shape[0] else x_MK.new_zeros(shape)
    for expert, start, end in ranges:
        torch.mm(grad_MN[start:end].t(), x_MK[start:end], out=grad_ENK[expert])
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
