"""The moe_permute kernels, through their own bindings, on the host executor: the same bits as the reference.

Outputs and scratch start out poisoned, with guards round them; unused rows of gradients are NaN.
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
from dscoder.testing import compare, gpu
from dscoder.testing.cases import randn
from dscoder.testing.examples import FIXED
from dscoder.testing.poison import WILD, assert_guards_whole, guarded, poison_rows_from, with_strides

LOWEST = -(2**31)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUTINGS = ["any", "dropped", "one_expert", "half", "sorted", "none"]
MIN_CHUNK, MAX_CHUNKS = 1024, 128  # choices a block ranks at the least, blocks at the most


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    num_tokens: int = 5
    width: int = 8
    num_experts: int = 64
    num_topk: int = 6
    dtype: torch.dtype = torch.bfloat16
    routing: str = "dropped"
    order: int = 0


def idx_of(case: Case) -> Tensor:
    """Choices with duplicates within a token, whatever the kernel's caller may think of."""
    rng = torch.Generator().manual_seed(case.order)
    shape = (case.num_tokens, case.num_topk)
    idx = torch.randint(0, case.num_experts, shape, generator=rng, dtype=torch.int32)
    match case.routing:
        case "dropped":
            outside = torch.tensor([LOWEST, -1, case.num_experts, WILD], dtype=torch.int32)
            wild = outside[torch.randint(0, 4, shape, generator=rng)]
            idx = torch.where(torch.rand(shape, generator=rng) < 0.3, wild, idx)
        case "one_expert":
            idx.fill_(case.num_experts - 1)
        case "half":
            idx = idx // 2 * 2
        case "sorted":
            idx = idx.flatten().sort(descending=True).values.view(shape)
        case "none":
            idx.fill_(-1)
    return idx


def permute(host_ops: ModuleType, case: Case, x_TD: Tensor, idx_TK: Tensor) -> tuple[Tensor, ...]:
    num_rows = idx_TK.numel()
    rows_MD, rows_memory = guarded(num_rows, case.width, dtype=case.dtype)
    offsets_E, offsets_memory = guarded(case.num_experts, dtype=torch.int32)
    row_TK, row_memory = guarded(*idx_TK.shape, dtype=torch.int32)
    token_M, token_memory = guarded(idx_TK.numel(), dtype=torch.int32)
    counts, counts_memory = guarded(
        host_ops.moe_permute_num_counts(num_rows), case.num_experts, dtype=torch.int32
    )
    host_ops.moe_permute_forward(x_TD, idx_TK, rows_MD, offsets_E, row_TK, token_M, counts)
    assert_guards_whole(rows_memory, offsets_memory, row_memory, token_memory, counts_memory)
    return rows_MD, offsets_E, row_TK, token_M


def sum_of_rows(host_ops: ModuleType, grad_MD: Tensor, row_TK: Tensor) -> Tensor:
    grad_TD, memory = guarded(row_TK.shape[0], grad_MD.shape[1], dtype=grad_MD.dtype)
    host_ops.moe_permute_backward(grad_MD, row_TK, grad_TD)
    assert_guards_whole(memory)
    return grad_TD


def tensors_of(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """x with guards that a stray read would copy, idx, and the gradient of the rows."""
    rng = torch.Generator().manual_seed(case.order + 1)
    x_TD, _ = guarded(case.num_tokens, case.width, dtype=case.dtype)
    x_TD.copy_(randn(rng, case.num_tokens, case.width))
    idx_TK = idx_of(case)
    return x_TD, idx_TK, randn(rng, idx_TK.numel(), case.width, dtype=case.dtype)


def check(host_ops: ModuleType, host_kernels: ModuleType, case: Case) -> None:
    host_kernels.set_order(case.order)
    x_TD, idx_TK, grad_MD = tensors_of(case)
    rows_MD, offsets_E, row_TK, token_M = permute(host_ops, case, x_TD, idx_TK)
    leaf_TD = x_TD.clone().requires_grad_()
    wanted_MD, handle = ops.moe_permute(leaf_TD, idx_TK, num_experts=case.num_experts)
    compare.assert_same(offsets_E, handle.offsets_E)
    compare.assert_same(row_TK, handle.row_TK)
    compare.assert_same(token_M, handle.token_M)
    compare.assert_same(rows_MD, wanted_MD.detach())

    grad_MD = poison_rows_from(grad_MD, int(offsets_E[-1]))
    (wanted_TD,) = torch.autograd.grad(wanted_MD, leaf_TD, grad_MD)
    compare.assert_close(sum_of_rows(host_ops, grad_MD, row_TK), wanted_TD)


# ---- the shapes that the kernel treats differently ----

# Words of 16 bytes a row: a tile is 640 of them, 320 threads side by side.
WIDTHS = [8, 24, 136, 1024, 2048, 5120, 5128]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_any_width(host_ops: ModuleType, host_kernels: ModuleType, width: int, dtype: torch.dtype) -> None:
    check(host_ops, host_kernels, Case(width=width, dtype=dtype, order=width))


@pytest.mark.parametrize("num_topk", range(1, 17))
def test_any_number_of_experts_a_token(host_ops: ModuleType, host_kernels: ModuleType, num_topk: int) -> None:
    check(host_ops, host_kernels, Case(num_topk=num_topk, num_tokens=19, order=num_topk))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("num_tokens", [0, 1, 170, 171, 1021])  # 6 * 170 choices are one chunk, 6 * 171 two
def test_any_number_of_tokens(
    host_ops: ModuleType, host_kernels: ModuleType, num_tokens: int, routing: str
) -> None:
    check(host_ops, host_kernels, Case(num_tokens=num_tokens, routing=routing, order=num_tokens))


@pytest.mark.parametrize("num_experts", [1, 2, 31, 160, 257, 509, 512])
@pytest.mark.parametrize("num_tokens", [3, 701])
def test_any_number_of_experts(
    host_ops: ModuleType, host_kernels: ModuleType, num_experts: int, num_tokens: int
) -> None:
    check(host_ops, host_kernels, Case(num_experts=num_experts, num_tokens=num_tokens, order=num_experts))


@pytest.mark.parametrize("case", [Case(num_tokens=0), Case(num_topk=0), Case(width=0)], ids=str)
def test_nothing_to_move(host_ops: ModuleType, host_kernels: ModuleType, case: Case) -> None:
    check(host_ops, host_kernels, case)


# ---- chunks ----


def maps(host_ops: ModuleType, idx_TK: Tensor, num_experts: int) -> tuple[Tensor, ...]:
    offsets_E, offsets_memory = guarded(num_experts, dtype=torch.int32)
    row_TK, row_memory = guarded(*idx_TK.shape, dtype=torch.int32)
    token_M, token_memory = guarded(idx_TK.numel(), dtype=torch.int32)
    counts, _ = guarded(host_ops.moe_permute_num_counts(idx_TK.numel()), num_experts, dtype=torch.int32)
    host_ops.moe_permute_maps_forward(idx_TK, offsets_E, row_TK, token_M, counts)
    assert_guards_whole(offsets_memory, row_memory, token_memory)
    return offsets_E, row_TK, token_M


@pytest.mark.parametrize("num_choices", [MIN_CHUNK * MAX_CHUNKS + 5, 3 * MIN_CHUNK * 17 + 1])
def test_maps_of_many_chunks(host_ops: ModuleType, host_kernels: ModuleType, num_choices: int) -> None:
    """More choices than MAX_CHUNKS smallest chunks hold, so that chunks grow; and more chunks than are added
    up at once."""
    host_kernels.set_order(num_choices)
    case = Case(num_tokens=num_choices, num_topk=1, num_experts=37)
    handle = ops.moe_permute_maps(idx_of(case), num_experts=37)
    wanted = (handle.offsets_E, handle.row_TK, handle.token_M)
    for got, want in zip(maps(host_ops, idx_of(case), 37), wanted, strict=True):
        compare.assert_same(got, want)


@pytest.mark.parametrize(
    ("num_choices", "num_counts"),
    [
        (0, 0),
        (1, 0),
        (MIN_CHUNK, 0),
        (MIN_CHUNK + 1, 2),
        (8192 * 6, 48),
        (MIN_CHUNK * MAX_CHUNKS, MAX_CHUNKS),
        (MIN_CHUNK * MAX_CHUNKS + 1, MAX_CHUNKS // 2 + 1),
        (2**31 - 1, MAX_CHUNKS),
    ],
)
def test_chunks_are_few_and_one_needs_no_counts(
    host_ops: ModuleType, num_choices: int, num_counts: int
) -> None:
    assert host_ops.moe_permute_num_counts(num_choices) == num_counts


@settings(FIXED)
@given(num_choices=st.integers(0, 2**31 - 1))
def test_chunks_never_outnumber_what_a_block_adds_up(host_ops: ModuleType, num_choices: int) -> None:
    num_counts = host_ops.moe_permute_num_counts(num_choices)
    assert num_counts <= MAX_CHUNKS
    assert (num_counts > 1) == (num_choices > MIN_CHUNK)


# ---- any shape, any order ----


@st.composite
def cases(draw: st.DrawFn) -> Case:
    return Case(
        num_tokens=draw(st.sampled_from([0, 1, 2, 3, 7, 31, 67, 211])),
        width=8 * draw(st.integers(1, 40)),
        num_experts=draw(st.one_of(st.integers(1, 512), st.sampled_from([64, 160, 512]))),
        num_topk=draw(st.integers(1, 16)),
        dtype=draw(st.sampled_from(DTYPES)),
        routing=draw(st.sampled_from(ROUTINGS)),
        order=draw(st.integers(0, 2**32)),
    )


@settings(FIXED, max_examples=50)
@given(case=cases())
def test_any_shape_agrees_with_the_reference(
    host_ops: ModuleType, host_kernels: ModuleType, case: Case
) -> None:
    check(host_ops, host_kernels, case)


@pytest.mark.parametrize("num_tokens", [33, 400])
def test_the_order_of_threads_and_blocks_changes_nothing(
    host_ops: ModuleType, host_kernels: ModuleType, num_tokens: int
) -> None:
    case = Case(num_tokens=num_tokens, num_experts=13, width=24, num_topk=7)
    x_TD, idx_TK, grad_MD = tensors_of(case)
    host_kernels.set_order(0)
    wanted = permute(host_ops, case, x_TD, idx_TK)
    wanted_TD = sum_of_rows(host_ops, grad_MD, wanted[2])
    for order in range(1, 12):
        host_kernels.set_order(order)
        for got, want in zip(permute(host_ops, case, x_TD, idx_TK), wanted, strict=True):
            compare.assert_same(got, want)
        compare.assert_same(sum_of_rows(host_ops, grad_MD, wanted[2]), wanted_TD)


# ---- the op on the kernels ----

KERNEL_OPS = ("moe_permute", "moe_permute_maps", "moe_permute_backward")


def forward_and_backward(x_TD: Tensor, idx_TK: Tensor, grad_MD: Tensor) -> tuple[Tensor, ...]:
    leaf_TD = x_TD.detach().requires_grad_()
    rows_MD, handle = ops.moe_permute(leaf_TD, idx_TK, num_experts=64)
    maps = (handle.offsets_E, handle.row_TK, handle.token_M)
    return rows_MD.detach(), *maps, *torch.autograd.grad(rows_MD, leaf_TD, grad_MD)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("num_tokens", [0, 37])
def test_the_op_and_its_gradient_run_on_the_kernels(
    use_kernels: Callable[..., None], num_tokens: int, dtype: torch.dtype
) -> None:
    tensors = tensors_of(Case(num_tokens=num_tokens, dtype=dtype))
    wanted = forward_and_backward(*tensors)
    wanted_handle = ops.moe_permute_maps(tensors[1], num_experts=64)
    use_kernels(*KERNEL_OPS)
    gpu.assert_agrees(forward_and_backward(*tensors), wanted)
    handle = ops.moe_permute_maps(tensors[1], num_experts=64)
    compare.assert_same(handle.offsets_E, wanted_handle.offsets_E)
    compare.assert_same(handle.row_TK, wanted_handle.row_TK)
    compare.assert_same(handle.token_M, wanted_handle.token_M)


@pytest.mark.parametrize(
    "view", [with_strides, lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)]
)
def test_strides_and_crooked_memory_change_nothing(
    use_kernels: Callable[..., None], view: Callable[[Tensor], Tensor]
) -> None:
    tensors = tensors_of(Case(num_tokens=37, dtype=torch.bfloat16))
    use_kernels(*KERNEL_OPS)
    wanted = forward_and_backward(*tensors)
    for got, want in zip(forward_and_backward(*map(view, tensors)), wanted, strict=True):
        compare.assert_same(got, want)


# ---- a wrong argument is an error, and nothing is launched ----


def int32(*shape: int) -> Tensor:
    return torch.full(shape, WILD, dtype=torch.int32)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"x": torch.zeros(4, 8).double()}, TypeError, "x must be float32, bfloat16 or float16, got float64"),
        ({"x": torch.zeros(8)}, ValueError, "x must have 2 dimensions, got 1"),
        ({"x": torch.zeros(5, 8)}, ValueError, r"x must have shape \[4, any\], got \[5, 8\]"),
        (
            {"x": torch.zeros(4, 6), "rows": torch.zeros(8, 6)},
            ValueError,
            "x in float32 must be a multiple of 4 wide, got 6",
        ),
        (
            {"x": torch.zeros(4, 12).bfloat16(), "rows": torch.zeros(8, 12).bfloat16()},
            ValueError,
            "x in bfloat16 must be a multiple of 8 wide, got 12",
        ),
        (
            {"x": torch.zeros(33)[1:].view(4, 8)},
            ValueError,
            "x must begin on a boundary of 16 bytes, got one 4",
        ),
        ({"rows": torch.zeros(9, 8)}, ValueError, r"rows must have shape \[8, 8\], got \[9, 8\]"),
        ({"rows": torch.zeros(8, 8).half()}, TypeError, "rows must be float32, got float16"),
        ({"idx": int32(4, 2).long()}, TypeError, "idx must be int32, got int64"),
        ({"token": int32(7)}, ValueError, r"token must have shape \[8\], got \[7\]"),
        ({"row": int32(4, 3)}, ValueError, r"row must have shape \[4, 2\], got \[4, 3\]"),
        (
            {"offsets": int32(0), "counts": int32(0, 0)},
            ValueError,
            "offsets must have at least 1 element, got 0",
        ),
        (
            {"offsets": int32(513), "counts": int32(0, 513)},
            ValueError,
            "num_experts must be <= 512, got 513",
        ),
        ({"counts": int32(1, 3)}, ValueError, r"counts must have shape \[0, 3\], got \[1, 3\]"),
        (
            {"idx": int32(4, 17), "row": int32(4, 17), "token": int32(68), "rows": torch.zeros(68, 8)},
            ValueError,
            "idx must have at most 16 columns, got 17",
        ),
    ],
)
def test_a_wrong_argument_is_named(
    host_ops: ModuleType, fields: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    arguments = {
        **{"x": torch.zeros(4, 8), "idx": int32(4, 2), "rows": torch.full((8, 8), torch.nan)},
        **{"offsets": int32(3), "row": int32(4, 2), "token": int32(8), "counts": int32(0, 3)},
        **fields,
    }
    with pytest.raises(error, match=f"^moe_permute: {message}"):
        host_ops.moe_permute_forward(**arguments)
    assert bool((arguments["row"] == WILD).all())


def test_a_gradient_of_the_wrong_shape_is_named(host_ops: ModuleType) -> None:
    message = r"^moe_permute backward: grad must have shape \[8, any\], got \[7, 8\]$"
    with pytest.raises(ValueError, match=message):
        host_ops.moe_permute_backward(torch.zeros(7, 8), int32(4, 2), torch.zeros(4, 8))
