from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dscoder import ops
from dscoder.ops import library
from dscoder.runtime import native

OPS = {
    "moe_gate": lambda f, i: (f, 1, 1, 1, 1.0, False),
    "moe_gate_backward": lambda f, i: (f, f, i, 1.0, False),
    "moe_gate_with_balance": lambda f, i: (f, 1, 1, 1, 1.0, False, 1),
    "moe_gate_with_balance_backward": lambda f, i: (f, f[0], f, i, f[None], 1.0, False),
    "moe_permute": lambda f, i: (f, i, 2),
    "moe_permute_maps": lambda f, i: (i, 2),
    "moe_permute_backward": lambda f, i: (f, i),
    "moe_unpermute": lambda f, i: (f, f, i, i[0]),
    "moe_unpermute_backward": lambda f, i: (f, f, f, i, i[0]),
    "moe_balance_loss": lambda f, i: (f, i, 1, 1, 1, None),
    "moe_balance_loss_backward": lambda f, i: (f[0], f[None], 1, torch.float32),
    "grouped_gemm": lambda f, i: (f, f[None], i[0], "auto"),
    "grouped_gemm_weight_gradient": lambda f, i: (f, f, i[0], None, "auto"),
    "grouped_gemm_weight_gradient_into": lambda f, i: (f.new_ones(1, 2, 2), f, f, i[0], None, False, "auto"),
    "moe_experts": lambda f, i: (f, f[None].mT, f[None].mT, i[0], None, None, False, "auto"),
    "moe_experts_gate_up_gradient": lambda f, i: (f, f[None].mT, f, i[0], "auto"),
    "moe_experts_rows": lambda f, i: (f, i, i[0]),
    "rope": lambda f, i: (f[None], f[None], f, f, i[0], True, False),
    "latent_rope": lambda f, i: (f[None], f, f[0], f, f, i[0], 1e-6),
    "latent_rope_backward": lambda f, i: (f[None], f, f, f[0], f[0], f, f, i[0]),
    "latent_append": lambda f, i: (
        f[None],
        f,
        f[0],
        f,
        f,
        i[0],
        1e-6,
        i[0],
        f[None].clone(),
        f[None].clone(),
    ),
    "mla_prefill": lambda f, i: (f[None], f[None], f[None], i[0], i[0], 1.0, True, False, "auto"),
    "mla_prefill_backward": lambda f, i: (f[None], [f[None]] * 5, i[0], i[0], 1.0, True, False, "auto"),
    "mla_decode": lambda f, i: (f[None, None], f[None], i, i[0], None, 1, 1.0, "auto"),
    "mla_decode_plan": lambda f, i: (i[0], 1, 1, 4),
}


def on_cuda(op: str) -> Any:
    """Run the CUDA implementation of `op` on CPU tensors, as the dispatcher would with CUDA ones."""
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    args = OPS[op](torch.zeros(1, 2), torch.zeros(1, 1, dtype=torch.int32))
    return getattr(torch.ops.dscoder, op).default.redispatch(key, *args)


def test_every_op_of_the_library_is_listed_here() -> None:
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("dscoder::")}
    assert {f"dscoder::{op}" for op in OPS} == registered


@pytest.mark.parametrize("op", OPS)
def test_a_cuda_call_names_the_op_when_built_without_kernels(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native._C, "has_cuda", False)
    with pytest.raises(RuntimeError, match=rf"^{op}: .*built without"):
        on_cuda(op)


def test_an_op_without_a_kernel_runs_its_reference_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native._C, "has_cuda", True)
    out, _ = on_cuda("mla_prefill")
    assert isinstance(out, Tensor)
    assert out.tolist() == [[[0.0, 0.0]]]


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_sums_are_taken_in_float32_or_better(dtype: torch.dtype, wanted: torch.dtype) -> None:
    assert library.accumulate_dtype(dtype) == wanted


def test_tensors_on_two_devices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^op: idx must be on cpu like x, got meta$"):
        library.check_devices("op", x=torch.zeros(1), idx=torch.zeros(1, device="meta"))


def test_a_list_is_not_a_tensor() -> None:
    with pytest.raises(TypeError, match=r"^op: x must be a tensor, got list$"):
        library.check_tensor("op", "x", [1.0], num_dims=1, dtypes=library.FLOATS)  # type: ignore[arg-type]


def test_all_wanted_dtypes_are_named() -> None:
    with pytest.raises(TypeError, match=r"^op: x must be int32 or int64, got float32$"):
        library.check_tensor("op", "x", torch.zeros(1), num_dims=1, dtypes=(torch.int32, torch.int64))


@pytest.mark.parametrize("value", [2.0, True, "2", None])
def test_what_is_no_int_is_refused_by_name(value: object) -> None:
    with pytest.raises(TypeError, match=rf"^op: count must be int, got {type(value).__name__}$"):
        library.check_at_least("op", "count", value, 1)  # type: ignore[arg-type]


class Forgetful(torch.autograd.Function):
    """Passes no gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, _grad: Tensor) -> None:
        return None


class Ops(TorchDispatchMode):
    """The names of what is called while it is on, views left out: they launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


PROBS = torch.full((2, 4), 0.25)
IDX = torch.zeros(2, 1, dtype=torch.int32)
LEAST: dict[str, tuple[Callable[[Tensor], Tensor], list[str]]] = {
    "gate": (lambda x: ops.moe_gate(x, num_topk=1)[1], ["moe_gate_backward"]),
    "gate_with_balance": (
        lambda x: torch.cat([y.flatten() for y in ops.moe_gate_with_balance(x, num_topk=1)[1:]]),
        ["moe_gate_with_balance_backward"],
    ),
    "gate_with_balance_for_weights": (
        lambda x: ops.moe_gate_with_balance(x, num_topk=1)[1],
        ["new_zeros", "moe_gate_with_balance_backward"],
    ),
    "gate_with_balance_for_terms": (
        lambda x: ops.moe_gate_with_balance(x, num_topk=1)[2],
        ["new_zeros", "moe_gate_with_balance_backward"],
    ),
    "balance_terms": (lambda x: ops.moe_balance_terms(x, IDX), ["moe_balance_loss_backward"]),
    "balance_loss": (
        lambda x: ops.moe_balance_loss(x, IDX, expert=0.1, device=0.2, communication=0.3),
        ["moe_balance_loss_backward"],
    ),
    "permute": (lambda x: ops.moe_permute(x, IDX, num_experts=2)[0], ["moe_permute_backward"]),
}


@pytest.mark.parametrize(("function", "wanted"), LEAST.values(), ids=LEAST)
def test_a_gradient_fills_no_zeros_that_nobody_reads(
    function: Callable[[Tensor], Tensor], wanted: list[str]
) -> None:
    x = PROBS.clone().requires_grad_()
    out = function(x)
    grad = torch.ones_like(out)
    with Ops() as called:
        torch.autograd.grad(out, x, grad)
    assert called.names == wanted


def test_the_weighted_loss_is_one_op_in_either_direction() -> None:
    x = PROBS.clone().requires_grad_()
    with Ops() as called:
        loss = ops.moe_balance_loss(x, IDX, expert=0.1, device=0.2, communication=0.3)
    assert called.names == ["moe_balance_loss"]
    assert loss.shape == ()


@pytest.mark.parametrize("function", [function for function, _ in LEAST.values()], ids=LEAST)
def test_where_no_gradient_comes_from_none_goes_on(function: Callable[[Tensor], Tensor]) -> None:
    x = PROBS.clone().requires_grad_()
    out = Forgetful.apply(function(x)) + x.sum()
    with Ops() as called:
        (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad.eq(out.numel()).all()
    assert not [name for name in called.names if name.startswith("moe_")]


X = torch.zeros(2, 4)

INTS: dict[str, tuple[Callable[[Any], object], str]] = {
    "gate_topk": (lambda n: ops.moe_gate(X, num_topk=n), "moe_gate: num_topk"),
    "gate_groups": (lambda n: ops.moe_gate(X, num_topk=1, num_groups=n), "moe_gate: num_groups"),
    "gate_kept": (lambda n: ops.moe_gate(X, num_topk=1, num_groups_kept=n), "moe_gate: num_groups_kept"),
    "permute": (lambda n: ops.moe_permute(X, IDX, num_experts=n), "moe_permute: num_experts"),
    "permute_maps": (lambda n: ops.moe_permute_maps(IDX, num_experts=n), "moe_permute_maps: num_experts"),
    "balance_sequences": (
        lambda n: ops.moe_balance_terms(X, IDX, num_sequences=n),
        "moe_balance_loss: num_sequences",
    ),
    "balance_groups": (
        lambda n: ops.moe_balance_terms(X, IDX, num_groups=n),
        "moe_balance_loss: num_groups",
    ),
    "balance_kept": (
        lambda n: ops.moe_balance_terms(X, IDX, num_groups_kept=n),
        "moe_balance_loss: num_groups_kept",
    ),
    "decode": (
        lambda n: ops.mla_decode(X[None, None], X[None], IDX[:1], IDX[0], value_dim=n, scale=1.0),
        "mla_decode: value_dim",
    ),
}


@pytest.mark.parametrize("call", [INTS["permute"], INTS["permute_maps"]], ids=["permute", "permute_maps"])
def test_an_expert_is_an_int32(call: tuple[Callable[[Any], object], str]) -> None:
    function, argument = call
    with pytest.raises(ValueError, match=rf"^{argument} must be <= 2147483647, got 2147483648$"):
        function(2**31)


NUMBERS: dict[str, tuple[Callable[[Any], object], str]] = {
    "gate_scale": (lambda x: ops.moe_gate(X, num_topk=1, scale=x), "moe_gate: scale"),
    "gate_with_balance_scale": (
        lambda x: ops.moe_gate_with_balance(X, num_topk=1, scale=x),
        "moe_gate_with_balance: scale",
    ),
    "expert": (lambda x: ops.moe_balance_loss(X, IDX, expert=x), "moe_balance_loss: expert"),
    "device": (lambda x: ops.moe_balance_loss(X, IDX, device=x), "moe_balance_loss: device"),
    "communication": (
        lambda x: ops.moe_balance_loss(X, IDX, communication=x),
        "moe_balance_loss: communication",
    ),
}


@pytest.mark.parametrize("value", ["a", None, True], ids=str)
@pytest.mark.parametrize(("call", "argument"), NUMBERS.values(), ids=NUMBERS)
def test_every_float_argument_is_checked(call: Callable[[Any], object], argument: str, value: object) -> None:
    with pytest.raises(TypeError, match=rf"^{argument} must be float, got {type(value).__name__}$"):
        call(value)


@pytest.mark.parametrize(("call", "argument"), INTS.values(), ids=INTS)
def test_every_int_argument_is_checked(call: Callable[[Any], object], argument: str) -> None:
    with pytest.raises(TypeError, match=rf"^{argument} must be int, got float$"):
        call(1.0)
