"""The sm_90a products on a GPU, step by step: every tile with two stages alone, all stages, multicast, skew.

A tile's name may end in the step ("128x256/1" to "/4"), so that the first test to fail says which part of the
kernel is wrong. docs/grouped_gemm_sm90.md says what each step adds, and what to do when all of them hold.

A wrong count of bytes shows as a kernel that waits forever, so every check runs in another process, which is
ended at a limit.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from dscoder import ops
from dscoder.runtime import native
from dscoder.testing import gpu
from dscoder.testing.cases import generator, randn, routing
from dscoder.testing.compare import assert_close, assert_product, assert_same

pytestmark = pytest.mark.skipif(not gpu.has_hopper(), reason="needs a GPU of compute capability 9.0")

DTYPES = [torch.bfloat16, torch.float16]
STEPS = [1, 2, 3, 4]  # of the ladder
LARGE_TILES = ["64x256", "128x256"]
TILES = ["32x128", "64x128", *LARGE_TILES]
# Rows of each expert: none, one, about a multiple of a tile, rows of one expert alone, more tiles than SMs.
COUNTS = {
    "one row": [1],
    "one expert": [300],
    "few": [1, 0, 130, 17, 0, 64, 65, 129],
    "odd and even tiles": [128, 256, 384, 63, 127, 255],
    "half empty": [0, 77, 0, 40, 0, 200, 0, 3],
    "decode": [3, 0, 31, 8, 1, 33, 24, 5] * 4,
    "many": [2900, 0, 1, 640],
}
WIDTHS = [
    (336, 152),
    (8, 8),
    (256, 64),
    (520, 1000),
]  # N, K: tiles and blocks of the depth in part, and whole
GUARD_ROWS, ROWS_OF_NONE = 3, 9
LIMIT_S = 10.0  # of a check, which takes some milliseconds

Apart = Callable[..., None]


def ends_of(counts: Sequence[int]) -> Tensor:
    ends: Tensor = torch.tensor(counts, device=gpu.DEVICE).cumsum(0).to(torch.int32)
    return ends


def rows_of(rng: torch.Generator, counts: Sequence[int], width: int, dtype: torch.dtype) -> Tensor:
    """Rows of all experts, then NaNs in the rows of none."""
    rows = randn(rng, sum(counts) + ROWS_OF_NONE, width, dtype=dtype)
    rows[sum(counts) :] = torch.nan
    return rows


def weights(rng: torch.Generator, *shape: int, depth: int, dtype: torch.dtype) -> Tensor:
    return randn(rng, *shape).div(depth**0.5).to(dtype)


class Guarded:
    """A poisoned output between rows that nobody may write."""

    def __init__(self, num_rows: int, width: int, dtype: torch.dtype) -> None:
        self.memory = torch.full(
            (num_rows + 2 * GUARD_ROWS, width), torch.nan, dtype=dtype, device=gpu.DEVICE
        )
        self.rows = self.memory[GUARD_ROWS:-GUARD_ROWS]

    def check(self) -> None:
        """Nothing round it was written."""
        assert self.memory[:GUARD_ROWS].isnan().all()
        assert self.memory[-GUARD_ROWS:].isnan().all()


def products(x: Tensor, w_EKN: Tensor, counts: Sequence[int]) -> Tensor:
    """x[m] @ w[e] in float64, zeros for the rows of none."""
    *by_expert, of_none = torch.split(x.double(), [*counts, len(x) - sum(counts)])
    made = [rows @ w.double() for rows, w in zip(by_expert, w_EKN, strict=True)]
    return torch.cat([*made, of_none.new_zeros(len(of_none), w_EKN.shape[2])])


def check_product(
    name: str,
    tile: str,
    counts: Sequence[int],
    widths: tuple[int, int],
    dtype: torch.dtype,
    turned: bool,
) -> None:
    rng = generator(name, gpu.DEVICE)
    num_columns, depth = widths
    x = rows_of(rng, counts, depth, dtype)
    shape = (depth, num_columns) if turned else (num_columns, depth)
    w = weights(rng, len(counts), *shape, depth=depth, dtype=dtype)
    y = Guarded(len(x), num_columns, dtype)
    native._C.grouped_gemm_forward(x, w, y.rows, ends_of(counts), None, turned, "sm90", tile)
    assert_product(y.rows, products(x, w if turned else w.mT, counts))
    assert not y.rows[sum(counts) :].any()
    y.check()


@pytest.mark.parametrize("tile", ["32x128", "128x256"])
def test_a_map_whose_strides_do_not_ascend(tile: str, apart: Apart) -> None:
    """That of gate and up: cuda.h does not promise that the driver takes it (csrc/core/tensor_map.h)."""
    apart(check_swiglu, f"{tile}/1", [64], (128, 64), torch.bfloat16)


@pytest.mark.sanitize("memcheck", "synccheck")
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("step", STEPS)
def test_a_product_step_by_step(step: int, tile: str, apart: Apart) -> None:
    apart(check_product, f"{tile}/{step}", COUNTS["few"], (336, 152), torch.bfloat16, False)


@pytest.mark.sanitize("memcheck", "synccheck")
@pytest.mark.parametrize("tile", LARGE_TILES)
@pytest.mark.parametrize("step", STEPS)
def test_a_product_with_turned_weights_step_by_step(step: int, tile: str, apart: Apart) -> None:
    apart(check_product, f"{tile}/{step}", COUNTS["few"], (336, 152), torch.bfloat16, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("kind", COUNTS)
@pytest.mark.parametrize("tile", ["auto", *TILES])
def test_products(tile: str, kind: str, widths: tuple[int, int], dtype: torch.dtype, apart: Apart) -> None:
    apart(check_product, tile, COUNTS[kind], widths, dtype, False)
    if tile in ("auto", *LARGE_TILES):
        apart(check_product, tile, COUNTS[kind], widths, dtype, True)


def check_swiglu(
    name: str, tile: str, counts: Sequence[int], widths: tuple[int, int], dtype: torch.dtype
) -> None:
    rng = generator(name, gpu.DEVICE)
    width, depth = widths
    x = rows_of(rng, counts, depth, dtype)
    w = weights(rng, len(counts), 2 * width, depth, depth=depth, dtype=dtype)
    hidden, gate_up = Guarded(len(x), width, dtype), Guarded(len(x), 2 * width, dtype)
    native._C.grouped_swiglu_forward(x, w, hidden.rows, gate_up.rows, ends_of(counts), None, "sm90", tile)
    assert_product(gate_up.rows, products(x, w.mT, counts))
    gate, up = gate_up.rows.double().chunk(2, dim=1)
    assert_close(hidden.rows, silu(gate) * up)
    alone = Guarded(len(x), width, dtype)
    native._C.grouped_swiglu_forward(x, w, alone.rows, None, ends_of(counts), None, "sm90", tile)
    assert_same(alone.rows, hidden.rows)
    for output in (hidden, gate_up, alone):
        output.check()


@pytest.mark.sanitize("memcheck", "synccheck")
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("step", STEPS)
def test_swiglu_step_by_step(step: int, tile: str, apart: Apart) -> None:
    apart(check_swiglu, f"{tile}/{step}", COUNTS["few"], (168, 152), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("kind", COUNTS)
@pytest.mark.parametrize("tile", ["auto", *TILES])
def test_swiglu(tile: str, kind: str, widths: tuple[int, int], dtype: torch.dtype, apart: Apart) -> None:
    apart(check_swiglu, tile, COUNTS[kind], widths, dtype)


def check_swiglu_backward(
    name: str, tile: str, counts: Sequence[int], widths: tuple[int, int], dtype: torch.dtype
) -> None:
    rng = generator(name, gpu.DEVICE)
    width, depth = widths
    grad = rows_of(rng, counts, depth, dtype)
    w = weights(rng, len(counts), depth, width, depth=depth, dtype=dtype)
    gate_up = rows_of(rng, counts, 2 * width, dtype)
    got = Guarded(len(grad), 2 * width, dtype)
    native._C.grouped_swiglu_backward(grad, w, gate_up, got.rows, ends_of(counts), "sm90", tile)
    grad_hidden = products(grad, w, counts).to(dtype).double()[: sum(counts)]
    gate, up = gate_up[: sum(counts)].double().requires_grad_().chunk(2, dim=1)
    wanted = torch.autograd.grad(silu(gate) * up, (gate, up), grad_hidden)
    assert_close(got.rows[: sum(counts)], torch.cat(wanted, dim=1))
    assert not got.rows[sum(counts) :].any()
    got.check()


@pytest.mark.sanitize("memcheck", "synccheck")
@pytest.mark.parametrize("tile", LARGE_TILES)
@pytest.mark.parametrize("step", STEPS)
def test_swiglu_backward_step_by_step(step: int, tile: str, apart: Apart) -> None:
    apart(check_swiglu_backward, f"{tile}/{step}", COUNTS["few"], (168, 152), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("kind", COUNTS)
@pytest.mark.parametrize("tile", ["auto", *LARGE_TILES])
def test_swiglu_backward(
    tile: str, kind: str, widths: tuple[int, int], dtype: torch.dtype, apart: Apart
) -> None:
    apart(check_swiglu_backward, tile, COUNTS[kind], widths, dtype)


def check_weight_gradient(
    name: str, tile: str, counts: Sequence[int], widths: tuple[int, int], dtype: torch.dtype
) -> None:
    rng = generator(name, gpu.DEVICE)
    num_columns, depth = widths
    grad, x = (rows_of(rng, counts, width, dtype) for width in (num_columns, depth))
    pieces = [torch.split(rows[: sum(counts)].double(), list(counts)) for rows in (grad, x)]
    wanted = torch.stack([g.mT @ rows for g, rows in zip(*pieces, strict=True)])
    for out_dtype in (dtype, torch.float32):
        memory = Guarded(len(counts) * num_columns, depth, out_dtype)
        out = memory.rows.view(len(counts), num_columns, depth)
        native._C.grouped_gemm_weight_gradient(grad, x, out, ends_of(counts), None, False, "sm90", tile)
        assert_product(out, wanted)
        old = out.double()
        native._C.grouped_gemm_weight_gradient(grad, x, out, ends_of(counts), None, True, "sm90", tile)
        assert_close(out, old + wanted)
        memory.check()


@pytest.mark.sanitize("memcheck", "synccheck")
@pytest.mark.parametrize("step", STEPS)
def test_a_weight_gradient_step_by_step(step: int, apart: Apart) -> None:
    apart(check_weight_gradient, f"128x256/{step}", COUNTS["few"], (336, 152), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("kind", COUNTS)
def test_weight_gradients(kind: str, widths: tuple[int, int], dtype: torch.dtype, apart: Apart) -> None:
    apart(check_weight_gradient, "auto", COUNTS[kind], widths, dtype)


def check_same_bits(name: str, tile: str, step: str) -> None:
    """Twenty runs one behind the other: a race shows as a difference, in some of them."""
    rng = generator(name, gpu.DEVICE)
    counts, width, depth = COUNTS["many"], 2048, 1408
    x, grad = (rows_of(rng, counts, size, torch.bfloat16) for size in (depth, width))
    num_experts = len(counts)
    if step == "weight_gradient":
        outputs = [Guarded(num_experts * width, depth, torch.bfloat16) for _ in range(20)]
        for out in outputs:
            grad_w = out.rows.view(num_experts, width, depth)
            args = (grad, x, grad_w, ends_of(counts), None, False, "sm90", tile)
            native._C.grouped_gemm_weight_gradient(*args)
    elif step == "swiglu":
        w = weights(rng, num_experts, 2 * width, depth, depth=depth, dtype=torch.bfloat16)
        outputs = [Guarded(len(x), width, torch.bfloat16) for _ in range(20)]
        for out in outputs:
            native._C.grouped_swiglu_forward(x, w, out.rows, None, ends_of(counts), None, "sm90", tile)
    elif step == "swiglu_backward":
        w = weights(rng, num_experts, depth, width, depth=depth, dtype=torch.bfloat16)
        gate_up = rows_of(rng, counts, 2 * width, torch.bfloat16)
        outputs = [Guarded(len(x), 2 * width, torch.bfloat16) for _ in range(20)]
        for out in outputs:
            native._C.grouped_swiglu_backward(x, w, gate_up, out.rows, ends_of(counts), "sm90", tile)
    else:
        w = weights(rng, num_experts, width, depth, depth=depth, dtype=torch.bfloat16)
        outputs = [Guarded(len(x), width, torch.bfloat16) for _ in range(20)]
        for out in outputs:
            native._C.grouped_gemm_forward(x, w, out.rows, ends_of(counts), None, False, "sm90", tile)
    for out in outputs:
        assert_same(out.rows, outputs[0].rows)


@pytest.mark.parametrize(
    ("step", "tile"),
    [
        *(("forward", tile) for tile in TILES),
        *(("swiglu", tile) for tile in TILES),
        *(("swiglu_backward", tile) for tile in LARGE_TILES),
        ("weight_gradient", "auto"),
    ],
)
def test_the_same_bits_every_time(step: str, tile: str, apart: Apart) -> None:
    apart(check_same_bits, tile, step)


def check_refusal_of_named_rows(name: str) -> None:
    x = rows_of(generator(name, gpu.DEVICE), [4], 64, torch.bfloat16)
    w = x.new_ones(1, 64, 64)
    idx = torch.arange(4, dtype=torch.int32, device=gpu.DEVICE)
    y = x.new_empty(4, 64)
    with pytest.raises(ValueError, match=r"^grouped_gemm: arch sm90 reads rows where they lie, got row_idx"):
        native._C.grouped_gemm_forward(x, w, y, ends_of([4]), idx, False, "sm90", "auto")


def test_named_rows_are_refused(apart: Apart) -> None:
    apart(check_refusal_of_named_rows)


def product(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    return ops.grouped_gemm(x, w, offsets, arch="sm90" if x.is_cuda else "auto")


def check_op(name: str, num_rows: int) -> None:
    rng = generator(name)
    x, w = randn(rng, num_rows, 136), randn(rng, 4, 72, 136) / 136**0.5
    end = int(0.9 * num_rows)
    offsets = torch.tensor([end // 7, end // 7, end // 2, end], dtype=torch.int32)
    inputs = (x.bfloat16(), w.bfloat16(), offsets)
    step = gpu.forward_and_backward(product)
    gpu.assert_is_reference(step, *inputs)
    gpu.assert_replay_follows(step, inputs, (*inputs[:2], torch.full_like(offsets, end)))
    gpu.assert_never_waits(step, *inputs)
    gpu.assert_runs_on_the_callers_stream(step, *inputs)


@pytest.mark.parametrize("num_rows", [0, 1, 77, 700])
def test_the_op_and_its_gradients(num_rows: int, apart: Apart) -> None:
    apart(check_op, num_rows)


def layer(x: Tensor, gate_up: Tensor, down: Tensor, idx: Tensor) -> Tensor:
    handle = ops.moe_permute_maps(idx, num_experts=len(down))
    return ops.moe_experts(x, gate_up, down, handle, arch="sm90" if x.is_cuda else "auto")


def check_layer(name: str, num_tokens: int) -> None:
    rng = generator(name)
    idx = routing(rng, num_tokens=num_tokens, num_experts=5, num_topk=2, kind="skewed")
    gate_up, down = randn(rng, 5, 144, 136) / 136**0.5, randn(rng, 5, 136, 72) / 72**0.5
    inputs = (randn(rng, num_tokens, 136).bfloat16(), gate_up.bfloat16(), down.bfloat16(), idx)
    step = gpu.forward_and_backward(layer)
    gpu.assert_is_reference(step, *inputs)
    gpu.assert_never_waits(step, *inputs)


@pytest.mark.parametrize("num_tokens", [0, 1, 90, 701])
def test_the_expert_layer_and_its_gradients(num_tokens: int, apart: Apart) -> None:
    apart(check_layer, num_tokens)
