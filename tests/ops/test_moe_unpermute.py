import pytest
import torch
from torch import Tensor

from dscoder import ops
from dscoder.testing.cases import randn, routing
from dscoder.testing.compare import assert_close, assert_gradients, assert_op_registered, assert_same
from dscoder.testing.poison import poison_rows_from, with_strides


def handle_of(rows: list[list[int]], num_experts: int = 2) -> ops.PermuteHandle:
    row_TK = torch.tensor(rows, dtype=torch.int32)
    return ops.PermuteHandle(offsets_E=torch.zeros(num_experts, dtype=torch.int32), row_TK=row_TK)


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
    y = torch.tensor([[torch.nan], [10.0], [torch.nan], [torch.nan]])
    weight = torch.tensor([[torch.nan, 2.0], [torch.inf, torch.nan]])
    assert ops.moe_unpermute(y, weight, handle_of([[-1, 1], [-1, -1]])).tolist() == [[20.0], [0.0]]


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
