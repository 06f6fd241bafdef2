"""The moe_gate kernels, through their own bindings, on the host executor: the same answers as the reference.

Indices are compared bitwise, ties and NaN rows included; outputs start out poisoned, with guards round them.
"""

from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dscoder import ops
from dscoder.testing import compare
from dscoder.testing.examples import FIXED

WILD = 2**31 - 1
NUM_GUARD_ROWS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    num_tokens: int = 5
    num_experts: int = 64
    num_topk: int = 6
    num_groups: int = 1
    num_groups_kept: int = 1
    scale: float = 1.0
    renormalize: bool = False
    values: str = "normal"
    is_aligned: bool = True
    order: int = 0

    @property
    def options(self) -> dict[str, int | float | bool]:
        return {
            "num_groups": self.num_groups,
            "num_groups_kept": self.num_groups_kept,
            "scale": self.scale,
            "renormalize": self.renormalize,
        }


VALUES = ["normal", "ties", "constant", "zeros", "huge", "tiny", "infinite", "nan"]


def logits_of(case: Case) -> Tensor:
    rng = torch.Generator().manual_seed(case.order)
    shape = (case.num_tokens, case.num_experts)
    # One float in front takes the rows off their 16-byte boundary.
    memory = torch.empty(case.num_tokens * case.num_experts + 4)
    logits = memory[0 if case.is_aligned else 1 :][: shape[0] * shape[1]].view(shape)
    logits.copy_(torch.randn(shape, generator=rng))
    chance = torch.rand(shape, generator=rng)
    match case.values:
        case "ties":
            logits.round_()
        case "constant":
            logits.fill_(0.5)
        case "zeros":
            logits.copy_(torch.where(chance < 0.5, 0.0, -0.0))
        case "huge":
            logits.mul_(1e38)
        case "tiny":
            logits.mul_(1e-42)
        case "infinite":
            logits.masked_fill_(chance < 0.7, -torch.inf)
            logits[::3].masked_fill_(chance[::3] > 0.98, torch.inf)
        case "nan":
            # NaNs of both signs, as the hardware may leave them.
            logits[::2].masked_fill_(chance[::2] < 0.1, torch.nan)
            logits[1::4].copy_(torch.where(chance[1::4] < 0.1, -torch.tensor(torch.nan), logits[1::4]))
    return logits


def guarded(shape: tuple[int, int], fill: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A poisoned output, and the memory it lies in, with guard rows before and after."""
    memory = torch.full((shape[0] + 2 * NUM_GUARD_ROWS, shape[1]), fill, dtype=dtype)
    return memory[NUM_GUARD_ROWS : NUM_GUARD_ROWS + shape[0]], memory


def assert_guards_whole(memory: Tensor) -> None:
    guards = torch.cat([memory[:NUM_GUARD_ROWS], memory[-NUM_GUARD_ROWS:]])
    assert bool((guards.isnan() if guards.is_floating_point() else guards == WILD).all())


def forward(host_ops: ModuleType, case: Case, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    shape = (case.num_tokens, case.num_topk)
    idx_TK, idx_memory = guarded(shape, WILD, torch.int32)
    weight_TK, weight_memory = guarded(shape, torch.nan, torch.float32)
    host_ops.moe_gate_forward(logits_TE, idx_TK, weight_TK, **case.options)
    assert_guards_whole(idx_memory)
    assert_guards_whole(weight_memory)
    return idx_TK, weight_TK


def check(host_ops: ModuleType, host_kernels: ModuleType, case: Case) -> None:
    host_kernels.set_order(case.order)
    logits_TE = logits_of(case)
    idx_TK, weight_TK = forward(host_ops, case, logits_TE)

    leaf_TE = logits_TE.clone().requires_grad_()
    wanted_idx, wanted_weight = ops.moe_gate(leaf_TE, num_topk=case.num_topk, **case.options)
    compare.assert_same(idx_TK, wanted_idx)
    compare.assert_close(weight_TK, wanted_weight)

    grad_weight = torch.randn(weight_TK.shape, generator=torch.Generator().manual_seed(case.order + 1))
    wanted_weight.backward(grad_weight)
    grad_logits, memory = guarded(tuple(logits_TE.shape), torch.nan, torch.float32)
    options = {"scale": case.scale, "renormalize": case.renormalize}
    host_ops.moe_gate_backward(logits_TE, idx_TK, grad_weight, grad_logits, **options)
    assert_guards_whole(memory)
    assert leaf_TE.grad is not None
    compare.assert_close(grad_logits, leaf_TE.grad)


# ---- every layout of the kernel ----

SHAPES = [
    Case(num_experts=64, num_topk=6),
    Case(num_experts=64, num_topk=16),
    Case(num_experts=64, num_topk=6, is_aligned=False),
    Case(num_experts=64, num_topk=8, num_groups=8, num_groups_kept=3),
    Case(num_experts=160, num_topk=6, num_groups=8, num_groups_kept=3, scale=16.0),
    Case(num_experts=160, num_topk=6, num_groups=8, num_groups_kept=3, scale=16.0, is_aligned=False),
    Case(num_experts=160, num_topk=16, num_groups=8, num_groups_kept=1, renormalize=True),
    Case(num_experts=160, num_topk=6, num_groups=8, num_groups_kept=4),
    Case(num_experts=160, num_topk=6),
    Case(num_experts=1, num_topk=1),
    Case(num_experts=2, num_topk=2, num_groups=2, num_groups_kept=2, renormalize=True),
    Case(num_experts=61, num_topk=5),
    Case(num_experts=127, num_topk=16, renormalize=True),
    Case(num_experts=257, num_topk=3, num_groups=257, num_groups_kept=11),
    Case(num_experts=509, num_topk=16, num_groups=509, num_groups_kept=16, renormalize=True),
    Case(num_experts=512, num_topk=16, scale=2.5),
    Case(num_experts=512, num_topk=16, num_groups=2, num_groups_kept=1),
    Case(num_experts=512, num_topk=9, num_groups=512, num_groups_kept=511, renormalize=True),
]


def with_fields(case: Case, **fields: object) -> Case:
    values = {name: getattr(case, name) for name in Case.__dataclass_fields__}
    return Case(**{**values, **fields})


def shape_name(case: Case) -> str:
    return f"E{case.num_experts}-G{case.num_groups}of{case.num_groups_kept}-K{case.num_topk}" + (
        "" if case.is_aligned else "-unaligned"
    )


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("case", SHAPES, ids=shape_name)
def test_every_layout_agrees_with_the_reference(
    host_ops: ModuleType, host_kernels: ModuleType, case: Case, values: str
) -> None:
    check(host_ops, host_kernels, with_fields(case, values=values, order=len(values)))


@pytest.mark.parametrize("num_tokens", [0, 1, 16, 17, 67])
@pytest.mark.parametrize("case", [SHAPES[0], SHAPES[4], SHAPES[11]], ids=shape_name)
def test_any_number_of_tokens(
    host_ops: ModuleType, host_kernels: ModuleType, case: Case, num_tokens: int
) -> None:
    check(host_ops, host_kernels, with_fields(case, num_tokens=num_tokens))


@pytest.mark.parametrize("case", [SHAPES[3], SHAPES[4], SHAPES[13]], ids=shape_name)
def test_the_order_of_threads_and_blocks_changes_nothing(
    host_ops: ModuleType, host_kernels: ModuleType, case: Case
) -> None:
    case = with_fields(case, values="ties", num_tokens=33)
    logits_TE = logits_of(case)
    host_kernels.set_order(0)
    wanted_idx, wanted_weight = forward(host_ops, case, logits_TE)
    for order in range(1, 16):
        host_kernels.set_order(order)
        idx_TK, weight_TK = forward(host_ops, case, logits_TE)
        compare.assert_same(idx_TK, wanted_idx)
        compare.assert_same(weight_TK, wanted_weight)


# ---- any shape ----


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_experts = draw(st.one_of(st.integers(1, 512), st.sampled_from([64, 128, 160, 256, 509, 512])))
    divisors = [d for d in range(1, num_experts + 1) if num_experts % d == 0]
    num_groups = draw(st.sampled_from(divisors))
    num_groups_kept = draw(st.integers(1, num_groups))
    num_candidates = num_experts // num_groups * num_groups_kept
    num_topk = draw(st.integers(1, min(16, num_candidates)))
    # A single renormalised expert has weight 1 and gradient 0, which no relative tolerance fits: see below.
    return Case(
        num_tokens=draw(st.integers(0, 19)),
        num_experts=num_experts,
        num_topk=num_topk,
        num_groups=num_groups,
        num_groups_kept=num_groups_kept,
        scale=draw(st.sampled_from([1.0, 16.0])),
        renormalize=num_topk > 1 and draw(st.booleans()),
        values=draw(st.sampled_from(VALUES)),
        is_aligned=draw(st.booleans()),
        order=draw(st.integers(0, 2**32)),
    )


@settings(FIXED, max_examples=80)
@given(case=cases())
def test_any_shape_agrees_with_the_reference(
    host_ops: ModuleType, host_kernels: ModuleType, case: Case
) -> None:
    check(host_ops, host_kernels, case)


def test_a_single_renormalised_expert_has_no_gradient(host_ops: ModuleType) -> None:
    logits_TE = logits_of(Case(num_experts=18))
    idx_TK, weight_TK = forward(host_ops, Case(num_experts=18, num_topk=1, renormalize=True), logits_TE)
    compare.assert_same(weight_TK, torch.ones(5, 1))
    grad_logits = torch.full_like(logits_TE, torch.nan)
    host_ops.moe_gate_backward(logits_TE, idx_TK, torch.ones(5, 1), grad_logits, scale=1.0, renormalize=True)
    assert grad_logits.abs().max() < 1e-6


# ---- a wrong argument is an error, and nothing is launched ----


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (
            {"logits": torch.zeros(4, 64, dtype=torch.float64)},
            TypeError,
            "logits must be float32, got float64",
        ),
        ({"logits": [1.0]}, TypeError, "logits must be a torch tensor"),
        ({"logits": torch.zeros(64)}, ValueError, "logits must have 2 dimensions, got 1"),
        ({"logits": torch.zeros(64, 4).T}, ValueError, "logits must be contiguous"),
        ({"logits": torch.zeros(4, 513)}, ValueError, "num_experts must be <= 512, got 513"),
        ({"idx": torch.zeros(4, 6, dtype=torch.int64)}, TypeError, "idx must be int32, got int64"),
        ({"idx": torch.zeros(5, 6, dtype=torch.int32)}, ValueError, "idx must have shape"),
        ({"weight": torch.zeros(4, 5)}, ValueError, "weight must have shape"),
        ({"num_groups": 7}, ValueError, "num_experts must be a multiple of num_groups, got 64 and 7"),
        ({"num_groups": 0}, ValueError, "num_groups"),
        ({"num_groups_kept": 2}, ValueError, r"num_groups_kept must be in \[1, 1\], got 2"),
        ({"num_groups": 32}, ValueError, r"num_topk must be <= 2 \(experts in the kept groups\), got 6"),
    ],
)
def test_a_wrong_argument_is_named(
    host_ops: ModuleType, fields: dict[str, object], error: type[Exception], message: str
) -> None:
    arguments = {
        "logits": torch.zeros(4, 64),
        "idx": torch.full((4, 6), WILD, dtype=torch.int32),
        "weight": torch.zeros(4, 6),
        **Case().options,
        **fields,
    }
    with pytest.raises(error, match=message):
        host_ops.moe_gate_forward(**arguments)


def test_more_than_sixteen_experts_a_token_are_refused(host_ops: ModuleType) -> None:
    idx, weight = torch.zeros(4, 17, dtype=torch.int32), torch.zeros(4, 17)
    with pytest.raises(ValueError, match="num_topk must be <= 16, got 17"):
        host_ops.moe_gate_forward(torch.zeros(4, 64), idx, weight, **Case().options)
