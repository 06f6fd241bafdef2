import pytest
import torch
from torch import Tensor

from dscoder import ops
from dscoder.testing.cases import randn
from dscoder.testing.compare import assert_close, assert_gradients, assert_op_registered, assert_same
from dscoder.testing.poison import with_strides

NAN, INF = float("nan"), float("inf")
SHAPES = [  # T, E, K, groups, kept
    (0, 64, 6, 1, 1),
    (1, 64, 6, 1, 1),
    (131, 64, 6, 1, 1),
    (131, 160, 6, 8, 3),
    (37, 16, 4, 4, 4),
    (37, 13, 13, 1, 1),
    (37, 12, 2, 6, 1),
]


def by_hand(
    logits: Tensor, num_topk: int, num_groups: int, num_groups_kept: int
) -> tuple[list[list[int]], Tensor]:
    """The rule as the paper words it, one token at a time."""
    rows, width = [], logits.shape[1] // num_groups
    for logit in logits.tolist():
        best = [max(logit[g * width : (g + 1) * width]) for g in range(num_groups)]
        kept = sorted(range(num_groups), key=lambda g: (-best[g], g))[:num_groups_kept]
        allowed = [e for e in range(len(logit)) if e // width in kept]
        rows.append(sorted(allowed, key=lambda e: (-logit[e], e))[:num_topk])
    idx = torch.tensor(rows, dtype=torch.int64).view(-1, num_topk)
    return rows, logits.double().softmax(dim=-1).gather(1, idx)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_follows_the_paper(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, rng: torch.Generator
) -> None:
    num_tokens, num_experts, num_topk, num_groups, num_kept = shape
    logits = randn(rng, num_tokens, num_experts, dtype=dtype)  # bfloat16 logits tie often
    idx, weight = ops.moe_gate(
        logits, num_topk=num_topk, num_groups=num_groups, num_groups_kept=num_kept, scale=16.0
    )
    wanted_idx, wanted_weight = by_hand(logits, num_topk, num_groups, num_kept)
    assert idx.dtype == torch.int32
    assert weight.dtype == torch.float32
    assert idx.tolist() == wanted_idx
    assert_close(weight, wanted_weight * 16.0)


def test_ties_go_to_the_smaller_index() -> None:
    idx, _ = ops.moe_gate(torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0]]), num_topk=4)
    assert idx.tolist() == [[1, 3, 0, 2]]


def test_tied_groups_go_to_the_smaller_group() -> None:
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0, 5.0, 4.0]])
    idx, _ = ops.moe_gate(logits, num_topk=3, num_groups=3, num_groups_kept=2)
    assert idx.tolist() == [[1, 2, 3]]


def test_a_group_scores_by_its_best_expert_not_by_its_two_best() -> None:
    logits = torch.tensor([[5.0, 0.0, 4.0, 4.0]])
    idx, _ = ops.moe_gate(logits, num_topk=2, num_groups=2, num_groups_kept=1)
    assert idx.tolist() == [[0, 1]]


def test_logits_decide_where_probabilities_are_all_zero() -> None:
    idx, weight = ops.moe_gate(torch.tensor([[0.0, -300.0, -200.0, -250.0]]), num_topk=4)
    assert idx.tolist() == [[0, 2, 3, 1]]
    assert weight.tolist() == [[1.0, 0.0, 0.0, 0.0]]


def test_minus_infinity_in_a_kept_group_comes_before_a_dropped_group() -> None:
    logits = torch.tensor([[3.0, -INF, -INF, 2.0, 1.0, 0.0]])
    idx, _ = ops.moe_gate(logits, num_topk=3, num_groups=2, num_groups_kept=1)
    assert idx.tolist() == [[0, 1, 2]]


def test_the_softmax_covers_dropped_groups_too() -> None:
    idx, weight = ops.moe_gate(torch.zeros(1, 4), num_topk=2, num_groups=2, num_groups_kept=1)
    assert idx.tolist() == [[0, 1]]
    assert weight.tolist() == [[0.25, 0.25]]


def test_renormalized_weights_sum_to_the_scale() -> None:
    _, weight = ops.moe_gate(torch.zeros(1, 8), num_topk=2, renormalize=True, scale=3.0)
    assert weight.tolist() == [[1.5, 1.5]]


@pytest.mark.parametrize("row", [[NAN, 1.0, 2.0, NAN], [NAN] * 4, [INF, INF, 0.0, NAN], [-INF] * 4])
@pytest.mark.parametrize("num_groups", [1, 2])
def test_a_poisoned_row_chooses_distinct_experts_in_range(row: list[float], num_groups: int) -> None:
    logits = torch.tensor([row, [0.0, 1.0, 2.0, 3.0]])
    idx, weight = ops.moe_gate(logits, num_topk=2, num_groups=num_groups, num_groups_kept=1)
    assert len(set(idx[0].tolist())) == 2
    assert ((idx >= 0) & (idx < 4)).all()
    assert weight[0].isnan().all()
    assert idx[1].tolist() == [3, 2]
    assert weight[1].isfinite().all()


def test_nan_counts_as_the_largest_logit() -> None:
    idx, _ = ops.moe_gate(torch.tensor([[INF, NAN, 0.0, NAN]]), num_topk=3)
    assert idx.tolist() == [[1, 3, 0]]


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("num_groups", "num_kept"), [(1, 1), (4, 2)])
def test_gradients_match_finite_differences(
    renormalize: bool, num_groups: int, num_kept: int, rng: torch.Generator
) -> None:
    def weights(logits: Tensor) -> Tensor:
        return ops.moe_gate(
            logits,
            num_topk=3,
            num_groups=num_groups,
            num_groups_kept=num_kept,
            scale=2.5,
            renormalize=renormalize,
        )[1]

    assert_gradients(weights, randn(rng, 5, 8, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_the_softmax_gradient(dtype: torch.dtype, rng: torch.Generator) -> None:
    logits = randn(rng, 131, 64, dtype=dtype).requires_grad_()
    grad = randn(rng, 131, 6)
    idx, weight = ops.moe_gate(logits, num_topk=6, scale=16.0)
    (actual,) = torch.autograd.grad(weight, logits, grad)
    exact = logits.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(exact.softmax(dim=-1).gather(1, idx.long()) * 16.0, exact, grad.double())
    assert actual.dtype == dtype
    assert_close(actual, wanted)


def test_strides_change_nothing(rng: torch.Generator) -> None:
    logits = randn(rng, 31, 16)
    for actual, wanted in zip(
        ops.moe_gate(with_strides(logits), num_topk=4), ops.moe_gate(logits, num_topk=4), strict=True
    ):
        assert_same(actual, wanted)


@pytest.mark.parametrize("num_tokens", [0, 7])
def test_it_is_a_proper_op(num_tokens: int, rng: torch.Generator) -> None:
    logits = randn(rng, num_tokens, 8)
    args = (3, 4, 2, 2.0, True)
    assert_op_registered(torch.ops.dscoder.moe_gate.default, (logits.clone().requires_grad_(), *args))
    weight, idx = torch.ops.dscoder.moe_gate.default(logits, *args)
    assert_op_registered(torch.ops.dscoder.moe_gate_backward.default, (weight, logits, idx, 2.0, True))


def test_it_compiles_whole(rng: torch.Generator) -> None:
    logits = randn(rng, 9, 8).requires_grad_()
    compiled = torch.compile(
        lambda x: ops.moe_gate(x * 2, num_topk=3), fullgraph=True, backend="aot_eager", dynamic=True
    )
    idx, weight = compiled(logits)
    wanted_idx, wanted_weight = ops.moe_gate(logits * 2, num_topk=3)
    assert_same(idx, wanted_idx)
    assert_same(weight, wanted_weight)
    (actual,) = torch.autograd.grad(weight[:, 0].sum(), logits)
    (wanted,) = torch.autograd.grad(wanted_weight[:, 0].sum(), logits)
    assert_same(actual, wanted)


@pytest.mark.parametrize(
    ("logits", "arguments", "error", "message"),
    [
        (torch.zeros(2, 8, dtype=torch.int64), {}, TypeError, "logits must be float32 or .*, got int64"),
        (torch.zeros(8), {}, ValueError, r"logits must have 2 dimensions, got shape \(8,\)"),
        (torch.zeros(2, 8), {"num_topk": 0}, ValueError, "num_topk must be >= 1, got 0"),
        (torch.zeros(2, 8), {"num_topk": 9}, ValueError, r"num_topk must be <= 8 \(.*\), got 9"),
        (torch.zeros(2, 8), {"num_groups": 0}, ValueError, "num_groups must be >= 1, got 0"),
        (torch.zeros(2, 8), {"num_groups": 3}, ValueError, "num_experts must be a multiple .* 8 and 3"),
        (torch.zeros(2, 8), {"num_groups_kept": 0}, ValueError, "num_groups_kept must be >= 1, got 0"),
        (torch.zeros(2, 8), {"num_groups_kept": 2}, ValueError, "num_groups_kept must be <= .* 1, got 2"),
        (
            torch.zeros(2, 8),
            {"num_topk": 5, "num_groups": 4, "num_groups_kept": 2},
            ValueError,
            r"num_topk must be <= 4 \(experts in the kept groups\), got 5",
        ),
    ],
)
def test_wrong_arguments_are_named(
    logits: Tensor, arguments: dict[str, int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^moe_gate: {message}$"):
        ops.moe_gate(logits, **{"num_topk": 2, **arguments})
