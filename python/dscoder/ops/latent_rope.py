"""latent_rope: what latent attention does to its projections before it attends (DeepSeek-V2 eqs 9-15).

The latent's RMSNorm, and the rotation of neighbours in the shared key and in each query head's last
elements, in one pass over both.
"""

from typing import Any

import torch
from torch import Tensor

from dscoder.ops.library import (
    FLOATS,
    accumulate_dtype,
    aligned,
    check_at_least,
    check_devices,
    check_number,
    check_shape,
    check_tensor,
    define_gradient,
    define_op,
    refuse_second_derivative,
    spread_rows,
)
from dscoder.ops.rope import angles_at, check_angles, holds_words, kernel_angles, rotate_neighbours
from dscoder.runtime import native

_MAX_LATENT_WIDTH = 512  # of the kernels: a warp holds a row in registers


def latent_rope(
    query_THd: Tensor,
    latent_Td: Tensor,
    weight_C: Tensor,
    cos_Lf: Tensor,
    sin_Lf: Tensor,
    positions_T: Tensor,
    *,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Norm the latent, rotate the shared key and the queries' last r = 2 f elements.

    A row of `latent_Td` is C + r wide: the latent, then the key that all heads share; the query's heads are
    n + r wide. Both may be views of one projection. Token t turns by the angles in row positions_T[t] of the
    tables. A position outside them is an error on the host, NaN from the kernels.

    Returns:
        New tensors: the query, its first n columns as they were, and the rows: latent / sqrt(mean(latent^2)
        + eps) * weight, computed in float32 and rounded once, then the rotated key. Differentiable in query,
        latent and weight, once.
    """
    op = "latent_rope"
    check_latent_rope(op, query_THd, latent_Td, weight_C, (cos_Lf, sin_Lf, positions_T), eps)
    query: Tensor
    row_Td: Tensor
    query, row_Td, _ = torch.ops.dscoder.latent_rope.default(
        query_THd, latent_Td, weight_C, cos_Lf, sin_Lf, positions_T, eps
    )
    return query, row_Td


def check_latent_rope(
    op: str,
    query_THd: Tensor,
    latent_Td: Tensor,
    weight_C: Tensor,
    angles: tuple[Tensor, Tensor, Tensor],
    eps: float,
) -> None:
    """What `latent_rope` and `latent_append` ask of the arguments that they share."""
    check_tensor(op, "query", query_THd, num_dims=3, dtypes=FLOATS)
    check_tensor(op, "latent", latent_Td, num_dims=2, dtypes=(query_THd.dtype,))
    check_tensor(op, "weight", weight_C, num_dims=1, dtypes=FLOATS)
    num_tokens, _, head_width = query_THd.shape
    check_shape(op, "latent", latent_Td, (num_tokens, latent_Td.shape[1]))
    check_at_least(op, "the number of weights", weight_C.shape[0], 1)
    rope_width = latent_Td.shape[1] - weight_C.shape[0]
    if rope_width < 0 or rope_width % 2:
        raise ValueError(
            f"{op}: latent must be wider than weight by an even number of columns,"
            f" got {latent_Td.shape[1]} and {weight_C.shape[0]}"
        )
    if head_width < rope_width:
        raise ValueError(f"{op}: query must be at least {rope_width} wide, got {head_width}")
    check_angles(op, angles, num_tokens=num_tokens, width=rope_width)
    check_number(op, "eps", eps)
    cos_Lf, sin_Lf, positions_T = angles
    check_devices(
        op,
        query=query_THd,
        latent=latent_Td,
        weight=weight_C,
        cos=cos_Lf,
        sin=sin_Lf,
        positions=positions_T,
    )


# ---- references ----


def rotated(x_THr: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Neighbours turned in the dtype of the angles, rounded to the dtype of x."""
    return rotate_neighbours(x_THr.to(angles[0].dtype), *angles).to(x_THr.dtype)


def normed(latent_TC: Tensor, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The latent's RMSNorm and 1 / rms, [T, 1], in float32 or wider."""
    dtype = accumulate_dtype(latent_TC.dtype)
    length_T1 = torch.linalg.vector_norm(latent_TC, dim=-1, keepdim=True, dtype=dtype)
    scale_T1: Tensor = length_T1.square_().mul_(1.0 / latent_TC.shape[-1]).add_(eps).rsqrt_()
    out_TC: Tensor = (latent_TC * scale_T1).mul_(weight_C).to(latent_TC.dtype)
    return out_TC, scale_T1


def _turn_query(query_THd: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    out_THd = query_THd.new_empty(query_THd.shape)
    first = query_THd.shape[-1] - 2 * angles[0].shape[-1]
    out_THd[..., :first] = query_THd[..., :first]
    out_THd[..., first:] = rotated(query_THd[..., first:], angles)
    return out_THd


def _forward(
    query_THd: Tensor,
    latent_Td: Tensor,
    weight_C: Tensor,
    cos_Lf: Tensor,
    sin_Lf: Tensor,
    positions_T: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, width = accumulate_dtype(query_THd.dtype), weight_C.shape[0]
    angles = angles_at(cos_Lf, sin_Lf, positions_T, dtype=dtype, inverse=False)
    row_Td = latent_Td.new_empty(latent_Td.shape)
    row_Td[:, :width], scale_T1 = normed(latent_Td[:, :width], weight_C, eps)
    row_Td[:, width:] = rotated(latent_Td[:, None, width:], angles)[:, 0]
    return _turn_query(query_THd, angles), row_Td, scale_T1.squeeze(-1)


def _backward(
    grad_query_THd: Tensor,
    grad_row_Td: Tensor,
    latent_Td: Tensor,
    weight_C: Tensor,
    scale_T: Tensor,
    cos_Lf: Tensor,
    sin_Lf: Tensor,
    positions_T: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    width, scale_T1 = weight_C.shape[0], scale_T.unsqueeze(-1)
    angles = angles_at(cos_Lf, sin_Lf, positions_T, dtype=scale_T.dtype, inverse=True)
    latent_TC, grad_TC = latent_Td[:, :width], grad_row_Td[:, :width].to(scale_T.dtype)
    product_TC = grad_TC * latent_TC
    grad_weight_C = product_TC.t() @ scale_T
    # The part of the gradient along the latent changes only its length, which the norm takes out again.
    along_T1 = (product_TC @ weight_C.to(scale_T.dtype)).unsqueeze(-1)
    along_T1 = along_T1.mul_(scale_T1.square()).mul_(-1.0 / width)
    grad_latent_Td = latent_Td.new_empty(latent_Td.shape)
    grad_latent_Td[:, :width] = (grad_TC * weight_C).addcmul_(latent_TC, along_T1).mul_(scale_T1)
    grad_latent_Td[:, width:] = rotated(grad_row_Td[:, None, width:], angles)[:, 0]
    return _turn_query(grad_query_THd, angles), grad_latent_Td, grad_weight_C.to(weight_C.dtype)


# ---- kernels ----


def has_kernel(query_THd: Tensor, latent_Td: Tensor, weight_C: Tensor) -> bool:
    """Whether there are kernels for these widths and this dtype."""
    width = weight_C.shape[0]
    widths = (width, latent_Td.shape[1], query_THd.shape[2])
    return width <= _MAX_LATENT_WIDTH and holds_words(query_THd.dtype, *widths)


def kernel_projections(
    query_THd: Tensor, latent_Td: Tensor, weight_C: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, latent and weight as kernels take them; copies only where they are not so."""
    weight = weight_C if weight_C.dtype == latent_Td.dtype else weight_C.float()
    return spread_rows(query_THd, num_dense=2), spread_rows(latent_Td, num_dense=1), aligned(weight)


def _forward_kernel(
    query_THd: Tensor,
    latent_Td: Tensor,
    weight_C: Tensor,
    cos_Lf: Tensor,
    sin_Lf: Tensor,
    positions_T: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if not has_kernel(query_THd, latent_Td, weight_C):
        return _forward(query_THd, latent_Td, weight_C, cos_Lf, sin_Lf, positions_T, eps)
    outputs = _fake(query_THd, latent_Td)
    projections = kernel_projections(query_THd, latent_Td, weight_C)
    angles = kernel_angles(cos_Lf, sin_Lf, positions_T)
    native._C.latent_rope_forward(*projections, angles, *outputs, eps)
    return outputs


def _backward_kernel(
    grad_query_THd: Tensor,
    grad_row_Td: Tensor,
    latent_Td: Tensor,
    weight_C: Tensor,
    scale_T: Tensor,
    *angles: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    if not has_kernel(grad_query_THd, latent_Td, weight_C):
        return _backward(grad_query_THd, grad_row_Td, latent_Td, weight_C, scale_T, *angles)
    _, latent, weight = kernel_projections(grad_query_THd, latent_Td, weight_C)
    grad_query, grad_latent, _ = _backward_fake(grad_query_THd, grad_row_Td, latent_Td, weight_C)
    grad_weight_C = scale_T.new_empty(weight_C.shape)
    num_partials = native._C.latent_rope_num_partials(latent_Td.shape[0])
    partial_weight = scale_T.new_empty(num_partials, *weight_C.shape)
    native._C.latent_rope_backward(
        (aligned(grad_query_THd), aligned(grad_row_Td)),
        *(latent, weight, scale_T.contiguous(), kernel_angles(*angles), grad_query, grad_latent),
        (grad_weight_C, partial_weight),
    )
    return grad_query, grad_latent, grad_weight_C.to(weight_C.dtype)


def _fake(query_THd: Tensor, latent_Td: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    scale_T = latent_Td.new_empty(latent_Td.shape[0], dtype=accumulate_dtype(latent_Td.dtype))
    return query_THd.new_empty(query_THd.shape), latent_Td.new_empty(latent_Td.shape), scale_T


def _backward_fake(
    grad_query_THd: Tensor, _grad_row: Tensor, latent_Td: Tensor, weight_C: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    grad_query = grad_query_THd.new_empty(grad_query_THd.shape)
    return grad_query, latent_Td.new_empty(latent_Td.shape), weight_C.new_empty(weight_C.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, latent_Td, weight_C, cos_Lf, sin_Lf, positions_T, _ = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(latent_Td, weight_C, output[2], cos_Lf, sin_Lf, positions_T)
    ctx.set_materialize_grads(True)  # one call does both


def _differentiate(ctx: Any, grad_query: Tensor, grad_row: Tensor, _: None) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("latent_rope")
    grads = torch.ops.dscoder.latent_rope_backward.default(grad_query, grad_row, *ctx.saved_tensors)
    return (*grads, None, None, None, None)


define_op(
    # scale: 1 / rms of each latent, for the backward pass.
    "latent_rope(Tensor query, Tensor latent, Tensor weight, Tensor cos, Tensor sin, Tensor positions,"
    " float eps) -> (Tensor query, Tensor row, Tensor scale)",
    reference=_forward,
    kernel=_forward_kernel,
    fake=_fake,
)
define_op(
    "latent_rope_backward(Tensor grad_query, Tensor grad_row, Tensor latent, Tensor weight, Tensor scale,"
    " Tensor cos, Tensor sin, Tensor positions) -> (Tensor, Tensor, Tensor)",
    reference=_backward,
    kernel=_backward_kernel,
    fake=_backward_fake,
)
define_gradient("latent_rope", save=_save, backward=_differentiate)
