"""The gradients of prefill attention of sm_80 through their own bindings, on the host executor, in float64.

Outputs and scratch start out poisoned, with guards round them; rows of no sequence are NaN.
"""

from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dscoder.testing.cases import randn
from dscoder.testing.compare import assert_same
from dscoder.testing.examples import FIXED
from dscoder.testing.poison import assert_guards_whole, guarded
from dscoder.testing.prefill import (
    NUM_STRAY,
    SCALE,
    WIDTHS,
    Lengths,
    PrefillCase,
    apart,
    prefill_case,
    stray_case,
)
from dscoder.testing.prefill_gradients import Gradients, assert_gradients_near, forward_and_gradients

BF16, FP16 = torch.bfloat16, torch.float16
# Tiles have 64 keys, and 128 queries: 64 where sequences have no more queries on average.
SHORT = (0, 1, 2, 15, 16, 17, 31, 33, 63, 64)
EDGES = (*SHORT, 65, 127, 128, 129, 160, 200)


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    lengths: Lengths
    num_heads: int = 1
    num_key_heads: int | None = None
    widths: tuple[int, int] = (192, 128)
    dtype: torch.dtype = BF16
    causal: bool = True
    deterministic: bool = False
    order: int = 0

    def case(self) -> PrefillCase:
        rng = torch.Generator().manual_seed(self.order)
        return prefill_case(
            rng,
            self.lengths,
            num_heads=self.num_heads,
            num_key_heads=self.num_key_heads,
            widths=self.widths,
            dtype=self.dtype,
        )

    def grad_out(self) -> Tensor:
        rng = torch.Generator().manual_seed(self.order + 1)
        num_queries = sum(num_queries for num_queries, _ in self.lengths)
        return randn(rng, num_queries, self.num_heads, self.widths[1], dtype=self.dtype)


def saved_of(
    case: PrefillCase, grad_out: Tensor, *, causal: bool, scale: float = SCALE
) -> tuple[Tensor, Tensor]:
    """out rounded once, and lse."""
    q, k, v, *ends = case
    exact = (q.double(), k.double(), v.double(), ends[0], ends[1])
    out, lse, _ = forward_and_gradients(exact, grad_out.double(), causal=causal, scale=scale)
    return out.to(grad_out.dtype), lse.float()


def differentiate(
    host_ops: ModuleType,
    case: PrefillCase,
    grad_out: Tensor,
    *,
    causal: bool = True,
    deterministic: bool = False,
    scale: float = SCALE,
    saved: tuple[Tensor, Tensor] | None = None,
    arch: str = "sm80",
) -> Gradients:
    q, k, v, ends_q, ends_k = case
    num_queries, num_heads, width = q.shape
    num_sequences = len(ends_q) - 1
    out, lse = saved if saved is not None else saved_of(case, grad_out, causal=causal, scale=scale)
    size = host_ops.mla_prefill_plan_size(max(num_queries, len(k)), num_sequences)
    plan, plan_memory = guarded(-(-size // 2), 2, dtype=torch.int32)
    num_sums = 0 if deterministic else host_ops.mla_prefill_num_sums(num_queries, num_sequences)
    values, values_memory = guarded(2, num_heads, num_queries, dtype=torch.float32)
    sums, sums_memory = guarded(num_sums, num_heads, width, dtype=torch.float32)
    pairs = [guarded(*x.shape, dtype=x.dtype) for x in (q, k, v)]
    grads = tuple(grad for grad, _ in pairs)
    host_ops.mla_prefill_backward(
        *(grad_out, (q, k, v, out, lse), (ends_q, ends_k), (plan.view(-1), values, sums), grads),
        *(scale, causal, deterministic, arch),
    )
    assert_guards_whole(plan_memory, values_memory, sums_memory, *(memory for _, memory in pairs))
    return grads[0], grads[1], grads[2]


def check(host_ops: ModuleType, host_kernels: ModuleType, call: Call) -> None:
    host_kernels.set_order(call.order)
    case, grad_out = call.case(), call.grad_out()
    for deterministic in (False, True):
        actual = differentiate(host_ops, case, grad_out, causal=call.causal, deterministic=deterministic)
        assert_gradients_near(actual, case, grad_out, causal=call.causal)


# ---- sizes ----


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("lengths", [SHORT, (200, 129, 1, 65)], ids=["short", "long"])
def test_sequences_of_any_length_attend_to_themselves(
    host_ops: ModuleType,
    host_kernels: ModuleType,
    lengths: tuple[int, ...],
    widths: tuple[int, int],
    dtype: torch.dtype,
    causal: bool,
) -> None:
    pairs = tuple((length, length) for length in lengths)
    check(host_ops, host_kernels, Call(lengths=pairs, widths=widths, dtype=dtype, causal=causal))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [((1, 200), (33, 97), (5, 64)), ((128, 129), (130, 261))], ids=str)
def test_a_piece_of_a_prompt_sees_the_keys_before_it(
    host_ops: ModuleType, host_kernels: ModuleType, lengths: Lengths, causal: bool
) -> None:
    check(host_ops, host_kernels, Call(lengths=lengths, causal=causal, order=1))


@pytest.mark.parametrize("causal", [True, False])
def test_queries_ahead_of_all_keys_see_nothing(
    host_ops: ModuleType, host_kernels: ModuleType, causal: bool
) -> None:
    """Whole tiles of them, too, and sequences that have no keys, or no queries, at all."""
    check(host_ops, host_kernels, Call(lengths=((300, 3), (40, 0), (0, 50), (7, 5)), causal=causal))


def test_what_sees_nothing_and_what_nobody_sees_have_gradient_zero(host_ops: ModuleType) -> None:
    call = Call(lengths=((9, 4), (0, 70), (5, 0)))
    grad_q, grad_k, grad_v = differentiate(host_ops, call.case(), call.grad_out())
    assert not grad_q[:5].any()
    assert grad_q[5:9].any()
    assert not grad_q[9:].any()
    for grad in (grad_k, grad_v):
        assert grad[:4].any()
        assert not grad[4:].any()


@pytest.mark.parametrize(("num_heads", "num_key_heads"), [(3, 3), (17, 17), (4, 2), (6, 1), (34, 17)])
def test_heads_share_keys_in_groups(
    host_ops: ModuleType, host_kernels: ModuleType, num_heads: int, num_key_heads: int
) -> None:
    call = Call(lengths=((40, 40), (3, 9)), num_heads=num_heads, num_key_heads=num_key_heads)
    check(host_ops, host_kernels, call)


@settings(FIXED, max_examples=15)
@given(
    lengths=st.lists(
        st.tuples(*2 * [st.one_of(st.sampled_from(EDGES), st.integers(0, 200))]), min_size=1, max_size=4
    ),
    groups=st.sampled_from([(1, 1), (2, 1), (2, 2)]),
    widths=st.sampled_from(WIDTHS),
    dtype=st.sampled_from([BF16, FP16]),
    causal=st.booleans(),
    order=st.integers(0, 1000),
)
def test_random_calls_are_exact_enough(
    host_ops: ModuleType,
    host_kernels: ModuleType,
    lengths: list[tuple[int, int]],
    groups: tuple[int, int],
    widths: tuple[int, int],
    dtype: torch.dtype,
    causal: bool,
    order: int,
) -> None:
    call = Call(lengths=tuple(lengths), num_heads=groups[0], num_key_heads=groups[1], widths=widths)
    check(host_ops, host_kernels, replace(call, dtype=dtype, causal=causal, order=order))


@pytest.mark.parametrize("num_stray", [0, 4])
def test_no_sequences_are_zeros(host_ops: ModuleType, num_stray: int) -> None:
    q, k, v, ends_q, ends_k = Call(lengths=((num_stray, num_stray),)).case()
    case, grad_out = (q, k, v, ends_q[:1], ends_k[:1]), torch.ones(num_stray, 1, 128, dtype=BF16)
    for grad in differentiate(host_ops, case, grad_out):
        assert_same(grad, torch.zeros_like(grad))


# ---- order ----


def test_without_atomics_the_order_of_threads_and_blocks_changes_no_bit(
    host_ops: ModuleType, host_kernels: ModuleType
) -> None:
    call = Call(lengths=((150, 150), (20, 90)), num_heads=2, num_key_heads=1)
    case, grad_out = call.case(), call.grad_out()
    host_kernels.set_order(0)
    wanted = differentiate(host_ops, case, grad_out, deterministic=True)
    for order in range(1, 5):
        host_kernels.set_order(order)
        again = differentiate(host_ops, case, grad_out, deterministic=True)
        for got, want in zip(again, wanted, strict=True):
            assert_same(got, want)


def test_keys_and_values_have_the_same_bits_with_atomics_too(
    host_ops: ModuleType, host_kernels: ModuleType
) -> None:
    call = Call(lengths=((150, 190),), causal=False)
    case, grad_out = call.case(), call.grad_out()
    wanted = differentiate(host_ops, case, grad_out, causal=False, deterministic=True)
    for order in range(3):
        host_kernels.set_order(order)
        for got, want in zip(
            differentiate(host_ops, case, grad_out, causal=False)[1:], wanted[1:], strict=True
        ):
            assert_same(got, want)


# ---- memory ----


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_rows_of_no_sequence_reach_nothing_and_get_zeros(
    host_ops: ModuleType, causal: bool, deterministic: bool
) -> None:
    call = Call(lengths=((70, 70), (0, 3), (12, 40)), num_heads=2)
    case, grad_out = call.case(), call.grad_out()
    wanted = differentiate(host_ops, case, grad_out, causal=causal, deterministic=deterministic)
    stray, stray_grad = stray_case(case), torch.full((len(grad_out) + 2 * NUM_STRAY, 2, 128), torch.nan)
    stray_grad = stray_grad.to(BF16)
    stray_grad[NUM_STRAY:-NUM_STRAY] = grad_out
    out, lse = saved_of(case, grad_out, causal=causal)
    stray_out, stray_lse = torch.full_like(stray_grad, torch.nan), torch.full((len(stray_grad), 2), torch.nan)
    stray_out[NUM_STRAY:-NUM_STRAY], stray_lse[NUM_STRAY:-NUM_STRAY] = out, lse
    saved = (stray_out, stray_lse)
    actual = differentiate(
        host_ops, stray, stray_grad, saved=saved, causal=causal, deterministic=deterministic
    )
    for got, want in zip(actual, wanted, strict=True):
        if deterministic:
            assert_same(got[NUM_STRAY:-NUM_STRAY], want)
        for margin in (got[:NUM_STRAY], got[-NUM_STRAY:]):
            assert_same(margin, torch.zeros_like(margin))
    inside = (
        actual[0][NUM_STRAY:-NUM_STRAY],
        actual[1][NUM_STRAY:-NUM_STRAY],
        actual[2][NUM_STRAY:-NUM_STRAY],
    )
    assert_gradients_near(inside, case, grad_out, causal=causal)


def test_tokens_and_heads_may_lie_apart(host_ops: ModuleType) -> None:
    call = Call(lengths=((70, 90), (12, 40)), num_heads=2)
    case, grad_out = call.case(), call.grad_out()
    q, k, v, ends_q, ends_k = case
    saved = saved_of(case, grad_out, causal=True)
    wanted = differentiate(host_ops, case, grad_out, deterministic=True, saved=saved)
    views = (apart(q), apart(k), apart(v), ends_q, ends_k)
    actual = differentiate(host_ops, views, apart(grad_out), deterministic=True, saved=saved)
    for got, want in zip(actual, wanted, strict=True):
        assert_same(got, want)


@pytest.mark.parametrize(
    "ends", [(0, 500, 82), (0, -7, 82), (40, 20, 82), (2**31 - 1, -(2**31), 2**31 - 1)], ids=str
)
def test_ends_of_nonsense_stay_within_their_memory(host_ops: ModuleType, ends: tuple[int, ...]) -> None:
    """The sanitizers see every access; guards and the run's end are what this build sees."""
    call = Call(lengths=((70, 70), (12, 12)))
    case, grad_out = call.case(), call.grad_out()
    saved, wild = saved_of(case, grad_out, causal=True), torch.tensor(ends, dtype=torch.int32)
    for deterministic in (False, True):
        differentiate(host_ops, (*case[:3], wild, wild), grad_out, saved=saved, deterministic=deterministic)


# ---- numbers ----


def test_a_nan_in_a_sequence_stays_in_it(host_ops: ModuleType) -> None:
    call = Call(lengths=((70, 70), (12, 40)))
    case, grad_out = call.case(), call.grad_out()
    case[0][3, 0, 5] = torch.nan
    saved = saved_of(case, grad_out, causal=True)
    assert saved[1][3].isnan().all()
    for deterministic in (False, True):
        actual = differentiate(host_ops, case, grad_out, saved=saved, deterministic=deterministic)
        for grad in actual:
            assert grad[:70].isnan().any()
            assert grad[70:].isfinite().all()


def test_large_scores_overflow_nothing(host_ops: ModuleType, host_kernels: ModuleType) -> None:
    """Scores in the hundreds, of keys that are not seen too: no float32 holds exp of them."""
    call = Call(lengths=((70, 70), (5, 130)))
    (q, k, v, ends_q, ends_k), grad_out = call.case(), call.grad_out()
    case = (q * 8, k * 8, v, ends_q, ends_k)
    assert_gradients_near(differentiate(host_ops, case, grad_out), case, grad_out, causal=True)


def test_scores_far_below_zero_make_no_weights_of_keys_that_are_not_there(host_ops: ModuleType) -> None:
    """exp(0 - lse) of the zeros behind the last key is inf, and inf * 0 would be NaN."""
    call = Call(lengths=((5, 5),))
    (q, k, v, ends_q, ends_k), grad_out = call.case(), call.grad_out()
    case = (q.abs() * 6, -k.abs() * 6, v, ends_q, ends_k)
    for deterministic in (False, True):
        actual = differentiate(host_ops, case, grad_out, causal=False, deterministic=deterministic)
        assert_gradients_near(actual, case, grad_out, causal=False)


# ---- what is refused ----


def refused(host_ops: ModuleType, error: type[Exception], message: str, **changed: object) -> None:
    call = Call(lengths=((7, 9),), num_heads=2)
    (q, k, v, *ends), grad_out = call.case(), call.grad_out()
    given = {
        **{"q": q, "k": k, "v": v, "out": torch.zeros_like(grad_out), "lse": torch.zeros(7, 2)},
        **{"grad_out": grad_out, "plan": torch.zeros(64).int(), "row_values": torch.zeros(2, 2, 7)},
        **{"sums_q": torch.zeros(16, 2, 192), "grad_q": q, "grad_k": k, "grad_v": v, "arch": "sm80"},
        **{"ends_q": ends[0], "ends_k": ends[1]},
    } | changed
    groups = (
        ("q", "k", "v", "out", "lse"),
        ("ends_q", "ends_k"),
        ("plan", "row_values", "sums_q"),
        ("grad_q", "grad_k", "grad_v"),
    )
    tensors = [tuple(given[name] for name in names) for names in groups]
    with pytest.raises(error, match=f"^mla_prefill backward: {message}"):
        host_ops.mla_prefill_backward(given["grad_out"], *tensors, SCALE, True, False, given["arch"])


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"q": torch.zeros(7, 2, 192)}, TypeError, "q must be bfloat16 or float16, got float32"),
        ({"k": torch.zeros(9, 2, 192).half()}, TypeError, "k must be bfloat16, got float16"),
        ({"k": torch.zeros(9, 2, 128).bfloat16()}, ValueError, r"k must have shape \[any, any, 192\]"),
        ({"v": torch.zeros(8, 2, 128).bfloat16()}, ValueError, r"v must have shape \[9, 2, any\]"),
        ({"lse": torch.zeros(7, 3)}, ValueError, r"lse must have shape \[7, 2\], got \[7, 3\]"),
        ({"out": torch.zeros(7, 2, 64).bfloat16()}, ValueError, r"out must have shape \[7, 2, 128\]"),
        (
            {"grad_out": torch.zeros(6, 2, 128).bfloat16()},
            ValueError,
            r"grad_out must have shape \[7, 2, 128\]",
        ),
        ({"plan": torch.zeros(6).int()}, ValueError, "plan must have at least 7 elements, got 6"),
        ({"sums_q": torch.zeros(0, 2, 192)}, ValueError, r"sums_q must have shape \[16, 2, 192\]"),
        ({"row_values": torch.zeros(2, 7, 2)}, ValueError, r"row_values must have shape \[2, 2, 7\]"),
        ({"grad_k": torch.zeros(9, 1, 192).bfloat16()}, ValueError, r"grad_k must have shape \[9, 2, 192\]"),
        ({"ends_k": torch.zeros(3).int()}, ValueError, r"cu_seqlens_k must have shape \[2\], got \[3\]"),
        (
            {"q": torch.zeros(7, 2, 193).bfloat16()[..., :192]},
            ValueError,
            "q must have tokens and heads a multiple of 8 elements apart, got 386 and 193",
        ),
        (
            {"q": torch.zeros(7 * 2 * 192 + 1).bfloat16()[1:].view(7, 2, 192)},
            ValueError,
            "q must start at a multiple of 16 bytes, is 2 past one",
        ),
        ({"arch": "sm90"}, ValueError, "arch sm90 needs compute capability 9.0"),
        ({"arch": "sm70"}, ValueError, "arch must be auto, sm80 or sm90, got sm70"),
    ],
)
def test_wrong_arguments_are_named(
    host_ops: ModuleType, changed: dict[str, object], error: type[Exception], message: str
) -> None:
    refused(host_ops, error, message, **changed)
