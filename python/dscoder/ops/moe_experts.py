"""moe_experts: the routed experts' SwiGLU networks over rows in expert order (FFN_i of DeepSeek-V2 eq 20).

On a GPU two grouped products: the first gathers its rows from the tokens as it loads them and applies the
SwiGLU to its sums, so that neither the rows in expert order nor anything between its product and the second
one's input is written but what the gradient reads.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dscoder.ops.grouped_gemm import product_by_expert, product_in_pieces, stored_weights
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
from dscoder.ops.moe_permute import PermuteHandle
from dscoder.runtime import native

OP = "moe_experts"

Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def moe_experts(
    x_TD: Tensor,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    handle: PermuteHandle | Tensor,
    *,
    gathers: bool | None = None,
    arch: str = "auto",
) -> Tensor:
    """y[m] = down[e] @ (silu(gate) * up), [gate, up] = gate_up[e] @ x[m], for the rows m of expert e.

    `gate_up_EFD` is [E, 2 F, D], the gate's rows first; `down_EDF` is [E, D, F]. With the handle of
    `moe_permute_maps`, `x_TD` holds tokens and row m is the token that the handle puts there; with end
    offsets_E (int32) alone it holds the rows, in expert order already. The rows from offsets_E[-1] on come
    out zero.

    `gathers`: the first product reads the tokens where they lie (True), or from a copy in expert order
    that is kept for the gradient (False). Default: True for kernels, of which those of sm_90 make a copy as
    they need it and keep none, False for the reference. `arch` as in `grouped_gemm`: kernels take bfloat16
    and float16, D and F multiples of 8 and at most 512 experts.

    [gate, up] and the network's hidden rows are rounded to x's dtype, what is between them is float32.

    Returns:
        y_MD in x's dtype, for `moe_unpermute`. Differentiable in x, gate_up and down, once; an expert without
        rows gets zero gradients. Kept for that: x_TD (or the copy of its rows, M * D), [gate, up] (M * 2 F),
        the hidden rows (M * F) and the maps; without a gradient nothing is.
    """
    check_tensor(OP, "x", x_TD, num_dims=2, dtypes=FLOATS)
    check_tensor(OP, "gate_up", gate_up_EFD, num_dims=3, dtypes=(x_TD.dtype,))
    check_tensor(OP, "down", down_EDF, num_dims=3, dtypes=(x_TD.dtype,))
    offsets_E = handle.offsets_E if isinstance(handle, PermuteHandle) else handle
    check_tensor(OP, "offsets", offsets_E, num_dims=1, dtypes=(torch.int32,))
    num_experts, width, expert_width = down_EDF.shape
    check_shape(OP, "down", down_EDF, (num_experts, x_TD.shape[1], expert_width))
    check_shape(OP, "gate_up", gate_up_EFD, (num_experts, 2 * expert_width, width))
    check_shape(OP, "offsets", offsets_E, (num_experts,))
    check_devices(OP, x=x_TD, gate_up=gate_up_EFD, down=down_EDF, offsets=offsets_E)
    check_arch(OP, arch, x_TD, lambda: kernel_refusal(x_TD, num_experts, D=width, F=expert_width))
    weights = (gate_up_EFD, down_EDF)
    if not isinstance(handle, PermuteHandle):
        return _experts(x_TD, *weights, offsets_E, None, None, arch)
    row_TK, token_M = handle.row_TK, handle.token_M
    check_tensor(OP, "row", row_TK, num_dims=2, dtypes=(torch.int32,))
    check_shape(OP, "row", row_TK, (x_TD.shape[0], row_TK.shape[1]))
    check_tensor(OP, "token", token_M, num_dims=1, dtypes=(torch.int32,))
    check_shape(OP, "token", token_M, (row_TK.numel(),))
    check_devices(OP, x=x_TD, row=row_TK, token=token_M)
    if gathers is None:
        on_cpu = x_TD.device.type == "cpu"
        gathers = not (on_cpu or runs_reference(arch, x_TD, num_experts, D=width, F=expert_width))
    if gathers:
        return _experts(x_TD, *weights, offsets_E, row_TK, token_M.contiguous(), arch)
    x_MD = torch.ops.dscoder.moe_experts_rows.default(x_TD, row_TK, token_M)
    return _experts(x_MD, *weights, offsets_E, None, None, arch)


def _experts(
    x: Tensor,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    offsets_E: Tensor,
    row_TK: Tensor | None,
    token_M: Tensor | None,
    arch: str,
) -> Tensor:
    needs_gradient = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (x, gate_up_EFD, down_EDF)
    )
    y_MD: Tensor
    y_MD, _, _ = torch.ops.dscoder.moe_experts.default(
        x, gate_up_EFD, down_EDF, offsets_E, row_TK, token_M, needs_gradient, arch
    )
    return y_MD


# ---- references ----


def _hidden(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.to(accumulate_dtype(gate_up.dtype)).chunk(2, dim=-1)
    return F.silu(gate).mul_(up).to(gate_up.dtype)


def _forward_by(product: Product) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The reference on grouped products of this kind."""

    def forward(
        x: Tensor,
        gate_up_EFD: Tensor,
        down_EDF: Tensor,
        offsets_E: Tensor,
        _row: Tensor | None,
        token_M: Tensor | None,
        keeps: bool,
        _arch: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        gate_up = product(rows_of(x, token_M), gate_up_EFD, offsets_E)
        hidden = _hidden(gate_up)
        y_MD = product(hidden, down_EDF, offsets_E)
        if keeps:
            return y_MD, gate_up, hidden
        return y_MD, gate_up.new_empty(0), hidden.new_empty(0)

    return forward


def _gate_up_gradient_by(product: Product) -> Callable[..., Tensor]:
    """The reference of the gradient of [gate, up], on grouped products of this kind."""

    def backward(grad_MD: Tensor, down_EDF: Tensor, gate_up: Tensor, offsets_E: Tensor, _arch: str) -> Tensor:
        dtype = accumulate_dtype(gate_up.dtype)
        grad = product(grad_MD, down_EDF.transpose(1, 2), offsets_E).to(dtype)
        gate, up = gate_up.to(dtype).chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up, dtype=dtype)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_gate_up.to(gate_up.dtype)

    return backward


def _rows(x_TD: Tensor, _row: Tensor, token_M: Tensor) -> Tensor:
    return x_TD.index_select(0, token_M)


# ---- kernels ----


def _forward_kernel(
    x: Tensor,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    offsets_E: Tensor,
    row_TK: Tensor | None,
    token_M: Tensor | None,
    keeps: bool,
    arch: str,
) -> tuple[Tensor, Tensor, Tensor]:
    num_experts, width, expert_width = down_EDF.shape
    args = (x, gate_up_EFD, down_EDF, offsets_E, row_TK, token_M, keeps, arch)
    if runs_reference(arch, x, num_experts, D=width, F=expert_width):
        return _reference_in_pieces(*args)
    y_MD, gate_up, kept_hidden = _forward_fake(*args)
    hidden = kept_hidden if keeps else x.new_empty(y_MD.shape[0], expert_width)
    offsets_E = offsets_E.contiguous()
    x, token_M = loaded_rows("swiglu", x, token_M, (num_experts, expert_width, width), arch)
    native._C.grouped_swiglu_forward(
        *(x, aligned(gate_up_EFD), hidden, gate_up if keeps else None, offsets_E, token_M, arch)
    )
    down, is_transposed = stored_weights(down_EDF)
    native._C.grouped_gemm_forward(hidden, down, y_MD, offsets_E, None, is_transposed, arch)
    return y_MD, gate_up, kept_hidden


def _gate_up_gradient_kernel(
    grad_MD: Tensor, down_EDF: Tensor, gate_up: Tensor, offsets_E: Tensor, arch: str
) -> Tensor:
    num_experts, width, expert_width = down_EDF.shape
    if runs_reference(arch, grad_MD, num_experts, D=width, F=expert_width):
        return _gate_up_gradient_in_pieces(grad_MD, down_EDF, gate_up, offsets_E, arch)
    grad_gate_up = torch.empty_like(gate_up)
    native._C.grouped_swiglu_backward(
        *(aligned(grad_MD), aligned(down_EDF), gate_up, grad_gate_up, offsets_E.contiguous(), arch)
    )
    return grad_gate_up


_reference_in_pieces = _forward_by(product_in_pieces)
_gate_up_gradient_in_pieces = _gate_up_gradient_by(product_in_pieces)


# ---- tracing and gradients ----


def _forward_fake(
    x: Tensor,
    _gate_up: Tensor,
    down_EDF: Tensor,
    _offsets: Tensor,
    _row: Tensor | None,
    token_M: Tensor | None,
    keeps: bool,
    _arch: str,
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows = x.shape[0] if token_M is None else token_M.shape[0]
    _, width, expert_width = down_EDF.shape
    y_MD = x.new_empty(num_rows, width)
    if not keeps:
        return y_MD, x.new_empty(0), x.new_empty(0)
    return y_MD, x.new_empty(num_rows, 2 * expert_width), x.new_empty(num_rows, expert_width)


def _gate_up_gradient_fake(_grad: Tensor, _down: Tensor, gate_up: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(gate_up)


def _rows_fake(x_TD: Tensor, _row: Tensor, token_M: Tensor) -> Tensor:
    return x_TD.new_empty(token_M.shape[0], x_TD.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, gate_up_EFD, down_EDF, offsets_E, row_TK, token_M, keeps, ctx.arch = inputs
    if not keeps:
        raise ValueError(f"{OP}: keeps must be True where a gradient is asked for, got {keeps}")
    _, gate_up, hidden = output
    ctx.mark_non_differentiable(gate_up, hidden)
    ctx.set_materialize_grads(False)
    needs_x, needs_gate_up, needs_down = ctx.needs_input_grad[:3]
    ctx.save_for_backward(
        x if needs_gate_up else None,
        gate_up_EFD if needs_x else None,
        down_EDF if needs_x or needs_gate_up else None,
        gate_up if needs_x or needs_gate_up else None,
        hidden if needs_down else None,
        *(offsets_E, row_TK, token_M),
    )


def _differentiate(ctx: Any, grad_MD: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    refuse_second_derivative(OP)
    if grad_MD is None:
        return (None,) * 8
    x, gate_up_EFD, down_EDF, gate_up, hidden, offsets_E, row_TK, token_M = ctx.saved_tensors
    library, arch = torch.ops.dscoder, ctx.arch
    grad_x = grad_gate_up = grad_down = None
    if hidden is not None:
        grad_down = library.grouped_gemm_weight_gradient.default(grad_MD, hidden, offsets_E, None, arch)
    if gate_up is not None:
        grad = library.moe_experts_gate_up_gradient.default(grad_MD, down_EDF, gate_up, offsets_E, arch)
    if x is not None:
        grad_gate_up = library.grouped_gemm_weight_gradient.default(grad, x, offsets_E, token_M, arch)
    if gate_up_EFD is not None:
        grad_x = library.grouped_gemm.default(grad, gate_up_EFD.transpose(1, 2), offsets_E, arch)
    if grad_x is not None and row_TK is not None:
        grad_x = library.moe_permute_backward.default(grad_x, row_TK)
    return grad_x, grad_gate_up, grad_down, None, None, None, None, None


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _differentiate_rows(ctx: Any, grad_MD: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative(OP)
    (row_TK,) = ctx.saved_tensors
    return torch.ops.dscoder.moe_permute_backward.default(grad_MD, row_TK), None, None


define_op(
    # token: the row of x for each row in expert order, and row its inverse; without them, the same row.
    "moe_experts(Tensor x, Tensor gate_up, Tensor down, Tensor offsets, Tensor? row, Tensor? token,"
    " bool keeps, str arch) -> (Tensor y, Tensor gate_up, Tensor hidden)",
    reference=_forward_by(product_by_expert),
    kernel=_forward_kernel,
    fake=_forward_fake,
)
define_op(
    "moe_experts_gate_up_gradient(Tensor grad, Tensor down, Tensor gate_up, Tensor offsets, str arch)"
    " -> Tensor",
    reference=_gate_up_gradient_by(product_by_expert),
    kernel=_gate_up_gradient_kernel,
    fake=_gate_up_gradient_fake,
)
define_op(
    "moe_experts_rows(Tensor x, Tensor row, Tensor token) -> Tensor",
    reference=_rows,
    kernel=_rows,
    fake=_rows_fake,
)
define_gradient("moe_experts", save=_save, backward=_differentiate)
define_gradient("moe_experts_rows", save=_save_rows, backward=_differentiate_rows)
