"""The grouped products of sm_80, through their own bindings, on the host executor, against float64.

Outputs start out poisoned, with guards round them. Rows of no expert are NaN and their indices wild: the
kernels must not read them. Every tile is asked for by its name; the executor has three SMs, so that blocks
take several tiles.
"""

from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dscoder.testing import compare
from dscoder.testing.cases import randn
from dscoder.testing.examples import FIXED
from dscoder.testing.poison import WILD, assert_guards_whole, guarded

BF16, FP16 = torch.bfloat16, torch.float16
ALL_TILES = ["16x128", "64x128", "128x256"]
LARGE_TILES = ALL_TILES[1:]  # of the steps that come with many rows
GROUPS = (0, 1, 150, 0, 64, 37, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    counts: tuple[int, ...] = GROUPS
    num_unowned: int = 9
    num_columns: int = 136
    depth: int = 72
    dtype: torch.dtype = BF16
    tile: str = "auto"
    gathers: bool = False
    order: int = 0

    @property
    def num_owned(self) -> int:
        return sum(self.counts)

    @property
    def num_rows(self) -> int:
        return self.num_owned + self.num_unowned

    @property
    def num_experts(self) -> int:
        return len(self.counts)

    @property
    def offsets(self) -> Tensor:
        return torch.tensor(self.counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)

    @property
    def rng(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.order)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """What a kernel gets (x, row_idx), and the rows it means."""

    x: Tensor
    row_idx: Tensor | None
    meant: Tensor  # float64, those of experts alone


def rows_of(case: Case, rng: torch.Generator, width: int) -> Rows:
    """Rows in expert order, or a smaller x and an index into it; NaN where no expert's row comes from."""
    if not case.gathers:
        x = randn(rng, case.num_rows, width, dtype=case.dtype)
        x[case.num_owned :] = torch.nan
        return Rows(x=x, row_idx=None, meant=x[: case.num_owned].double())
    num_source_rows = max(1, case.num_rows // 3)
    x = randn(rng, num_source_rows, width, dtype=case.dtype)
    row_idx = torch.randint(0, num_source_rows, (case.num_rows,), generator=rng, dtype=torch.int32)
    meant = x[row_idx[: case.num_owned].long()].double()
    # Indices outside x stand for rows of zeros.
    for place, wild in zip(range(3, case.num_owned, 29), (-1, num_source_rows, WILD, -(2**31)), strict=False):
        row_idx[place] = wild
        meant[place] = 0
    row_idx[case.num_owned :] = WILD
    return Rows(x=x, row_idx=row_idx, meant=meant)


def product_of(case: Case, rows: Tensor, w_ENK: Tensor) -> Tensor:
    """In float64; zeros for rows of no expert."""
    parts = [x @ w.double().T for x, w in zip(torch.split(rows, list(case.counts)), w_ENK, strict=True)]
    return torch.cat([*parts, torch.zeros(case.num_unowned, w_ENK.shape[1], dtype=torch.float64)])


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


# ---- each step, its kernel against the reference ----


def forward(host_ops: ModuleType, case: Case, *, is_w_transposed: bool = False) -> Tensor:
    rng = case.rng
    rows = rows_of(case, rng, case.depth)
    w_ENK = randn(rng, case.num_experts, case.num_columns, case.depth, dtype=case.dtype)
    y_MN, memory = guarded(case.num_rows, case.num_columns, dtype=case.dtype)
    w = w_ENK.transpose(1, 2).contiguous() if is_w_transposed else w_ENK
    options = (is_w_transposed, "sm80", case.tile)
    host_ops.grouped_gemm_forward(rows.x, w, y_MN, case.offsets, rows.row_idx, *options)
    assert_guards_whole(memory)
    compare.assert_product(y_MN, product_of(case, rows.meant, w_ENK))
    assert not y_MN[case.num_owned :].any()
    return y_MN


def swiglu(host_ops: ModuleType, case: Case, *, keeps_gate_up: bool = True) -> Tensor:
    rng, width = case.rng, case.num_columns
    rows = rows_of(case, rng, case.depth)
    w_EFK = randn(rng, case.num_experts, 2 * width, case.depth, dtype=case.dtype) / case.depth**0.5
    hidden_MF, memory = guarded(case.num_rows, width, dtype=case.dtype)
    gate_up_MF, gate_up_memory = guarded(case.num_rows, 2 * width, dtype=case.dtype)
    kept = gate_up_MF if keeps_gate_up else None
    tensors = (rows.x, w_EFK, hidden_MF, kept, case.offsets, rows.row_idx)
    host_ops.grouped_swiglu_forward(*tensors, "sm80", case.tile)
    assert_guards_whole(memory, gate_up_memory)
    wanted = product_of(case, rows.meant, w_EFK)
    gate, up = torch.split(wanted.to(case.dtype).double(), width, dim=1)
    compare.assert_product(hidden_MF, silu(gate) * up)
    assert not hidden_MF[case.num_owned :].any()
    if keeps_gate_up:
        compare.assert_product(gate_up_MF, wanted)
        assert not gate_up_MF[case.num_owned :].any()
    else:
        assert gate_up_MF.isnan().all()
    return hidden_MF


def swiglu_backward(host_ops: ModuleType, case: Case) -> Tensor:
    rng, width = case.rng, case.num_columns
    grad_MD, gate_up_MF = (randn(rng, case.num_rows, n, dtype=case.dtype) for n in (case.depth, 2 * width))
    grad_MD[case.num_owned :] = torch.nan
    gate_up_MF[case.num_owned :] = torch.nan
    w_EDF = randn(rng, case.num_experts, case.depth, width, dtype=case.dtype)
    out_MF, memory = guarded(case.num_rows, 2 * width, dtype=case.dtype)
    host_ops.grouped_swiglu_backward(grad_MD, w_EDF, gate_up_MF, out_MF, case.offsets, "sm80", case.tile)
    assert_guards_whole(memory)
    leaf = gate_up_MF[: case.num_owned].double().requires_grad_()
    gate, up = torch.split(leaf, width, dim=1)
    grad_hidden = product_of(case, grad_MD[: case.num_owned].double(), w_EDF.transpose(1, 2))
    (silu(gate) * up).backward(grad_hidden[: case.num_owned].to(case.dtype).double())
    assert leaf.grad is not None
    compare.assert_product(out_MF[: case.num_owned], leaf.grad)
    assert not out_MF[case.num_owned :].any()
    return out_MF


def weight_gradient(
    host_ops: ModuleType, case: Case, *, dtype: torch.dtype = torch.float32, accumulates: bool = False
) -> Tensor:
    rng = case.rng
    rows = rows_of(case, rng, case.depth)
    grad_MN = randn(rng, case.num_rows, case.num_columns, dtype=case.dtype)
    grad_MN[case.num_owned :] = torch.nan
    out_ENK, memory = guarded(case.num_experts, case.num_columns, case.depth, dtype=dtype)
    wanted = torch.zeros(out_ENK.shape, dtype=torch.float64)
    if accumulates:
        out_ENK.copy_(randn(rng, *out_ENK.shape))
        wanted = out_ENK.double()
    tensors = (grad_MN, rows.x, out_ENK, case.offsets, rows.row_idx)
    host_ops.grouped_gemm_weight_gradient(*tensors, accumulates, "sm80", case.tile)
    assert_guards_whole(memory)
    grads = torch.split(grad_MN[: case.num_owned].double(), list(case.counts))
    for e, (grad, x) in enumerate(zip(grads, torch.split(rows.meant, list(case.counts)), strict=True)):
        wanted[e] += grad.T @ x
    compare.assert_product(out_ENK, wanted)
    is_empty = torch.tensor(case.counts) == 0
    if not accumulates:
        assert not out_ENK[is_empty].any()
    else:
        compare.assert_same(out_ENK[is_empty].double(), wanted[is_empty])
    return out_ENK


# ---- every tile, type and form ----


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("gathers", [False, True], ids=["in order", "gathered"])
@pytest.mark.parametrize("tile", ALL_TILES)
def test_rows_meet_the_weights_of_their_expert(
    host_ops: ModuleType, tile: str, gathers: bool, dtype: torch.dtype
) -> None:
    forward(host_ops, Case(tile=tile, gathers=gathers, dtype=dtype))


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("gathers", [False, True], ids=["in order", "gathered"])
@pytest.mark.parametrize("tile", LARGE_TILES)
def test_weights_may_lie_with_their_depth_outermost(
    host_ops: ModuleType, tile: str, gathers: bool, dtype: torch.dtype
) -> None:
    forward(host_ops, Case(tile=tile, gathers=gathers, dtype=dtype), is_w_transposed=True)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("gathers", [False, True], ids=["in order", "gathered"])
@pytest.mark.parametrize("tile", ALL_TILES)
def test_gate_and_up_meet_in_the_epilogue(
    host_ops: ModuleType, tile: str, gathers: bool, dtype: torch.dtype
) -> None:
    swiglu(host_ops, Case(tile=tile, gathers=gathers, dtype=dtype))
    swiglu(host_ops, Case(tile=tile, gathers=gathers, dtype=dtype), keeps_gate_up=False)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("tile", LARGE_TILES)
def test_the_gradients_of_gate_and_up(host_ops: ModuleType, tile: str, dtype: torch.dtype) -> None:
    swiglu_backward(host_ops, Case(tile=tile, dtype=dtype))


@pytest.mark.parametrize("accumulates", [False, True], ids=["stored", "added"])
@pytest.mark.parametrize(
    ("dtype", "result"), [(BF16, BF16), (BF16, torch.float32), (FP16, FP16), (FP16, torch.float32)]
)
@pytest.mark.parametrize("gathers", [False, True], ids=["in order", "gathered"])
@pytest.mark.parametrize("tile", LARGE_TILES)
def test_the_gradient_of_the_weights(
    host_ops: ModuleType, tile: str, gathers: bool, dtype: torch.dtype, result: torch.dtype, accumulates: bool
) -> None:
    case = Case(tile=tile, gathers=gathers, dtype=dtype)
    weight_gradient(host_ops, case, dtype=result, accumulates=accumulates)


# ---- sizes ----


@pytest.mark.parametrize("depth", [8, 16, 24, 64, 128, 136, 1408])
@pytest.mark.parametrize("tile", ALL_TILES)
def test_any_depth(host_ops: ModuleType, tile: str, depth: int) -> None:
    forward(host_ops, Case(tile=tile, depth=depth, counts=(17, 0, 5), num_columns=24))


@pytest.mark.parametrize("num_columns", [8, 120, 128, 264])
@pytest.mark.parametrize("step", [forward, swiglu, swiglu_backward, weight_gradient])
def test_any_number_of_columns(host_ops: ModuleType, step: object, num_columns: int) -> None:
    assert callable(step)
    for tile in LARGE_TILES:
        step(host_ops, Case(tile=tile, num_columns=num_columns, counts=(17, 0, 130)))


EDGES = {
    "no rows": Case(counts=(0, 0, 0), num_unowned=0),
    "rows of no expert": Case(counts=(0, 0), num_unowned=130),
    "one row": Case(counts=(0, 1), num_unowned=0),
    "one expert has all": Case(counts=(0, 0, 700, 0), num_unowned=0, num_columns=264),
    "many bands": Case(counts=(1200,), num_columns=24, depth=8),
    "one expert": Case(counts=(65,)),
    "512 experts": Case(counts=tuple(3 * (e % 37 == 0) for e in range(512)), num_columns=24, depth=8),
    "multiples of a tile": Case(counts=(128, 64, 256, 16), num_unowned=128),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("step", [forward, swiglu, swiglu_backward, weight_gradient])
def test_any_fall_of_rows(host_ops: ModuleType, step: object, edge: str) -> None:
    assert callable(step)
    for tile in LARGE_TILES:
        step(host_ops, replace(EDGES[edge], tile=tile))


@pytest.mark.parametrize("edge", EDGES)
def test_any_fall_of_rows_in_small_tiles(host_ops: ModuleType, edge: str) -> None:
    forward(host_ops, replace(EDGES[edge], tile="16x128"))
    swiglu(host_ops, replace(EDGES[edge], tile="16x128"))


@pytest.mark.parametrize("offsets", [[5, 3, 9], [-4, 20, WILD], [0, WILD, -(2**31)], [30, 30, 30]])
def test_wild_offsets_are_clamped(host_ops: ModuleType, offsets: list[int]) -> None:
    rng = torch.Generator().manual_seed(1)
    x, w = randn(rng, 20, 16, dtype=BF16), randn(rng, 3, 8, 16, dtype=BF16)
    outputs = []
    ends = torch.tensor(offsets, dtype=torch.int64).clamp(0, 20).cummax(0).values.int()
    for given_offsets in (torch.tensor(offsets, dtype=torch.int64).int(), ends):
        y, memory = guarded(20, 8, dtype=BF16)
        host_ops.grouped_gemm_forward(x, w, y, given_offsets, None, False, "sm80")
        assert_guards_whole(memory)
        outputs.append(y)
    compare.assert_same(*outputs)


def test_offsets_of_elements_are_64_bits_wide(host_ops: ModuleType) -> None:
    """Untouched memory costs nothing: x and w span more than 2^31 elements each."""
    depth, num_columns, num_experts = 4096, 2048, 300
    x, w = torch.empty(530_000, depth, dtype=BF16), torch.empty(num_experts, num_columns, depth, dtype=BF16)
    assert min(x.numel(), w.numel()) > 2**31
    rng = torch.Generator().manual_seed(2)
    x[-2:], w[-1, -8:] = randn(rng, 2, depth, dtype=BF16), randn(rng, 8, depth, dtype=BF16)
    w[-1, :-8] = 0
    row_idx = torch.tensor([len(x) - 2, len(x) - 1], dtype=torch.int32)
    offsets_E = torch.zeros(num_experts, dtype=torch.int32)
    offsets_E[-1] = 2
    y, memory = guarded(2, num_columns, dtype=BF16)
    host_ops.grouped_gemm_forward(x, w, y, offsets_E, row_idx, False, "sm80", "16x128")
    assert_guards_whole(memory)
    compare.assert_product(y[:, -8:], x[-2:].double() @ w[-1, -8:].double().T)
    assert not y[:, :-8].any()


@st.composite
def cases(draw: st.DrawFn) -> Case:
    count = st.one_of(st.just(0), st.just(1), st.integers(0, 40), st.sampled_from([63, 64, 65, 128, 129]))
    counts = tuple(draw(st.lists(count, min_size=1, max_size=9)))
    width = st.integers(1, 20).map(lambda n: 8 * n)
    return Case(
        counts=counts,
        num_unowned=draw(st.sampled_from([0, 1, 70])),
        num_columns=draw(width),
        depth=draw(width),
        dtype=draw(st.sampled_from([BF16, FP16])),
        tile=draw(st.sampled_from(["auto", *LARGE_TILES])),
        gathers=draw(st.booleans()),
        order=draw(st.integers(0, 2**32)),
    )


@settings(FIXED, max_examples=60)
@given(case=cases(), flag=st.booleans(), is_small=st.booleans())
def test_any_shape_agrees_with_the_reference(
    host_ops: ModuleType, host_kernels: ModuleType, case: Case, flag: bool, is_small: bool
) -> None:
    host_kernels.set_order(case.order)
    forward(host_ops, replace(case, tile="16x128") if is_small else case)
    forward(host_ops, case, is_w_transposed=True)
    swiglu(host_ops, replace(case, tile="16x128") if is_small else case, keeps_gate_up=flag)
    swiglu_backward(host_ops, case)
    dtype = torch.float32 if is_small else case.dtype
    weight_gradient(host_ops, case, dtype=dtype, accumulates=flag)


@pytest.mark.parametrize("step", [forward, swiglu, swiglu_backward, weight_gradient])
def test_the_order_of_threads_and_blocks_changes_no_bit(
    host_ops: ModuleType, host_kernels: ModuleType, step: object
) -> None:
    assert callable(step)
    case = Case(depth=200, gathers=step is weight_gradient)
    for tile in LARGE_TILES:
        results = []
        for order in range(6):
            host_kernels.set_order(order)
            results.append(step(host_ops, replace(case, tile=tile)))
        for result in results[1:]:
            compare.assert_same(result, results[0])
