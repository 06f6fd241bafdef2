"""The fused op is its two parts: their values, their gradients together, their errors."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dscoder import ops
from dscoder.testing.cases import randn
from dscoder.testing.compare import assert_close, assert_gradients, assert_op_registered, assert_same
from dscoder.testing.poison import with_strides

V2 = {"num_topk": 6, "num_groups": 8, "num_groups_kept": 3, "scale": 16.0}
SMALL = {"num_topk": 3, "num_groups": 4, "num_groups_kept": 2, "scale": 2.5}


def in_two(logits: Tensor, *, num_sequences: int = 1, **options: int | float | bool) -> tuple[Tensor, ...]:
    idx, weight = ops.moe_gate(logits, **options)
    groups = {name: options.get(name, 1) for name in ("num_groups", "num_groups_kept")}
    wide = logits.to(weight.dtype)
    terms = ops.moe_balance_terms(wide.softmax(dim=-1), idx, num_sequences=num_sequences, **groups)
    return idx, weight, terms


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_the_gate_and_the_loss(renormalize: bool, dtype: torch.dtype, rng: torch.Generator) -> None:
    logits = randn(rng, 60, 160, dtype=dtype).requires_grad_()
    options = {**V2, "renormalize": renormalize, "num_sequences": 4}
    got, wanted = ops.moe_gate_with_balance(logits, **options), in_two(logits, **options)
    for actual, want in zip(got, wanted, strict=True):
        assert_same(actual, want)
    grads = randn(rng, 60, 6, dtype=got[1].dtype), 60 * randn(rng, 3, dtype=got[1].dtype)
    (actual,) = torch.autograd.grad(got[1:], logits, grads)
    (want,) = torch.autograd.grad(wanted[1:], logits, grads)
    assert actual.dtype == dtype
    assert_close(actual, want)


@pytest.mark.parametrize("renormalize", [False, True])
def test_gradients_match_finite_differences(renormalize: bool, rng: torch.Generator) -> None:
    assert_gradients(
        lambda logits: ops.moe_gate_with_balance(logits, **SMALL, renormalize=renormalize, num_sequences=3)[
            1:
        ],
        randn(rng, 6, 8, dtype=torch.float64),
    )


@pytest.mark.parametrize("used", [1, 2])
def test_one_of_the_two_may_go_unused(used: int, rng: torch.Generator) -> None:
    logits = randn(rng, 6, 8).requires_grad_()
    (actual,) = torch.autograd.grad(ops.moe_gate_with_balance(logits, **SMALL)[used].square().sum(), logits)
    (wanted,) = torch.autograd.grad(in_two(logits, **SMALL)[used].square().sum(), logits)
    assert_close(actual, wanted)


def test_no_tokens_are_as_balanced_as_nothing() -> None:
    logits = torch.zeros(0, 8, requires_grad=True)
    idx, weight, terms = ops.moe_gate_with_balance(logits, num_topk=2, num_sequences=3)
    assert idx.shape == weight.shape == (0, 2)
    assert terms.tolist() == [0.0, 0.0, 0.0]
    (grad,) = torch.autograd.grad(terms.sum(), logits)
    assert grad.shape == (0, 8)


def test_strides_change_nothing(rng: torch.Generator) -> None:
    logits = randn(rng, 6, 8)
    for actual, wanted in zip(
        ops.moe_gate_with_balance(with_strides(logits), **SMALL),
        ops.moe_gate_with_balance(logits, **SMALL),
        strict=True,
    ):
        assert_same(actual, wanted)


@pytest.mark.parametrize("num_tokens", [0, 6])
def test_it_is_a_proper_op(num_tokens: int, rng: torch.Generator) -> None:
    logits = randn(rng, num_tokens, 8)
    args = (3, 4, 2, 2.0, True, 2)
    op = torch.ops.dscoder.moe_gate_with_balance.default
    assert_op_registered(op, (logits.clone().requires_grad_(), *args))
    weight, idx, terms, load = op(logits, *args)
    assert_op_registered(
        torch.ops.dscoder.moe_gate_with_balance_backward.default,
        (weight, terms, logits, idx, load, 2.0, True),
    )


def test_it_compiles_whole(rng: torch.Generator) -> None:
    logits = randn(rng, 6, 8).requires_grad_()

    def loss(logits: Tensor) -> Tensor:
        idx, weight, terms = ops.moe_gate_with_balance(logits * 2, **SMALL, num_sequences=2)
        return (weight * (idx + 1)).sum() + terms.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    actual, wanted = compiled(logits), loss(logits)
    assert_same(actual, wanted)
    assert_same(torch.autograd.grad(actual, logits)[0], torch.autograd.grad(wanted, logits)[0])


@pytest.mark.parametrize(
    ("op", "function"),
    [
        ("moe_gate", lambda x: ops.moe_gate(x, num_topk=2)[1]),
        ("moe_gate_with_balance", lambda x: ops.moe_gate_with_balance(x, num_topk=2)[2]),
        ("moe_balance_loss", lambda x: ops.moe_balance_terms(x, torch.zeros(6, 2, dtype=torch.int32))),
    ],
)
def test_a_second_derivative_is_refused_not_wrong(op: str, function: Callable[[Tensor], Tensor]) -> None:
    x = torch.ones(6, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match=rf"^{op}: the gradient must not be differentiated again"):
        torch.autograd.grad(function(x).sum(), x, create_graph=True)


@pytest.mark.parametrize(
    ("logits", "arguments", "error", "message"),
    [
        (torch.zeros(6, 8, dtype=torch.int64), {}, TypeError, "logits must be float32 or .*, got int64"),
        (torch.zeros(6, 0), {}, ValueError, "num_experts must be >= 1, got 0"),
        (torch.zeros(6, 8), {"num_topk": 9}, ValueError, r"num_topk must be <= 8 \(.*\), got 9"),
        (torch.zeros(6, 8), {"num_groups": 3}, ValueError, "num_experts must be a multiple .* 8 and 3"),
        (torch.zeros(6, 8), {"num_groups_kept": 2}, ValueError, "num_groups_kept must be <= .* 1, got 2"),
        (torch.zeros(6, 8), {"num_sequences": 0}, ValueError, "num_sequences must be >= 1, got 0"),
        (torch.zeros(6, 8), {"num_sequences": 4}, ValueError, "num_tokens must be a multiple of .* 6 and 4"),
    ],
)
def test_wrong_arguments_are_named(
    logits: Tensor, arguments: dict[str, int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^moe_gate_with_balance: {message}$"):
        ops.moe_gate_with_balance(logits, **{"num_topk": 2, **arguments})
