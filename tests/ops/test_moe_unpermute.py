from typing import Any

import pytest
import torch
from torch import Tensor

from dscoder import ops
from dscoder.testing.cases import randn, routing
from dscoder.testing.compare import assert_close, assert_gradients, assert_op_registered, assert_same
from dscoder.testing.poison import poison_rows_from, with_strides

UNREAD = torch.zeros(0, dtype=torch.int32)  # the tokens of the rows are not what is summed by


def handle_of(rows: list[list[int]]) -> ops.PermuteHandle:
    """A handle of one expert."""
    row_TK = torch.tensor(rows, dtype=torch.int32)
    num_used = (row_TK >= 0).sum(dtype=torch.int32)
    return ops.PermuteHandle(offsets_E=num_used.view(1), row_TK=row_TK, token_M=UNREAD)


def random_case(
    rng: torch.Generator, num_tokens: int, *, dtype: torch.dtype, share_dropped: float = 0.0
) -> tuple[Tensor, Tensor, ops.PermuteHandle]:
    """y_MD, weight_TK and a handle, four of eight experts a token."""
    idx = routing(rng, num_tokens=num_tokens, num_experts=8, num_topk=4)
    idx[torch.rand(idx.shape, generator=rng) < share_dropped] = -1
    _, handle = ops.moe_permute(torch.zeros(num_tokens, 1), idx, num_experts=8)
    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        randn(rng, num_tokens * 4, 5, dtype=dtype),
        randn(rng, num_tokens, 4, dtype=weight_dtype),
        handle,
    )


def test_it_is_the_weighted_sum_of_a_tokens_rows() -> None:
    y = torch.tensor([[1.0], [10.0], [100.0], [1000.0]])
    weight = torch.tensor([[1.0, 2.0], [3.0, 0.5]])
    assert ops.moe_unpermute(y, weight, handle_of([[2, 0], [1, 3]])).tolist() == [[102.0], [530.0]]


def test_a_dropped_choice_adds_nothing_whatever_its_weight() -> None:
    y = torch.tensor([[10.0], [torch.nan], [torch.nan], [torch.nan]])
    weight = torch.tensor([[torch.nan, 2.0], [torch.inf, torch.nan]])
    assert ops.moe_unpermute(y, weight, handle_of([[-1, 0], [-1, -1]])).tolist() == [[20.0], [0.0]]


@pytest.mark.parametrize("num_tokens", [0, 1, 131])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share_dropped", [0.0, 0.3, 1.0])
def test_it_sums_in_float32(
    num_tokens: int, dtype: torch.dtype, share_dropped: float, rng: torch.Generator
) -> None:
    y, weight, handle = random_case(rng, num_tokens, dtype=dtype, share_dropped=share_dropped)
    out = ops.moe_unpermute(y, weight, handle)
    is_kept = handle.row_TK >= 0
    rows = y.double()[handle.row_TK.clamp(min=0).long()]
    wanted = (rows * (weight * is_kept).double()[..., None]).sum(dim=1)
    assert out.dtype == dtype
    assert_close(out, wanted)


def test_permute_and_back_with_equal_weights_is_the_identity(rng: torch.Generator) -> None:
    x = randn(rng, 17, 3)
    idx = routing(rng, num_tokens=17, num_experts=8, num_topk=4)
    rows, handle = ops.moe_permute(x, idx, num_experts=8)
    assert_same(ops.moe_unpermute(rows, torch.full((17, 4), 0.25), handle), x)


@pytest.mark.parametrize("share_dropped", [0.0, 0.4])
def test_gradients_match_finite_differences(share_dropped: float, rng: torch.Generator) -> None:
    y, weight, handle = random_case(rng, 3, dtype=torch.float64, share_dropped=share_dropped)
    assert_gradients(lambda y, weight: ops.moe_unpermute(y, weight, handle), y, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_match_the_plain_formula(dtype: torch.dtype, rng: torch.Generator) -> None:
    y, weight, handle = random_case(rng, 31, dtype=dtype)
    grad = randn(rng, 31, 5, dtype=dtype)
    inputs = (y.requires_grad_(), weight.requires_grad_())
    actual = torch.autograd.grad(ops.moe_unpermute(*inputs, handle), inputs, grad)
    exact = tuple(x.detach().double().requires_grad_() for x in inputs)
    plain = (exact[0][handle.row_TK.long()] * exact[1][..., None]).sum(dim=1)
    for got, wanted in zip(actual, torch.autograd.grad(plain, exact, grad.double()), strict=True):
        assert_close(got, wanted, dtype=dtype)


def test_unused_rows_are_neither_read_nor_given_a_gradient(rng: torch.Generator) -> None:
    y, weight, handle = random_case(rng, 31, dtype=torch.float32, share_dropped=0.3)
    num_used = int((handle.row_TK >= 0).sum())
    poisoned = poison_rows_from(y, num_used).requires_grad_()
    out = ops.moe_unpermute(poisoned, weight, handle)
    assert_same(out, ops.moe_unpermute(y, weight, handle))
    (grad,) = torch.autograd.grad(out.sum(), poisoned)
    assert grad.isfinite().all()
    assert_same(grad[num_used:], torch.zeros_like(grad[num_used:]))


def test_a_second_derivative_is_refused(rng: torch.Generator) -> None:
    y, weight, handle = random_case(rng, 3, dtype=torch.float32)
    out = ops.moe_unpermute(y.requires_grad_(), weight, handle)
    with pytest.raises(RuntimeError, match=r"^moe_unpermute: .*got create_graph=True$"):
        torch.autograd.grad(out.sum(), y, create_graph=True)


def test_strides_change_nothing(rng: torch.Generator) -> None:
    y, weight, handle = random_case(rng, 11, dtype=torch.float32)
    actual = ops.moe_unpermute(with_strides(y), with_strides(weight), handle)
    assert_same(actual, ops.moe_unpermute(y, weight, handle))


@pytest.mark.parametrize("num_tokens", [0, 7])
def test_it_is_a_proper_op(num_tokens: int, rng: torch.Generator) -> None:
    y, weight, handle = random_case(rng, num_tokens, dtype=torch.float32, share_dropped=0.2)
    args = (y.requires_grad_(), weight.requires_grad_(), handle.row_TK, handle.offsets_E)
    assert_op_registered(torch.ops.dscoder.moe_unpermute.default, args)
    grad = randn(rng, num_tokens, 5)
    args = (grad, y.detach(), weight.detach(), handle.row_TK, handle.offsets_E)
    assert_op_registered(torch.ops.dscoder.moe_unpermute_backward.default, args)


def test_it_compiles_whole(rng: torch.Generator) -> None:
    y, weight, handle = random_case(rng, 7, dtype=torch.float32)
    compiled = torch.compile(
        lambda y, w: ops.moe_unpermute(y, w * 2, handle), fullgraph=True, backend="aot_eager"
    )
    assert_same(compiled(y, weight), ops.moe_unpermute(y, weight * 2, handle))


@pytest.mark.parametrize(
    ("y", "weight", "error", "message"),
    [
        (torch.zeros(4, 2).int(), torch.zeros(2, 2), TypeError, "y must be float32 or .*, got int32"),
        (torch.zeros(4), torch.zeros(2, 2), ValueError, r"y must have 2 dimensions, got shape \(4,\)"),
        (torch.zeros(3, 2), torch.zeros(2, 2), ValueError, r"y must have shape \(4, 2\), got \(3, 2\)"),
        (torch.zeros(4, 2), torch.zeros(2), ValueError, r"weight must have 2 dimensions, got shape \(2,\)"),
        (torch.zeros(4, 2), torch.zeros(2, 3), ValueError, r"weight must have shape \(2, 2\), got \(2, 3\)"),
        (torch.zeros(4, 2), torch.zeros(2, 2).half(), TypeError, "weight must be float32 .*, got float16"),
        (
            torch.zeros(4, 2),
            torch.zeros(2, 2, device="meta"),
            ValueError,
            "weight must be on cpu like y, got meta",
        ),
    ],
)
def test_wrong_arguments_are_named(y: Tensor, weight: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^moe_unpermute: {message}$"):
        ops.moe_unpermute(y, weight, handle_of([[0, 1], [2, 3]]))


@pytest.mark.parametrize(
    ("rows", "num_used", "got"),
    [
        ([[-1, 1], [2, 3]], 4, "4 rows, got 3 choices of 3 rows up to 3"),
        ([[-1, 1], [2, 3]], 3, "3 rows, got 3 choices of 3 rows up to 3"),
        ([[0, 1], [2, 2]], 4, "4 rows, got 4 choices of 3 rows up to 2"),
        ([[0, 1], [2, 4]], 4, "4 rows, got 4 choices of 4 rows up to 4"),
        ([[-1, -1], [-1, -1]], -1, "-1 rows, got 0 choices of 0 rows up to -1"),
    ],
)
def test_a_handle_with_a_hole_or_a_row_twice_is_refused(
    rows: list[list[int]], num_used: int, got: str
) -> None:
    handle = ops.PermuteHandle(
        offsets_E=torch.tensor([0, num_used], dtype=torch.int32),
        row_TK=handle_of(rows).row_TK,
        token_M=UNREAD,
    )
    wanted = r"row must name each row below offsets\[-1\] once"
    with pytest.raises(ValueError, match=rf"^moe_unpermute: {wanted}, {got}$"):
        ops.moe_unpermute(torch.zeros(4, 2), torch.zeros(2, 2), handle)


ROW_TK, OFFSETS_E = torch.arange(4, dtype=torch.int32).view(2, 2), torch.tensor([1, 4], dtype=torch.int32)


@pytest.mark.parametrize(
    ("row", "offsets", "error", "message"),
    [
        (ROW_TK.long(), OFFSETS_E, TypeError, "row must be int32, got int64"),
        (ROW_TK.float(), OFFSETS_E, TypeError, "row must be int32, got float32"),
        (ROW_TK[0], OFFSETS_E, ValueError, r"row must have 2 dimensions, got shape \(2,\)"),
        (ROW_TK, None, TypeError, "offsets must be a tensor, got NoneType"),
        (ROW_TK, OFFSETS_E.long(), TypeError, "offsets must be int32, got int64"),
        (ROW_TK, OFFSETS_E[None], ValueError, r"offsets must have 1 dimensions, got shape \(1, 2\)"),
        (ROW_TK, OFFSETS_E[:0], ValueError, "num_experts must be >= 1, got 0"),
        (ROW_TK, OFFSETS_E.to("meta"), ValueError, "offsets must be on cpu like y, got meta"),
    ],
)
def test_a_wrong_handle_is_named(row: Any, offsets: Any, error: type[Exception], message: str) -> None:
    handle = ops.PermuteHandle(offsets_E=offsets, row_TK=row, token_M=UNREAD)
    with pytest.raises(error, match=f"^moe_unpermute: {message}$"):
        ops.moe_unpermute(torch.zeros(4, 2), torch.zeros(2, 2), handle)


@pytest.mark.parametrize("handle", [None, (OFFSETS_E, ROW_TK)], ids=["none", "tuple"])
def test_what_is_no_handle_is_named(handle: Any) -> None:
    message = f"^moe_unpermute: handle must be a PermuteHandle, got {type(handle).__name__}$"
    with pytest.raises(TypeError, match=message):
        ops.moe_unpermute(torch.zeros(4, 2), torch.zeros(2, 2), handle)


def test_a_choice_dropped_by_its_weight_gives_its_row_no_gradient(rng: torch.Generator) -> None:
    y, weight, handle = random_case(rng, 5, dtype=torch.float32)
    weight[2, 1] = 0.0
    out = ops.moe_unpermute(y.requires_grad_(), weight, handle)
    (grad,) = torch.autograd.grad(out.sum(), y)
    assert grad[handle.row_TK[2, 1]].tolist() == [0.0] * 5
    assert_same(grad[handle.row_TK.flatten().long()], weight.view(-1, 1).expand(20, 5))
