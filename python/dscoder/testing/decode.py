"""Cases of latent decoding at the kernels' widths, in poisoned memory, and how exact a result has to be.

Everything stays on the device that a case is drawn on: long contexts are checked where they lie.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dscoder import ops
from dscoder.testing.cases import randn

WIDTH, VALUE_DIM = 576, 512
SCALE = 192**-0.5  # of the published models, but for YaRN's factor
_WILD = (2**31 - 1, -(2**31), -1)
_TIMES_TORCH = 2.0  # how far from float64 an output may be, in errors of torch's result in q's dtype
_LSE_RELATIVE = 1e-5

DecodeCase = tuple[Tensor, Tensor, Tensor, Tensor]  # q, cache, page table, lengths


def decode_case(
    rng: torch.Generator,
    lengths: Sequence[int],
    *,
    num_new: int = 1,
    num_heads: int = 16,
    page_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    num_pages: int = 0,
    num_slots: int = 0,
) -> DecodeCase:
    """(q_BSHd, cache_PLd, page_table_BN, seq_lens_B) on the generator's device, pages in random order.

    Pages of nobody and rows behind a sequence's last are NaN, slots of the table not in use are wild.
    `num_pages` and `num_slots` are at the least what the lengths need, for cases of the same shapes.
    """
    device = rng.device
    needed = [-(-length // page_size) for length in lengths]
    num_pages = max(num_pages, sum(needed) + 2)
    num_slots = max(num_slots, max(needed, default=0) + 1)
    cache = randn(rng, num_pages, page_size, WIDTH, dtype=dtype)
    order = torch.randperm(num_pages, generator=rng, device=device)
    used, unused = order[: sum(needed)], order[sum(needed) :]
    cache[unused] = torch.nan
    wild = torch.tensor(_WILD, dtype=torch.int32, device=device)
    wild = torch.cat([wild, wild.new_full((1,), num_pages)])
    table = wild[torch.arange(len(lengths) * num_slots, device=device) % len(wild)]
    table = table.view(len(lengths), num_slots)
    is_used = torch.arange(num_slots, device=device) < torch.tensor(needed, device=device).unsqueeze(1)
    table[is_used] = used.to(torch.int32)
    for b, length in enumerate(lengths):
        if length % page_size:
            cache[table[b, needed[b] - 1].long(), length % page_size :] = torch.nan
    q = randn(rng, len(lengths), num_new, num_heads, WIDTH, dtype=dtype)
    return q, cache, table, torch.tensor(lengths, dtype=torch.int32, device=device)


def random_lengths(rng: torch.Generator, num_sequences: int, longest: int) -> list[int]:
    """Uniform, 0 and `longest` among what can come."""
    drawn = torch.randint(0, longest + 1, (num_sequences,), generator=rng, device=rng.device)
    lengths: list[int] = drawn.tolist()
    return lengths


def plan_for(case: DecodeCase) -> Tensor:
    """What `mla_decode` makes for itself where none is passed."""
    q, cache, table, seq_lens = case
    _, num_new, num_heads, _ = q.shape
    max_rows = table.shape[1] * cache.shape[1]
    return ops.mla_decode_plan(seq_lens, num_new=num_new, num_heads=num_heads, max_rows=max_rows)


def _by_sequence(case: DecodeCase) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """q_SHd, the rows [length, d] and how many of them each new token sees, [S]; a length 0 is left out."""
    q, cache, table, seq_lens = case
    num_new, page_size = q.shape[1], cache.shape[1]
    for b, length in enumerate(seq_lens.tolist()):
        if length > 0:
            pages = table[b, : -(-length // page_size)].long()
            num_seen_S = torch.arange(length - num_new + 1, length + 1, device=q.device)
            yield q[b], cache[pages].flatten(0, 1)[:length], num_seen_S


def _attention(q: Tensor, rows: Tensor, num_seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As torch's fused kernels round: sums in float32 (float64), weights and the output in q's dtype."""
    summed = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("shd,rd->shr", q.to(summed), rows.to(summed)) * scale
    is_hidden = torch.arange(len(rows), device=q.device) >= num_seen.unsqueeze(1)
    scores.masked_fill_(is_hidden.unsqueeze(1), -torch.inf)
    probs = scores.softmax(dim=-1).to(q.dtype)
    out = torch.einsum("shr,rc->shc", probs.to(summed), rows[:, :VALUE_DIM].to(summed)).to(q.dtype)
    return out.masked_fill_((num_seen <= 0)[:, None, None], 0), scores.logsumexp(dim=-1)


def assert_decodes(actual: tuple[Tensor, Tensor], case: DecodeCase, *, scale: float = SCALE) -> None:
    """Each sequence's output is as near to float64 as torch's in q's dtype comes, within a factor of two.

    In the largest error and in the mean square. Log-sum-exps are within 1e-5 of float64's, relative to them
    or to 1. Tokens that see nothing have zeros and -inf.
    """
    (out, lse), (q, _, _, seq_lens) = actual, case
    assert out.shape == (*q.shape[:3], VALUE_DIM)
    assert (out.dtype, lse.shape, lse.dtype) == (q.dtype, q.shape[:3], torch.float32)
    is_empty = seq_lens <= 0
    assert bool((out[is_empty] == 0).all()), "the output of an empty sequence is not 0"
    assert bool((lse[is_empty] == -math.inf).all()), "the log-sum-exp of an empty sequence is not -inf"
    full = (~is_empty).nonzero().flatten().tolist()
    for b, (q_SHd, rows, num_seen) in zip(full, _by_sequence(case), strict=True):
        exact, exact_lse = _attention(q_SHd.double(), rows.double(), num_seen, scale)
        torchs, _ = _attention(q_SHd, rows, num_seen, scale)
        _assert_near(out[b].double() - exact, torchs.double() - exact, f"sequence {b} of {len(rows)} rows")
        _assert_lse(lse[b].double(), exact_lse, f"sequence {b} of {len(rows)} rows")


def _assert_near(error: Tensor, allowed: Tensor, where: str) -> None:
    for name, got, limit in (
        ("largest", error.abs().max(), allowed.abs().max()),
        ("mean square", error.square().mean().sqrt(), allowed.square().mean().sqrt()),
    ):
        assert got.item() <= _TIMES_TORCH * limit.item(), (
            f"{where}: {name} error of out is {got.item():.3g}, wanted <= {_TIMES_TORCH:g} times torch's "
            f"{limit.item():.3g}"
        )


def _assert_lse(lse: Tensor, exact: Tensor, where: str) -> None:
    is_seen = exact.isfinite()
    assert bool((lse[~is_seen] == -math.inf).all()), f"{where}: a token that sees nothing has a log-sum-exp"
    relative = (lse[is_seen] - exact[is_seen]).abs() / exact[is_seen].abs().clamp(min=1)
    worst = relative.max().item() if relative.numel() else 0.0
    assert worst <= _LSE_RELATIVE, (
        f"{where}: error of the log-sum-exp is {worst:.3g} of it, wanted <= {_LSE_RELATIVE:g}"
    )
