"""mla_prefill: attention over packed sequences of any lengths, value heads narrower than key heads (192/128).

The training form of latent attention (DeepSeek-V2 eqs 9-19): every head has its own keys and values. Heads
that share keys in groups, and values as wide as keys, are attention as DeepSeek-Coder has it.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dscoder.ops.library import (
    FLOATS,
    accumulate_dtype,
    aligned,
    check_arch,
    check_devices,
    check_number,
    check_shape,
    check_tensor,
    define_gradient,
    define_op,
    device_refusal,
    refuse_second_derivative,
    spread_rows,
)
from dscoder.runtime import native

KERNEL_DTYPES = (torch.bfloat16, torch.float16)
KERNEL_WIDTHS = ((192, 128), (128, 128))  # of keys and of values

# Queries multiplied with their keys at once. Measured on the CPU at (heads, length, widths) = (16, 512,
# 192/128) and (4, 512, 48/32), forward and backward: 64 and 128 are within 5 %, 256 is 20 % slower; torch's
# fused CPU attention on values padded to 192 takes 1.7 times as long.
_BLOCK = 128


def mla_prefill(
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    scale: float,
    causal: bool = True,
    arch: str = "auto",
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v inside each sequence; sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1].

    `cu_seqlens_q` and `cu_seqlens_k` are int32 [B + 1], ascending within 0 and the number of rows: the
    reference refuses others, kernels cannot. A sequence may have other lengths in q and k, zero too;
    `causal` aligns their ends: the last query sees every key.
    Query head h reads head h // (H / G) of k and v; G divides H. Where torch was asked
    for deterministic algorithms, every gradient has the same bits each time.

    `arch` says what runs on a GPU (a CPU runs the reference). "auto": kernels for bfloat16 and float16,
    widths (192, 128) and (128, 128) of keys and values and a scale > 0, on compute capability 8.x and 9.0,
    else the reference, which waits for the lengths. "sm80", "sm90": these kernels, ValueError where they
    cannot. "reference": that. Tokens and heads may lie apart; kernels read them there if in steps of 16
    bytes. They write no row that belongs to no sequence.

    Returns:
        out_THv in q's dtype and lse_TH, the float32 (float64 for float64) log-sum-exp of the scaled scores.
        A query that sees no key has out 0 and lse -inf. Differentiable in q, k and v through out, once; lse
        carries no gradient.

    Source: DeepSeek-V2, arXiv 2405.04434, eqs 9-19; online softmax as FlashAttention-2, arXiv 2307.08691.
    """
    op = "mla_prefill"
    check_tensor(op, "q", q_THd, num_dims=3, dtypes=FLOATS)
    check_tensor(op, "k", k_TGd, num_dims=3, dtypes=(q_THd.dtype,))
    check_tensor(op, "v", v_TGv, num_dims=3, dtypes=(q_THd.dtype,))
    num_heads, num_key_heads = q_THd.shape[1], k_TGd.shape[1]
    if bool(num_heads) != bool(num_key_heads) or (num_heads and num_heads % num_key_heads):
        raise ValueError(f"{op}: k must have heads that divide {num_heads}, those of q, got {num_key_heads}")
    check_shape(op, "k", k_TGd, (*k_TGd.shape[:2], q_THd.shape[2]))
    check_shape(op, "v", v_TGv, (*k_TGd.shape[:2], v_TGv.shape[2]))
    check_tensor(op, "cu_seqlens_q", cu_seqlens_q, num_dims=1, dtypes=(torch.int32,))
    check_tensor(op, "cu_seqlens_k", cu_seqlens_k, num_dims=1, dtypes=(torch.int32,))
    if not cu_seqlens_q.shape[0]:
        raise ValueError(f"{op}: cu_seqlens_q must have at least one element, got {cu_seqlens_q.shape[0]}")
    check_shape(op, "cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens_q.shape))
    check_devices(op, q=q_THd, k=k_TGd, v=v_TGv, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    check_number(op, "scale", scale)
    if not isinstance(causal, bool):
        raise TypeError(f"{op}: causal must be bool, got {type(causal).__name__}")
    check_arch(op, arch, q_THd, lambda: kernel_refusal(q_THd, v_TGv, scale))
    deterministic = torch.are_deterministic_algorithms_enabled()
    out: Tensor
    lse: Tensor
    out, lse = torch.ops.dscoder.mla_prefill.default(
        q_THd, k_TGd, v_TGv, cu_seqlens_q, cu_seqlens_k, scale, causal, deterministic, arch
    )
    return out, lse


def kernel_refusal(q_THd: Tensor, v_TGv: Tensor, scale: float) -> str | None:
    """What the kernels want and do not get, or None where they can run."""
    widths = (q_THd.shape[2], v_TGv.shape[2])
    if q_THd.dtype not in KERNEL_DTYPES:
        wanted = " or ".join(str(kind).removeprefix("torch.") for kind in KERNEL_DTYPES)
        return f"q of {wanted}, got {str(q_THd.dtype).removeprefix('torch.')}"
    if widths not in KERNEL_WIDTHS:
        return f"widths of k and v to be {' or '.join(map(str, KERNEL_WIDTHS))}, got {widths}"
    if not scale > 0:
        return f"scale > 0, got {scale}"
    refusal: str | None = device_refusal(q_THd.device)
    return refusal


# ---- references ----


def _check_ends(argument: str, ends: list[int], num_rows: int) -> None:
    """Ends that come to the host anyway are looked at; kernels, which must not wait, stay within the rows."""
    if ends[0] < 0 or ends[-1] > num_rows or any(end < start for start, end in pairwise(ends)):
        raise ValueError(f"mla_prefill: {argument} must ascend within 0 and {num_rows}, the rows, got {ends}")


def _blocks(
    q_THd: Tensor, k_TGd: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool
) -> Iterator[tuple[slice, slice]]:
    """Rows of up to _BLOCK queries of one sequence that see a key, and the rows of all keys they see.

    Where causal, the last query sees the last key of its block, the one before it one key less, and so on:
    the keys behind a block, half of them all, are never multiplied.
    """
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    _check_ends("cu_seqlens_q", ends_q, q_THd.shape[0])
    _check_ends("cu_seqlens_k", ends_k, k_TGd.shape[0])
    for b in range(len(ends_q) - 1):
        start_q, end_q, start_k, end_k = ends_q[b], ends_q[b + 1], ends_k[b], ends_k[b + 1]
        if end_k <= start_k:
            continue
        if causal:
            start_q = max(start_q, end_q - (end_k - start_k))  # the queries before it see nothing
        for start in range(start_q, end_q, _BLOCK):
            end = min(start + _BLOCK, end_q)
            yield slice(start, end), slice(start_k, end_k - (end_q - end) if causal else end_k)


def _upper_triangle(q: Tensor, dtype: torch.dtype) -> Tensor:
    """-inf above the diagonal: added to a block's last columns, it hides the keys that are in the future."""
    return torch.full((_BLOCK, _BLOCK), -torch.inf, dtype=dtype, device=q.device).triu_(1)


def _heads_of(x_TGd: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    """The rows that each query head reads, [H, T, d]; a copy only where heads share them."""
    x_GTd = x_TGd.to(dtype).transpose(0, 1)
    return x_GTd if len(x_GTd) == num_heads else x_GTd.repeat_interleave(num_heads // len(x_GTd), dim=0)


def _sum_of_heads(grad_HTd: Tensor, num_key_heads: int) -> Tensor:
    """[G, T, d]: what the query heads that share a head say of it."""
    if len(grad_HTd) == num_key_heads:
        return grad_HTd
    num_heads, *rest = grad_HTd.shape
    return grad_HTd.reshape(num_key_heads, num_heads // num_key_heads, *rest).sum(dim=1)


def _forward(
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    causal: bool,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(q_THd.dtype)
    future = _upper_triangle(q_THd, dtype)
    q_HTd, k_HTd, v_HTv = (_heads_of(x, q_THd.shape[1], dtype) for x in (q_THd, k_TGd, v_TGv))
    q_HTd = q_HTd * scale
    out_THv = q_THd.new_zeros(*q_THd.shape[:2], v_TGv.shape[2])
    lse_TH = q_THd.new_full(q_THd.shape[:2], -torch.inf, dtype=dtype)
    for rows, keys in _blocks(q_THd, k_TGd, cu_seqlens_q, cu_seqlens_k, causal):
        scores = torch.bmm(q_HTd[:, rows], k_HTd[:, keys].transpose(1, 2))
        if causal:
            num_rows = scores.shape[1]
            scores[..., -num_rows:] += future[:num_rows, :num_rows]
        largest = scores.amax(dim=-1, keepdim=True)
        probs = scores.sub_(largest).exp_()
        total = probs.sum(dim=-1, keepdim=True)
        out_THv[rows] = torch.bmm(probs, v_HTv[:, keys]).div_(total).transpose(0, 1).to(out_THv.dtype)
        lse_TH[rows] = largest.add_(total.log_()).squeeze(-1).t()
    return out_THv, lse_TH


def _backward(
    grad_THv: Tensor,
    saved: list[Tensor],
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    causal: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    q_THd, k_TGd, v_TGv, out_THv, lse_TH = saved
    dtype, num_heads = accumulate_dtype(q_THd.dtype), q_THd.shape[1]
    q_HTd, k_HTd, v_HTv, grad_HTv = (_heads_of(x, num_heads, dtype) for x in (q_THd, k_TGd, v_TGv, grad_THv))
    q_HTd = q_HTd * scale
    minus_lse = lse_TH.neg().t().unsqueeze(-1)
    # d scores = probs * (d probs - delta), delta = sum(d out * out): the softmax's own gradient.
    minus_delta = (grad_THv.to(dtype) * out_THv.to(dtype)).sum(dim=-1).neg_().t().unsqueeze(-1)
    grad_q = q_THd.new_zeros(q_THd.shape)
    grad_k_HTd, grad_v_HTv = (x.new_zeros(x.shape) for x in (k_HTd, v_HTv))
    for rows, keys in _blocks(q_THd, k_TGd, cu_seqlens_q, cu_seqlens_k, causal):
        q, k, grad = q_HTd[:, rows], k_HTd[:, keys], grad_HTv[:, rows]
        probs = torch.baddbmm(minus_lse[:, rows], q, k.transpose(1, 2)).exp_()
        if causal:
            probs[..., -probs.shape[1] :].tril_()
        grad_v_HTv[:, keys].baddbmm_(probs.transpose(1, 2), grad)
        grad_scores = torch.baddbmm(minus_delta[:, rows], grad, v_HTv[:, keys].transpose(1, 2)).mul_(probs)
        grad_q[rows] = torch.bmm(grad_scores, k).mul_(scale).transpose(0, 1).to(grad_q.dtype)
        grad_k_HTd[:, keys].baddbmm_(grad_scores.transpose(1, 2), q)
    grad_k, grad_v = (
        _sum_of_heads(x, k_TGd.shape[1]).transpose(0, 1).to(q_THd.dtype).contiguous()
        for x in (grad_k_HTd, grad_v_HTv)
    )
    return grad_q, grad_k, grad_v


# ---- kernels ----


def _runs_reference(q_THd: Tensor, v_TGv: Tensor, scale: float, arch: str) -> bool:
    if arch == "reference":
        return True
    refusal = kernel_refusal(q_THd, v_TGv, scale)
    if refusal is not None and arch != "auto":
        raise ValueError(f"mla_prefill: arch {arch} wants {refusal}")
    return refusal is not None


def _forward_kernel(
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    causal: bool,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    _deterministic, arch = options
    if _runs_reference(q_THd, v_TGv, scale, arch):
        return _forward(q_THd, k_TGd, v_TGv, cu_seqlens_q, cu_seqlens_k, scale, causal)
    out_THv, lse_TH = _forward_fake(q_THd, k_TGd, v_TGv)
    if not out_THv.numel():
        return out_THv, lse_TH
    plan_size = native._C.mla_prefill_plan_size(q_THd.shape[0], cu_seqlens_q.shape[0] - 1)
    q, k, v = (spread_rows(x, num_dense=1) for x in (q_THd, k_TGd, v_TGv))
    native._C.mla_prefill_forward(
        *(q, k, v, cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()),
        *(cu_seqlens_q.new_empty(plan_size), out_THv, lse_TH),
        scale,
        causal,
        arch,
    )
    return out_THv, lse_TH


def _backward_kernel(
    grad_THv: Tensor,
    saved: list[Tensor],
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    causal: bool,
    deterministic: bool,
    arch: str,
) -> tuple[Tensor, Tensor, Tensor]:
    q_THd, k_TGd, v_TGv, out_THv, lse_TH = saved
    if _runs_reference(q_THd, v_TGv, scale, arch):
        return _backward(grad_THv, saved, cu_seqlens_q, cu_seqlens_k, scale, causal)
    grads = _backward_fake(grad_THv, saved)
    num_sequences, (num_queries, num_heads, width) = cu_seqlens_q.shape[0] - 1, q_THd.shape
    plan_size = native._C.mla_prefill_plan_size(max(num_queries, k_TGd.shape[0]), num_sequences)
    num_sums = 0 if deterministic else native._C.mla_prefill_num_sums(num_queries, num_sequences)
    scratch = (
        cu_seqlens_q.new_empty(plan_size),
        lse_TH.new_empty(2, num_heads, num_queries),
        lse_TH.new_empty(num_sums, num_heads, width),
    )
    grad_out, *inputs = (spread_rows(x, num_dense=1) for x in (grad_THv, q_THd, k_TGd, v_TGv))
    native._C.mla_prefill_backward(
        grad_out,
        (*inputs, aligned(out_THv), lse_TH.contiguous()),
        (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()),
        scratch,
        grads,
        scale,
        causal,
        deterministic,
        arch,
    )
    return grads


def _forward_fake(q_THd: Tensor, _k: Tensor, v_TGv: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = q_THd.new_empty(*q_THd.shape[:2], v_TGv.shape[2])
    return out, q_THd.new_empty(q_THd.shape[:2], dtype=accumulate_dtype(q_THd.dtype))


def _backward_fake(_grad: Tensor, saved: list[Tensor], *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in saved[:3])
    return grad_q, grad_k, grad_v


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, cu_seqlens_q, cu_seqlens_k, ctx.scale, ctx.causal, ctx.deterministic, ctx.arch = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output, cu_seqlens_q, cu_seqlens_k)


def _differentiate(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("mla_prefill")
    *saved, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    grads = torch.ops.dscoder.mla_prefill_backward.default(
        grad_out, saved, cu_seqlens_q, cu_seqlens_k, ctx.scale, ctx.causal, ctx.deterministic, ctx.arch
    )
    return (*grads, None, None, None, None, None, None)


define_op(
    "mla_prefill(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, float scale,"
    " bool causal, bool deterministic, str arch) -> (Tensor out, Tensor lse)",
    reference=_forward,
    kernel=_forward_kernel,
    fake=_forward_fake,
)
define_op(
    "mla_prefill_backward(Tensor grad_out, Tensor[] saved, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
    " float scale, bool causal, bool deterministic, str arch) -> (Tensor, Tensor, Tensor)",
    reference=_backward,
    kernel=_backward_kernel,
    fake=_backward_fake,
)
define_gradient("mla_prefill", save=_save, backward=_differentiate)
