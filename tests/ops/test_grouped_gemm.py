from typing import Any

import pytest
import torch
from torch import Tensor

from dscoder import ops
from dscoder.ops.grouped_gemm import (
    product_by_expert,
    product_in_pieces,
    stored_weights,
)
from dscoder.runtime import native
from dscoder.testing.cases import randn
from dscoder.testing.compare import assert_close, assert_gradients, assert_op_registered, assert_same
from dscoder.testing.poison import poison_rows_from, with_strides

COUNTS = {  # rows of each expert, then rows of none
    "uneven": ([3, 0, 7, 1, 0], 0),
    "rows_of_none": ([0, 5, 2, 0, 1], 4),
    "all_to_one": ([0, 0, 11, 0, 0], 0),
    "all_dropped": ([0, 0, 0, 0, 0], 6),
    "no_rows": ([0, 0, 0, 0, 0], 0),
}


def offsets_of(counts: list[int]) -> Tensor:
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def by_expert(x: Tensor, w: Tensor, counts: list[int]) -> Tensor:
    """The definition, in float64."""
    y = torch.zeros(x.shape[0], w.shape[1], dtype=torch.float64)
    expert_of_row = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    for row, expert in enumerate(expert_of_row.tolist()):
        y[row] = w[expert].double() @ x[row].double()
    return y


@pytest.mark.parametrize("case", COUNTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_row_meets_its_expert(case: str, dtype: torch.dtype, rng: torch.Generator) -> None:
    counts, num_spare = COUNTS[case]
    x = randn(rng, sum(counts) + num_spare, 7, dtype=dtype)
    w = randn(rng, 5, 3, 7, dtype=dtype)
    y = ops.grouped_gemm(x, w, offsets_of(counts))
    assert y.dtype == dtype
    assert_close(y, by_expert(x, w, counts))


@pytest.mark.parametrize("case", COUNTS)
def test_gradients_match_finite_differences(case: str, rng: torch.Generator) -> None:
    counts, num_spare = COUNTS[case]
    x = randn(rng, sum(counts) + num_spare, 3, dtype=torch.float64)
    w = randn(rng, 5, 2, 3, dtype=torch.float64)
    assert_gradients(lambda x, w: ops.grouped_gemm(x, w, offsets_of(counts)), x, w)


def test_an_expert_without_rows_gets_a_zero_weight_gradient(rng: torch.Generator) -> None:
    x, w = randn(rng, 4, 3), randn(rng, 3, 2, 3).requires_grad_()
    y = ops.grouped_gemm(x, w, offsets_of([4, 0, 0]))
    (grad,) = torch.autograd.grad(y.sum(), w)
    assert_same(grad[1:], torch.zeros(2, 2, 3))
    assert_close(grad[0], x.sum(dim=0).expand(2, 3))


def test_rows_of_no_expert_are_not_read_and_come_out_zero(rng: torch.Generator) -> None:
    x = poison_rows_from(randn(rng, 9, 3), 6).requires_grad_()
    w = randn(rng, 2, 4, 3).requires_grad_()
    y = ops.grouped_gemm(x, w, offsets_of([2, 4]))
    assert_same(y[6:], torch.zeros(3, 4))
    assert y.isfinite().all()
    grad_x, grad_w = torch.autograd.grad(y, (x, w), poison_rows_from(torch.ones(9, 4), 6))
    assert grad_w.isfinite().all()
    assert_same(grad_x[6:], torch.zeros(3, 3))


def test_nan_stays_with_its_row_and_its_expert(rng: torch.Generator) -> None:
    x, w = randn(rng, 4, 3), randn(rng, 2, 5, 3).requires_grad_()
    x[1, 0] = torch.nan
    y = ops.grouped_gemm(x, w, offsets_of([2, 2]))
    assert y[1].isnan().all()
    assert y[[0, 2, 3]].isfinite().all()
    (grad,) = torch.autograd.grad(y[[0, 2, 3]].sum(), w)
    assert grad[1].isfinite().all()


@pytest.mark.parametrize("offsets", [[-9, 2, 3], [2, 99, 2**31 - 1], [3, 1, 2]])
def test_wild_offsets_stay_within_the_rows(offsets: list[int], rng: torch.Generator) -> None:
    y = ops.grouped_gemm(randn(rng, 3, 2), randn(rng, 3, 4, 2), torch.tensor(offsets, dtype=torch.int32))
    assert y.isfinite().all()


def test_strides_change_nothing(rng: torch.Generator) -> None:
    x, w, offsets = randn(rng, 8, 3), randn(rng, 2, 4, 3), offsets_of([3, 5])
    wanted = ops.grouped_gemm(x, w, offsets)
    assert_close(ops.grouped_gemm(with_strides(x), with_strides(w), with_strides(offsets)), wanted)
    transposed = w.transpose(1, 2).contiguous().transpose(1, 2)
    assert_close(ops.grouped_gemm(x, transposed, offsets), wanted)


@pytest.mark.parametrize("case", ["uneven", "rows_of_none", "no_rows"])
def test_it_is_a_proper_op(case: str, rng: torch.Generator) -> None:
    counts, num_spare = COUNTS[case]
    num_rows, offsets = sum(counts) + num_spare, offsets_of(counts)
    x, w = randn(rng, num_rows, 3).requires_grad_(), randn(rng, 5, 4, 3).requires_grad_()
    assert_op_registered(torch.ops.dscoder.grouped_gemm.default, (x, w, offsets, "auto"))
    grad, rows = randn(rng, num_rows, 4), x.detach()
    assert_op_registered(
        torch.ops.dscoder.grouped_gemm_weight_gradient.default, (grad, rows, offsets, None, "auto")
    )
    assert_op_registered(
        torch.ops.dscoder.grouped_gemm_weight_gradient_into.default,
        (torch.ones(5, 4, 3), grad, rows, offsets, None, True, "auto"),
    )


def test_it_compiles_whole_through_an_expert_layer(rng: torch.Generator) -> None:
    """The whole path of a token: gate, permute, product, back."""
    x = randn(rng, 9, 6).requires_grad_()
    gate, w = randn(rng, 4, 6), randn(rng, 4, 6, 6).requires_grad_()

    def layer(x: Tensor, w: Tensor) -> Tensor:
        idx, weight = ops.moe_gate(x @ gate.t(), num_topk=2)
        rows, handle = ops.moe_permute(x, idx, num_experts=4)
        return ops.moe_unpermute(ops.grouped_gemm(rows, w, handle.offsets_E), weight, handle)

    actual = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)(x, w)
    wanted = layer(x, w)
    assert_same(actual, wanted)
    for got, want in zip(
        torch.autograd.grad(actual.sum(), (x, w)), torch.autograd.grad(wanted.sum(), (x, w)), strict=True
    ):
        assert_same(got, want)


def test_only_what_a_gradient_needs_is_kept(rng: torch.Generator) -> None:
    x, w, offsets = randn(rng, 4, 3), randn(rng, 2, 5, 3), offsets_of([1, 3])
    for frozen, trained in ((x, w), (w, x)):
        trained.requires_grad_()
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            ops.grouped_gemm(x, w, offsets)
        assert [t.data_ptr() for t in kept] == [frozen.data_ptr(), offsets.data_ptr()]
        trained.requires_grad_(False)


def test_a_gradient_of_the_gradient_is_refused_by_name(rng: torch.Generator) -> None:
    x, w = randn(rng, 4, 3).requires_grad_(), randn(rng, 2, 5, 3)
    y = ops.grouped_gemm(x, w, offsets_of([1, 3]))
    with pytest.raises(RuntimeError, match=r"^grouped_gemm: the gradient must not be differentiated again"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


# ---- the weight gradient by itself ----


def gradient_by_expert(grad: Tensor, x: Tensor, counts: list[int]) -> Tensor:
    """The definition, in float64."""
    out = torch.zeros(len(counts), grad.shape[1], x.shape[1], dtype=torch.float64)
    expert_of_row = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    for row, expert in enumerate(expert_of_row.tolist()):
        out[expert] += torch.outer(grad[row].double(), x[row].double())
    return out


@pytest.mark.parametrize("case", COUNTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_weight_gradient_comes_in_the_inputs_dtype_or_wider(
    case: str, dtype: torch.dtype, rng: torch.Generator
) -> None:
    counts, num_spare = COUNTS[case]
    grad = poison_rows_from(randn(rng, sum(counts) + num_spare, 4, dtype=dtype), sum(counts))
    x = poison_rows_from(randn(rng, sum(counts) + num_spare, 3, dtype=dtype), sum(counts))
    wanted = gradient_by_expert(grad, x, counts)
    got = ops.grouped_gemm_weight_gradient(grad, x, offsets_of(counts))
    assert got.dtype == dtype
    assert_close(got, wanted)
    if dtype == torch.bfloat16:
        wide = ops.grouped_gemm_weight_gradient(grad, x, offsets_of(counts), dtype=torch.float32)
        assert wide.dtype == torch.float32
        assert_close(wide, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_gradient_is_added_to_what_is_there_or_replaces_it(
    dtype: torch.dtype, rng: torch.Generator
) -> None:
    counts = [3, 0, 2]
    grad, x, before = randn(rng, 5, 4, dtype=dtype), randn(rng, 5, 3, dtype=dtype), randn(rng, 3, 4, 3)
    wanted = gradient_by_expert(grad, x, counts)
    out = before.clone()
    assert ops.grouped_gemm_weight_gradient(grad, x, offsets_of(counts), out=out, accumulate=True) is out
    assert_close(out, before + wanted)
    assert_same(out[1], before[1])
    out.fill_(torch.nan)
    ops.grouped_gemm_weight_gradient(grad, x, offsets_of(counts), out=out)
    assert_close(out, wanted)


def test_the_weight_gradient_compiles_in_place(rng: torch.Generator) -> None:
    grad, x, offsets = randn(rng, 5, 4), randn(rng, 5, 3), offsets_of([2, 3])

    def add_twice(out: Tensor) -> Tensor:
        for _ in range(2):
            ops.grouped_gemm_weight_gradient(grad, x, offsets, out=out, accumulate=True)
        return out + 1

    eager, compiled = torch.zeros(2, 2, 4, 3).unbind()
    wanted = add_twice(eager)
    assert_same(torch.compile(add_twice, fullgraph=True, backend="aot_eager")(compiled), wanted)
    assert_same(compiled, eager)


X, W, OFFSETS = torch.zeros(4, 3), torch.zeros(2, 5, 3), torch.zeros(2, dtype=torch.int32)
GRAD, OUT = torch.zeros(4, 5), torch.zeros(2, 5, 3)
HALVES = {"grad": GRAD.bfloat16(), "x": X.bfloat16()}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"grad": torch.zeros(4, 5).int()}, TypeError, "grad must be float32 or .*, got int32"),
        ({"x": torch.zeros(4, 3).half()}, TypeError, "x must be float32, got float16"),
        ({"x": torch.zeros(3, 3)}, ValueError, r"x must have shape \(4, 3\), got \(3, 3\)"),
        ({"offsets": torch.zeros(2)}, TypeError, "offsets must be int32, got float32"),
        ({"x": torch.zeros(4, 3, device="meta")}, ValueError, "x must be on cpu like grad, got meta"),
        ({"dtype": torch.bfloat16}, TypeError, "dtype must be float32, got bfloat16"),
        ({"out": OUT.double()}, TypeError, "out must be float32, got float64"),
        ({"out": OUT.double(), "dtype": torch.float64}, TypeError, "out must be float32, got float64"),
        ({**HALVES, "out": OUT, "dtype": torch.bfloat16}, TypeError, "out must be bfloat16, got float32"),
        (
            {"out": torch.zeros(2, 5, 3, requires_grad=True)},
            ValueError,
            "out must not require a gradient, got requires_grad=True",
        ),
        ({"out": OUT[:1]}, ValueError, r"out must have shape \(2, 5, 3\), got \(1, 5, 3\)"),
        ({"out": OUT.to("meta")}, ValueError, "out must be on cpu like grad, got meta"),
        (
            {"out": torch.zeros(2, 3, 5).mT},
            ValueError,
            r"out must be contiguous, got strides \(15, 1, 5\)",
        ),
        ({"accumulate": True}, ValueError, "accumulate needs out, got accumulate=True and out=None"),
        ({"arch": "sm80"}, ValueError, "arch must be auto or reference on cpu, got sm80"),
    ],
)
def test_wrong_arguments_of_the_weight_gradient_are_named(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"grad": GRAD, "x": X, "offsets": OFFSETS, **changed}
    tensors = [arguments.pop(name) for name in ("grad", "x", "offsets")]
    with pytest.raises(error, match=f"^grouped_gemm_weight_gradient: {message}$"):
        ops.grouped_gemm_weight_gradient(*tensors, **arguments)


# ---- on a GPU: what kernels cannot do, and where they are chosen ----


@pytest.mark.parametrize(
    "offsets", [[-9, 2, 3], [2, 99, 2**31 - 1], [3, 1, 2], [0, 0, 7], [0, 0, 0], [5, 5, 7]]
)
@pytest.mark.parametrize("num_rows", [0, 1, 7, 16])
def test_pieces_of_equal_size_are_the_reference(
    num_rows: int, offsets: list[int], rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU runs in float32 and at odd widths, without the host knowing an offset."""
    x, w, grad = randn(rng, num_rows, 3), randn(rng, 3, 4, 3), randn(rng, num_rows, 4)
    ends = torch.tensor(offsets, dtype=torch.int32)
    num_used = min(max(*offsets, 0), num_rows)
    x, grad = poison_rows_from(x, num_used), poison_rows_from(grad, num_used)
    assert_close(product_in_pieces(x, w, ends), ops.grouped_gemm(x, w, ends))
    for accumulate in (False, True):
        got, wanted = torch.ones(2, *w.shape).unbind()
        key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        monkeypatch.setattr(native._C, "has_cuda", True)
        args = (grad, x, ends, None, accumulate, "auto")
        torch.ops.dscoder.grouped_gemm_weight_gradient_into.default.redispatch(key, got, *args)
        ops.grouped_gemm_weight_gradient(grad, x, ends, out=wanted, accumulate=accumulate)
        assert_close(got, wanted)


def test_weights_are_copied_only_where_they_lie_in_neither_form(rng: torch.Generator) -> None:
    w = randn(rng, 2, 8, 16)
    assert stored_weights(w)[0].data_ptr() == stored_weights(w.mT)[0].data_ptr() == w.data_ptr()
    assert [is_transposed for _, is_transposed in (stored_weights(w), stored_weights(w.mT))] == [False, True]
    copy, is_transposed = stored_weights(with_strides(w))
    assert not is_transposed
    assert_same(copy, w)


@pytest.mark.parametrize(
    ("x", "w", "offsets", "error", "message"),
    [
        (X.int(), W, OFFSETS, TypeError, "x must be float32 or .*, got int32"),
        (X[0], W, OFFSETS, ValueError, r"x must have 2 dimensions, got shape \(3,\)"),
        (X, W.half(), OFFSETS, TypeError, "w must be float32, got float16"),
        (X, W[0], OFFSETS, ValueError, r"w must have 3 dimensions, got shape \(5, 3\)"),
        (X, torch.zeros(2, 5, 4), OFFSETS, ValueError, r"w must have shape \(2, 5, 3\), got \(2, 5, 4\)"),
        (X, W, OFFSETS.long(), TypeError, "offsets must be int32, got int64"),
        (X, W, OFFSETS[:1], ValueError, r"offsets must have shape \(2,\), got \(1,\)"),
        (X, W, OFFSETS[None], ValueError, r"offsets must have 1 dimensions, got shape \(1, 2\)"),
        (X, W.to("meta"), OFFSETS, ValueError, "w must be on cpu like x, got meta"),
    ],
)
def test_wrong_arguments_are_named(
    x: Tensor, w: Tensor, offsets: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^grouped_gemm: {message}$"):
        ops.grouped_gemm(x, w, offsets)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("sm70", "arch must be one of auto, sm80, sm90, reference, got 'sm70'"),
        ("sm80", "arch must be auto or reference on cpu, got sm80"),
        ("sm90", "arch must be auto or reference on cpu, got sm90"),
    ],
)
def test_an_arch_that_cannot_be_had_is_named(arch: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^grouped_gemm: {message}$"):
        ops.grouped_gemm(X, W, OFFSETS, arch=arch)


@pytest.mark.parametrize("arch", ["auto", "reference"])
def test_a_cpu_runs_the_reference(arch: str, rng: torch.Generator) -> None:
    x, w = randn(rng, 4, 3), randn(rng, 2, 5, 3)
    assert_same(
        ops.grouped_gemm(x, w, offsets_of([1, 3]), arch=arch), product_by_expert(x, w, offsets_of([1, 3]))
    )
