"""The kernels of latent_rope and latent_append, through their own bindings, on the host executor.

Outputs and scratch start out poisoned, with guards round them; what lies beside strided rows is NaN.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dscoder import ops
from dscoder.testing import compare
from dscoder.testing.cases import latent_case, randn
from dscoder.testing.examples import FIXED
from dscoder.testing.poison import WILD, assert_guards_whole, guarded, with_strides

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    num_tokens: int = 5
    num_heads: int = 3
    nope_width: int = 16
    rope_width: int = 8
    latent_width: int = 64
    dtype: torch.dtype = torch.bfloat16
    weight_dtype: torch.dtype | None = None  # that of the latent
    order: int = 0


def tensors_of(case: Case) -> tuple[Tensor, ...]:
    """Query and latent are slices of one projection, NaN on both sides of them."""
    rng = torch.Generator().manual_seed(case.order)
    query, latent, weight, *angles = latent_case(
        rng,
        case.num_tokens,
        num_heads=case.num_heads,
        nope_width=case.nope_width,
        rope_width=case.rope_width,
        latent_width=case.latent_width,
        dtype=case.dtype,
    )
    flat = query.flatten(1)
    end = 8 + flat.shape[1]
    projection, _ = guarded(case.num_tokens, end + latent.shape[1] + 16, dtype=case.dtype)
    projection[:, 8:end] = flat
    projection[:, end + 8 : -8] = latent
    weight = weight.to(case.weight_dtype or case.dtype)
    return projection[:, 8:end].view(query.shape), projection[:, end + 8 : -8], weight, *angles


def forward(host_ops: ModuleType, t: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    query, latent, weight, *angles = t
    query_out, query_memory = guarded(*query.shape, dtype=query.dtype)
    row_out, row_memory = guarded(*latent.shape, dtype=query.dtype)
    scale_out, scale_memory = guarded(len(query), dtype=torch.float32)
    host_ops.latent_rope_forward(query, latent, weight, tuple(angles), query_out, row_out, scale_out, EPS)
    assert_guards_whole(query_memory, row_memory, scale_memory)
    return query_out, row_out, scale_out


def backward(host_ops: ModuleType, t: tuple[Tensor, ...], grads: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    query, latent, weight, *angles = t
    *_, scale = forward(host_ops, t)
    num_partials = host_ops.latent_rope_num_partials(len(query))
    grad_query, query_memory = guarded(*query.shape, dtype=query.dtype)
    grad_latent, latent_memory = guarded(*latent.shape, dtype=query.dtype)
    grad_weight, weight_memory = guarded(*weight.shape, dtype=torch.float32)
    partial, partial_memory = guarded(num_partials, *weight.shape, dtype=torch.float32)
    outputs = (grad_query, grad_latent, (grad_weight, partial))
    host_ops.latent_rope_backward(grads, latent, weight, scale, tuple(angles), *outputs)
    assert_guards_whole(query_memory, latent_memory, weight_memory, partial_memory)
    return grad_query, grad_latent, grad_weight


def append(
    host_ops: ModuleType, t: tuple[Tensor, ...], slots: Tensor, num_pages: int = 9
) -> tuple[Tensor, ...]:
    """The cache, pages of 4 rows, and the query's place; NaN where nothing was written."""
    query, latent, weight, *angles = t
    cache, cache_memory = guarded(num_pages, 4, latent.shape[1], dtype=query.dtype)
    query_out, query_memory = guarded(*query.shape[:2], latent.shape[1], dtype=query.dtype)
    host_ops.latent_append_forward(query, latent, weight, tuple(angles), slots, cache, query_out, EPS)
    assert_guards_whole(cache_memory, query_memory)
    return cache, query_out


def grads_of(case: Case) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(case.order + 1)
    head_width = case.nope_width + case.rope_width
    return (
        randn(rng, case.num_tokens, case.num_heads, head_width, dtype=case.dtype),
        randn(rng, case.num_tokens, case.latent_width + case.rope_width, dtype=case.dtype),
    )


def slots_of(case: Case) -> Tensor:
    """Distinct ones among 36, and a third of them outside."""
    rng = torch.Generator().manual_seed(case.order + 2)
    slots = torch.randperm(max(36, case.num_tokens), generator=rng)[: case.num_tokens]
    outside = torch.tensor([-1, 36, WILD, -(2**62), 2**62])
    lots = torch.randint(3 * len(outside), (case.num_tokens,), generator=rng)
    return torch.where(lots < len(outside), outside[lots % len(outside)], slots)


def check(host_ops: ModuleType, host_kernels: ModuleType, case: Case) -> None:
    host_kernels.set_order(case.order)
    t, grads, slots = tensors_of(case), grads_of(case), slots_of(case)
    wanted = torch.ops.dscoder.latent_rope.default(*t, EPS)
    for got, want in zip(forward(host_ops, t), wanted, strict=True):
        compare.assert_close(got, want)
    wanted = torch.ops.dscoder.latent_rope_backward.default(*grads, *t[1:3], wanted[2], *t[3:])
    for got, want in zip(backward(host_ops, t, grads), wanted, strict=True):
        compare.assert_close(got, want.to(got.dtype), dtype=want.dtype)

    cache, query_out = append(host_ops, t, slots)
    wanted_cache, wanted_query = torch.full_like(cache, torch.nan), torch.full_like(query_out, torch.nan)
    torch.ops.dscoder.latent_append.default(*t, EPS, slots, wanted_cache, wanted_query)
    compare.assert_close(cache, wanted_cache)
    compare.assert_close(query_out, wanted_query)


# ---- the shapes that the kernels treat differently ----

# A warp holds 512 numbers of a latent, 32 words a time; the key of 264 has more than a word a lane.
WIDTHS = [(8, 8, 8), (16, 0, 8), (0, 64, 256), (128, 64, 512), (24, 264, 264), (8, 16, 504)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("nope_width", "rope_width", "latent_width"), WIDTHS)
def test_any_width(
    host_ops: ModuleType,
    host_kernels: ModuleType,
    nope_width: int,
    rope_width: int,
    latent_width: int,
    dtype: torch.dtype,
) -> None:
    case = Case(nope_width=nope_width, rope_width=rope_width, latent_width=latent_width, dtype=dtype)
    check(host_ops, host_kernels, case)


# A block norms 8 rows, or has 512 words of queries; the weight's gradient is that of 128 blocks at most.
@pytest.mark.parametrize("num_heads", [0, 1, 16])
@pytest.mark.parametrize("num_tokens", [0, 1, 8, 131])
def test_any_number_of_heads_and_tokens(
    host_ops: ModuleType, host_kernels: ModuleType, num_tokens: int, num_heads: int
) -> None:
    check(host_ops, host_kernels, Case(num_tokens=num_tokens, num_heads=num_heads, order=num_tokens))


def test_more_tokens_than_blocks_for_their_rows(host_ops: ModuleType, host_kernels: ModuleType) -> None:
    assert host_ops.latent_rope_num_partials(1029) == 128
    check(host_ops, host_kernels, Case(num_tokens=1029, num_heads=1, nope_width=0, latent_width=8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_of_float32(host_ops: ModuleType, host_kernels: ModuleType, dtype: torch.dtype) -> None:
    check(host_ops, host_kernels, Case(dtype=dtype, weight_dtype=torch.float32))


# ---- any shape, any order ----


@st.composite
def cases(draw: st.DrawFn) -> Case:
    return Case(
        num_tokens=draw(st.sampled_from([0, 1, 2, 3, 7, 31])),
        num_heads=draw(st.integers(0, 9)),
        nope_width=8 * draw(st.integers(0, 9)),
        rope_width=8 * draw(st.integers(0, 9)),
        latent_width=8 * draw(st.integers(1, 64)),
        dtype=draw(st.sampled_from(DTYPES)),
        weight_dtype=draw(st.sampled_from([None, torch.float32])),
        order=draw(st.integers(0, 2**32)),
    )


@settings(FIXED, max_examples=40)
@given(case=cases())
def test_any_shape_agrees_with_the_reference(
    host_ops: ModuleType, host_kernels: ModuleType, case: Case
) -> None:
    check(host_ops, host_kernels, case)


def test_the_order_of_threads_and_blocks_changes_nothing(
    host_ops: ModuleType, host_kernels: ModuleType
) -> None:
    case = Case(num_tokens=29, num_heads=7, latent_width=512, rope_width=64)
    t, grads, slots = tensors_of(case), grads_of(case), slots_of(case)

    def everything() -> tuple[Tensor, ...]:
        return *forward(host_ops, t), *backward(host_ops, t, grads), *append(host_ops, t, slots)

    host_kernels.set_order(0)
    wanted = everything()
    for order in range(1, 8):
        host_kernels.set_order(order)
        for got, want in zip(everything(), wanted, strict=True):
            compare.assert_same(got, want)


@pytest.mark.parametrize("position", [-1, 12, WILD, 2**62])
def test_a_position_outside_the_tables_makes_what_it_turns_nan(host_ops: ModuleType, position: int) -> None:
    t = tensors_of(Case(num_tokens=3))
    query, row, scale = forward(host_ops, t)
    t[5][1] = position
    got_query, got_row, got_scale = forward(host_ops, t)
    assert got_query[1, :, 16:].isnan().all()
    assert got_row[1, 64:].isnan().all()
    compare.assert_same(got_row[:, :64], row[:, :64])
    compare.assert_same(got_query[::2], query[::2])
    compare.assert_same(got_scale, scale)


# ---- the ops on the kernels ----


def forward_and_backward(t: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = tuple(x.detach().requires_grad_() for x in t[:3])
    out = ops.latent_rope(*leaves, *t[3:], eps=EPS)
    grads = [torch.arange(x.numel()).remainder(17).sub(8).div(8).view(x.shape).to(x.dtype) for x in out]
    return *(x.detach() for x in out), *torch.autograd.grad(out, leaves, grads)


def appended(t: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    target = ops.AppendTarget(
        slots_T=torch.arange(len(t[0])).flip(0) * 3 - 2,
        cache_PLd=torch.full((40, 2, t[1].shape[1]), torch.nan, dtype=t[0].dtype),
        query_out_THd=torch.full((*t[0].shape[:2], t[1].shape[1]), torch.nan, dtype=t[0].dtype),
    )
    ops.latent_append(*t, eps=EPS, target=target)
    return target.cache_PLd, target.query_out_THd


KERNEL_OPS = ("latent_rope", "latent_rope_backward", "latent_append")
KERNEL_CASES = [
    *(
        Case(num_tokens=num_tokens, dtype=dtype)
        for num_tokens in (0, 37)
        for dtype in (*DTYPES, torch.float64)
    ),
    Case(weight_dtype=torch.float32),
    Case(weight_dtype=torch.float64),
    # What only the reference can do.
    Case(nope_width=4, dtype=torch.float16),
    Case(rope_width=6, dtype=torch.float32),
    Case(latent_width=520),
]


@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_the_ops_and_their_gradients_run_on_the_kernels(use_kernels: Callable[..., None], case: Case) -> None:
    t = tensors_of(case)
    wanted = (*forward_and_backward(t), *appended(t))
    use_kernels(*KERNEL_OPS)
    for got, want in zip((*forward_and_backward(t), *appended(t)), wanted, strict=True):
        assert got.dtype == want.dtype
        compare.assert_close(got, want, dtype=case.dtype)


def test_the_ops_take_any_strides_and_tables(use_kernels: Callable[..., None]) -> None:
    query, latent, weight, cos, sin, positions = tensors_of(Case(num_tokens=7, dtype=torch.float32))
    use_kernels(*KERNEL_OPS)
    plain = (query, latent, weight, cos, sin, positions)
    crooked = tuple(with_strides(x) for x in (*plain[:3], cos.double(), sin.double(), positions.int()))
    off_by_one = torch.cat([query.new_zeros(1), query.flatten()])[1:].view(query.shape)
    wanted = (*forward_and_backward(plain), *appended(plain))
    for t in (crooked, (off_by_one, *plain[1:])):
        for got, want in zip((*forward_and_backward(t), *appended(t)), wanted, strict=True):
            compare.assert_same(got, want)


def test_a_cache_in_pieces_is_appended_to_as_it_is(use_kernels: Callable[..., None]) -> None:
    t = tensors_of(Case(num_tokens=2))
    use_kernels(*KERNEL_OPS)
    _, row = ops.latent_rope(*t, eps=EPS)
    wide = torch.full((3, 2, 4, 72), torch.nan, dtype=torch.bfloat16)
    query_out = torch.full((2, 3, 72), torch.nan, dtype=torch.bfloat16)
    target = ops.AppendTarget(slots_T=torch.tensor([9, 0]), cache_PLd=wide[:, 1], query_out_THd=query_out)
    ops.latent_append(*t, eps=EPS, target=target)
    compare.assert_close(wide[[2, 0], 1, [1, 0]], row)
    assert wide[:, 0].isnan().all()


# ---- a wrong argument is an error, and nothing is launched ----


def arguments(**fields: object) -> dict[str, object]:
    angles = (torch.zeros(5, 2), torch.zeros(5, 2), torch.zeros(3, dtype=torch.int64))
    return {
        **{"query": torch.zeros(3, 2, 8), "latent": torch.zeros(3, 12), "weight": torch.zeros(8)},
        **{"angles": angles, "slots": torch.zeros(3, dtype=torch.int64), "cache": torch.zeros(2, 4, 12)},
        **{"query_out": torch.full((3, 2, 12), torch.nan), "eps": 1e-6, **fields},
    }


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"query": torch.zeros(3, 2, 8).int()}, TypeError, "query must be float32, bfloat16 or float16"),
        (
            {"query": torch.zeros(3, 4, 8)[:, ::2]},
            ValueError,
            r"query must be contiguous in its last 2 dimensions, got shape \[3, 2, 8\] with strides",
        ),
        (
            {"query": torch.zeros(3, 2, 2)},
            ValueError,
            "latent must be as wide as weight and at most 2 more, got 12 and 8",
        ),
        ({"latent": torch.zeros(4, 12)}, ValueError, r"latent must have shape \[3, any\], got \[4, 12\]"),
        ({"latent": torch.zeros(3, 12).half()}, TypeError, "latent must be float32, got float16"),
        ({"weight": torch.zeros(8).half()}, TypeError, "weight must be float32, got float16"),
        ({"weight": torch.zeros(0)}, ValueError, "weight must have at least 1 element, got 0"),
        ({"weight": torch.zeros(16)}, ValueError, "latent must be as wide as weight and at most 8 more"),
        ({"angles": (torch.zeros(5, 2),) * 2}, TypeError, None),
        ({"slots": torch.zeros(3).int()}, TypeError, "slots must be int64, got int32"),
        ({"slots": torch.zeros(2).long()}, ValueError, r"slots must have shape \[3\], got \[2\]"),
        ({"cache": torch.zeros(2, 4, 8)}, ValueError, r"cache must have shape \[any, any, 12\], got"),
        ({"query_out": torch.zeros(3, 2, 8)}, ValueError, r"query_out must have shape \[3, 2, 12\], got"),
        (
            {"latent": torch.zeros(38)[2:].view(3, 12)},
            ValueError,
            "latent must begin on a boundary of 16 bytes, got one 8 bytes past it",
        ),
        (
            {"latent": torch.zeros(3, 13)[:, :12]},
            ValueError,
            "latent in float32 must have rows a multiple of 4 apart, got 13",
        ),
    ],
)
def test_a_wrong_argument_is_named(
    host_ops: ModuleType, fields: dict[str, object], error: type[Exception], message: str | None
) -> None:
    given_arguments = arguments(**fields)
    with pytest.raises(error, match=None if message is None else f"^latent_append: {message}"):
        host_ops.latent_append_forward(**given_arguments)
    query_out = given_arguments["query_out"]
    assert isinstance(query_out, Tensor)
    assert "query_out" in fields or bool(query_out.isnan().all())


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case(latent_width=12), "the latent in bfloat16 must be a multiple of 8 wide, got 12"),
        (Case(rope_width=4), "the rotated part in bfloat16 must be a multiple of 8 wide, got 4"),
        (
            Case(nope_width=4),
            "the part of the query that is not rotated in bfloat16 must be a multiple of 8 wide, got 4",
        ),
        (Case(latent_width=520), "weight must have at most 512 elements, got 520"),
    ],
    ids=str,
)
def test_what_the_kernels_cannot_do_is_refused(host_ops: ModuleType, case: Case, message: str) -> None:
    t = tensors_of(case)
    with pytest.raises(ValueError, match=f"^latent_rope: {message}$"):
        forward(host_ops, t)
