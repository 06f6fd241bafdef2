"""Cases of prefill attention at the kernels' widths, in poisoned memory, and how exact a result has to be.

Everything stays on the device that a case is drawn on: long sequences are checked where they lie.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dscoder.testing.cases import cu_seqlens, randn

WIDTHS = ((192, 128), (128, 128))  # of keys and of values
SCALE = 192**-0.5
NUM_STRAY = 3  # rows ahead of the first sequence, and behind the last one, of stray_case
_TIMES_TORCH = 2.0  # how far from float64 an output may be, in errors of torch's result in q's dtype
_LSE_RELATIVE = 1e-5
_BLOCK = 1024  # queries that are checked at once

PrefillCase = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # q, k, v, cu_seqlens_q, cu_seqlens_k
Lengths = Sequence[tuple[int, int]]  # of each sequence, in queries and in keys


def prefill_case(
    rng: torch.Generator,
    lengths: Lengths,
    *,
    num_heads: int = 2,
    num_key_heads: int | None = None,
    widths: tuple[int, int] = (192, 128),
    dtype: torch.dtype = torch.bfloat16,
) -> PrefillCase:
    """(q_THd, k_TGd, v_TGv, cu_seqlens_q, cu_seqlens_k) on the generator's device; G = H by default."""
    num_queries, num_keys = (sum(pair[side] for pair in lengths) for side in (0, 1))
    num_key_heads = num_heads if num_key_heads is None else num_key_heads
    q = randn(rng, num_queries, num_heads, widths[0], dtype=dtype)
    k = randn(rng, num_keys, num_key_heads, widths[0], dtype=dtype)
    v = randn(rng, num_keys, num_key_heads, widths[1], dtype=dtype)
    ends_q, ends_k = (cu_seqlens([pair[side] for pair in lengths]).to(rng.device) for side in (0, 1))
    return q, k, v, ends_q, ends_k


def stray_case(case: PrefillCase) -> PrefillCase:
    """The same with NUM_STRAY rows of NaN that belong to no sequence ahead of all and behind all."""
    *rows, ends_q, ends_k = case
    q, k, v = (_with_stray_rows(x) for x in rows)
    return q, k, v, ends_q + NUM_STRAY, ends_k + NUM_STRAY


def _with_stray_rows(x: Tensor) -> Tensor:
    stray = x.new_full((NUM_STRAY, *x.shape[1:]), torch.nan)
    return torch.cat([stray, x, stray])


def apart(x: Tensor) -> Tensor:
    """A view of the same values, NaN between its heads and its tokens; in steps that kernels read."""
    num_tokens, num_heads, width = x.shape
    memory = x.new_full((num_tokens, num_heads + 1, width + 16), torch.nan)
    view = memory[:, :num_heads, 8 : 8 + width]
    view.copy_(x)
    return view


def _by_sequence(case: PrefillCase, causal: bool) -> Iterator[tuple[slice, slice, Tensor]]:
    """Queries and keys of a sequence in rows, and how many of these keys each query sees."""
    *_, ends_q, ends_k = case
    ends = zip(ends_q.tolist(), ends_k.tolist(), strict=True)
    for (first_q, first_k), (end_q, end_k) in pairwise(ends):
        num_keys = end_k - first_k
        for first in range(first_q, end_q, _BLOCK):
            end = min(first + _BLOCK, end_q)
            hidden = torch.arange(end_q - first - 1, end_q - end - 1, -1, device=ends_q.device)
            num_seen = (num_keys - hidden).clamp(min=0) if causal else torch.full_like(hidden, num_keys)
            yield slice(first, end), slice(first_k, end_k), num_seen


def attention(q: Tensor, k: Tensor, v: Tensor, num_seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As torch's fused kernels round: sums in float32 (float64), weights and the output in q's dtype.

    Of queries [S, H, d] over keys [R, G, d], of which each sees the first num_seen [S].
    """
    summed = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1).to(summed) for x in (k, v))
    scores = torch.einsum("shd,rhd->hsr", q.to(summed), keys) * scale
    is_hidden = torch.arange(k.shape[0], device=q.device) >= num_seen.unsqueeze(1)
    scores.masked_fill_(is_hidden, -torch.inf)
    probs = scores.softmax(dim=-1).masked_fill(is_hidden, 0).to(q.dtype).to(summed)
    out = torch.einsum("hsr,rhv->shv", probs, values).to(q.dtype)
    return out, scores.logsumexp(dim=-1).t()


def assert_prefills(
    actual: tuple[Tensor, Tensor], case: PrefillCase, *, causal: bool, scale: float = SCALE
) -> None:
    """Each sequence's output is as near to float64 as torch's in q's dtype comes, within a factor of two.

    In the largest error and in the mean square. Log-sum-exps are within 1e-5 of float64's, relative to them
    or to 1. Queries that see nothing have zeros and -inf.
    """
    (out, lse), (q, k, v, *_) = actual, case
    assert (out.shape, out.dtype) == ((*q.shape[:2], v.shape[2]), q.dtype)
    assert (lse.shape, lse.dtype) == (q.shape[:2], torch.float32)
    for queries, keys, num_seen in _by_sequence(case, causal):
        where = f"queries {queries.start} to {queries.stop}"
        is_blind = num_seen == 0
        assert bool((out[queries][is_blind] == 0).all()), f"{where}: out of one that sees nothing is not 0"
        assert bool((lse[queries][is_blind] == -math.inf).all()), f"{where}: lse of a blind one is not -inf"
        if bool(is_blind.all()):
            continue
        q_SHd, num_seen = q[queries][~is_blind], num_seen[~is_blind]
        exact, exact_lse = attention(q_SHd.double(), k[keys].double(), v[keys].double(), num_seen, scale)
        torchs, _ = attention(q_SHd, k[keys], v[keys], num_seen, scale)
        _assert_near(out[queries][~is_blind].double() - exact, torchs.double() - exact, where)
        error = (lse[queries][~is_blind] - exact_lse).abs() / exact_lse.abs().clamp(min=1)
        worst = error.max().item()
        assert worst <= _LSE_RELATIVE, (
            f"{where}: error of lse is {worst:.3g} of it, at most {_LSE_RELATIVE:g}"
        )


def _assert_near(error: Tensor, allowed: Tensor, where: str) -> None:
    for name, got, limit in (
        ("largest", error.abs().max(), allowed.abs().max()),
        ("mean square", error.square().mean().sqrt(), allowed.square().mean().sqrt()),
    ):
        assert got.item() <= _TIMES_TORCH * limit.item(), (
            f"{where}: {name} error of out is {got.item():.3g}, wanted <= {_TIMES_TORCH:g} times torch's "
            f"{limit.item():.3g}"
        )
