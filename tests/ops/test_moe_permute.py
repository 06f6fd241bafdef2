import pytest
import torch
from torch import Tensor

from dscoder import ops
from dscoder.testing.cases import randn, routing
from dscoder.testing.compare import assert_close, assert_gradients, assert_op_registered, assert_same
from dscoder.testing.poison import with_strides


def int32(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def test_rows_lie_in_expert_order_and_keep_token_order() -> None:
    x = torch.tensor([[10.0], [11.0], [12.0]])
    rows, handle = ops.moe_permute(x, int32([[2, 0], [0, 2], [2, 3]]), num_experts=5)
    assert rows.tolist() == [[10.0], [11.0], [10.0], [11.0], [12.0], [12.0]]
    assert handle.offsets_E.tolist() == [2, 2, 5, 6, 6]
    assert handle.row_TK.tolist() == [[2, 0], [1, 3], [4, 5]]
    assert handle.token_M.tolist() == [0, 1, 0, 1, 2, 2]
    assert handle.offsets_E.dtype == handle.row_TK.dtype == handle.token_M.dtype == torch.int32


def test_a_dropped_choice_gets_no_row_and_the_rest_is_zero() -> None:
    x = torch.tensor([[10.0], [11.0], [torch.nan]])
    rows, handle = ops.moe_permute(x, int32([[1, -1], [0, 1], [-1, -1]]), num_experts=2)
    assert rows.tolist() == [[11.0], [10.0], [11.0], [0.0], [0.0], [0.0]]
    assert handle.offsets_E.tolist() == [1, 3]
    assert handle.row_TK.tolist() == [[1, -1], [0, 2], [-1, -1]]
    assert handle.token_M.tolist() == [1, 0, 1, 0, 0, 0]


@pytest.mark.parametrize("wild", [-(2**31), -7, 3, 2**31 - 1])
def test_a_wild_index_is_a_dropped_choice(wild: int) -> None:
    rows, handle = ops.moe_permute(torch.ones(1, 2), int32([[wild, 2]]), num_experts=3)
    assert handle.offsets_E.tolist() == [0, 0, 1]
    assert handle.row_TK.tolist() == [[-1, 0]]
    assert rows.tolist() == [[1.0, 1.0], [0.0, 0.0]]


@pytest.mark.parametrize("num_tokens", [0, 1, 131])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_choice_finds_its_token(num_tokens: int, dtype: torch.dtype, rng: torch.Generator) -> None:
    x = randn(rng, num_tokens, 7, dtype=dtype)
    idx = routing(rng, num_tokens=num_tokens, num_experts=16, num_topk=4)
    rows, handle = ops.moe_permute(x, idx, num_experts=16)
    assert rows.shape == (num_tokens * 4, 7)
    assert_same(rows[handle.row_TK.long()], x[:, None].expand(-1, 4, -1))
    starts = torch.cat([torch.zeros(1, dtype=torch.int32), handle.offsets_E])
    owner = torch.bucketize(handle.row_TK, handle.offsets_E, right=True)
    assert_same(owner, idx.long())
    assert_same(starts.diff().long(), torch.bincount(idx.flatten(), minlength=16))


def test_all_tokens_to_one_expert_is_a_copy(rng: torch.Generator) -> None:
    x = randn(rng, 13, 3)
    rows, handle = ops.moe_permute(x, torch.full((13, 1), 2, dtype=torch.int32), num_experts=4)
    assert_same(rows, x)
    assert handle.offsets_E.tolist() == [0, 0, 13, 13]


def test_the_maps_alone_are_those_of_the_rows(rng: torch.Generator) -> None:
    idx = routing(rng, num_tokens=31, num_experts=8, num_topk=4)
    idx[torch.rand(idx.shape, generator=rng) < 0.3] = -1
    _, wanted = ops.moe_permute(torch.zeros(31, 1), idx, num_experts=8)
    handle = ops.moe_permute_maps(idx, num_experts=8)
    assert_same(handle.offsets_E, wanted.offsets_E)
    assert_same(handle.row_TK, wanted.row_TK)
    assert_same(handle.token_M, wanted.token_M)


def test_a_second_derivative_is_refused(rng: torch.Generator) -> None:
    x = randn(rng, 3, 2).requires_grad_()
    rows, _ = ops.moe_permute(x, int32([[0], [1], [0]]), num_experts=2)
    with pytest.raises(RuntimeError, match=r"^moe_permute: .*got create_graph=True$"):
        torch.autograd.grad(rows.sum(), x, create_graph=True)


def test_gradients_match_finite_differences(rng: torch.Generator) -> None:
    idx = routing(rng, num_tokens=5, num_experts=4, num_topk=3)
    idx[1, 2] = idx[3, 0] = -1
    assert_gradients(
        lambda x: ops.moe_permute(x, idx, num_experts=4)[0], randn(rng, 5, 2, dtype=torch.float64)
    )


def test_a_tokens_gradient_is_the_sum_over_its_rows(rng: torch.Generator) -> None:
    x = randn(rng, 31, 5, dtype=torch.bfloat16).requires_grad_()
    idx = routing(rng, num_tokens=31, num_experts=8, num_topk=4)
    rows, handle = ops.moe_permute(x, idx, num_experts=8)
    grad = randn(rng, 124, 5, dtype=torch.bfloat16)
    (actual,) = torch.autograd.grad(rows, x, grad)
    assert actual.dtype == torch.bfloat16
    assert_close(actual, grad.float()[handle.row_TK.long()].sum(dim=1))


def test_strides_change_nothing(rng: torch.Generator) -> None:
    x, idx = randn(rng, 11, 3), routing(rng, num_tokens=11, num_experts=4, num_topk=2)
    actual, _ = ops.moe_permute(with_strides(x), with_strides(idx), num_experts=4)
    wanted, _ = ops.moe_permute(x, idx, num_experts=4)
    assert_same(actual, wanted)


@pytest.mark.parametrize("num_tokens", [0, 7])
def test_it_is_a_proper_op(num_tokens: int, rng: torch.Generator) -> None:
    x = randn(rng, num_tokens, 5).requires_grad_()
    idx = routing(rng, num_tokens=num_tokens, num_experts=8, num_topk=3)
    assert_op_registered(torch.ops.dscoder.moe_permute.default, (x, idx, 8))
    assert_op_registered(torch.ops.dscoder.moe_permute_maps.default, (idx, 8))
    rows, _, row, _ = torch.ops.dscoder.moe_permute.default(x.detach(), idx, 8)
    assert_op_registered(torch.ops.dscoder.moe_permute_backward.default, (rows, row))


def test_it_compiles_whole(rng: torch.Generator) -> None:
    x, idx = randn(rng, 7, 5), routing(rng, num_tokens=7, num_experts=8, num_topk=3)

    def permute(x: Tensor) -> tuple[Tensor, ...]:
        rows, handle = ops.moe_permute(x + 1, idx, num_experts=8)
        return rows, handle.offsets_E, handle.row_TK, handle.token_M

    compiled = torch.compile(permute, fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(compiled(x), permute(x), strict=True):
        assert_same(actual, wanted)


def test_wrong_choices_are_named_by_the_maps() -> None:
    with pytest.raises(TypeError, match=r"^moe_permute_maps: idx must be int32, got int64$"):
        ops.moe_permute_maps(torch.zeros(3, 2).long(), num_experts=4)


IDX = torch.zeros(3, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("x", "idx", "num_experts", "error", "message"),
    [
        (torch.zeros(3, 2).int(), IDX, 4, TypeError, "x must be float32 or .*, got int32"),
        (torch.zeros(3), IDX, 4, ValueError, r"x must have 2 dimensions, got shape \(3,\)"),
        (torch.zeros(3, 2), IDX.long(), 4, TypeError, "idx must be int32, got int64"),
        (torch.zeros(3, 2), IDX[0], 4, ValueError, r"idx must have 2 dimensions, got shape \(2,\)"),
        (torch.zeros(4, 2), IDX, 4, ValueError, r"idx must have shape \(4, 2\), got \(3, 2\)"),
        (torch.zeros(3, 2, device="meta"), IDX, 4, ValueError, "idx must be on meta like x, got cpu"),
        (torch.zeros(3, 2), IDX, 0, ValueError, "num_experts must be >= 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(
    x: Tensor, idx: Tensor, num_experts: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^moe_permute: {message}$"):
        ops.moe_permute(x, idx, num_experts=num_experts)
