"""mla_decode: absorbed latent attention over a paged cache (DeepSeek-V2 section 2.1 and appendix C).

The cache holds one row per token for all heads: the C-wide latent, then the r-wide rotated key. Queries
come multiplied into the latent space, so scores read whole rows and values are the rows' first C columns.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from dscoder.ops.library import (
    FLOATS,
    INT32_MAX,
    accumulate_dtype,
    aligned,
    check_arch,
    check_at_least,
    check_at_most,
    check_devices,
    check_number,
    check_shape,
    check_tensor,
    define_op,
    device_refusal,
    gpu_of,
)
from dscoder.runtime import native

KERNEL_DTYPES = (torch.bfloat16, torch.float16)
KERNEL_WIDTHS = (576, 512)  # of rows and of values
KERNEL_PAGE_SIZES = (16, 32, 64, 128)
_KERNEL_MULTIPLE = 8  # elements in the 16 bytes that the kernels copy at once
_BLOCK = 128  # new tokens multiplied with their sequence at once


def mla_decode(
    q_BSHd: Tensor,
    cache_PLd: Tensor,
    page_table_BN: Tensor,
    seq_lens_B: Tensor,
    *,
    value_dim: int,
    scale: float,
    plan: Tensor | None = None,
    arch: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of S new tokens per sequence over the pages of that sequence.

    Row j of sequence b lies in page page_table_BN[b, j // L] of the cache (L rows a page), at j % L.
    `seq_lens_B` (int32) counts the rows, the S new tokens' included: token s sees the first
    seq_lens_B[b] - S + s + 1. Slots of the table behind a sequence's last page may hold anything, and so
    may rows behind its last row; neither is used. A length beyond N * L is taken as N * L, the rows of a page
    that is not there as zeros. Lengths and table are read on the device.

    `plan` is what `mla_decode_plan` makes of the same lengths, B, S, H and N * L; without one each call makes
    its own. `arch` says what runs on a GPU (a CPU runs the reference, which needs no plan). "auto": kernels
    for bfloat16 and float16 rows 576 wide with values of 512, in pages of 16, 32, 64 or 128 rows, on compute
    capability 8.x and 9.0, else the reference, which waits for the lengths. "sm80", "sm90": these kernels,
    ValueError where they cannot. "reference": that. Pages may lie apart, and rows of the table too.

    Returns:
        out_BSHC in q's dtype (C = value_dim) and lse_BSH (float32; float64 for float64 q). A token that
        sees nothing (length 0, or padding in front of a short sequence) has out 0 and lse -inf. No gradient.

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1; plan and combination as FlashMLA splits them.
    """
    op = "mla_decode"
    check_tensor(op, "q", q_BSHd, num_dims=4, dtypes=FLOATS)
    check_tensor(op, "cache", cache_PLd, num_dims=3, dtypes=(q_BSHd.dtype,))
    check_tensor(op, "page_table", page_table_BN, num_dims=2, dtypes=(torch.int32,))
    check_tensor(op, "seq_lens", seq_lens_B, num_dims=1, dtypes=(torch.int32,))
    num_sequences, _, _, width = q_BSHd.shape
    check_shape(op, "cache", cache_PLd, (*cache_PLd.shape[:2], width))
    check_at_least(op, "num_pages", cache_PLd.shape[0], 1)
    check_at_least(op, "page_size", cache_PLd.shape[1], 1)
    check_shape(op, "page_table", page_table_BN, (num_sequences, page_table_BN.shape[1]))
    check_shape(op, "seq_lens", seq_lens_B, (num_sequences,))
    check_devices(op, q=q_BSHd, cache=cache_PLd, page_table=page_table_BN, seq_lens=seq_lens_B)
    check_at_least(op, "value_dim", value_dim, 1)
    if value_dim > width:
        raise ValueError(f"{op}: value_dim must be <= {width}, the width of q, got {value_dim}")
    check_number(op, "scale", scale)
    if plan is not None:
        _check_plan(op, plan, q_BSHd)
    check_arch(op, arch, q_BSHd, lambda: kernel_refusal(q_BSHd, cache_PLd, value_dim))
    out: Tensor
    lse: Tensor
    out, lse = torch.ops.dscoder.mla_decode.default(
        q_BSHd.detach(), cache_PLd.detach(), page_table_BN, seq_lens_B, plan, value_dim, scale, arch
    )
    return out, lse


def mla_decode_plan(seq_lens_B: Tensor, *, num_new: int, num_heads: int, max_rows: int) -> Tensor:
    """Deal the cached rows of all sequences out to the parts that `mla_decode` runs side by side.

    `seq_lens_B` (int32) as `mla_decode` takes it, `num_new` and `num_heads` the S and H of its query,
    `max_rows` the N * L rows that its page table has room for: longer sequences count as that long. Lengths
    are read on the device, and how many parts there are follows from the sizes and the GPU alone: captured
    in a CUDA graph, the plan follows the lengths of each replay. It serves every call on the same lengths,
    as the layers of one step are. One made for other lengths gives the same results, less evenly dealt out.

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


def _check_plan(op: str, plan: Tensor, q_BSHd: Tensor) -> None:
    check_tensor(op, "plan", plan, num_dims=2, dtypes=(torch.int32,))
    check_shape(op, "plan", plan, (plan.shape[0], 2))
    check_at_least(op, "rows of plan", plan.shape[0], q_BSHd.shape[0] + 2)
    check_devices(op, q=q_BSHd, plan=plan)


def kernel_refusal(q_BSHd: Tensor, cache_PLd: Tensor, value_dim: int) -> str | None:
    """What the kernels want and do not get, or None where they can run."""
    page_size, width = cache_PLd.shape[1:]
    if q_BSHd.dtype not in KERNEL_DTYPES:
        wanted = " or ".join(str(kind).removeprefix("torch.") for kind in KERNEL_DTYPES)
        return f"q of {wanted}, got {str(q_BSHd.dtype).removeprefix('torch.')}"
    if (width, value_dim) != KERNEL_WIDTHS:
        return f"widths {KERNEL_WIDTHS} of rows and values, got {(width, value_dim)}"
    if page_size not in KERNEL_PAGE_SIZES:
        return f"page_size to be one of {', '.join(map(str, KERNEL_PAGE_SIZES))}, got {page_size}"
    refusal: str | None = device_refusal(q_BSHd.device)
    return refusal


# ---- references ----


@functools.cache
def _num_parts(num_new: int, num_heads: int, device: torch.device) -> int:
    num_sms = gpu_of(device)[2] if device.type == "cuda" else 1
    return native._C.mla_decode_num_parts(num_new, num_heads, num_sms)


def _plan_on_host(seq_lens_B: Tensor, num_new: int, num_heads: int, max_rows: int) -> Tensor:
    num_parts = _num_parts(num_new, num_heads, seq_lens_B.device)
    rows = native._C.mla_decode_plan_of(seq_lens_B.tolist(), num_parts, max_rows)
    return torch.tensor(rows, dtype=torch.int32, device=seq_lens_B.device)


def _gather_rows(cache_PLd: Tensor, page_table_BN: Tensor, seq_lens_B: Tensor, num_rows: int) -> Tensor:
    """The first `num_rows` rows of every sequence, [B, num_rows, d]; behind its end its last row again.

    So neither a slot of the table nor the NaN in a page that is not in use is ever read.
    """
    num_pages, page_size, width = cache_PLd.shape
    position = torch.arange(num_rows, device=cache_PLd.device)
    position = torch.minimum(position, (seq_lens_B.unsqueeze(1) - 1).clamp(min=0)).long()
    page = page_table_BN.gather(1, position // page_size).long()
    is_wild = (page < 0) | (page >= num_pages)
    row = page.masked_fill(is_wild, 0) * page_size + position % page_size
    rows = cache_PLd.reshape(-1, width).index_select(0, row.flatten()).view(*row.shape, width)
    return rows.masked_fill_(is_wild.unsqueeze(-1), 0) if is_wild.any() else rows


def _forward(
    q_BSHd: Tensor,
    cache_PLd: Tensor,
    page_table_BN: Tensor,
    seq_lens_B: Tensor,
    _plan: Tensor | None,
    value_dim: int,
    scale: float,
    _arch: str,
) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(q_BSHd.dtype)
    num_new = q_BSHd.shape[1]
    seq_lens_B = seq_lens_B.clamp(0, page_table_BN.shape[1] * cache_PLd.shape[1])
    longest = max(seq_lens_B.tolist(), default=0)
    rows = _gather_rows(cache_PLd, page_table_BN, seq_lens_B, longest).to(dtype)
    out_BSHC = q_BSHd.new_zeros(*q_BSHd.shape[:3], value_dim)
    lse_BSH = q_BSHd.new_full(q_BSHd.shape[:3], -torch.inf, dtype=dtype)
    # Blocks of new tokens bound the memory of a long prompt's scores, and end at the last row they can see.
    for start in range(0, num_new, _BLOCK):
        end = min(start + _BLOCK, num_new)
        num_seen_BS = (seq_lens_B - num_new).unsqueeze(1) + torch.arange(
            start + 1, end + 1, device=rows.device
        )
        keys = rows[:, : max(longest - num_new + end, 0)]
        out, lse_BSH[:, start:end] = _attend(
            q_BSHd[:, start:end].to(dtype) * scale, keys, num_seen_BS, value_dim
        )
        out_BSHC[:, start:end] = out.to(out_BSHC.dtype)
    return out_BSHC, lse_BSH


def _attend(q_BSHd: Tensor, rows: Tensor, num_seen_BS: Tensor, value_dim: int) -> tuple[Tensor, Tensor]:
    """Attention of scaled queries over the first num_seen of the rows [B, rows, d] each."""
    shape = (*q_BSHd.shape[:3], rows.shape[1])
    position = torch.arange(shape[-1], device=q_BSHd.device)
    is_hidden = position >= num_seen_BS.unsqueeze(-1)
    scores = torch.bmm(q_BSHd.flatten(1, 2), rows.transpose(1, 2)).view(shape)
    scores.masked_fill_(is_hidden.unsqueeze(2), -torch.inf)
    lse_BSH = scores.logsumexp(dim=-1)
    probs = scores.sub_(lse_BSH.unsqueeze(-1)).exp_().flatten(1, 2)
    out = torch.bmm(probs, rows[..., :value_dim]).view(*shape[:3], value_dim)
    # A token that sees nothing has NaN probabilities, -inf - -inf.
    return out.masked_fill_((num_seen_BS <= 0)[..., None, None], 0), lse_BSH


# ---- kernels ----


def _plan_kernel(seq_lens_B: Tensor, num_new: int, num_heads: int, max_rows: int) -> Tensor:
    if device_refusal(seq_lens_B.device) is not None:
        return _plan_on_host(seq_lens_B, num_new, num_heads, max_rows)
    plan = _plan_fake(seq_lens_B, num_new, num_heads, max_rows)
    native._C.mla_decode_plan(seq_lens_B.contiguous(), plan, max_rows)
    return plan


def _plan_fake(seq_lens_B: Tensor, num_new: int, num_heads: int, _max_rows: int) -> Tensor:
    num_parts = _num_parts(num_new, num_heads, seq_lens_B.device)
    return seq_lens_B.new_empty(num_parts + 1 + seq_lens_B.shape[0], 2)


def _layout_refusal(cache_PLd: Tensor) -> str | None:
    """The same of where the pages lie, which tracing cannot tell."""
    num_pages, page_size, width = cache_PLd.shape
    page_stride, *inner_strides = cache_PLd.stride()
    offset = cache_PLd.storage_offset()
    if num_pages == 1:
        page_stride = page_size * width  # that of a single page may be any
    if inner_strides != [width, 1] or page_stride < page_size * width:
        return f"the rows of a page of cache one after the other, got strides {cache_PLd.stride()}"
    if offset % _KERNEL_MULTIPLE or page_stride % _KERNEL_MULTIPLE:
        got = f"stride {page_stride} and offset {offset}"
        return f"pages of cache at multiples of {_KERNEL_MULTIPLE} elements, got {got}"
    return None


def _runs_reference(q_BSHd: Tensor, cache_PLd: Tensor, value_dim: int, arch: str) -> bool:
    if arch == "reference":
        return True
    refusal = kernel_refusal(q_BSHd, cache_PLd, value_dim) or _layout_refusal(cache_PLd)
    if refusal is not None and arch != "auto":
        raise ValueError(f"mla_decode: arch {arch} wants {refusal}")
    return refusal is not None


def _forward_kernel(
    q_BSHd: Tensor,
    cache_PLd: Tensor,
    page_table_BN: Tensor,
    seq_lens_B: Tensor,
    plan: Tensor | None,
    value_dim: int,
    scale: float,
    arch: str,
) -> tuple[Tensor, Tensor]:
    if _runs_reference(q_BSHd, cache_PLd, value_dim, arch):
        return _forward(q_BSHd, cache_PLd, page_table_BN, seq_lens_B, plan, value_dim, scale, arch)
    out_BSHC, lse_BSH = _fake(q_BSHd, value_dim)
    if not out_BSHC.numel():
        return out_BSHC, lse_BSH
    num_sequences, num_new, num_heads, _ = q_BSHd.shape
    if page_table_BN.shape[1] and page_table_BN.stride(1) != 1:
        page_table_BN = page_table_BN.contiguous()
    if plan is None:
        max_rows = page_table_BN.shape[1] * cache_PLd.shape[1]
        plan = _plan_kernel(seq_lens_B, num_new, num_heads, max_rows)
    num_parts = plan.shape[0] - 1 - num_sequences
    num_slots = 2 * num_parts if num_parts > 1 else 0  # one part alone shares nothing
    partial_out = q_BSHd.new_empty(num_slots, num_new * num_heads, value_dim, dtype=torch.float32)
    partial_lse = q_BSHd.new_empty(num_slots, num_new * num_heads, dtype=torch.float32)
    native._C.mla_decode_forward(
        *(aligned(q_BSHd), cache_PLd, page_table_BN, seq_lens_B.contiguous(), aligned(plan)),
        *(out_BSHC, lse_BSH, partial_out, partial_lse),
        scale,
        arch,
    )
    return out_BSHC, lse_BSH


def _fake(q_BSHd: Tensor, value_dim: int) -> tuple[Tensor, Tensor]:
    out = q_BSHd.new_empty(*q_BSHd.shape[:3], value_dim)
    return out, q_BSHd.new_empty(q_BSHd.shape[:3], dtype=accumulate_dtype(q_BSHd.dtype))


def _fake_forward(q_BSHd: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    _cache, _table, _seq_lens, _plan, value_dim, _scale, _arch = args
    return _fake(q_BSHd, value_dim)


define_op(
    "mla_decode(Tensor q, Tensor cache, Tensor page_table, Tensor seq_lens, Tensor? plan, int value_dim,"
    " float scale, str arch) -> (Tensor out, Tensor lse)",
    reference=_forward,
    kernel=_forward_kernel,
    fake=_fake_forward,
)
define_op(
    "mla_decode_plan(Tensor seq_lens, int num_new, int num_heads, SymInt max_rows) -> Tensor",
    reference=_plan_on_host,
    kernel=_plan_kernel,
    fake=_plan_fake,
)
