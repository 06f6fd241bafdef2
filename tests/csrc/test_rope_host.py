"""The rope kernels, through their own bindings, on the host executor: the reference's answers.

Outputs start out poisoned, with guards round them; what lies between strided heads is NaN.
"""

from collections.abc import Callable
from dataclasses import dataclass
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
from dscoder.testing.poison import WILD, assert_guards_whole, guarded, with_strides

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUM_POSITIONS = 37


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    num_tokens: int = 5
    num_q_heads: int = 3
    num_k_heads: int = 1
    width: int = 16
    interleaved: bool = True
    inverse: bool = False
    dtype: torch.dtype = torch.bfloat16
    order: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensors:
    q_THr: Tensor
    k_TGr: Tensor
    cos_Lf: Tensor
    sin_Lf: Tensor
    positions_T: Tensor

    def all(self) -> tuple[Tensor, ...]:
        return self.q_THr, self.k_TGr, self.cos_Lf, self.sin_Lf, self.positions_T


def tensors_of(case: Case) -> Tensors:
    """Slices of one projection, NaN on both sides of them."""
    rng = torch.Generator().manual_seed(case.order)
    num_heads = case.num_q_heads + case.num_k_heads
    projection, _ = guarded(case.num_tokens, num_heads + 2, case.width + 8, dtype=case.dtype)
    heads = projection[:, 1:-1, 8:]
    heads.copy_(randn(rng, *heads.shape))
    angle = randn(rng, NUM_POSITIONS, case.width // 2)
    return Tensors(
        q_THr=heads[:, : case.num_q_heads],
        k_TGr=heads[:, case.num_q_heads :],
        cos_Lf=angle.cos(),
        sin_Lf=angle.sin(),
        positions_T=torch.randint(NUM_POSITIONS, (case.num_tokens,), generator=rng),
    )


def turned(host_ops: ModuleType, t: Tensors, case: Case) -> tuple[Tensor, Tensor]:
    q, q_memory = guarded(*t.q_THr.shape, dtype=case.dtype)
    k, k_memory = guarded(*t.k_TGr.shape, dtype=case.dtype)
    host_ops.rope_forward(*t.all(), q, k, case.interleaved, case.inverse)
    assert_guards_whole(q_memory, k_memory)
    return q, k


def check(host_ops: ModuleType, host_kernels: ModuleType, case: Case) -> None:
    host_kernels.set_order(case.order)
    t = tensors_of(case)
    wanted = torch.ops.dscoder.rope.default(*t.all(), case.interleaved, case.inverse)
    for got, want in zip(turned(host_ops, t, case), wanted, strict=True):
        compare.assert_close(got, want)


# ---- the shapes that the kernels treat differently ----


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 64, 128])
def test_any_width(
    host_ops: ModuleType,
    host_kernels: ModuleType,
    width: int,
    dtype: torch.dtype,
    interleaved: bool,
    inverse: bool,
) -> None:
    case = Case(width=width, dtype=dtype, interleaved=interleaved, inverse=inverse, order=width)
    check(host_ops, host_kernels, case)


# A block turns 512 units; 17 heads of 8 are 136 a token, 129 of them 1032.
@pytest.mark.parametrize("num_q_heads", [0, 1, 16, 128])
@pytest.mark.parametrize("num_tokens", [0, 1, 4, 67])
def test_any_number_of_heads_and_tokens(
    host_ops: ModuleType, host_kernels: ModuleType, num_tokens: int, num_q_heads: int
) -> None:
    case = Case(num_tokens=num_tokens, num_q_heads=num_q_heads, width=64, order=num_tokens)
    check(host_ops, host_kernels, case)


@pytest.mark.parametrize("case", [Case(width=0), Case(num_k_heads=0), Case(num_q_heads=0, num_k_heads=0)])
def test_nothing_to_turn(host_ops: ModuleType, host_kernels: ModuleType, case: Case) -> None:
    check(host_ops, host_kernels, case)


# ---- any shape, any order ----


@st.composite
def cases(draw: st.DrawFn) -> Case:
    return Case(
        num_tokens=draw(st.sampled_from([0, 1, 2, 3, 7, 31, 67])),
        num_q_heads=draw(st.integers(0, 9)),
        num_k_heads=draw(st.integers(0, 3)),
        width=16 * draw(st.integers(1, 9)),
        interleaved=draw(st.booleans()),
        inverse=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        order=draw(st.integers(0, 2**32)),
    )


@settings(FIXED, max_examples=50)
@given(case=cases())
def test_any_shape_agrees_with_the_reference(
    host_ops: ModuleType, host_kernels: ModuleType, case: Case
) -> None:
    check(host_ops, host_kernels, case)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_order_of_threads_and_blocks_changes_nothing(
    host_ops: ModuleType, host_kernels: ModuleType, interleaved: bool
) -> None:
    case = Case(num_tokens=41, num_q_heads=9, width=32, interleaved=interleaved)
    t = tensors_of(case)
    host_kernels.set_order(0)
    wanted = turned(host_ops, t, case)
    for order in range(1, 8):
        host_kernels.set_order(order)
        for got, want in zip(turned(host_ops, t, case), wanted, strict=True):
            compare.assert_same(got, want)


@pytest.mark.parametrize("position", [-1, NUM_POSITIONS, WILD, -(2**62), 2**62])
def test_a_position_outside_the_tables_makes_its_token_nan(host_ops: ModuleType, position: int) -> None:
    case = Case(num_tokens=3)
    t = tensors_of(case)
    wanted = turned(host_ops, t, case)
    t.positions_T[1] = position
    for got, want in zip(turned(host_ops, t, case), wanted, strict=True):
        assert got[1].isnan().all()
        compare.assert_same(got[::2], want[::2])


# ---- the op on the kernels ----


def forward_and_backward(t: tuple[Tensor, ...], *, interleaved: bool) -> tuple[Tensor, ...]:
    leaves = tuple(x.detach().requires_grad_() for x in t[:2])
    out = ops.rope(*leaves, *t[2:], interleaved=interleaved)
    grads = [torch.arange(x.numel()).remainder(17).div(16).view(x.shape).to(x.dtype) for x in out]
    return *(x.detach() for x in out), *torch.autograd.grad(out, leaves, grads)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("width", [6, 8, 16, 64])
def test_the_op_and_its_gradients_run_on_the_kernels(
    use_kernels: Callable[..., None], width: int, dtype: torch.dtype, interleaved: bool
) -> None:
    """Widths that are no whole words, and float64, run the reference there, too."""
    t = tensors_of(Case(num_tokens=37, width=width, dtype=dtype)).all()
    wanted = forward_and_backward(t, interleaved=interleaved)
    use_kernels("rope")
    for got, want in zip(forward_and_backward(t, interleaved=interleaved), wanted, strict=True):
        assert got.dtype == want.dtype
        compare.assert_close(got, want)


def test_the_op_takes_any_strides_and_tables(use_kernels: Callable[..., None]) -> None:
    q, k, cos, sin, positions = tensors_of(Case(num_tokens=7, dtype=torch.float32)).all()
    use_kernels("rope")
    wanted = ops.rope(q, k, cos, sin, positions)
    crooked = [with_strides(x) for x in (q, k, cos.double(), sin.double(), positions.int())]
    off_by_one = torch.cat([q.new_zeros(1), q.flatten()])[1:].view(q.shape)
    for got in (ops.rope(*crooked), ops.rope(off_by_one, k, cos, sin, positions)):
        compare.assert_same(got[0], wanted[0])
        compare.assert_same(got[1], wanted[1])


# ---- a wrong argument is an error, and nothing is launched ----


def arguments(**fields: Tensor) -> dict[str, Tensor | bool]:
    return {
        **{"q": torch.zeros(3, 2, 16), "k": torch.zeros(3, 1, 16), "cos": torch.zeros(5, 8)},
        **{"sin": torch.zeros(5, 8), "positions": torch.zeros(3, dtype=torch.int64)},
        **{"q_out": torch.full((3, 2, 16), torch.nan), "k_out": torch.zeros(3, 1, 16)},
        **{"interleaved": True, "inverse": False, **fields},
    }


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"q": torch.zeros(3, 2, 16).int()}, TypeError, "q must be float32, bfloat16 or float16, got int32"),
        (
            {"q": torch.zeros(3, 2, 32)[..., ::2]},
            ValueError,
            r"q must be contiguous in its last 1 dimensions, got shape \[3, 2, 16\] with strides",
        ),
        ({"k": torch.zeros(3, 1, 8)}, ValueError, r"k must have shape \[3, any, 16\], got \[3, 1, 8\]"),
        ({"k": torch.zeros(3, 1, 16).half()}, TypeError, "k must be float32, got float16"),
        ({"cos": torch.zeros(5, 16)}, ValueError, r"cos must have shape \[any, 8\], got \[5, 16\]"),
        ({"cos": torch.zeros(5, 8).double()}, TypeError, "cos must be float32, got float64"),
        ({"sin": torch.zeros(4, 8)}, ValueError, r"sin must have shape \[5, 8\], got \[4, 8\]"),
        ({"positions": torch.zeros(3).int()}, TypeError, "positions must be int64, got int32"),
        ({"positions": torch.zeros(2).long()}, ValueError, r"positions must have shape \[3\], got \[2\]"),
        ({"q_out": torch.zeros(3, 1, 16)}, ValueError, r"q_out must have shape \[3, 2, 16\], got"),
        ({"k_out": torch.zeros(3, 2, 16)}, ValueError, r"k_out must have shape \[3, 1, 16\], got"),
        (
            {"q": torch.zeros(98)[2:].view(3, 2, 16)},
            ValueError,
            "q must begin on a boundary of 16 bytes, got one 8 bytes past it",
        ),
        (
            {"q": torch.zeros(3, 2, 18)[..., :16]},
            ValueError,
            "q in float32 must have rows a multiple of 4 apart, got 18",
        ),
    ],
)
def test_a_wrong_argument_is_named(
    host_ops: ModuleType, fields: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    given_arguments = arguments(**fields)
    with pytest.raises(error, match=f"^rope: {message}"):
        host_ops.rope_forward(**given_arguments)
    if "q_out" not in fields:
        assert bool(given_arguments["q_out"].isnan().all())  # type: ignore[union-attr]


@pytest.mark.parametrize(("width", "interleaved", "wanted"), [(12, True, 8), (24, False, 16)])
def test_a_width_of_no_whole_words_is_refused(
    host_ops: ModuleType, width: int, interleaved: bool, wanted: int
) -> None:
    case = Case(width=width, interleaved=interleaved)
    with pytest.raises(
        ValueError, match=f"^rope: q in bfloat16 must be a multiple of {wanted} wide, got {width}$"
    ):
        turned(host_ops, tensors_of(case), case)


def test_more_heads_than_the_division_is_exact_for_are_refused(host_ops: ModuleType) -> None:
    case = Case(num_tokens=1, num_q_heads=32768, width=8)
    with pytest.raises(
        ValueError, match=r"^rope: a token must have at most 32768 units of 16 bytes, got 32769$"
    ):
        turned(host_ops, tensors_of(case), case)
