"""rope: rotate pairs of query and key elements by an angle that grows with the position (RoFormer eq. 34).

Which elements pair up differs: DeepSeek-V2 rotates neighbours (0, 1), (2, 3), ..; LLaMA-style checkpoints
(DeepSeek-Coder v1) rotate (i, i + r / 2).
"""

from typing import Any

import torch
from torch import Tensor

from dscoder.ops.library import (
    FLOATS,
    accumulate_dtype,
    aligned,
    check_devices,
    check_shape,
    check_tensor,
    define_gradient,
    define_op,
    spread_rows,
)
from dscoder.runtime import native


def rope(
    q_THr: Tensor,
    k_TGr: Tensor,
    cos_Lf: Tensor,
    sin_Lf: Tensor,
    positions_T: Tensor,
    *,
    interleaved: bool = True,
) -> tuple[Tensor, Tensor]:
    """Rotate token t's heads by the angles in row positions_T[t] of the tables; f = r / 2.

    `q_THr` and `k_TGr` may have different head counts (V2's key has one head for all). Computed in float32.

    Returns:
        New tensors with the shapes and dtypes of q and k. Differentiable in both.
    """
    op = "rope"
    check_tensor(op, "q", q_THr, num_dims=3, dtypes=FLOATS)
    check_tensor(op, "k", k_TGr, num_dims=3, dtypes=(q_THr.dtype,))
    num_tokens, _, width = q_THr.shape
    if width % 2:
        raise ValueError(f"{op}: q must have an even last dimension, got {width}")
    check_shape(op, "k", k_TGr, (num_tokens, k_TGr.shape[1], width))
    check_angles(op, (cos_Lf, sin_Lf, positions_T), num_tokens=num_tokens, width=width)
    check_devices(op, q=q_THr, k=k_TGr, cos=cos_Lf, sin=sin_Lf, positions=positions_T)
    q: Tensor
    k: Tensor
    q, k = torch.ops.dscoder.rope.default(q_THr, k_TGr, cos_Lf, sin_Lf, positions_T, interleaved, False)
    return q, k


def check_angles(op: str, angles: tuple[Tensor, Tensor, Tensor], *, num_tokens: int, width: int) -> None:
    """Of cos, sin and positions: TypeError or ValueError unless they hold angles for heads of this width."""
    cos_Lf, sin_Lf, positions_T = angles
    table_dtypes = (torch.float32, torch.float64)
    check_tensor(op, "cos", cos_Lf, num_dims=2, dtypes=table_dtypes)
    check_tensor(op, "sin", sin_Lf, num_dims=2, dtypes=table_dtypes)
    check_shape(op, "cos", cos_Lf, (cos_Lf.shape[0], width // 2))
    check_shape(op, "sin", sin_Lf, tuple(cos_Lf.shape))
    check_tensor(op, "positions", positions_T, num_dims=1, dtypes=(torch.int32, torch.int64))
    check_shape(op, "positions", positions_T, (num_tokens,))


def angles_at(
    cos_Lf: Tensor, sin_Lf: Tensor, positions_T: Tensor, *, dtype: torch.dtype, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Each token's rows of the tables, [T, 1, f], in `dtype`; `inverse`: of the opposite angles."""
    cos_T1f = cos_Lf.index_select(0, positions_T).unsqueeze(1).to(dtype)
    sin_T1f = sin_Lf.index_select(0, positions_T).unsqueeze(1).to(dtype)
    return cos_T1f, -sin_T1f if inverse else sin_T1f


def rotate_neighbours(x: Tensor, cos_T1f: Tensor, sin_T1f: Tensor) -> Tensor:
    """The pairs (0, 1), (2, 3), .. of the last dimension turned, in the dtype of all three."""
    # Complex numbers: one pass, where writing the two halves of the pairs apart takes six.
    x = x.contiguous()
    if x.storage_offset() % 2:
        # One head of one token counts as contiguous wherever it starts; a complex view must start evenly.
        x = x.clone()
    pairs = torch.view_as_complex(x.view(*x.shape[:2], x.shape[2] // 2, 2))
    return torch.view_as_real(pairs * torch.complex(cos_T1f, sin_T1f)).view(x.shape)


def _rotate_halves(x: Tensor, cos_T1f: Tensor, sin_T1f: Tensor) -> Tensor:
    cos_T1r = torch.cat([cos_T1f, cos_T1f], dim=-1)
    sin_T1r = torch.cat([-sin_T1f, sin_T1f], dim=-1)
    return (x * cos_T1r).addcmul_(x.roll(x.shape[2] // 2, dims=-1), sin_T1r)


def _forward(
    q_THr: Tensor,
    k_TGr: Tensor,
    cos_Lf: Tensor,
    sin_Lf: Tensor,
    positions_T: Tensor,
    interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(q_THr.dtype)
    angles = angles_at(cos_Lf, sin_Lf, positions_T, dtype=dtype, inverse=inverse)
    rotate = rotate_neighbours if interleaved else _rotate_halves
    q, k = (rotate(x.to(dtype), *angles).to(x.dtype) for x in (q_THr, k_TGr))
    return q, k


def holds_words(dtype: torch.dtype, *widths: int) -> bool:
    """Whether kernels can take rows of these widths: whole words of 16 bytes."""
    return dtype != torch.float64 and not any(width % (16 // dtype.itemsize) for width in widths)


def kernel_angles(cos_Lf: Tensor, sin_Lf: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tables and positions as kernels take them; copies only where they are not so."""
    return aligned(cos_Lf.float()), aligned(sin_Lf.float()), positions_T.long().contiguous()


def _forward_kernel(
    q_THr: Tensor,
    k_TGr: Tensor,
    cos_Lf: Tensor,
    sin_Lf: Tensor,
    positions_T: Tensor,
    interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    num_pairs = q_THr.shape[2] // 2
    if not holds_words(q_THr.dtype, *((2 * num_pairs,) if interleaved else (num_pairs,))):
        return _forward(q_THr, k_TGr, cos_Lf, sin_Lf, positions_T, interleaved, inverse)
    q, k = _fake(q_THr, k_TGr)
    heads = (spread_rows(q_THr, num_dense=1), spread_rows(k_TGr, num_dense=1))
    angles = kernel_angles(cos_Lf, sin_Lf, positions_T)
    native._C.rope_forward(*heads, *angles, q, k, interleaved, inverse)
    return q, k


def _fake(q_THr: Tensor, k_TGr: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q_THr.new_empty(q_THr.shape), k_TGr.new_empty(k_TGr.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *_, cos_Lf, sin_Lf, positions_T, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos_Lf, sin_Lf, positions_T)
    ctx.set_materialize_grads(True)  # one call rotates both


def _differentiate(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    # A rotation's transpose is the rotation back.
    grads = torch.ops.dscoder.rope.default(
        grad_q, grad_k, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse
    )
    return (*grads, None, None, None, None, None)


define_op(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor positions, bool interleaved, bool inverse)"
    " -> (Tensor q, Tensor k)",
    reference=_forward,
    kernel=_forward_kernel,
    fake=_fake,
)
define_gradient("rope", save=_save, backward=_differentiate)
