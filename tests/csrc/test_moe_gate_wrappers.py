"""The Python side of the kernels of moe_gate and moe_balance_loss, the host executor in place of a GPU."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from dscoder import ops
from dscoder.testing.cases import generator, randn
from dscoder.testing.gpu import Function, assert_agrees, forward_and_backward
from dscoder.testing.poison import with_strides

UseKernels = Callable[..., None]

OPS = [
    f"{op}{suffix}"
    for op in ("moe_gate", "moe_gate_with_balance", "moe_balance_loss")
    for suffix in ("", "_backward")
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
V2 = {"num_topk": 6, "num_groups": 8, "num_groups_kept": 3, "scale": 16.0}


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    return generator(request.node.nodeid)


def check(use_kernels: UseKernels, function: Function, *inputs: Tensor) -> None:
    """The kernels through the op agree with the reference through the op, gradients included."""
    step = forward_and_backward(function)
    wanted = step(*inputs)
    use_kernels(*OPS)
    assert_agrees(step(*inputs), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("renormalize", [False, True])
def test_the_gate(
    use_kernels: UseKernels, dtype: torch.dtype, renormalize: bool, rng: torch.Generator
) -> None:
    logits = randn(rng, 21, 160, dtype=dtype)
    check(use_kernels, lambda x: ops.moe_gate(x, **V2, renormalize=renormalize), logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("num_sequences", [1, 21])
def test_the_gate_with_balance(
    use_kernels: UseKernels,
    num_sequences: int,
    dtype: torch.dtype,
    renormalize: bool,
    rng: torch.Generator,
) -> None:
    options = {**V2, "renormalize": renormalize, "num_sequences": num_sequences}
    logits = randn(rng, 21, 160, dtype=dtype)
    check(use_kernels, lambda x: ops.moe_gate_with_balance(x, **options), logits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loss(use_kernels: UseKernels, dtype: torch.dtype, rng: torch.Generator) -> None:
    idx, _ = ops.moe_gate(randn(rng, 21, 160), **V2)
    probs = randn(rng, 21, 160).softmax(dim=-1).to(dtype)
    options = {"num_sequences": 3, "num_groups": 8, "num_groups_kept": 3}
    check(use_kernels, lambda x: ops.moe_balance_terms(x, idx, **options), probs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weighted_loss(use_kernels: UseKernels, dtype: torch.dtype, rng: torch.Generator) -> None:
    idx, _ = ops.moe_gate(randn(rng, 21, 160), **V2)
    probs = randn(rng, 21, 160).softmax(dim=-1).to(dtype)
    options = {"num_sequences": 3, "num_groups": 8, "num_groups_kept": 3, "expert": 0.3, "device": 0.5}
    check(use_kernels, lambda x: ops.moe_balance_loss(x, idx, **options, communication=0.2), probs)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: ops.moe_gate(x.t().contiguous().t(), num_topk=2),
        lambda x: ops.moe_gate_with_balance(x.t().contiguous().t(), num_topk=2),
        lambda x: ops.moe_balance_terms(
            x.t().contiguous().t(), with_strides(torch.arange(12, dtype=torch.int32).view(6, 2))
        ),
        # Gradients of one number for all elements come without memory of their own.
        lambda x: ops.moe_gate(x, num_topk=2)[1].sum(),
        lambda x: sum(y.sum() for y in ops.moe_gate_with_balance(x, num_topk=2)[1:]),
        lambda x: ops.moe_balance_terms(x, torch.arange(12, dtype=torch.int32).view(6, 2)).sum(),
    ],
)
def test_tensors_that_are_not_contiguous(
    use_kernels: UseKernels, function: Function, rng: torch.Generator
) -> None:
    check(use_kernels, function, randn(rng, 6, 16))


@pytest.mark.parametrize("num_sequences", [1, 4])
def test_no_tokens(use_kernels: UseKernels, num_sequences: int) -> None:
    idx = torch.zeros(0, 2, dtype=torch.int32)
    empty = torch.zeros(0, 16)
    check(
        use_kernels,
        lambda x: (
            *ops.moe_gate_with_balance(x, num_topk=2, num_sequences=num_sequences),
            ops.moe_balance_terms(x, idx, num_sequences=num_sequences),
        ),
        empty,
    )


def test_one_of_weights_and_terms_may_go_unused(use_kernels: UseKernels, rng: torch.Generator) -> None:
    logits = randn(rng, 6, 16)
    check(
        use_kernels,
        lambda x: torch.cat([ops.moe_gate_with_balance(x, num_topk=2)[i].flatten() for i in (1, 2)]),
        logits,
    )


def test_the_kernels_are_what_ran(
    use_kernels: UseKernels, host_ops: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests above compare something: with the binding gone, the way to it is an error."""
    monkeypatch.delattr(host_ops, "moe_gate_with_balance_forward")
    use_kernels(*OPS)
    with pytest.raises(AttributeError, match="moe_gate_with_balance_forward"):
        ops.moe_gate_with_balance(torch.zeros(2, 4), num_topk=1)
