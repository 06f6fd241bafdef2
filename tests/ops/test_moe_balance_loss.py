import pytest
import torch
from torch import Tensor

from dscoder import ops
from dscoder.testing.cases import randn, routing
from dscoder.testing.compare import assert_close, assert_gradients, assert_op_registered, assert_same
from dscoder.testing.poison import with_strides


def by_hand(probs: Tensor, idx: Tensor, num_groups: int, num_kept: int) -> list[float]:
    """Equations 23 to 31 for one sequence, symbol by symbol."""
    (num_tokens, num_experts), num_topk = probs.shape, idx.shape[1]
    chosen = [set(row) for row in idx.tolist()]
    mean = probs.double().mean(dim=0).tolist()
    load = [
        num_experts / (num_topk * num_tokens) * sum(e in row for row in chosen) for e in range(num_experts)
    ]
    width = num_experts // num_groups
    groups = [range(g * width, (g + 1) * width) for g in range(num_groups)]
    group_mean = [sum(mean[e] for e in group) for group in groups]
    group_load = [sum(load[e] for e in group) / width for group in groups]
    sent = [
        num_groups / (num_kept * num_tokens) * sum(bool(row & set(group)) for row in chosen)
        for group in groups
    ]
    return [
        sum(f * p for f, p in zip(load, mean, strict=True)),
        sum(f * p for f, p in zip(group_load, group_mean, strict=True)),
        sum(f * p for f, p in zip(sent, group_mean, strict=True)),
    ]


@pytest.mark.parametrize(("num_experts", "num_topk", "num_groups", "num_kept"), [(8, 3, 4, 2), (64, 6, 1, 1)])
def test_it_follows_the_paper(
    num_experts: int, num_topk: int, num_groups: int, num_kept: int, rng: torch.Generator
) -> None:
    probs = randn(rng, 31, num_experts).softmax(dim=-1)
    idx = routing(rng, num_tokens=31, num_experts=num_experts, num_topk=num_topk)
    terms = ops.moe_balance_terms(probs, idx, num_groups=num_groups, num_groups_kept=num_kept)
    assert terms.dtype == torch.float32
    assert_close(terms, torch.tensor(by_hand(probs, idx, num_groups, num_kept)))


def test_perfect_balance_gives_one_and_one_expert_for_all_gives_their_number() -> None:
    probs = torch.full((8, 8), 0.125)
    balanced = torch.arange(8, dtype=torch.int32).view(8, 1)
    terms = ops.moe_balance_terms(probs, balanced, num_groups=4, num_groups_kept=1)
    assert terms.tolist() == [1.0, 1.0, 1.0]
    certain = torch.eye(8)[:1].expand(8, 8)
    terms = ops.moe_balance_terms(certain, torch.zeros_like(balanced), num_groups=4, num_groups_kept=1)
    assert terms.tolist() == [8.0, 4.0, 4.0]


def test_the_loss_is_the_weighted_sum_of_the_terms(rng: torch.Generator) -> None:
    probs = torch.rand(6, 4, generator=rng).requires_grad_()
    idx = routing(rng, num_tokens=6, num_experts=4, num_topk=2)
    expert, device, communication = ops.moe_balance_terms(probs, idx, num_groups=2, num_groups_kept=2)
    loss = ops.moe_balance_loss(
        probs, idx, num_groups=2, num_groups_kept=2, expert=0.003, device=0.05, communication=0.02
    )
    assert loss.shape == ()
    wanted = 0.003 * expert + 0.05 * device + 0.02 * communication
    assert_close(loss, wanted)
    assert_close(torch.autograd.grad(loss, probs)[0], torch.autograd.grad(wanted, probs)[0])


def test_sequences_are_balanced_one_by_one(rng: torch.Generator) -> None:
    probs, idx = torch.rand(15, 4, generator=rng), routing(rng, num_tokens=15, num_experts=4, num_topk=2)
    together = ops.moe_balance_terms(probs, idx, num_sequences=3, num_groups=2)
    alone = [ops.moe_balance_terms(probs[i : i + 5], idx[i : i + 5], num_groups=2) for i in (0, 5, 10)]
    assert_close(together, torch.stack(alone).mean(dim=0))


@pytest.mark.parametrize("wild", [-1, 4, -(2**31), 2**31 - 1])
def test_an_index_outside_the_experts_counts_for_nobody(wild: int) -> None:
    probs = torch.full((2, 4), 0.25)
    idx = torch.tensor([[0, wild], [wild, wild]], dtype=torch.int32)
    terms = ops.moe_balance_terms(probs, idx, num_groups=2)
    assert terms.tolist() == [0.25, 0.25, 0.5]


def test_zero_tokens_cost_nothing() -> None:
    terms = ops.moe_balance_terms(torch.zeros(0, 4), torch.zeros(0, 2, dtype=torch.int32), num_sequences=2)
    assert terms.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("num_sequences", [1, 3, 2**40])
def test_no_tokens_are_any_number_of_sequences(num_sequences: int) -> None:
    probs, idx = torch.zeros(0, 4).requires_grad_(), torch.zeros(0, 2, dtype=torch.int32)
    loss = ops.moe_balance_loss(probs, idx, num_sequences=num_sequences, expert=1.0)
    _, _, terms = ops.moe_gate_with_balance(probs, num_topk=2, num_sequences=num_sequences)
    assert [loss.item(), *terms.tolist()] == [0.0] * 4
    assert torch.autograd.grad(loss + terms.sum(), probs)[0].shape == (0, 4)


def test_float64_is_exact_to_float64() -> None:
    """Loads of 20 / 7 and 10 / 7 of mean probabilities that float32 does not hold."""
    probs = torch.tensor([[0.1, 0.9]], dtype=torch.float64).expand(7, 2)
    idx = torch.tensor([[0]] * 5 + [[1]] * 2, dtype=torch.int32)
    terms = ops.moe_balance_terms(probs, idx, num_groups=2)
    wanted = 10 / 7 * 0.1 + 4 / 7 * 0.9
    assert (terms - wanted).abs().max() < 1e-15


def test_more_choices_are_counted_than_float32_counts() -> None:
    """2^24 + 1 is no float32: counted in it, two experts look alike."""
    num_tokens = 2**24 + 1
    probs = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(num_tokens, 2)
    idx = torch.zeros(1, 1, dtype=torch.int32).expand(num_tokens, 1)
    assert ops.moe_balance_terms(probs, idx)[0] == 2.0


def test_nan_stays_in_its_sequence_and_reaches_the_loss() -> None:
    probs = torch.full((2, 4), 0.25)
    probs[1, 2] = torch.nan
    idx = torch.tensor([[0], [1]], dtype=torch.int32)
    assert ops.moe_balance_terms(probs, idx, num_sequences=2).isnan().all()
    assert ops.moe_balance_terms(probs[:1], idx[:1]).isfinite().all()


def test_gradients_match_finite_differences(rng: torch.Generator) -> None:
    idx = routing(rng, num_tokens=6, num_experts=4, num_topk=2)
    assert_gradients(
        lambda probs: ops.moe_balance_terms(probs, idx, num_sequences=2, num_groups=2, num_groups_kept=1),
        randn(rng, 6, 4, dtype=torch.float64),
    )


def test_a_half_precision_gradient_keeps_its_dtype(rng: torch.Generator) -> None:
    probs = torch.rand(6, 4, generator=rng).bfloat16().requires_grad_()
    idx = routing(rng, num_tokens=6, num_experts=4, num_topk=2)
    loss = ops.moe_balance_loss(probs, idx, expert=1.0)
    assert loss.dtype == torch.float32
    (grad,) = torch.autograd.grad(loss, probs)
    assert grad.dtype == torch.bfloat16
    load = torch.bincount(idx.flatten(), minlength=4) * (4 / (2 * 6))
    assert_close(grad, (load / 6).expand(6, 4))


def test_strides_change_nothing(rng: torch.Generator) -> None:
    probs, idx = torch.rand(6, 4, generator=rng), routing(rng, num_tokens=6, num_experts=4, num_topk=2)
    actual = ops.moe_balance_terms(with_strides(probs), with_strides(idx), num_sequences=2)
    assert_same(actual, ops.moe_balance_terms(probs, idx, num_sequences=2))


@pytest.mark.parametrize("num_tokens", [0, 6])
def test_it_is_a_proper_op(num_tokens: int, rng: torch.Generator) -> None:
    probs = torch.rand(num_tokens, 4, generator=rng).requires_grad_()
    idx = routing(rng, num_tokens=num_tokens, num_experts=4, num_topk=2)
    op = torch.ops.dscoder.moe_balance_loss.default
    for weights in (None, [0.003, 0.05, 0.02]):
        assert_op_registered(op, (probs, idx, 2, 2, 1, weights))


def test_it_compiles_whole(rng: torch.Generator) -> None:
    logits = randn(rng, 6, 4).requires_grad_()
    idx = routing(rng, num_tokens=6, num_experts=4, num_topk=2)

    def loss(logits: Tensor) -> Tensor:
        return ops.moe_balance_loss(logits.softmax(dim=-1), idx, num_sequences=2, expert=0.5)

    actual = torch.compile(loss, fullgraph=True, backend="aot_eager")(logits)
    wanted = loss(logits)
    assert_same(actual, wanted)
    assert_same(torch.autograd.grad(actual, logits)[0], torch.autograd.grad(wanted, logits)[0])


PROBS, IDX = torch.zeros(6, 4), torch.zeros(6, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("probs", "idx", "arguments", "error", "message"),
    [
        (PROBS.int(), IDX, {}, TypeError, "probs must be float32 or .*, got int32"),
        (PROBS[0], IDX, {}, ValueError, r"probs must have 2 dimensions, got shape \(4,\)"),
        (PROBS, IDX.long(), {}, TypeError, "idx must be int32, got int64"),
        (PROBS, IDX[:5], {}, ValueError, r"idx must have shape \(6, 2\), got \(5, 2\)"),
        (PROBS, IDX[:, :0], {}, ValueError, "num_topk must be >= 1, got 0"),
        (PROBS.to("meta"), IDX, {}, ValueError, "idx must be on meta like probs, got cpu"),
        (PROBS[:, :0], IDX, {}, ValueError, "num_experts must be >= 1, got 0"),
        (PROBS, IDX, {"num_sequences": 0}, ValueError, "num_sequences must be >= 1, got 0"),
        (PROBS, IDX, {"num_sequences": 4}, ValueError, "num_tokens must be a multiple .*, got 6 and 4"),
        (PROBS, IDX, {"num_groups": 0}, ValueError, "num_groups must be >= 1, got 0"),
        (PROBS, IDX, {"num_groups": 3}, ValueError, "num_experts must be a multiple .*, got 4 and 3"),
        (PROBS, IDX, {"num_groups_kept": 0}, ValueError, "num_groups_kept must be >= 1, got 0"),
        (PROBS, IDX, {"num_groups_kept": 2}, ValueError, "num_groups_kept must be <= .* 1, got 2"),
    ],
)
def test_wrong_arguments_are_named(
    probs: Tensor, idx: Tensor, arguments: dict[str, int], error: type[Exception], message: str
) -> None:
    for function in (ops.moe_balance_terms, ops.moe_balance_loss):
        with pytest.raises(error, match=f"^moe_balance_loss: {message}$"):
            function(probs, idx, **arguments)
