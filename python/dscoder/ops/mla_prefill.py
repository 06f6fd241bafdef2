"""mla_prefill: attention over packed sequences of any lengths, value heads narrower than key heads (192/128).

The training form of latent attention (DeepSeek-V2 eqs 9-19): every head has its own keys and values.
"""

from typing import Any

import torch
from torch import Tensor

from dscoder.ops.library import (
    FLOATS,
    accumulate_dtype,
    check_devices,
    check_shape,
    check_tensor,
    define_gradient,
    define_op,
)


def mla_prefill(
    q_THd: Tensor,
    k_THd: Tensor,
    v_THv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    scale: float,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v inside each sequence; sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1].

    `cu_seqlens_q` and `cu_seqlens_k` are int32 [B + 1], ascending from 0 to the number of rows. A sequence
    may have other lengths in q and k, zero too; `causal` aligns their ends: the last query sees every key.

    Returns:
        out_THv in q's dtype and lse_TH, the float32 (float64 for float64) log-sum-exp of the scaled scores.
        A query that sees no key has out 0 and lse -inf. Differentiable in q, k and v through out; lse
        carries no gradient.
    """
    op = "mla_prefill"
    check_tensor(op, "q", q_THd, num_dims=3, dtypes=FLOATS)
    check_tensor(op, "k", k_THd, num_dims=3, dtypes=(q_THd.dtype,))
    check_tensor(op, "v", v_THv, num_dims=3, dtypes=(q_THd.dtype,))
    check_shape(op, "k", k_THd, (k_THd.shape[0], *q_THd.shape[1:]))
    check_shape(op, "v", v_THv, (*k_THd.shape[:2], v_THv.shape[2]))
    check_tensor(op, "cu_seqlens_q", cu_seqlens_q, num_dims=1, dtypes=(torch.int32,))
    check_tensor(op, "cu_seqlens_k", cu_seqlens_k, num_dims=1, dtypes=(torch.int32,))
    check_shape(op, "cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens_q.shape))
    check_devices(op, q=q_THd, k=k_THd, v=v_THv, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    out: Tensor
    lse: Tensor
    out, lse = torch.ops.dscoder.mla_prefill.default(
        q_THd, k_THd, v_THv, cu_seqlens_q, cu_seqlens_k, scale, causal
    )
    return out, lse


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    """[H, q, k], scaled, masked."""
    scores = torch.matmul(q.transpose(0, 1), k.permute(1, 2, 0)).mul_(scale)
    if causal:
        num_q, num_k = scores.shape[1:]
        hidden = torch.ones(num_q, num_k, dtype=torch.bool, device=q.device).triu_(num_k - num_q + 1)
        scores.masked_fill_(hidden, float("-inf"))
    return scores


def _spans(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> list[tuple[slice, slice]]:
    q, k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    return [(slice(q[b], q[b + 1]), slice(k[b], k[b + 1])) for b in range(len(q) - 1)]


def _forward(
    q_THd: Tensor,
    k_THd: Tensor,
    v_THv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(q_THd.dtype)
    out = q_THd.new_zeros(*q_THd.shape[:2], v_THv.shape[2])
    lse = q_THd.new_full(q_THd.shape[:2], float("-inf"), dtype=dtype)
    for rows, keys in _spans(cu_seqlens_q, cu_seqlens_k):
        scores = _scores(q_THd[rows].to(dtype), k_THd[keys].to(dtype), scale, causal)
        lse_Hq = scores.logsumexp(dim=-1)
        probs = (scores - lse_Hq.clamp(min=torch.finfo(dtype).min).unsqueeze(-1)).exp_()
        out[rows] = torch.matmul(probs, v_THv[keys].to(dtype).transpose(0, 1)).transpose(0, 1).to(out.dtype)
        lse[rows] = lse_Hq.t()
    return out, lse


def _backward(
    grad_out: Tensor,
    q_THd: Tensor,
    k_THd: Tensor,
    v_THv: Tensor,
    out_THv: Tensor,
    lse_TH: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(q_THd.dtype)
    grad_q, grad_k, grad_v = (
        torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q_THd, k_THd, v_THv)
    )
    for rows, keys in _spans(cu_seqlens_q, cu_seqlens_k):
        q, k, v, out, grad = (
            x.to(dtype).transpose(0, 1)
            for x in (q_THd[rows], k_THd[keys], v_THv[keys], out_THv[rows], grad_out[rows])
        )
        lse = lse_TH[rows].t().unsqueeze(-1).clamp(min=torch.finfo(dtype).min)
        probs = _scores(q.transpose(0, 1), k.transpose(0, 1), scale, causal).sub_(lse).exp_()
        grad_v[keys] = torch.matmul(probs.transpose(1, 2), grad).transpose(0, 1).to(grad_v.dtype)
        grad_probs = torch.matmul(grad, v.transpose(1, 2))
        grad_scores = probs * (grad_probs - (grad * out).sum(dim=-1, keepdim=True)) * scale
        grad_q[rows] = torch.matmul(grad_scores, k).transpose(0, 1).to(grad_q.dtype)
        grad_k[keys] = torch.matmul(grad_scores.transpose(1, 2), q).transpose(0, 1).to(grad_k.dtype)
    return grad_q, grad_k, grad_v


def _forward_fake(
    q_THd: Tensor,
    k_THd: Tensor,
    v_THv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    out = q_THd.new_empty(*q_THd.shape[:2], v_THv.shape[2])
    return out, q_THd.new_empty(q_THd.shape[:2], dtype=accumulate_dtype(q_THd.dtype))


def _backward_fake(
    grad_out: Tensor,
    q_THd: Tensor,
    k_THd: Tensor,
    v_THv: Tensor,
    out_THv: Tensor,
    lse_TH: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return q_THd.new_empty(q_THd.shape), k_THd.new_empty(k_THd.shape), v_THv.new_empty(v_THv.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, cu_seqlens_q, cu_seqlens_k, ctx.scale, ctx.causal = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output, cu_seqlens_q, cu_seqlens_k)


def _differentiate(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.dscoder.mla_prefill_backward.default(
        grad_out, *ctx.saved_tensors, ctx.scale, ctx.causal
    )
    return (*grads, None, None, None, None)


define_op(
    "mla_prefill(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, float scale,"
    " bool causal) -> (Tensor out, Tensor lse)",
    reference=_forward,
    fake=_forward_fake,
)
define_op(
    "mla_prefill_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " Tensor cu_seqlens_q, Tensor cu_seqlens_k, float scale, bool causal) -> (Tensor, Tensor, Tensor)",
    reference=_backward,
    fake=_backward_fake,
)
define_gradient("mla_prefill", save=_save, backward=_differentiate)
