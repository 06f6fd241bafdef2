"""The balance kernels, alone and fused with the gate, on the host executor: the answers of the references.

Outputs and scratch start out poisoned, with guards round them.
"""

from dataclasses import dataclass, replace
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
NUM_GUARDS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    num_sequences: int = 2
    length: int = 5
    num_experts: int = 64
    num_topk: int = 6
    num_groups: int = 1
    num_groups_kept: int = 1
    scale: float = 1.0
    renormalize: bool = False
    num_chunks: int | None = None  # None: as many as the kernels' plan says
    num_slices: int | None = None
    weights: tuple[float, float, float] | None = None  # of the loss; None: its terms
    is_tied: bool = False
    is_aligned: bool = True
    order: int = 0

    @property
    def num_tokens(self) -> int:
        return self.num_sequences * self.length

    @property
    def groups(self) -> dict[str, int]:
        return {"num_groups": self.num_groups, "num_groups_kept": self.num_groups_kept}

    @property
    def gate(self) -> dict[str, float | bool]:
        return {"scale": self.scale, "renormalize": self.renormalize}


def guarded(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A poisoned tensor in the middle of poisoned memory."""
    fill = torch.nan if dtype.is_floating_point else WILD
    size = torch.Size(shape).numel()
    return torch.full((size + 2 * NUM_GUARDS,), fill, dtype=dtype)[NUM_GUARDS : NUM_GUARDS + size].view(shape)


def assert_guards_whole(*tensors: Tensor) -> None:
    for tensor in tensors:
        memory = torch.as_strided(tensor, (tensor.numel() + 2 * NUM_GUARDS,), (1,), 0)
        guards = torch.cat([memory[:NUM_GUARDS], memory[-NUM_GUARDS:]])
        assert bool((guards.isnan() if guards.is_floating_point() else guards == WILD).all())


def buffers_of(host_ops: ModuleType, case: Case) -> tuple[Tensor, ...]:
    sizes = (case.num_tokens, case.num_experts, case.num_sequences, case.num_groups)
    num_chunks, num_slices = host_ops.moe_balance_plan(*sizes)
    num_chunks, num_slices = case.num_chunks or num_chunks, case.num_slices or num_slices
    num_terms = 3 if case.weights is None else 1
    shape = (case.num_sequences, num_chunks)
    return (
        guarded(*shape, case.num_experts),
        guarded(*shape, case.num_experts + 2 * case.num_groups, dtype=torch.int32),
        guarded(case.num_sequences, case.num_groups, num_slices, num_terms),
        guarded(1, dtype=torch.int32),
        guarded(num_terms),
        guarded(num_terms, case.num_sequences, case.num_experts),
    )


def logits_of(case: Case) -> Tensor:
    rng = torch.Generator().manual_seed(case.order)
    # One float in front takes the rows off their 16-byte boundary.
    memory = torch.randn(case.num_tokens * case.num_experts + 4, generator=rng)
    if case.is_tied:
        memory.round_()
    first = 0 if case.is_aligned else 1
    return memory[first : first + case.num_tokens * case.num_experts].view(case.num_tokens, case.num_experts)


def fused(host_ops: ModuleType, case: Case, logits_TE: Tensor) -> tuple[Tensor, ...]:
    """idx, weight, terms and load of the fused kernel."""
    idx_TK = guarded(case.num_tokens, case.num_topk, dtype=torch.int32)
    weight_TK = guarded(case.num_tokens, case.num_topk)
    buffers = buffers_of(host_ops, case)
    host_ops.moe_gate_with_balance_forward(logits_TE, idx_TK, weight_TK, buffers, **case.groups, **case.gate)
    assert_guards_whole(idx_TK, weight_TK, *buffers)
    return idx_TK, weight_TK, *buffers[-2:]


def composed(case: Case, logits_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the two references, one after the other."""
    idx_TK, weight_TK = ops.moe_gate(logits_TE, num_topk=case.num_topk, **case.groups, **case.gate)
    terms_3 = ops.moe_balance_terms(
        logits_TE.softmax(dim=-1), idx_TK, num_sequences=case.num_sequences, **case.groups
    )
    return idx_TK, weight_TK, terms_3


def check_fused(host_ops: ModuleType, host_kernels: ModuleType, case: Case) -> None:
    host_kernels.set_order(case.order)
    logits_TE = logits_of(case)
    idx_TK, weight_TK, terms_3, load_3BE = fused(host_ops, case, logits_TE)

    leaf_TE = logits_TE.clone().requires_grad_()
    wanted_idx, wanted_weight, wanted_terms = composed(case, leaf_TE)
    compare.assert_same(idx_TK, wanted_idx)
    compare.assert_close(weight_TK, wanted_weight)
    compare.assert_close(terms_3, wanted_terms)

    rng = torch.Generator().manual_seed(case.order + 1)
    # Of one size, so that neither gradient drowns in the other.
    grad_weight = torch.randn(weight_TK.shape, generator=rng) / case.scale
    grad_terms = torch.randn(3, generator=rng) * max(case.num_tokens, 1)
    torch.autograd.backward([wanted_weight, wanted_terms], [grad_weight, grad_terms])
    grad_logits = guarded(*logits_TE.shape)
    host_ops.moe_gate_with_balance_backward(
        logits_TE, idx_TK, (grad_weight, grad_terms), load_3BE, grad_logits, **case.gate
    )
    assert_guards_whole(grad_logits)
    assert leaf_TE.grad is not None
    compare.assert_close(grad_logits, leaf_TE.grad)


def check_alone(host_ops: ModuleType, host_kernels: ModuleType, case: Case, dtype: torch.dtype) -> None:
    host_kernels.set_order(case.order)
    rng = torch.Generator().manual_seed(case.order)
    probs_TE = torch.rand(case.num_tokens, case.num_experts, generator=rng).to(dtype)
    # Twice as many indices as experts: half of the choices count for nobody, and many are repeated.
    low, high = -case.num_experts // 2, 3 * case.num_experts // 2 + 1
    idx_TK = torch.randint(low, high, (case.num_tokens, case.num_topk), generator=rng, dtype=torch.int32)
    buffers = buffers_of(host_ops, case)
    host_ops.moe_balance_loss_forward(probs_TE, idx_TK, buffers, **case.groups, weights=case.weights)
    assert_guards_whole(*buffers)
    terms, load_NBE = buffers[-2:]

    leaf_TE = probs_TE.clone().requires_grad_()
    wanted = ops.moe_balance_terms(leaf_TE, idx_TK, num_sequences=case.num_sequences, **case.groups)
    if case.weights is not None:
        wanted = (wanted * torch.tensor(case.weights)).sum(dim=0, keepdim=True)
    compare.assert_close(terms, wanted)
    grad_terms = torch.randn(len(wanted), generator=rng)
    wanted.backward(grad_terms)
    grad_probs = guarded(case.num_tokens, case.num_experts, dtype=dtype)
    host_ops.moe_balance_loss_backward(grad_terms, load_NBE, grad_probs)
    assert_guards_whole(grad_probs)
    assert leaf_TE.grad is not None
    compare.assert_close(grad_probs, leaf_TE.grad)


# ---- every layout, every way of cutting the tokens up ----

SHAPES = [
    Case(num_experts=64, num_topk=6),
    Case(num_experts=64, num_topk=16, num_groups=8, num_groups_kept=8),
    Case(num_experts=64, num_topk=6, is_aligned=False),
    Case(num_experts=160, num_topk=6, num_groups=8, num_groups_kept=3, scale=16.0),
    Case(num_experts=160, num_topk=6, num_groups=8, num_groups_kept=3, scale=16.0, is_aligned=False),
    Case(num_experts=160, num_topk=16, num_groups=8, num_groups_kept=2, renormalize=True),
    Case(num_experts=160, num_topk=6, num_groups=8, num_groups_kept=5, renormalize=True),
    Case(num_experts=1, num_topk=1),
    Case(num_experts=61, num_topk=5, renormalize=True),
    Case(num_experts=127, num_topk=16),
    Case(num_experts=257, num_topk=3, num_groups=257, num_groups_kept=11),
    Case(num_experts=512, num_topk=16, scale=2.5),
    Case(num_experts=512, num_topk=16, num_groups=2, num_groups_kept=1),
    Case(num_experts=512, num_topk=9, num_groups=512, num_groups_kept=511, renormalize=True),
]


def shape_name(case: Case) -> str:
    renormalized = "-renormalized" if case.renormalize else ""
    aligned = "" if case.is_aligned else "-unaligned"
    return f"E{case.num_experts}-G{case.num_groups}of{case.num_groups_kept}-K{case.num_topk}" + (
        renormalized + aligned
    )


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("case", SHAPES, ids=shape_name)
def test_every_layout_agrees_with_the_two_references(
    host_ops: ModuleType, host_kernels: ModuleType, case: Case, is_tied: bool
) -> None:
    check_fused(host_ops, host_kernels, replace(case, is_tied=is_tied, order=7))


@pytest.mark.parametrize(
    ("num_sequences", "length", "num_chunks"),
    [(1, 0, None), (3, 0, 2), (1, 1, None), (1, 67, None), (2, 40, 3), (1, 9, 8), (3, 5, 7), (67, 1, None)],
)
@pytest.mark.parametrize("case", [SHAPES[0], SHAPES[3], SHAPES[8]], ids=shape_name)
def test_any_number_of_sequences_tokens_and_chunks(
    host_ops: ModuleType,
    host_kernels: ModuleType,
    case: Case,
    num_sequences: int,
    length: int,
    num_chunks: int | None,
) -> None:
    case = replace(case, num_sequences=num_sequences, length=length, num_chunks=num_chunks)
    check_fused(host_ops, host_kernels, case)
    check_alone(host_ops, host_kernels, case, torch.float32)


# 20, 61 and 256 experts a group: slices of one width, a last one that is shorter, some that are empty.
@pytest.mark.parametrize("num_slices", [1, 3, 7, 8, 20])
@pytest.mark.parametrize("case", [SHAPES[3], SHAPES[8], SHAPES[12]], ids=shape_name)
def test_any_number_of_slices(
    host_ops: ModuleType, host_kernels: ModuleType, case: Case, num_slices: int
) -> None:
    case = replace(case, num_slices=num_slices, num_chunks=3)
    check_fused(host_ops, host_kernels, case)
    check_alone(host_ops, host_kernels, case, torch.float32)


@pytest.mark.parametrize("weights", [(0.003, 0.05, 0.02), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
@pytest.mark.parametrize("case", SHAPES, ids=shape_name)
def test_the_loss_is_the_weighted_sum(
    host_ops: ModuleType, host_kernels: ModuleType, case: Case, weights: tuple[float, float, float]
) -> None:
    check_alone(host_ops, host_kernels, replace(case, weights=weights), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [SHAPES[3], SHAPES[8], SHAPES[11], SHAPES[13]], ids=shape_name)
def test_probabilities_of_any_float(
    host_ops: ModuleType, host_kernels: ModuleType, case: Case, dtype: torch.dtype
) -> None:
    check_alone(host_ops, host_kernels, replace(case, length=19), dtype)


@pytest.mark.parametrize("case", [SHAPES[3], SHAPES[5], SHAPES[10]], ids=shape_name)
def test_the_order_of_threads_and_blocks_changes_no_bit(
    host_ops: ModuleType, host_kernels: ModuleType, case: Case
) -> None:
    case = replace(case, num_sequences=3, length=37)
    logits_TE = logits_of(case)
    probs_TE = logits_TE.softmax(dim=-1)
    runs = []
    for order in range(12):
        host_kernels.set_order(order)
        run = fused(host_ops, case, logits_TE)
        buffers = buffers_of(host_ops, case)
        host_ops.moe_balance_loss_forward(probs_TE, run[0], buffers, **case.groups)
        runs.append((*run, *buffers[-2:]))
    for run in runs[1:]:
        for got, wanted in zip(run, runs[0], strict=True):
            compare.assert_same(got, wanted)


# ---- any shape ----


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_experts = draw(st.one_of(st.integers(1, 512), st.sampled_from([64, 128, 160, 256, 509, 512])))
    divisors = [d for d in range(1, num_experts + 1) if num_experts % d == 0]
    num_groups = draw(st.sampled_from(divisors))
    num_groups_kept = draw(st.integers(1, num_groups))
    group_width = num_experts // num_groups
    num_candidates = group_width * num_groups_kept
    return Case(
        num_sequences=draw(st.integers(1, 5)),
        length=draw(st.integers(0, 9)),
        num_experts=num_experts,
        num_topk=draw(st.integers(1, min(16, num_candidates))),
        num_groups=num_groups,
        num_groups_kept=num_groups_kept,
        scale=draw(st.sampled_from([1.0, 16.0])),
        renormalize=draw(st.booleans()),
        num_chunks=draw(st.sampled_from([None, 1, 2, 5])),
        num_slices=draw(st.one_of(st.none(), st.integers(1, group_width))),
        is_tied=draw(st.booleans()),
        is_aligned=draw(st.booleans()),
        order=draw(st.integers(0, 2**32)),
    )


SETTINGS = settings(FIXED, max_examples=60)


@SETTINGS
@given(case=cases())
def test_any_shape_agrees_with_the_two_references(
    host_ops: ModuleType, host_kernels: ModuleType, case: Case
) -> None:
    # A single expert for all tokens has gradient 0, which no relative tolerance fits.
    if case.num_experts > 1:
        check_fused(host_ops, host_kernels, case)


@SETTINGS
@given(
    case=cases(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    weights=st.sampled_from([None, (0.003, 0.05, 0.02)]),
)
def test_any_shape_of_probabilities_agrees_with_the_reference(
    host_ops: ModuleType,
    host_kernels: ModuleType,
    case: Case,
    dtype: torch.dtype,
    weights: tuple[float, float, float] | None,
) -> None:
    check_alone(host_ops, host_kernels, replace(case, weights=weights), dtype)


# ---- poison ----


def test_nan_logits_reach_the_terms_and_no_index_leaves_its_range(host_ops: ModuleType) -> None:
    case = SHAPES[3]
    logits_TE = logits_of(case)
    logits_TE[7, 5] = torch.nan
    idx_TK, weight_TK, terms_3, load_3BE = fused(host_ops, case, logits_TE)
    assert terms_3.isnan().all()
    assert weight_TK[7].isnan().all()
    assert weight_TK[:7].isfinite().all()
    assert bool(((idx_TK >= 0) & (idx_TK < case.num_experts)).all())
    assert load_3BE.isfinite().all()


def test_nan_probabilities_reach_the_terms(host_ops: ModuleType) -> None:
    case = Case(num_experts=4, num_topk=1)
    probs_TE = torch.full((10, 4), 0.25)
    probs_TE[9, 0] = torch.nan
    buffers = buffers_of(host_ops, case)
    host_ops.moe_balance_loss_forward(probs_TE, torch.zeros(10, 1, dtype=torch.int32), buffers, **case.groups)
    assert buffers[4].isnan().all()


# ---- wrong arguments ----


def shaped(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(sizes, dtype=dtype)


@pytest.mark.parametrize(
    ("position", "tensor", "error", "message"),
    [
        (0, shaped(2, 1, 63), ValueError, "prob_sum must have shape"),
        (0, shaped(0, 1, 64), ValueError, r"prob_sum must have from 1 to 2\^31 - 1 chunks, got 0 x 1"),
        (0, shaped(3, 1, 64), ValueError, "num_tokens must be a multiple of num_sequences, got 10 and 3"),
        (1, shaped(2, 1, 65), TypeError, "count must be int32, got float32"),
        (1, shaped(2, 2, 65, dtype=torch.int32), ValueError, "count must have shape"),
        (2, shaped(2, 2, 1, 3), ValueError, "slice_terms must have shape"),
        (2, shaped(2, 1, 0, 3), ValueError, "slice_terms must have from 1 to num_experts 64 slices"),
        (2, shaped(2, 1, 65, 3), ValueError, "slice_terms must have from 1 to num_experts 64 slices"),
        (3, shaped(2, dtype=torch.int32), ValueError, "num_finished must have shape"),
        (4, shaped(4), ValueError, "terms must have shape"),
        (5, shaped(3, 1, 64), ValueError, "load must have shape"),
    ],
)
def test_a_wrong_buffer_is_named(
    host_ops: ModuleType, position: int, tensor: Tensor, error: type[Exception], message: str
) -> None:
    case = Case()
    buffers = list(buffers_of(host_ops, case))
    buffers[position] = tensor
    idx_TK = shaped(10, 6, dtype=torch.int32)
    with pytest.raises(error, match=rf"^moe_gate_with_balance: {message}"):
        host_ops.moe_gate_with_balance_forward(
            shaped(10, 64), idx_TK, shaped(10, 6), tuple(buffers), **case.groups, **case.gate
        )
    with pytest.raises(error, match=rf"^moe_balance_loss: {message}"):
        host_ops.moe_balance_loss_forward(shaped(10, 64), idx_TK, tuple(buffers), **case.groups)


def test_what_the_kernels_cannot_do_is_refused(host_ops: ModuleType) -> None:
    wide = Case(num_experts=513, num_topk=1)
    with pytest.raises(ValueError, match=r"^moe_gate_with_balance: num_experts must be <= 512, got 513$"):
        fused(host_ops, wide, logits_of(wide))
    with pytest.raises(ValueError, match=r"^moe_balance_loss: num_experts must be <= 512, got 513$"):
        host_ops.moe_balance_loss_forward(
            shaped(10, 513), shaped(10, 1, dtype=torch.int32), buffers_of(host_ops, wide), **wide.groups
        )
    many = Case(num_topk=17)
    with pytest.raises(ValueError, match=r"^moe_gate_with_balance: num_topk must be <= 16, got 17$"):
        fused(host_ops, many, logits_of(many))
