"""How results are compared: bitwise for integers and copies, here stated tolerances for sums.

The one place with tolerances. Two numbers per dtype: the largest elementwise error relative to the largest
wanted element, and the largest 1 - cosine, which sees a small error that all elements share.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_RELATIVE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
# Of a matrix product whose result is rounded once: 1 - 2<x, y> / (<x, x> + <y, y>), the measure of DeepGEMM.
_PRODUCT_DISTANCE = {torch.float32: 1e-10, torch.bfloat16: 1e-5, torch.float16: 1e-6}
_ONE_MINUS_COSINE = {torch.float64: 1e-12, torch.float32: 1e-8, torch.bfloat16: 1e-4, torch.float16: 1e-5}


def assert_same(actual: Tensor, wanted: Tensor) -> None:
    """Same shape, dtype and values, bit for bit; NaN equals NaN."""
    torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)


def assert_close(actual: Tensor, wanted: Tensor, *, dtype: torch.dtype | None = None) -> None:
    """Same shape, same places of NaN and infinities, and values within the tolerance of `dtype`.

    `dtype` is the coarsest dtype that the computation went through; default: that of `actual`.
    """
    assert actual.shape == wanted.shape, f"shape {tuple(actual.shape)}, wanted {tuple(wanted.shape)}"
    dtype = actual.dtype if dtype is None else dtype
    want = wanted.detach().double()
    got = actual.detach().to(want.device).double()
    is_finite = want.isfinite()
    assert_same(got.masked_fill(is_finite, 0.0), want.masked_fill(is_finite, 0.0))
    got, want = got[is_finite], want[is_finite]
    if not want.numel():
        return
    error = (got - want).abs().max().item()
    largest = want.abs().max().item()
    assert error <= _RELATIVE[dtype] * largest, (
        f"largest error {error:.3g} is {error / max(largest, 1e-300):.3g} of the largest element "
        f"{largest:.3g}, wanted <= {_RELATIVE[dtype]:.3g}"
    )
    if largest > 0:
        distance = 1 - torch.cosine_similarity(got, want, dim=0, eps=0).item()
        assert distance <= _ONE_MINUS_COSINE[dtype], (
            f"1 - cosine is {distance:.3g}, wanted <= {_ONE_MINUS_COSINE[dtype]:.3g}"
        )


def assert_product(actual: Tensor, wanted: Tensor) -> None:
    """`assert_close`, and the distance over all elements that a product rounded once keeps to."""
    assert_close(actual, wanted)
    got, want = actual.detach().double(), wanted.detach().double().to(actual.device)
    scale = (got.square() + want.square()).sum().item()
    distance = (got - want).square().sum().item() / scale if scale else 0.0
    assert distance <= _PRODUCT_DISTANCE[actual.dtype], (
        f"distance {distance:.3g}, wanted <= {_PRODUCT_DISTANCE[actual.dtype]:.3g}"
    )


def assert_gradients(function: Callable[..., Any], *inputs: Tensor) -> None:
    """The gradients of `function` at float64 `inputs` match finite differences."""
    inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
    assert all(x.dtype == torch.float64 for x in inputs), "finite differences need float64 inputs"
    torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-6, rtol=1e-5, nondet_tol=0.0)


def assert_op_registered(op: Any, args: Sequence[Any]) -> None:
    """`torch.library.opcheck` with all its tests: schema, autograd, fake, and aot with dynamic shapes."""
    torch.library.opcheck(op, tuple(args))


def assert_same_curve(
    actual: Sequence[Mapping[str, float]],
    wanted: Sequence[Mapping[str, float]],
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """The reports of two runs that differ in the order of sums alone: each figure of `wanted` is close.

    `dtype` is what the runs computed in.
    """
    assert [report["step"] for report in actual] == [report["step"] for report in wanted]
    for got, want in zip(actual, wanted, strict=True):
        for name, value in want.items():
            error = abs(got[name] - value)
            assert error <= _RELATIVE[dtype] * abs(value), (
                f"step {want['step']}: {name} must be {value:.9g}, got {got[name]:.9g}, "
                f"{error / max(abs(value), 1e-300):.3g} off, wanted <= {_RELATIVE[dtype]:.3g}"
            )
