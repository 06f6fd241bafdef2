import pytest
import torch
from torch import Tensor

from dscoder import ops
from dscoder.testing.cases import randn
from dscoder.testing.compare import assert_close, assert_gradients, assert_op_registered, assert_same
from dscoder.testing.poison import poison_rows_from, with_strides

COUNTS = {  # rows of each expert, then rows of none
    "uneven": ([3, 0, 7, 1, 0], 0),
    "rows_of_none": ([0, 5, 2, 0, 1], 4),
    "all_to_one": ([0, 0, 11, 0, 0], 0),
    "all_dropped": ([0, 0, 0, 0, 0], 6),
    "no_rows": ([0, 0, 0, 0, 0], 0),
}


def offsets_of(counts: list[int]) -> Tensor:
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def by_expert(x: Tensor, w: Tensor, counts: list[int]) -> Tensor:
    """The definition, in float64."""
    y = torch.zeros(x.shape[0], w.shape[1], dtype=torch.float64)
    expert_of_row = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    for row, expert in enumerate(expert_of_row.tolist()):
        y[row] = w[expert].double() @ x[row].double()
    return y


@pytest.mark.parametrize("case", COUNTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_row_meets_its_expert(case: str, dtype: torch.dtype, rng: torch.Generator) -> None:
    counts, num_spare = COUNTS[case]
    x = randn(rng, sum(counts) + num_spare, 7, dtype=dtype)
    w = randn(rng, 5, 3, 7, dtype=dtype)
    y = ops.grouped_gemm(x, w, offsets_of(counts))
    assert y.dtype == dtype
    assert_close(y, by_expert(x, w, counts))


@pytest.mark.parametrize("case", COUNTS)
def test_gradients_match_finite_differences(case: str, rng: torch.Generator) -> None:
    counts, num_spare = COUNTS[case]
    x = randn(rng, sum(counts) + num_spare, 3, dtype=torch.float64)
    w = randn(rng, 5, 2, 3, dtype=torch.float64)
    assert_gradients(lambda x, w: ops.grouped_gemm(x, w, offsets_of(counts)), x, w)


def test_an_expert_without_rows_gets_a_zero_weight_gradient(rng: torch.Generator) -> None:
    x, w = randn(rng, 4, 3), randn(rng, 3, 2, 3).requires_grad_()
    y = ops.grouped_gemm(x, w, offsets_of([4, 0, 0]))
    (grad,) = torch.autograd.grad(y.sum(), w)
    assert_same(grad[1:], torch.zeros(2, 2, 3))
    assert_close(grad[0], x.sum(dim=0).expand(2, 3))


def test_rows_of_no_expert_are_not_read_and_come_out_zero(rng: torch.Generator) -> None:
    x = poison_rows_from(randn(rng, 9, 3), 6).requires_grad_()
    w = randn(rng, 2, 4, 3).requires_grad_()
    y = ops.grouped_gemm(x, w, offsets_of([2, 4]))
    assert_same(y[6:], torch.zeros(3, 4))
    assert y.isfinite().all()
    grad_x, grad_w = torch.autograd.grad(y, (x, w), poison_rows_from(torch.ones(9, 4), 6))
    assert grad_w.isfinite().all()
    assert_same(grad_x[6:], torch.zeros(3, 3))


def test_nan_stays_with_its_row_and_its_expert(rng: torch.Generator) -> None:
    x, w = randn(rng, 4, 3), randn(rng, 2, 5, 3).requires_grad_()
    x[1, 0] = torch.nan
    y = ops.grouped_gemm(x, w, offsets_of([2, 2]))
    assert y[1].isnan().all()
    assert y[[0, 2, 3]].isfinite().all()
    (grad,) = torch.autograd.grad(y[[0, 2, 3]].sum(), w)
    assert grad[1].isfinite().all()


@pytest.mark.parametrize("offsets", [[-9, 2, 3], [2, 99, 2**31 - 1], [3, 1, 2]])
def test_wild_offsets_stay_within_the_rows(offsets: list[int], rng: torch.Generator) -> None:
    y = ops.grouped_gemm(randn(rng, 3, 2), randn(rng, 3, 4, 2), torch.tensor(offsets, dtype=torch.int32))
    assert y.isfinite().all()


def test_strides_change_nothing(rng: torch.Generator) -> None:
    x, w, offsets = randn(rng, 8, 3), randn(rng, 2, 4, 3), offsets_of([3, 5])
    wanted = ops.grouped_gemm(x, w, offsets)
    assert_close(ops.grouped_gemm(with_strides(x), with_strides(w), with_strides(offsets)), wanted)
    transposed = w.transpose(1, 2).contiguous().transpose(1, 2)
    assert_close(ops.grouped_gemm(x, transposed, offsets), wanted)


@pytest.mark.parametrize("case", ["uneven", "rows_of_none", "no_rows"])
def test_it_is_a_proper_op(case: str, rng: torch.Generator) -> None:
    counts, num_spare = COUNTS[case]
    num_rows, offsets = sum(counts) + num_spare, offsets_of(counts)
    x, w = randn(rng, num_rows, 3).requires_grad_(), randn(rng, 5, 4, 3).requires_grad_()
    assert_op_registered(torch.ops.dscoder.grouped_gemm.default, (x, w, offsets))
    grad = randn(rng, num_rows, 4)
    assert_op_registered(torch.ops.dscoder.grouped_gemm_weight_gradient.default, (grad, x.detach(), offsets))


def test_it_compiles_whole_through_an_expert_layer(rng: torch.Generator) -> None:
    """The whole path of a token: gate, permute, product, back."""
    x = randn(rng, 9, 6).requires_grad_()
    gate, w = randn(rng, 4, 6), randn(rng, 4, 6, 6).requires_grad_()

    def layer(x: Tensor, w: Tensor) -> Tensor:
        idx, weight = ops.moe_gate(x @ gate.t(), num_topk=2)
        rows, handle = ops.moe_permute(x, idx, num_experts=4)
        return ops.moe_unpermute(ops.grouped_gemm(rows, w, handle.offsets_E), weight, handle)

    actual = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)(x, w)
    wanted = layer(x, w)
    assert_same(actual, wanted)
    for got, want in zip(
        torch.autograd.grad(actual.sum(), (x, w)), torch.autograd.grad(wanted.sum(), (x, w)), strict=True
    ):
        assert_same(got, want)


X, W, OFFSETS = torch.zeros(4, 3), torch.zeros(2, 5, 3), torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("x", "w", "offsets", "error", "message"),
    [
        (X.int(), W, OFFSETS, TypeError, "x must be float32 or .*, got int32"),
        (X[0], W, OFFSETS, ValueError, r"x must have 2 dimensions, got shape \(3,\)"),
        (X, W.half(), OFFSETS, TypeError, "w must be float32, got float16"),
        (X, W[0], OFFSETS, ValueError, r"w must have 3 dimensions, got shape \(5, 3\)"),
        (X, torch.zeros(2, 5, 4), OFFSETS, ValueError, r"w must have shape \(2, 5, 3\), got \(2, 5, 4\)"),
        (X, W, OFFSETS.long(), TypeError, "offsets must be int32, got int64"),
        (X, W, OFFSETS[:1], ValueError, r"offsets must have shape \(2,\), got \(1,\)"),
        (X, W, OFFSETS[None], ValueError, r"offsets must have 1 dimensions, got shape \(1, 2\)"),
        (X, W.to("meta"), OFFSETS, ValueError, "w must be on cpu like x, got meta"),
    ],
)
def test_wrong_arguments_are_named(
    x: Tensor, w: Tensor, offsets: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^grouped_gemm: {message}$"):
        ops.grouped_gemm(x, w, offsets)
