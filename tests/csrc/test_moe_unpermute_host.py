"""The moe_unpermute kernels, through their own bindings, on the host executor: the reference's answers.

Rows of nobody are NaN, as are weights of dropped choices; outputs start out poisoned, with guards round them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dscoder import ops
from dscoder.testing import compare
from dscoder.testing.cases import randn
from dscoder.testing.examples import FIXED
from dscoder.testing.poison import WILD, assert_guards_whole, guarded, poison_rows_from, with_strides

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    num_tokens: int = 5
    width: int = 8
    num_topk: int = 6
    dtype: torch.dtype = torch.bfloat16
    share_dropped: float = 0.2
    order: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensors:
    y_MD: Tensor
    weight_TK: Tensor
    handle: ops.PermuteHandle
    grad_TD: Tensor


def tensors_of(case: Case) -> Tensors:
    rng = torch.Generator().manual_seed(case.order)
    shape = (case.num_tokens, case.num_topk)
    idx_TK = torch.randint(0, 8, shape, generator=rng, dtype=torch.int32)
    idx_TK[torch.rand(shape, generator=rng) < case.share_dropped] = -1
    handle = ops.moe_permute_maps(idx_TK, num_experts=8)
    y_MD, _ = guarded(idx_TK.numel(), case.width, dtype=case.dtype)
    y_MD.copy_(poison_rows_from(randn(rng, *y_MD.shape), int(handle.offsets_E[-1])))
    grad_TD, _ = guarded(case.num_tokens, case.width, dtype=case.dtype)
    grad_TD.copy_(randn(rng, *grad_TD.shape))
    weight_TK = torch.rand(shape, generator=rng).masked_fill_(idx_TK < 0, torch.nan)
    return Tensors(y_MD=y_MD, weight_TK=weight_TK, handle=handle, grad_TD=grad_TD)


def forward(host_ops: ModuleType, t: Tensors) -> Tensor:
    out_TD, memory = guarded(*t.grad_TD.shape, dtype=t.y_MD.dtype)
    host_ops.moe_unpermute_forward(t.y_MD, t.weight_TK, t.handle.row_TK, out_TD)
    assert_guards_whole(memory)
    return out_TD


def backward(host_ops: ModuleType, t: Tensors) -> tuple[Tensor, Tensor]:
    grad_y, y_memory = guarded(*t.y_MD.shape, dtype=t.y_MD.dtype)
    grad_weight, weight_memory = guarded(*t.weight_TK.shape, dtype=torch.float32)
    host_ops.moe_unpermute_backward(
        t.grad_TD, t.y_MD, t.weight_TK, t.handle.row_TK, t.handle.offsets_E, grad_y, grad_weight
    )
    assert_guards_whole(y_memory, weight_memory)
    return grad_y, grad_weight


def check(host_ops: ModuleType, host_kernels: ModuleType, case: Case) -> None:
    host_kernels.set_order(case.order)
    t = tensors_of(case)
    leaves = (t.y_MD.detach().requires_grad_(), t.weight_TK.detach().requires_grad_())
    wanted = ops.moe_unpermute(*leaves, t.handle)
    compare.assert_close(forward(host_ops, t), wanted)

    wanted_y, wanted_weight = torch.autograd.grad(wanted, leaves, t.grad_TD)
    grad_y, grad_weight = backward(host_ops, t)
    compare.assert_same(grad_y, wanted_y)  # one product in float32, rounded once: no freedom
    compare.assert_close(grad_weight, wanted_weight)


# ---- the shapes that the kernels treat differently ----

# Words of 16 bytes a row: 320 threads side by side, and in the backward pass whole warps.
WIDTHS = [8, 24, 136, 512, 1024, 2048, 2568, 5120]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_any_width(host_ops: ModuleType, host_kernels: ModuleType, width: int, dtype: torch.dtype) -> None:
    check(host_ops, host_kernels, Case(width=width, dtype=dtype, order=width))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_topk", range(1, 17))
def test_any_number_of_experts_a_token(
    host_ops: ModuleType, host_kernels: ModuleType, num_topk: int, dtype: torch.dtype
) -> None:
    check(host_ops, host_kernels, Case(num_topk=num_topk, num_tokens=19, dtype=dtype, order=num_topk))


@pytest.mark.parametrize("share_dropped", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_tokens", [0, 1, 131])
def test_any_number_of_tokens(
    host_ops: ModuleType, host_kernels: ModuleType, num_tokens: int, share_dropped: float
) -> None:
    case = Case(num_tokens=num_tokens, share_dropped=share_dropped, order=num_tokens)
    check(host_ops, host_kernels, case)


@pytest.mark.parametrize("case", [Case(num_tokens=0), Case(num_topk=0), Case(width=0)], ids=str)
def test_nothing_to_sum(host_ops: ModuleType, host_kernels: ModuleType, case: Case) -> None:
    check(host_ops, host_kernels, case)


# ---- any shape, any order ----


@st.composite
def cases(draw: st.DrawFn) -> Case:
    return Case(
        num_tokens=draw(st.sampled_from([0, 1, 2, 3, 7, 31, 67])),
        width=8 * draw(st.integers(1, 60)),
        num_topk=draw(st.integers(1, 16)),
        dtype=draw(st.sampled_from(DTYPES)),
        share_dropped=draw(st.sampled_from([0.0, 0.1, 0.9, 1.0])),
        order=draw(st.integers(0, 2**32)),
    )


@settings(FIXED, max_examples=50)
@given(case=cases())
def test_any_shape_agrees_with_the_reference(
    host_ops: ModuleType, host_kernels: ModuleType, case: Case
) -> None:
    check(host_ops, host_kernels, case)


@pytest.mark.parametrize("width", [24, 2568])
def test_the_order_of_threads_and_blocks_changes_nothing(
    host_ops: ModuleType, host_kernels: ModuleType, width: int
) -> None:
    t = tensors_of(Case(num_tokens=11, width=width, num_topk=7))
    host_kernels.set_order(0)
    wanted = (forward(host_ops, t), *backward(host_ops, t))
    for order in range(1, 12):
        host_kernels.set_order(order)
        for got, want in zip((forward(host_ops, t), *backward(host_ops, t)), wanted, strict=True):
            compare.assert_same(got, want)


def test_the_sum_runs_over_the_choices_in_order(host_ops: ModuleType) -> None:
    """In float32 1 + 2^-24 is 1, but 2^-24 + 2^-24 + 1 is more than 1."""
    y_MD = torch.tensor([1.0, 2.0**-24, 2.0**-24])[:, None].repeat(3, 8)
    row_TK = torch.tensor([[0, 1, 2], [1, 2, 0], [2, 0, 1]], dtype=torch.int32)
    out_TD = torch.full((3, 8), torch.nan)
    host_ops.moe_unpermute_forward(y_MD, torch.ones(3, 3), row_TK, out_TD)
    assert out_TD[:, 0].tolist() == [1.0, 1.0 + 2.0**-23, 1.0]


def test_a_row_outside_the_tensor_is_neither_read_nor_written(host_ops: ModuleType) -> None:
    t = tensors_of(Case(num_tokens=4, num_topk=3, share_dropped=0.0))
    wild_TK = torch.where(t.handle.row_TK % 3 == 0, WILD, t.handle.row_TK)
    wild = Tensors(
        y_MD=t.y_MD,
        weight_TK=t.weight_TK,
        handle=replace(t.handle, offsets_E=torch.full((2,), -WILD, dtype=torch.int32), row_TK=wild_TK),
        grad_TD=t.grad_TD,
    )
    weight_TK = t.weight_TK.masked_fill(wild_TK == WILD, 0.0)
    compare.assert_close(forward(host_ops, wild), ops.moe_unpermute(t.y_MD, weight_TK, t.handle))
    _, grad_weight = backward(host_ops, wild)
    assert grad_weight[wild_TK == WILD].tolist() == [0.0] * 4


# ---- the op on the kernels ----

KERNEL_OPS = ("moe_unpermute", "moe_unpermute_backward")


def forward_and_backward(
    y_MD: Tensor, weight_TK: Tensor, handle: ops.PermuteHandle, grad_TD: Tensor
) -> tuple[Tensor, ...]:
    leaves = (y_MD.detach().requires_grad_(), weight_TK.detach().requires_grad_())
    out_TD = ops.moe_unpermute(*leaves, handle)
    return out_TD.detach(), *torch.autograd.grad(out_TD, leaves, grad_TD)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("num_tokens", [0, 37])
def test_the_op_and_its_gradients_run_on_the_kernels(
    use_kernels: Callable[..., None], num_tokens: int, dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    t = tensors_of(Case(num_tokens=num_tokens, dtype=dtype))
    inputs = (t.y_MD, t.weight_TK.to(weight_dtype), t.handle, t.grad_TD)
    wanted = forward_and_backward(*inputs)
    use_kernels(*KERNEL_OPS)
    for got, want in zip(forward_and_backward(*inputs), wanted, strict=True):
        assert got.dtype == want.dtype
        compare.assert_close(got, want, dtype=torch.float32 if want.dtype == torch.float64 else None)


def test_strides_change_nothing(use_kernels: Callable[..., None]) -> None:
    t = tensors_of(Case(num_tokens=37))
    handle = replace(
        t.handle, offsets_E=with_strides(t.handle.offsets_E), row_TK=with_strides(t.handle.row_TK)
    )
    use_kernels(*KERNEL_OPS)
    wanted = forward_and_backward(t.y_MD, t.weight_TK, t.handle, t.grad_TD)
    crooked = forward_and_backward(
        with_strides(t.y_MD), with_strides(t.weight_TK), handle, with_strides(t.grad_TD)
    )
    for got, want in zip(crooked, wanted, strict=True):
        compare.assert_same(got, want)


# ---- a wrong argument is an error, and nothing is launched ----


def arguments(**fields: Tensor) -> dict[str, Tensor]:
    return {
        **{"grad": torch.zeros(4, 8), "y": torch.zeros(8, 8), "weight": torch.zeros(4, 2)},
        **{"row": torch.zeros(4, 2, dtype=torch.int32), "offsets": torch.zeros(3, dtype=torch.int32)},
        **{"grad_y": torch.full((8, 8), torch.nan), "grad_weight": torch.zeros(4, 2), **fields},
    }


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"y": torch.zeros(8, 8).int()}, TypeError, "y must be float32, bfloat16 or float16, got int32"),
        ({"y": torch.zeros(7, 8)}, ValueError, r"y must have shape \[8, any\], got \[7, 8\]"),
        ({"grad": torch.zeros(4, 16)}, ValueError, r"grad must have shape \[4, 8\], got \[4, 16\]"),
        ({"grad": torch.zeros(4, 8).half()}, TypeError, "grad must be float32, got float16"),
        ({"weight": torch.zeros(4, 2).double()}, TypeError, "weight must be float32, got float64"),
        ({"row": torch.zeros(4, 2).long()}, TypeError, "row must be int32, got int64"),
        (
            {"offsets": torch.zeros(0, dtype=torch.int32)},
            ValueError,
            "offsets must have at least 1 element, got 0",
        ),
        ({"grad_y": torch.zeros(8, 16)}, ValueError, r"grad_y must have shape \[8, 8\], got \[8, 16\]"),
        (
            {"grad_weight": torch.zeros(4, 3)},
            ValueError,
            r"grad_weight must have shape \[4, 2\], got \[4, 3\]",
        ),
        ({"grad": torch.zeros(33)[1:].view(4, 8)}, ValueError, "grad must begin on a boundary of 16 bytes"),
    ],
)
def test_a_wrong_argument_is_named(
    host_ops: ModuleType, fields: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    given_arguments = arguments(**fields)
    with pytest.raises(error, match=f"^moe_unpermute backward: {message}"):
        host_ops.moe_unpermute_backward(**given_arguments)
    if "grad_y" not in fields:
        assert bool(given_arguments["grad_y"].isnan().all())


@pytest.mark.parametrize(
    ("width", "num_topk", "message"),
    [
        (12, 2, "y in bfloat16 must be a multiple of 8 wide, got 12"),
        (8, 17, "idx must have at most 16 columns, got 17"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(
    host_ops: ModuleType, width: int, num_topk: int, message: str
) -> None:
    y, out = torch.zeros(4 * num_topk, width).bfloat16(), torch.zeros(4, width).bfloat16()
    row, weight = torch.zeros(4, num_topk, dtype=torch.int32), torch.zeros(4, num_topk)
    with pytest.raises(ValueError, match=f"^moe_unpermute: {message}$"):
        host_ops.moe_unpermute_forward(y, weight, row, out)
