"""Gradients of prefill attention in float64, and how near to them a result has to be."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dscoder.testing.prefill import SCALE, PrefillCase

_TIMES_TORCH = 2.0  # how far from float64 a gradient may be, in errors of torch's result in q's dtype
# Of a gradient that is a difference of equal terms, in products of the largest elements of these.
_OF_TERMS = 1e-5

Gradients = tuple[Tensor, Tensor, Tensor]  # to q, k and v


@contextmanager
def deterministic_algorithms(is_asked: bool) -> Iterator[None]:
    """torch is asked for them inside, or is not."""
    was_asked = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(is_asked)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_asked)


def _differentiate(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, sees: Tensor, scale: float
) -> tuple[Tensor, Tensor, Gradients]:
    """(out, lse, gradients) of queries [S, H, d] over keys [R, G, d] where sees [S, R]; each sees some.

    As torch's fused kernels round: sums in float32 (float64), weights, their gradients and results in q's
    dtype. Its attention by plain products sums bfloat16 in float32 throughout, which no fused kernel does.
    """
    dtype, summed = q.dtype, torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    q, k, v, grad_out = (x.to(summed) for x in (q, k, v, grad_out))
    keys, values = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("shd,rhd->hsr", q, keys).mul_(scale).masked_fill_(~sees, -torch.inf)
    lse = scores.logsumexp(dim=-1)
    probs = scores.sub_(lse.unsqueeze(-1)).exp_()
    rounded = probs.to(dtype).to(summed)
    out = torch.einsum("hsr,rhv->shv", rounded, values).to(dtype)
    delta = (grad_out * out.to(summed)).sum(dim=-1).t()
    grad_scores = torch.einsum("shv,rhv->hsr", grad_out, values).sub_(delta.unsqueeze(-1)).mul_(probs)
    grad_scores = grad_scores.to(dtype).to(summed)
    grad_q = torch.einsum("hsr,rhd->shd", grad_scores, keys) * scale
    grad_k = torch.einsum("hsr,shd->rhd", grad_scores, q) * scale
    grad_v = torch.einsum("hsr,shv->rhv", rounded, grad_out)
    grad_k, grad_v = (x.reshape(len(k), -1, group, x.shape[2]).sum(dim=2) for x in (grad_k, grad_v))
    return out, lse.t(), (grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype))


def forward_and_gradients(
    case: PrefillCase, grad_out: Tensor, *, causal: bool, scale: float = SCALE
) -> tuple[Tensor, Tensor, Gradients]:
    """(out_THv, lse_TH, gradients) in the dtype of the case, sequence by sequence.

    lse is float32, or float64 of float64. Rows that belong to no sequence, or see nothing, have out 0, lse
    -inf and gradient 0.
    """
    q, k, v, ends_q, ends_k = case
    summed = torch.promote_types(q.dtype, torch.float32)
    out, lse = torch.zeros_like(grad_out), q.new_full(q.shape[:2], -torch.inf, dtype=summed)
    grads = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    starts_q, starts_k = ends_q.tolist(), ends_k.tolist()
    for b in range(len(starts_q) - 1):
        keys = slice(starts_k[b], starts_k[b + 1])
        num_keys, num_queries = keys.stop - keys.start, starts_q[b + 1] - starts_q[b]
        num_blind = max(num_queries - num_keys, 0) if causal else 0
        rows = slice(starts_q[b] + num_blind, starts_q[b + 1])
        if not num_keys or rows.start >= rows.stop:
            continue
        sees = torch.ones(rows.stop - rows.start, num_keys, dtype=torch.bool, device=q.device)
        if causal:
            sees = sees.tril(num_keys - len(sees))
        out[rows], lse[rows], own = _differentiate(q[rows], k[keys], v[keys], grad_out[rows], sees, scale)
        for grad, place, found in zip(grads, (rows, keys, keys), own, strict=True):
            grad[place] = found
    return out, lse, grads


def assert_gradients_near(
    actual: Gradients, case: PrefillCase, grad_out: Tensor, *, causal: bool, scale: float = SCALE
) -> None:
    """Each gradient is as near to float64 as torch's in q's dtype comes, within a factor of two.

    In the largest error and in the mean square. Rows that belong to no sequence have zeros.
    """
    q, k, v, *ends = case
    _, _, torchs = forward_and_gradients(case, grad_out, causal=causal, scale=scale)
    exact_case = (q.double(), k.double(), v.double(), ends[0], ends[1])
    _, _, exact = forward_and_gradients(exact_case, grad_out.double(), causal=causal, scale=scale)
    largest = [
        _largest(x, end) for x, end in zip((q, k, v, grad_out), (*ends, ends[1], ends[0]), strict=True)
    ]
    floor = _OF_TERMS * largest[2] * largest[3] * max(largest[:2])
    for name, got, near, want, end in zip("qkv", actual, torchs, exact, (*ends, ends[1]), strict=True):
        assert (got.shape, got.dtype) == (near.shape, near.dtype)
        begin, stop = end[0].item(), end[-1].item()
        assert not got[: int(begin)].any(), f"grad_{name}: rows ahead of all sequences are not 0"
        assert not got[int(stop) :].any(), f"grad_{name}: rows behind all sequences are not 0"
        _assert_near(got.double() - want, near.double() - want, f"grad_{name}", floor)


def _assert_near(error: Tensor, allowed: Tensor, name: str, floor: float) -> None:
    if not error.numel():
        return
    for measure, got, limit in (
        ("largest", error.abs().max(), allowed.abs().max()),
        ("mean square", error.square().mean().sqrt(), allowed.square().mean().sqrt()),
    ):
        assert got.item() <= _TIMES_TORCH * limit.item() + floor, (
            f"{name}: {measure} error is {got.item():.3g}, wanted <= {_TIMES_TORCH:g} times torch's "
            f"{limit.item():.3g}"
        )


def _largest(x: Tensor, ends: Tensor) -> float:
    rows = x[int(ends[0].item()) : int(ends[-1].item())]
    return rows.abs().max().item() if rows.numel() else 0.0
