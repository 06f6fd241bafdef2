"""The parts of the GPU harness that a CPU can run; tests/gpu uses the rest."""

import pytest
import torch
from torch import Tensor

from dscoder.testing import gpu
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
    with pytest.raises(ValueError, match=r"longer|shorter"):
        check([floats], [floats, ints])


def test_agreement_allows_rounding_but_not_another_dtype() -> None:
    wanted = torch.ones(4)
    assert_agrees([wanted + 1e-6], [wanted])
    with pytest.raises(AssertionError):
        assert_agrees([wanted.bfloat16()], [wanted])


class MadeUpMemory:
    """An allocator that gives freed blocks out again, cut to size; what it must get anew is clean."""

    def __init__(self) -> None:
        self.free: list[int] = []
        self.full = torch.full

    def poison(self, shape: tuple[int, ...], value: int, *, dtype: torch.dtype, device: str) -> Tensor:
        assert (value, dtype) == (0x7FFF, torch.int16)
        self.free.append(shape[0] * dtype.itemsize)
        return torch.empty(0)

    def rows(self, num_rows: int, width: int) -> Tensor:
        """Rows that a kernel forgot to write: what was poisoned, or zeros."""
        num_bytes = 4 * num_rows * width
        fitting = [size for size in self.free if size >= num_bytes]
        if not fitting:
            return torch.zeros(num_rows, width)
        self.free.remove(min(fitting))
        self.free.append(min(fitting) - num_bytes)
        return self.full((num_rows, width), torch.nan)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> MadeUpMemory:
    made_up = MadeUpMemory()
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu.torch, "full", made_up.poison)
    monkeypatch.setattr(gpu.torch.cuda, "empty_cache", made_up.free.clear)
    return made_up


@pytest.mark.parametrize("num_rows", [64, 100_000])
def test_a_row_that_no_kernel_wrote_is_seen_in_large_results_too(memory: MadeUpMemory, num_rows: int) -> None:
    is_reference = iter([True, False])

    def step(x: Tensor) -> tuple[Tensor, ...]:
        if next(is_reference):
            return tuple(torch.zeros(num_rows, 256) for _ in range(3))
        return tuple(memory.rows(num_rows, 256) for _ in range(3))

    with pytest.raises(AssertionError):
        gpu.assert_is_reference(step, torch.ones(1))


def test_a_row_that_no_kernel_wrote_is_seen_when_bits_are_compared(memory: MadeUpMemory) -> None:
    with pytest.raises(AssertionError):
        gpu.assert_same_bits_every_time(lambda _: (memory.rows(100_000, 256),), torch.ones(1))
