"""mla_decode_plan: which part of the GPU reads which rows of which sequence, for all layers of a step.

The rule is pure code (csrc/attention/mla_decode_plan.h), run by one small kernel on a GPU and by the host for
tensors on the CPU.
"""

import functools

import torch
from torch import Tensor

from dscoder.ops.library import (
    INT32_MAX,
    check_at_least,
    check_at_most,
    check_tensor,
    define_op,
    device_refusal,
    gpu_of,
)
from dscoder.runtime import native


def mla_decode_plan(seq_lens_B: Tensor, *, num_new: int, num_heads: int, max_rows: int) -> Tensor:
    """Deal the cached rows of all sequences out to the parts that `mla_decode` runs side by side.

    `seq_lens_B` (int32) as `mla_decode` takes it, `num_new` and `num_heads` the S and H of its query,
    `max_rows` the N * L rows that its page table has room for: longer sequences count as that long. Lengths
    are read on the device, and how many parts there are follows from the sizes and the GPU alone: captured
    in a CUDA graph, the plan follows the lengths of each replay. It serves every call on the same lengths,
    as the layers of one step are. One made for other lengths gives wrong results, and reads nothing wild.

    Returns:
        plan (int32, [parts + 1 + B, 2]): where each part begins, (sequence, block of 64 rows), then (B, 0);
        behind these the first and the last part that hold a piece of each sequence. No gradient.
    """
    op = "mla_decode_plan"
    check_tensor(op, "seq_lens", seq_lens_B, num_dims=1, dtypes=(torch.int32,))
    check_at_least(op, "num_new", num_new, 1)
    check_at_least(op, "num_heads", num_heads, 1)
    check_at_most(op, "num_new * num_heads", num_new * num_heads, INT32_MAX)
    check_at_least(op, "max_rows", max_rows, 0)
    plan: Tensor = torch.ops.dscoder.mla_decode_plan.default(seq_lens_B, num_new, num_heads, max_rows)
    return plan


@functools.cache
def _num_parts(num_new: int, num_heads: int, device: torch.device) -> int:
    num_sms = gpu_of(device)[2] if device.type == "cuda" else 1
    return native._C.mla_decode_num_parts(num_new, num_heads, num_sms)


def _forward(seq_lens_B: Tensor, num_new: int, num_heads: int, max_rows: int) -> Tensor:
    num_parts = _num_parts(num_new, num_heads, seq_lens_B.device)
    rows = native._C.mla_decode_plan_of(seq_lens_B.tolist(), num_parts, max_rows)
    return torch.tensor(rows, dtype=torch.int32, device=seq_lens_B.device)


def _forward_kernel(seq_lens_B: Tensor, num_new: int, num_heads: int, max_rows: int) -> Tensor:
    if device_refusal(seq_lens_B.device) is not None:
        return _forward(seq_lens_B, num_new, num_heads, max_rows)
    plan = _fake(seq_lens_B, num_new, num_heads, max_rows)
    native._C.mla_decode_plan(seq_lens_B.contiguous(), plan, max_rows)
    return plan


def _fake(seq_lens_B: Tensor, num_new: int, num_heads: int, _max_rows: int) -> Tensor:
    num_parts = _num_parts(num_new, num_heads, seq_lens_B.device)
    return seq_lens_B.new_empty(num_parts + 1 + seq_lens_B.shape[0], 2)


define_op(
    "mla_decode_plan(Tensor seq_lens, int num_new, int num_heads, SymInt max_rows) -> Tensor",
    reference=_forward,
    kernel=_forward_kernel,
    fake=_fake,
)
