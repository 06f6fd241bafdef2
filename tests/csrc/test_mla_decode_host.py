"""Latent decoding of sm_80 through its own bindings, on the host executor, against float64.

Outputs and scratch start out poisoned, with guards round them. Rows behind a sequence's last are NaN and so
are pages of nobody; slots of the table that are not in use are wild.
"""

from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dscoder.testing.decode import SCALE, VALUE_DIM, WIDTH, DecodeCase, assert_decodes, decode_case
from dscoder.testing.examples import FIXED
from dscoder.testing.poison import WILD, assert_guards_whole, guarded

BF16, FP16 = torch.bfloat16, torch.float16
EDGES = (0, 1, 31, 32, 33, 63, 64, 65)


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    lengths: tuple[int, ...]
    num_new: int = 1
    num_heads: int = 16
    page_size: int = 64
    dtype: torch.dtype = BF16
    num_parts: int = 3
    order: int = 0

    def case(self) -> DecodeCase:
        return decode_case(
            torch.Generator().manual_seed(self.order),
            self.lengths,
            num_new=self.num_new,
            num_heads=self.num_heads,
            page_size=self.page_size,
            dtype=self.dtype,
        )


def plan_for(host_ops: ModuleType, case: DecodeCase, num_parts: int) -> Tensor:
    _, cache, table, seq_lens = case
    plan, memory = guarded(num_parts + 1 + len(seq_lens), 2, dtype=torch.int32)
    host_ops.mla_decode_plan(seq_lens, plan, table.shape[1] * cache.shape[1])
    assert_guards_whole(memory)
    return plan


def decode(
    host_ops: ModuleType, case: DecodeCase, plan: Tensor, *, arch: str = "sm80"
) -> tuple[Tensor, Tensor]:
    q, cache, table, seq_lens = case
    num_sequences, num_new, num_heads, _ = q.shape
    num_parts, num_rows = len(plan) - 1 - num_sequences, num_new * num_heads
    num_slots = 2 * num_parts if num_parts > 1 else 0
    out, out_memory = guarded(num_sequences, num_new, num_heads, VALUE_DIM, dtype=q.dtype)
    lse, lse_memory = guarded(num_sequences, num_new, num_heads, dtype=torch.float32)
    partial_out, partial_memory = guarded(num_slots, num_rows, VALUE_DIM, dtype=torch.float32)
    partial_lse, partial_lse_memory = guarded(num_slots, num_rows, dtype=torch.float32)
    outputs = (out, lse, partial_out, partial_lse)
    host_ops.mla_decode_forward(q, cache, table, seq_lens, plan, *outputs, SCALE, arch)
    assert_guards_whole(out_memory, lse_memory, partial_memory, partial_lse_memory)
    return out, lse


def check(host_ops: ModuleType, host_kernels: ModuleType, call: Call) -> tuple[Tensor, Tensor]:
    host_kernels.set_order(call.order)
    case = call.case()
    actual = decode(host_ops, case, plan_for(host_ops, case, call.num_parts))
    assert_decodes(actual, case)
    return actual


# ---- sizes ----


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
def test_a_sequence_sees_the_rows_of_its_pages(
    host_ops: ModuleType, host_kernels: ModuleType, page_size: int, dtype: torch.dtype
) -> None:
    check(
        host_ops,
        host_kernels,
        Call(lengths=(*EDGES, 300, 129), page_size=page_size, dtype=dtype, order=page_size),
    )


@pytest.mark.parametrize("num_heads", [1, 7, 16, 17, 32, 61, 64, 65, 128])
def test_any_number_of_heads_is_tiled(host_ops: ModuleType, host_kernels: ModuleType, num_heads: int) -> None:
    check(host_ops, host_kernels, Call(lengths=(0, 40, 331), num_heads=num_heads, order=num_heads))


@pytest.mark.parametrize("num_heads", [5, 16, 40])
@pytest.mark.parametrize("num_new", [2, 3, 4, 9])
def test_a_new_token_does_not_see_those_behind_it(
    host_ops: ModuleType, host_kernels: ModuleType, num_new: int, num_heads: int
) -> None:
    call = Call(
        lengths=(num_new - 1, num_new, 33, 64, 190), num_new=num_new, num_heads=num_heads, order=num_new
    )
    check(host_ops, host_kernels, replace(call, dtype=FP16 if num_new % 2 else BF16))


@settings(FIXED, max_examples=12)
@given(
    lengths=st.lists(st.one_of(st.sampled_from(EDGES), st.integers(0, 400)), min_size=1, max_size=5),
    num_new=st.integers(1, 4),
    num_heads=st.sampled_from([1, 3, 8, 16, 24]),
    page_size=st.sampled_from([16, 32, 64, 128]),
    num_parts=st.integers(1, 9),
    order=st.integers(0, 1000),
)
def test_random_calls_are_exact_enough(
    host_ops: ModuleType,
    host_kernels: ModuleType,
    lengths: list[int],
    num_new: int,
    num_heads: int,
    page_size: int,
    num_parts: int,
    order: int,
) -> None:
    call = Call(lengths=tuple(lengths), num_new=num_new, num_heads=num_heads, page_size=page_size)
    check(host_ops, host_kernels, replace(call, num_parts=num_parts, order=order))


# ---- parts ----


@pytest.mark.parametrize("num_parts", [1, 2, 5, 13, 40])
def test_any_number_of_parts_gives_the_same(
    host_ops: ModuleType, host_kernels: ModuleType, num_parts: int
) -> None:
    """Also more parts than there are blocks."""
    check(host_ops, host_kernels, Call(lengths=(700, 0, 90, 260), num_parts=num_parts, num_heads=4))


def test_more_pieces_than_four_warps_have_lanes_are_added_up(
    host_ops: ModuleType, host_kernels: ModuleType
) -> None:
    call = Call(lengths=(64 * 280,), num_heads=1, num_parts=140)
    case = call.case()
    plan = plan_for(host_ops, case, call.num_parts)
    assert plan[-1, 1] - plan[-1, 0] >= 128
    assert_decodes(decode(host_ops, case, plan), case)


@pytest.mark.parametrize("planned", [(0, 0, 0), (64, 5000, 1), (900, 20, 400), (4000, 4000, 4000)])
def test_a_plan_made_for_other_lengths_decodes_too(host_ops: ModuleType, planned: tuple[int, ...]) -> None:
    q, cache, table, seq_lens = Call(lengths=(300, 0, 131)).case()
    stale = torch.tensor(planned, dtype=torch.int32)
    plan = torch.full((6 + 1 + 3, 2), WILD, dtype=torch.int32)
    host_ops.mla_decode_plan(stale, plan, 8192)
    case = (q, cache, table, seq_lens)
    assert_decodes(decode(host_ops, case, plan), case)


@pytest.mark.parametrize("filling", [0, -1, 1, 2, WILD, -(2**31)])
def test_a_plan_of_nonsense_stays_within_its_memory(host_ops: ModuleType, filling: int) -> None:
    """The sanitizers see every access; guards and the run's end are what this build sees."""
    case = Call(lengths=(100, 0, 131)).case()
    decode(host_ops, case, torch.full((4 + 1 + 3, 2), filling, dtype=torch.int32))


@pytest.mark.parametrize("seed", range(4))
def test_a_plan_of_random_rows_stays_within_its_memory(host_ops: ModuleType, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    case = Call(lengths=(100, 0, 131)).case()
    decode(host_ops, case, torch.randint(-1, 6, (5 + 1 + 3, 2), generator=rng, dtype=torch.int32))


def test_the_order_of_threads_and_blocks_changes_no_bit(
    host_ops: ModuleType, host_kernels: ModuleType
) -> None:
    case = Call(lengths=(77, 300), num_new=2, num_heads=9, order=1).case()
    plan = plan_for(host_ops, case, 4)
    first = decode(host_ops, case, plan)
    for order in range(1, 5):
        host_kernels.set_order(order)
        for again, wanted in zip(decode(host_ops, case, plan), first, strict=True):
            assert torch.equal(again, wanted)


# ---- memory ----


def test_the_cache_and_the_table_may_be_views(host_ops: ModuleType) -> None:
    case = Call(lengths=(33, 130), page_size=16).case()
    q, cache, table, seq_lens = case
    wide_cache = torch.full((cache.shape[0], 40, WIDTH), torch.nan, dtype=cache.dtype)
    wide_table = torch.full((table.shape[0], table.shape[1] + 5), WILD, dtype=torch.int32)
    pages, slots = wide_cache[:, 8:24], wide_table[:, 2 : 2 + table.shape[1]]
    pages.copy_(cache)
    slots.copy_(table)
    plan = plan_for(host_ops, case, 2)
    for seen, wanted in zip(
        decode(host_ops, (q, pages, slots, seq_lens), plan), decode(host_ops, case, plan), strict=True
    ):
        assert torch.equal(seen, wanted)


@pytest.mark.parametrize("wild", [-1, WILD, -(2**31)])
def test_rows_of_a_page_that_is_not_there_are_zeros(host_ops: ModuleType, wild: int) -> None:
    q, cache, table, seq_lens = Call(lengths=(64 * 3,)).case()
    zeroed = cache.clone()
    zeroed[table[0, 1].long()] = 0
    wanted = (q, zeroed, table.clone(), seq_lens)
    table[0, 1] = wild
    case = (q, cache, table, seq_lens)
    assert_decodes(decode(host_ops, case, plan_for(host_ops, case, 2)), wanted)


def test_a_length_beyond_the_table_is_that_of_the_table(host_ops: ModuleType) -> None:
    q, cache, table, seq_lens = Call(lengths=(128, 70)).case()
    table = table[:, :2]
    beyond = torch.tensor([WILD, 70], dtype=torch.int32)
    case = (q, cache, table, beyond)
    assert_decodes(decode(host_ops, case, plan_for(host_ops, case, 3)), (q, cache, table, seq_lens))


def test_negative_lengths_are_empty(host_ops: ModuleType) -> None:
    q, cache, table, seq_lens = Call(lengths=(0, 70)).case()
    case = (q, cache, table, torch.tensor([-5, 70], dtype=torch.int32))
    assert_decodes(decode(host_ops, case, plan_for(host_ops, case, 3)), (q, cache, table, seq_lens))


@pytest.mark.parametrize("num_parts", [1, 3, 40])
def test_a_nan_in_a_query_is_seen_in_both_its_results(host_ops: ModuleType, num_parts: int) -> None:
    """However many parts share the sequence: -inf would say that the token saw nothing."""
    q, *rest = Call(lengths=(64 * 70, 9), num_heads=2).case()
    q[0, 0, 1, 3] = torch.nan
    case = (q, *rest)
    for result in decode(host_ops, case, plan_for(host_ops, case, num_parts)):
        assert bool(result[0, 0, 1].isnan().all())
        assert bool(result[0, 0, 0].isfinite().all())
        assert bool(result[1].isfinite().all())


def test_large_scores_overflow_nothing(host_ops: ModuleType) -> None:
    """Scores in the thousands, growing along the sequence: the largest one so far changes in every stage."""
    q, cache, table, seq_lens = Call(lengths=(200,), num_heads=3).case()
    growth = torch.linspace(0.5, 8, 200)
    for row in range(200):
        cache[table[0, row // 64].long(), row % 64] *= growth[row]
    case = ((q * 8).to(q.dtype), cache, table, seq_lens)
    assert_decodes(decode(host_ops, case, plan_for(host_ops, case, 2)), case)


def test_no_sequences_are_no_work(host_ops: ModuleType) -> None:
    q, cache, table, seq_lens = Call(lengths=(5,)).case()
    case = (q[:0], cache, table[:0], seq_lens[:0])
    out, _ = decode(host_ops, case, plan_for(host_ops, case, 2))
    assert out.shape == (0, 1, 16, VALUE_DIM)


# ---- what is refused ----


def refused(host_ops: ModuleType, error: type[Exception], message: str, **changed: Tensor) -> None:
    q, cache, table, seq_lens = Call(lengths=(70, 30)).case()
    given = {
        "q": q,
        "cache": cache,
        "page_table": table,
        "seq_lens": seq_lens,
        "plan": torch.zeros(2 + 1 + 2, 2, dtype=torch.int32),
        "out": torch.zeros(2, 1, 16, VALUE_DIM, dtype=q.dtype),
        "lse": torch.zeros(2, 1, 16),
        "partial_out": torch.zeros(4, 16, VALUE_DIM),
        "partial_lse": torch.zeros(4, 16),
        "scale": SCALE,
        "arch": "sm80",
    } | changed
    with pytest.raises(error, match=message):
        host_ops.mla_decode_forward(**given)


def test_wrong_arguments_are_named(host_ops: ModuleType) -> None:
    cache = Call(lengths=(70, 30)).case()[1]
    refused(host_ops, TypeError, "q must be bfloat16 or float16, got float32", q=torch.zeros(2, 1, 16, WIDTH))
    refused(
        host_ops,
        ValueError,
        r"q must have shape \[any, any, any, 576\]",
        q=torch.zeros(2, 1, 16, 64, dtype=BF16),
    )
    refused(host_ops, ValueError, "pages of 16, 32, 64 or 128 rows, got 48", cache=cache[:, :48])
    refused(host_ops, TypeError, "cache must be bfloat16, got float16", cache=cache.half())
    refused(
        host_ops,
        ValueError,
        "contiguous in its last 2 dimensions",
        cache=cache.transpose(0, 1).contiguous().transpose(0, 1),
    )
    refused(
        host_ops,
        ValueError,
        r"page_table must have shape \[2, any\]",
        page_table=torch.zeros(3, 4, dtype=torch.int32),
    )
    refused(
        host_ops,
        ValueError,
        "plan must have more than 1 \\+ 2 rows, got 3",
        plan=torch.zeros(3, 2, dtype=torch.int32),
    )
    refused(
        host_ops,
        ValueError,
        r"partial_out must have shape \[4, 16, 512\]",
        partial_out=torch.zeros(3, 16, 512),
    )
    refused(
        host_ops, ValueError, r"seq_lens must have shape \[2\]", seq_lens=torch.zeros(3, dtype=torch.int32)
    )
    refused(host_ops, ValueError, "q must start at a multiple of 16 bytes, is 2 past one",
            q=torch.zeros(2 * 16 * WIDTH + 1, dtype=BF16)[1:].view(2, 1, 16, WIDTH))  # fmt: skip


def test_an_arch_that_is_not_there_is_named(host_ops: ModuleType) -> None:
    q, cache, table, seq_lens = Call(lengths=(70,)).case()
    case = (q, cache, table, seq_lens)
    plan = plan_for(host_ops, case, 2)
    with pytest.raises(ValueError, match=r"arch sm90 needs compute capability 9\.0"):
        decode(host_ops, case, plan, arch="sm90")
    with pytest.raises(ValueError, match="arch must be auto, sm80 or sm90, got sm70"):
        decode(host_ops, case, plan, arch="sm70")
    assert_decodes(decode(host_ops, case, plan, arch="auto"), case)
