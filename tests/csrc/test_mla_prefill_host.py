"""Prefill attention of sm_80 through its own bindings, on the host executor, against float64.

Outputs and scratch start out poisoned, with guards round them; rows of no sequence are NaN.
"""

from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dscoder.testing.examples import FIXED
from dscoder.testing.poison import WILD, assert_guards_whole, guarded
from dscoder.testing.prefill import (
    NUM_STRAY,
    SCALE,
    WIDTHS,
    PrefillCase,
    apart,
    assert_prefills,
    prefill_case,
    stray_case,
)

BF16, FP16 = torch.bfloat16, torch.float16
EDGES = (0, 1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 160)


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    lengths: tuple[tuple[int, int], ...]
    num_heads: int = 1
    num_key_heads: int | None = None
    widths: tuple[int, int] = (192, 128)
    dtype: torch.dtype = BF16
    causal: bool = True
    order: int = 0

    def case(self) -> PrefillCase:
        return prefill_case(
            torch.Generator().manual_seed(self.order),
            self.lengths,
            num_heads=self.num_heads,
            num_key_heads=self.num_key_heads,
            widths=self.widths,
            dtype=self.dtype,
        )


def attend(
    host_ops: ModuleType, case: PrefillCase, *, causal: bool = True, scale: float = SCALE, arch: str = "sm80"
) -> tuple[Tensor, Tensor]:
    q, k, v, ends_q, ends_k = case
    num_sequences = len(ends_q) - 1
    out, out_memory = guarded(*q.shape[:2], v.shape[2], dtype=q.dtype)
    lse, lse_memory = guarded(*q.shape[:2], dtype=torch.float32)
    size = host_ops.mla_prefill_plan_size(len(q), num_sequences)
    plan, plan_memory = guarded(-(-size // 2), 2, dtype=torch.int32)
    host_ops.mla_prefill_forward(q, k, v, ends_q, ends_k, plan.view(-1), out, lse, scale, causal, arch)
    assert_guards_whole(out_memory, lse_memory, plan_memory)
    return out, lse


def check(host_ops: ModuleType, host_kernels: ModuleType, call: Call) -> None:
    host_kernels.set_order(call.order)
    case = call.case()
    assert_prefills(attend(host_ops, case, causal=call.causal), case, causal=call.causal)


# ---- sizes ----


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("widths", WIDTHS)
def test_sequences_of_any_length_attend_to_themselves(
    host_ops: ModuleType,
    host_kernels: ModuleType,
    widths: tuple[int, int],
    dtype: torch.dtype,
    causal: bool,
) -> None:
    lengths = tuple((length, length) for length in EDGES)
    check(host_ops, host_kernels, Call(lengths=lengths, widths=widths, dtype=dtype, causal=causal))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("widths", WIDTHS)
def test_a_piece_of_a_prompt_sees_the_keys_before_it(
    host_ops: ModuleType, host_kernels: ModuleType, widths: tuple[int, int], causal: bool
) -> None:
    lengths = ((1, 200), (33, 97), (128, 129), (130, 261), (5, 64))
    check(host_ops, host_kernels, Call(lengths=lengths, widths=widths, causal=causal, order=1))


@pytest.mark.parametrize("causal", [True, False])
def test_queries_ahead_of_all_keys_see_nothing(
    host_ops: ModuleType, host_kernels: ModuleType, causal: bool
) -> None:
    """Whole tiles of them, too, and sequences that have no keys at all."""
    check(host_ops, host_kernels, Call(lengths=((300, 3), (40, 0), (0, 50), (7, 5)), causal=causal))


@pytest.mark.parametrize(("num_heads", "num_key_heads"), [(1, 1), (3, 3), (17, 17), (4, 2), (6, 1), (34, 17)])
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
    groups=st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 3)]),
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
    num_heads, num_key_heads = groups
    call = Call(
        lengths=tuple(lengths),
        num_heads=num_heads,
        num_key_heads=num_key_heads,
        widths=widths,
        dtype=dtype,
        causal=causal,
        order=order,
    )
    check(host_ops, host_kernels, call)


def test_no_sequences_are_no_work(host_ops: ModuleType) -> None:
    q, k, v, ends_q, ends_k = Call(lengths=((5, 5),)).case()
    out, lse = attend(host_ops, (q, k, v, ends_q[:1], ends_k[:1]))
    assert bool(out.isnan().all())
    assert bool(lse.isnan().all())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("keys", [32, 64])
@pytest.mark.parametrize("widths", WIDTHS)
def test_blocks_of_32_and_of_64_keys_give_what_is_wanted(
    host_ops: ModuleType, widths: tuple[int, int], keys: int, dtype: torch.dtype, causal: bool
) -> None:
    """Whichever the device has room for."""
    case = Call(lengths=((129, 129), (33, 96), (65, 64), (0, 9)), widths=widths, dtype=dtype).case()
    result = attend(host_ops, case, causal=causal, arch=f"sm80 {keys} keys")
    assert_prefills(result, case, causal=causal)


# ---- memory ----


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("widths", WIDTHS)
def test_rows_of_no_sequence_are_neither_read_nor_written(
    host_ops: ModuleType, widths: tuple[int, int], causal: bool
) -> None:
    """NaN that a masked weight multiplied, 0 * NaN, would show."""
    case = Call(lengths=((30, 30), (70, 100), (33, 33)), widths=widths).case()
    results = attend(host_ops, stray_case(case), causal=causal)
    for result in results:
        assert bool(result[:NUM_STRAY].isnan().all())
        assert bool(result[-NUM_STRAY:].isnan().all())
    assert_prefills((results[0][3:-3], results[1][3:-3]), case, causal=causal)


def test_nan_stays_in_its_sequence_and_its_head(host_ops: ModuleType) -> None:
    q, k, v, ends_q, ends_k = Call(lengths=((40, 40), (50, 50), (70, 70)), num_heads=2).case()
    k[45, 1] = torch.nan
    v[46, 1] = torch.nan
    for result in attend(host_ops, (q, k, v, ends_q, ends_k), causal=False):
        assert bool(result[40:90, 1].isnan().all())
        assert bool(result[40:90, 0].isfinite().all())
        assert bool(result[:40].isfinite().all())
        assert bool(result[90:].isfinite().all())


def test_a_nan_in_a_query_is_seen_in_both_its_results(host_ops: ModuleType) -> None:
    """-inf would say that the query saw nothing."""
    q, *rest = Call(lengths=((90, 90),)).case()
    q[41, 0, 3] = torch.nan
    for result in attend(host_ops, (q, *rest)):
        assert bool(result[41].isnan().all())
        assert bool(result[:41].isfinite().all())
        assert bool(result[42:].isfinite().all())


def test_heads_and_tokens_may_lie_apart(host_ops: ModuleType) -> None:
    q, k, v, *ends = case = Call(lengths=((40, 70), (30, 30)), num_heads=2).case()
    wanted = attend(host_ops, case)
    for got, want in zip(attend(host_ops, (apart(q), apart(k), apart(v), *ends)), wanted, strict=True):
        assert torch.equal(got, want)


def test_keys_and_values_may_be_columns_of_one_tensor(host_ops: ModuleType) -> None:
    """As a projection leaves them; and a head dimension may be the outer one."""
    q, k, v, *ends = case = Call(lengths=((40, 40), (30, 30)), num_heads=2, widths=(128, 128)).case()
    both = torch.cat([k, v], dim=-1)
    outer = q.transpose(0, 1).contiguous().transpose(0, 1)
    seen = attend(host_ops, (outer, both[..., :128], both[..., 128:], *ends))
    for got, want in zip(seen, attend(host_ops, case), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "ends", [[0, WILD, 60], [-5, -(2**31), 40], [50, 20, 60], [WILD, WILD, WILD], [0, 0, 61]]
)
def test_wild_ends_lead_nowhere_else(host_ops: ModuleType, ends: list[int]) -> None:
    """The sanitizers see every access; guards and the run's end are what this build sees."""
    q, k, v, *_ = Call(lengths=((60, 60),)).case()
    wild, tame = torch.tensor(ends, dtype=torch.int32), torch.tensor([0, 30, 60], dtype=torch.int32)
    for case in ((q, k, v, wild, wild), (q, k, v, wild, tame), (q, k, v, tame, wild)):
        attend(host_ops, case)


# ---- numbers ----


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_scores_that_grow_along_the_keys_move_the_reference(host_ops: ModuleType, dtype: torch.dtype) -> None:
    """Largest scores that rise by more than the weights may, by less, and fall."""
    for ends in ((0.1, 6.0), (0.5, 0.9), (6.0, 0.1)):
        q, _, *rest = Call(lengths=((150, 150),), dtype=dtype).case()
        growth = torch.linspace(*ends, 150)[:, None, None]
        v, ends_q, ends_k = rest
        case = (q, (q.roll(1, 0) * growth).to(dtype), v, ends_q, ends_k)
        for causal in (True, False):
            assert_prefills(attend(host_ops, case, causal=causal, scale=0.2), case, causal=causal, scale=0.2)


def test_large_scores_overflow_nothing(host_ops: ModuleType) -> None:
    q, k, *rest = Call(lengths=((100, 100),)).case()
    case = ((q * 30).to(BF16), (k * 30).to(BF16), *rest)
    assert_prefills(attend(host_ops, case, scale=1.0), case, causal=True, scale=1.0)


def test_the_order_of_threads_and_blocks_changes_no_bit(
    host_ops: ModuleType, host_kernels: ModuleType
) -> None:
    case = Call(lengths=((70, 70), (150, 180)), num_heads=2).case()
    first = attend(host_ops, case)
    for order in range(1, 5):
        host_kernels.set_order(order)
        for again, wanted in zip(attend(host_ops, case), first, strict=True):
            assert torch.equal(again, wanted)


# ---- what a device has room for ----

KIB = 1024
DEVICES = {"A100": (164, 163), "A10": (100, 99), "H200": (228, 227)}  # of an SM, of a block


@pytest.mark.parametrize(
    ("device", "width", "keys"),
    [("A100", 192, 32), ("A100", 128, 64), ("H200", 192, 64), ("H200", 128, 64), ("A10", 192, 32),
     ("A10", 128, 32)],
)  # fmt: skip
def test_keys_come_in_the_widest_blocks_that_leave_room_for_two_blocks_of_the_grid(
    host_ops: ModuleType, device: str, width: int, keys: int
) -> None:
    per_sm, per_block = (size * KIB for size in DEVICES[device])
    plan = host_ops.mla_prefill_sm80_plan(width, 128, per_sm, per_block)
    assert plan["keys"] == keys
    assert plan["shared_bytes"] == 2 * (128 * width + 2 * keys * width + keys * 128) <= per_block
    if device != "A10":
        assert 2 * (plan["shared_bytes"] + KIB + 128) <= per_sm


def test_a_device_without_room_is_refused(host_ops: ModuleType) -> None:
    with pytest.raises(ValueError, match="needs 81920 bytes of shared memory, the device has 65536"):
        host_ops.mla_prefill_sm80_plan(192, 128, 2**16, 2**16)


# ---- what is refused ----


def refused(host_ops: ModuleType, error: type[Exception], message: str, **changed: object) -> None:
    q, k, v, ends_q, ends_k = Call(lengths=((70, 70), (30, 30)), num_heads=2).case()
    given = {
        "q": q,
        "k": k,
        "v": v,
        "cu_seqlens_q": ends_q,
        "cu_seqlens_k": ends_k,
        "plan": torch.zeros(40, dtype=torch.int32),
        "out": torch.zeros(100, 2, 128, dtype=BF16),
        "lse": torch.zeros(100, 2),
        "scale": SCALE,
        "causal": True,
        "arch": "sm80",
    } | changed
    with pytest.raises(error, match=message):
        host_ops.mla_prefill_forward(**given)


def test_wrong_arguments_are_named(host_ops: ModuleType) -> None:
    q, k, v = (torch.zeros(100, 2, width, dtype=BF16) for width in (192, 192, 128))
    ends = torch.zeros(3, dtype=torch.int32)
    refused(host_ops, TypeError, "q must be bfloat16 or float16, got float32", q=q.float())
    refused(host_ops, TypeError, "k must be bfloat16, got float16", k=k.half())
    refused(host_ops, ValueError, r"k must have shape \[any, any, 192\]", k=k[..., :128])
    refused(host_ops, ValueError, r"v must have shape \[100, 2, any\]", v=v[:99])
    refused(host_ops, ValueError, r"out must have shape \[100, 2, 128\]", out=q)
    refused(host_ops, ValueError, r"cu_seqlens_k must have shape \[3\]", cu_seqlens_k=ends[:2])
    refused(host_ops, ValueError, "cu_seqlens_q must have at least one element, got 0", cu_seqlens_q=ends[:0])
    refused(host_ops, ValueError, "plan must have at least 12 elements, got 2", plan=ends[:2])
    refused(host_ops, ValueError, "heads of q must be a multiple of those of k, got 2 and 3",
            k=torch.zeros(100, 3, 192, dtype=BF16), v=torch.zeros(100, 3, 128, dtype=BF16))  # fmt: skip
    refused(host_ops, ValueError, "widths of keys and values must be 192 and 128, or 128 and 128, got 192 and"
            " 64", v=v[..., :64], out=torch.zeros(100, 2, 64, dtype=BF16))  # fmt: skip
    shifted = torch.zeros(100 * 2 * 192 + 1, dtype=BF16)[1:].view(100, 2, 192)
    refused(host_ops, ValueError, "q must start at a multiple of 16 bytes, is 2 past one", q=shifted)
    spread = torch.zeros(100, 2, 196, dtype=BF16)[..., :192]
    refused(host_ops, ValueError, "a multiple of 8 elements apart, got 392 and 196", k=spread)


def test_an_arch_that_is_not_there_is_named(host_ops: ModuleType) -> None:
    refused(host_ops, ValueError, r"arch sm90 needs compute capability 9\.0", arch="sm90")
    refused(host_ops, ValueError, "arch must be auto, sm80 or sm90, got sm70", arch="sm70")
    case = Call(lengths=((40, 40),)).case()
    assert_prefills(attend(host_ops, case, arch="auto"), case, causal=True)
