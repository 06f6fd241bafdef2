"""The parts of the GPU harness that a CPU can run; tests/gpu uses the rest."""

import pytest
import torch
from torch import Tensor

from dscoder.testing.gpu import assert_agrees, assert_all_same, forward_and_backward


def scaled(x: Tensor, factor: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
    return x * factor, idx + 1


def test_a_step_returns_outputs_then_gradients_of_floating_inputs() -> None:
    x, factor, idx = torch.ones(3), torch.full((3,), 2.0), torch.zeros(3, dtype=torch.int32)
    y, next_idx, grad_x, grad_factor = forward_and_backward(scaled)(x, factor, idx)
    assert y.tolist() == [2.0, 2.0, 2.0]
    assert next_idx.tolist() == [1, 1, 1]
    assert grad_factor.tolist() == [-1.0, -0.875, -0.75]
    assert grad_x.tolist() == [-2.0, -1.75, -1.5]
    assert not x.requires_grad


def test_a_step_of_no_rows_has_gradients_too() -> None:
    y, grad = forward_and_backward(lambda x: x * 2)(torch.zeros(0, 4))
    assert y.shape == grad.shape == (0, 4)


@pytest.mark.parametrize("check", [assert_agrees, assert_all_same])
def test_a_wrong_integer_or_a_missing_tensor_is_seen(check) -> None:
    floats, ints = torch.ones(4), torch.arange(4)
    check([floats, ints], [floats, ints])
    with pytest.raises(AssertionError):
        check([floats, ints], [floats, ints + 1])
    with pytest.raises(AssertionError):
        check([floats], [floats + 1])
    with pytest.raises(ValueError, match="longer|shorter"):
        check([floats], [floats, ints])


def test_agreement_allows_rounding_but_not_another_dtype() -> None:
    wanted = torch.ones(4)
    assert_agrees([wanted + 1e-6], [wanted])
    with pytest.raises(AssertionError):
        assert_agrees([wanted.bfloat16()], [wanted])
