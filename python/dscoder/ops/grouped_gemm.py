"""grouped_gemm: one matrix product per expert over rows in expert order, any number of rows each."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dscoder.ops.grouped_gemm_plan import kernel_refusal, loaded_rows, rows_of, runs_reference
from dscoder.ops.library import (
    FLOATS,
    accumulate_dtype,
    aligned,
    check_arch,
    check_devices,
    check_shape,
    check_tensor,
    define_gradient,
    define_op,
    refuse_second_derivative,
)
from dscoder.runtime import native


def grouped_gemm(x_MK: Tensor, w_ENK: Tensor, offsets_E: Tensor, *, arch: str = "auto") -> Tensor:
    """y[m] = x[m] @ w[e].T for the rows m of expert e: offsets[e - 1] <= m < offsets[e].

    `offsets_E` (int32) holds ascending end offsets; it is read on the device, never by the host of a GPU.
    Rows from offsets_E[-1] on are not read and come out zero. A `w_ENK` that is the transposed view of
    [E, K, N] weights is read as it lies.

    `arch` says what runs on a GPU (a CPU runs the reference). "auto": kernels, as `grouped_gemm_plan` tells,
    for bfloat16 and float16 with K and N multiples of 8 and at most 512 experts on compute capability 8.x and
    9.0, else the reference. "sm80", "sm90": these kernels, ValueError where they cannot. "reference": that.

    Returns:
        y_MN in x's dtype, sums in float32. Differentiable in x and w, once; an expert without rows gets a
        zero weight gradient.
    """
    op = "grouped_gemm"
    check_tensor(op, "x", x_MK, num_dims=2, dtypes=FLOATS)
    check_tensor(op, "w", w_ENK, num_dims=3, dtypes=(x_MK.dtype,))
    check_tensor(op, "offsets", offsets_E, num_dims=1, dtypes=(torch.int32,))
    check_shape(op, "w", w_ENK, (*w_ENK.shape[:2], x_MK.shape[1]))
    check_shape(op, "offsets", offsets_E, (w_ENK.shape[0],))
    check_devices(op, x=x_MK, w=w_ENK, offsets=offsets_E)
    num_experts, num_columns, depth = w_ENK.shape
    check_arch(op, arch, x_MK, lambda: kernel_refusal(x_MK, num_experts, N=num_columns, K=depth))
    y_MN: Tensor = torch.ops.dscoder.grouped_gemm.default(x_MK, w_ENK, offsets_E, arch)
    return y_MN


def grouped_gemm_weight_gradient(
    grad_MN: Tensor,
    x_MK: Tensor,
    offsets_E: Tensor,
    *,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
    accumulate: bool = False,
    arch: str = "auto",
) -> Tensor:
    """out[e] = grad[rows of e].T @ x[rows of e], what `grouped_gemm` gives w; for loops that keep their own.

    Sums are taken in float32 and rounded once, to x's dtype or, by `dtype` or the dtype of `out`, not at all
    (float32). `accumulate` adds to what `out` holds, else every element is written: zeros for an expert
    without rows. `arch` as in `grouped_gemm`. Not differentiable.

    Returns:
        out_ENK: `out` (contiguous, aliasing no input) if given, else a tensor of `dtype` (default x's).
    """
    op = "grouped_gemm_weight_gradient"
    check_tensor(op, "grad", grad_MN, num_dims=2, dtypes=FLOATS)
    check_tensor(op, "x", x_MK, num_dims=2, dtypes=(grad_MN.dtype,))
    check_tensor(op, "offsets", offsets_E, num_dims=1, dtypes=(torch.int32,))
    check_shape(op, "x", x_MK, (grad_MN.shape[0], x_MK.shape[1]))
    check_devices(op, grad=grad_MN, x=x_MK, offsets=offsets_E)
    num_experts, num_columns, depth = offsets_E.shape[0], grad_MN.shape[1], x_MK.shape[1]
    check_arch(op, arch, x_MK, lambda: kernel_refusal(x_MK, num_experts, N=num_columns, K=depth))
    dtypes = tuple({x_MK.dtype: None, accumulate_dtype(x_MK.dtype): None})
    if out is None:
        if accumulate:
            raise ValueError(f"{op}: accumulate needs out, got accumulate={accumulate} and out={out}")
        out = x_MK.new_empty((num_experts, num_columns, depth), dtype=dtype)
        check_tensor(op, "dtype", out, num_dims=3, dtypes=dtypes)
    else:
        check_tensor(op, "out", out, num_dims=3, dtypes=dtypes)
        check_tensor(op, "out", out, num_dims=3, dtypes=dtypes if dtype is None else (dtype,))
        check_shape(op, "out", out, (num_experts, num_columns, depth))
        check_devices(op, grad=grad_MN, out=out)
        if not out.is_contiguous():
            raise ValueError(f"{op}: out must be contiguous, got strides {out.stride()}")
        if out.requires_grad:
            raise ValueError(f"{op}: out must not require a gradient, got requires_grad={out.requires_grad}")
    torch.ops.dscoder.grouped_gemm_weight_gradient_into.default(
        out, grad_MN.detach(), x_MK.detach(), offsets_E, None, accumulate, arch
    )
    return out


# ---- references ----


def _row_counts(offsets_E: Tensor, num_rows: int) -> list[int]:
    """Rows of each expert, then the rows that belong to none; wild offsets are clamped to the rows."""
    counts = []
    start = 0
    for offset in offsets_E.tolist():
        end = min(max(offset, start), num_rows)
        counts.append(end - start)
        start = end
    return [*counts, num_rows - start]


def product_by_expert(x_MK: Tensor, w_ENK: Tensor, offsets_E: Tensor) -> Tensor:
    """The reference of `grouped_gemm`; reads the offsets on the host."""
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


def _write_by_expert(
    out_ENK: Tensor,
    grad_MN: Tensor,
    x: Tensor,
    offsets_E: Tensor,
    token_M: Tensor | None,
    accumulate: bool,
    _arch: str,
) -> None:
    x_MK = rows_of(x, token_M).to(out_ENK.dtype)
    counts = _row_counts(offsets_E, x_MK.shape[0])
    *x_by_expert, _ = torch.split(x_MK, counts)
    *grad_by_expert, _ = torch.split(grad_MN.to(out_ENK.dtype).t(), counts, dim=1)
    for count, grad, x_e, out in zip(counts[:-1], grad_by_expert, x_by_expert, out_ENK.unbind(), strict=True):
        if count and accumulate:
            out.addmm_(grad, x_e)
        elif count:
            torch.mm(grad, x_e, out=out)
        elif not accumulate:
            out.zero_()


def _forward(x_MK: Tensor, w_ENK: Tensor, offsets_E: Tensor, _arch: str) -> Tensor:
    return product_by_expert(x_MK, w_ENK, offsets_E)


# ---- on a GPU, what the kernels cannot do: the same in a number of products that no offset decides ----


class _Pieces:
    """Each expert's rows cut into pieces of ceil(M / E): at most 2 E of them, whoever has the rows."""

    def __init__(self, offsets_E: Tensor, num_rows: int) -> None:
        num_experts, device = len(offsets_E), offsets_E.device
        size = max(-(-num_rows // num_experts), 1)
        end_E = offsets_E.long().cummax(0).values.clamp(0, num_rows)
        start_E = F.pad(end_E[:-1], (1, 0))
        last_E = (end_E - start_E).add(size - 1).div(size, rounding_mode="floor").cumsum(0)
        self.first_E = F.pad(last_E[:-1], (1, 0))
        piece = torch.arange(2 * num_experts, device=device)
        self.expert = torch.searchsorted(last_E, piece, right=True).clamp(max=num_experts - 1)
        begin = start_E[self.expert] + (piece - self.first_E[self.expert]) * size
        self._row = begin[:, None] + torch.arange(size, device=device)
        self._is_row = self._row < end_E[self.expert][:, None]
        row_M = torch.arange(num_rows, device=device)
        expert_M = torch.searchsorted(end_E, row_M, right=True).clamp(max=num_experts - 1)
        rank_M = row_M - start_E[expert_M]
        # Row rank % size of piece rank // size of its expert: as pieces are of `size` rows, a sum.
        self._place_M = (self.first_E[expert_M] * size + rank_M).clamp(max=self._row.numel() - 1)
        self._is_unused_M = row_M >= end_E[-1]

    def split(self, x_MK: Tensor) -> Tensor:
        """[pieces, size, K], zero where a piece has no row."""
        row = self._row.clamp(max=len(x_MK) - 1)
        x = x_MK.index_select(0, row.flatten()).view(*row.shape, x_MK.shape[1])
        return x.masked_fill_(~self._is_row[..., None], 0)

    def join(self, y: Tensor) -> Tensor:
        """[pieces, size, N] -> y_MN, zero in the rows of no expert."""
        y_MN = y.flatten(0, 1).index_select(0, self._place_M)
        return y_MN.masked_fill_(self._is_unused_M[:, None], 0)


def product_in_pieces(x_MK: Tensor, w_ENK: Tensor, offsets_E: Tensor) -> Tensor:
    """`product_by_expert` without a host read: at most twice its work, on a copy of twice the weights."""
    if not x_MK.shape[0] or not w_ENK.shape[0]:
        return x_MK.new_zeros(x_MK.shape[0], w_ENK.shape[1])
    pieces = _Pieces(offsets_E, x_MK.shape[0])
    w = w_ENK.index_select(0, pieces.expert)
    return pieces.join(torch.bmm(pieces.split(x_MK), w.transpose(1, 2)))


def _write_in_pieces(
    out_ENK: Tensor, grad_MN: Tensor, x_MK: Tensor, offsets_E: Tensor, accumulate: bool
) -> None:
    dtype = accumulate_dtype(x_MK.dtype)
    grad_ENK = out_ENK.new_zeros(out_ENK.shape, dtype=dtype)
    if x_MK.shape[0] and out_ENK.numel():
        pieces = _Pieces(offsets_E, x_MK.shape[0])
        grad, x = pieces.split(grad_MN.to(dtype)), pieces.split(x_MK.to(dtype))
        products = torch.bmm(grad.transpose(1, 2), x)
        # The sum over each expert's pieces, always in the same order.
        every_piece = torch.arange(len(products), device=products.device)
        grad_ENK = F.embedding_bag(every_piece, products.flatten(1), pieces.first_E, mode="sum")
        grad_ENK = grad_ENK.view(out_ENK.shape)
    if accumulate:
        out_ENK.add_(grad_ENK)
    else:
        out_ENK.copy_(grad_ENK)


# ---- kernels ----


def stored_weights(w_ENK: Tensor) -> tuple[Tensor, bool]:
    """The weights as they lie in memory, and whether that is [E, K, N]; a copy only of neither form."""
    if not w_ENK.is_contiguous() and w_ENK.transpose(1, 2).is_contiguous():
        return aligned(w_ENK.transpose(1, 2)), True
    return aligned(w_ENK), False


def _forward_kernel(x_MK: Tensor, w_ENK: Tensor, offsets_E: Tensor, arch: str) -> Tensor:
    num_experts, num_columns, depth = w_ENK.shape
    if runs_reference(arch, x_MK, num_experts, N=num_columns, K=depth):
        return product_in_pieces(x_MK, w_ENK, offsets_E)
    y_MN = _forward_fake(x_MK, w_ENK)
    w, is_w_transposed = stored_weights(w_ENK)
    native._C.grouped_gemm_forward(
        aligned(x_MK), w, y_MN, offsets_E.contiguous(), None, is_w_transposed, arch
    )
    return y_MN


def _write_kernel(
    out_ENK: Tensor,
    grad_MN: Tensor,
    x: Tensor,
    offsets_E: Tensor,
    token_M: Tensor | None,
    accumulate: bool,
    arch: str,
) -> None:
    num_experts, num_columns, depth = out_ENK.shape
    if runs_reference(arch, x, num_experts, N=num_columns, K=depth):
        return _write_in_pieces(out_ENK, grad_MN, rows_of(x, token_M), offsets_E, accumulate)
    x, token_M = loaded_rows("weight_gradient", x, token_M, (num_experts, num_columns, depth), arch)
    native._C.grouped_gemm_weight_gradient(
        *(aligned(grad_MN), x, out_ENK, offsets_E.contiguous(), token_M, accumulate, arch)
    )


def _into_new(write: Callable[..., None]) -> Callable[..., Tensor]:
    def weight_gradient(
        grad_MN: Tensor, x: Tensor, offsets_E: Tensor, token_M: Tensor | None, arch: str
    ) -> Tensor:
        grad_w = _weight_gradient_fake(grad_MN, x, offsets_E)
        write(grad_w, grad_MN, x, offsets_E, token_M, False, arch)
        return grad_w

    return weight_gradient


def _forward_fake(x_MK: Tensor, w_ENK: Tensor, *_: Any) -> Tensor:
    return x_MK.new_empty(x_MK.shape[0], w_ENK.shape[1])


def _weight_gradient_fake(grad_MN: Tensor, x: Tensor, offsets_E: Tensor, *_: Any) -> Tensor:
    return x.new_empty(offsets_E.shape[0], grad_MN.shape[1], x.shape[1])


def _write_fake(*_: Any) -> None:
    return None


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_MK, w_ENK, offsets_E, ctx.arch = inputs
    needs_x, needs_w = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x_MK if needs_w else None, w_ENK if needs_x else None, offsets_E)


def _differentiate(ctx: Any, grad_MN: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("grouped_gemm")
    x_MK, w_ENK, offsets_E = ctx.saved_tensors
    grad_x = grad_w = None
    if w_ENK is not None:
        grad_x = torch.ops.dscoder.grouped_gemm.default(grad_MN, w_ENK.transpose(1, 2), offsets_E, ctx.arch)
    if x_MK is not None:
        grad_w = torch.ops.dscoder.grouped_gemm_weight_gradient.default(
            grad_MN, x_MK, offsets_E, None, ctx.arch
        )
    return grad_x, grad_w, None, None


define_op(
    "grouped_gemm(Tensor x, Tensor w, Tensor offsets, str arch) -> Tensor",
    reference=_forward,
    kernel=_forward_kernel,
    fake=_forward_fake,
)
define_op(
    # token: the row of x for each row of grad; without it, the same row.
    "grouped_gemm_weight_gradient(Tensor grad, Tensor x, Tensor offsets, Tensor? token, str arch) -> Tensor",
    reference=_into_new(_write_by_expert),
    kernel=_into_new(_write_kernel),
    fake=_weight_gradient_fake,
)
define_op(
    "grouped_gemm_weight_gradient_into(Tensor(a!) out, Tensor grad, Tensor x, Tensor offsets, Tensor? token,"
    " bool accumulate, str arch) -> ()",
    reference=_write_by_expert,
    kernel=_write_kernel,
    fake=_write_fake,
)
define_gradient("grouped_gemm", save=_save, backward=_differentiate)
