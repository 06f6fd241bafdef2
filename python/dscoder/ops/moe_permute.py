"""moe_permute: copy every token once per chosen expert, in expert order, as grouped_gemm wants its rows."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dscoder.ops.library import (
    FLOATS,
    check_at_least,
    check_devices,
    check_shape,
    check_tensor,
    define_gradient,
    define_op,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PermuteHandle:
    """Where the rows of a permutation lie; `moe_unpermute` and `grouped_gemm` read it on the device."""

    offsets_E: Tensor  # int32, row after the last one of each expert
    row_TK: Tensor  # int32, row of each token's k-th choice; -1: dropped


def moe_permute(x_TD: Tensor, idx_TK: Tensor, *, num_experts: int) -> tuple[Tensor, PermuteHandle]:
    """Rows of `x_TD` in expert order.

    Row `handle.row_TK[t, k]` of the result is token t, for expert `idx_TK[t, k]`. An expert's rows keep the
    order of the tokens. An index outside [0, num_experts), -1 by custom, drops the choice: it gets no row.

    Returns:
        x_MD with M = T * K always (rows from `handle.offsets_E[-1]` on are zero), and the handle.
        Differentiable in x: a token's gradient is the sum over its rows.
    """
    op = "moe_permute"
    check_tensor(op, "x", x_TD, num_dims=2, dtypes=FLOATS)
    check_tensor(op, "idx", idx_TK, num_dims=2, dtypes=(torch.int32,))
    check_shape(op, "idx", idx_TK, (x_TD.shape[0], idx_TK.shape[1]))
    check_devices(op, x=x_TD, idx=idx_TK)
    check_at_least(op, "num_experts", num_experts, 1)
    x_MD: Tensor
    x_MD, offsets_E, row_TK = torch.ops.dscoder.moe_permute.default(x_TD, idx_TK, num_experts)
    return x_MD, PermuteHandle(offsets_E=offsets_E, row_TK=row_TK)


def _forward(x_TD: Tensor, idx_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    is_dropped_TK = (idx_TK < 0) | (idx_TK >= num_experts)
    # Dropped choices sort behind the last expert.
    expert_M, slot_M = idx_TK.masked_fill(is_dropped_TK, num_experts).flatten().sort(stable=True)
    experts = torch.arange(num_experts, dtype=torch.int32, device=idx_TK.device)
    offsets_E = torch.searchsorted(expert_M, experts, right=True, out_int32=True)
    num_rows = idx_TK.numel()
    row_M = torch.empty_like(slot_M, dtype=torch.int32)
    row_M[slot_M] = torch.arange(num_rows, dtype=torch.int32, device=idx_TK.device)
    x_MD = x_TD.index_select(0, slot_M // max(idx_TK.shape[1], 1))
    x_MD[int(offsets_E[-1]) :] = 0
    return x_MD, offsets_E, row_M.view(idx_TK.shape).masked_fill_(is_dropped_TK, -1)


def _fake(x_TD: Tensor, idx_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    x_MD = x_TD.new_empty(idx_TK.shape[0] * idx_TK.shape[1], x_TD.shape[1])
    return x_MD, idx_TK.new_empty(num_experts), idx_TK.new_empty(idx_TK.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[2])


def _differentiate(ctx: Any, grad_MD: Tensor, _offsets: Tensor, _row: Tensor) -> tuple[Tensor | None, ...]:
    (row_TK,) = ctx.saved_tensors
    ones_TK = torch.ones(row_TK.shape, dtype=torch.float32, device=row_TK.device)
    return torch.ops.dscoder.moe_unpermute.default(grad_MD, ones_TK, row_TK), None, None


define_op(
    "moe_permute(Tensor x, Tensor idx, int num_experts) -> (Tensor x, Tensor offsets, Tensor row)",
    reference=_forward,
    fake=_fake,
)
define_gradient("moe_permute", save=_save, backward=_differentiate)
