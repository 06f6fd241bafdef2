"""How the bindings read tensors (csrc/bind/tensor.h), through moe_gate on the host executor."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from dscoder.testing.compare import assert_same

LOGITS = [[0.0, 3.0, 1.0, 2.0], [5.0, 4.0, 5.0, 6.0]]
WANTED = [[1, 3], [3, 0]]


class Tagged(Tensor):
    """A tensor class that the extension has never heard of."""


def best_two(host_ops: ModuleType, logits: Tensor) -> list[list[int]]:
    idx = torch.full((len(logits), 2), -1, dtype=torch.int32)
    weight = torch.empty(len(logits), 2)
    host_ops.moe_gate_forward(logits, idx, weight, 1, 1, 1.0, False)
    return idx.tolist()


def test_a_view_starts_where_it_starts(host_ops: ModuleType) -> None:
    memory = torch.full((3, 4), float("nan"))
    memory[1:] = torch.tensor(LOGITS)
    assert best_two(host_ops, memory[1:]) == WANTED


@pytest.mark.parametrize("kind", [torch.nn.Parameter, lambda logits: logits.as_subclass(Tagged)])
def test_a_subclass_of_tensor_is_a_tensor(host_ops: ModuleType, kind: type[Tensor]) -> None:
    for _ in range(2):  # found, then remembered
        assert best_two(host_ops, kind(torch.tensor(LOGITS))) == WANTED


def test_more_tensor_types_than_are_remembered(host_ops: ModuleType) -> None:
    for number in range(20):
        kind = type(f"Tagged{number}", (Tensor,), {})
        assert best_two(host_ops, torch.tensor(LOGITS).as_subclass(kind)) == WANTED


def test_strides_of_single_rows_do_not_matter(host_ops: ModuleType) -> None:
    row = torch.tensor(LOGITS)[:1].as_strided((1, 4), (999, 1))
    assert best_two(host_ops, row) == WANTED[:1]


def test_a_launch_that_fails_names_its_op(host_kernels: ModuleType) -> None:
    x = torch.zeros(64)
    with pytest.raises(RuntimeError, match=r"^some_op: host executor: launch: the block has 1025 threads"):
        host_kernels.run_fault_of("some_op", "too_many_threads", x)


def test_no_tokens_touch_nothing(host_ops: ModuleType) -> None:
    assert best_two(host_ops, torch.empty(0, 4)) == []


@pytest.mark.parametrize(
    ("shape", "strides", "text"),
    [
        ((2, 4), (1, 2), r"got shape \[2, 4\] with strides \[1, 2\]$"),
        ((2, 4), (0, 1), r"got shape \[2, 4\] with strides \[0, 1\]$"),
        ((2, 2), (4, 1), r"got shape \[2, 2\] with strides \[4, 1\]$"),
    ],
)
def test_strides_that_skip_or_repeat_are_refused(
    host_ops: ModuleType, shape: tuple[int, int], strides: tuple[int, int], text: str
) -> None:
    with pytest.raises(ValueError, match=rf"^moe_gate: logits must be contiguous, {text}"):
        best_two(host_ops, torch.tensor(LOGITS).as_strided(shape, strides))


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float64, "float64"),
        (torch.bfloat16, "bfloat16"),
        (torch.int8, "int8"),
        (torch.uint8, "uint8"),
        (torch.bool, "bool"),
        (torch.complex64, "complex64"),
    ],
)
def test_a_dtype_is_called_by_its_name(host_ops: ModuleType, dtype: torch.dtype, name: str) -> None:
    with pytest.raises(TypeError, match=f"^moe_gate: logits must be float32, got {name}$"):
        best_two(host_ops, torch.zeros(2, 4, dtype=dtype))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("idx", r"^moe_gate backward: idx must have shape \[2, any\], got \[3, 2\]$"),
        ("grad_weight", r"^moe_gate backward: grad_weight must have shape \[2, 2\], got \[3, 2\]$"),
        ("grad_logits", r"^moe_gate backward: grad_logits must have shape \[2, 4\], got \[3, 4\]$"),
    ],
)
def test_each_shape_of_the_backward_call_is_checked(
    host_ops: ModuleType, argument: str, message: str
) -> None:
    arguments = {
        "logits": torch.tensor(LOGITS),
        "idx": torch.tensor(WANTED, dtype=torch.int32),
        "grad_weight": torch.ones(2, 2),
        "grad_logits": torch.full((2, 4), 7.0),
    }
    wrong = arguments[argument]
    arguments[argument] = torch.cat([wrong, wrong[:1]])
    with pytest.raises(ValueError, match=message):
        host_ops.moe_gate_backward(**arguments, scale=1.0, renormalize=False)
    if argument != "grad_logits":
        assert_same(arguments["grad_logits"], torch.full((2, 4), 7.0))
