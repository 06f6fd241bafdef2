"""SwiGLU's epilogues at the ends of the number line, and what the bindings of the grouped products refuse."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

BF16, FP16 = torch.bfloat16, torch.float16
GATES = {
    BF16: [-1e30, -1e4, -128.0, -100.0, -88.5, -87.0, -20.0, -1.0, -0.0, 0.0, 1e-30, 1.0, 20.0, 100.0, 1e30],
    FP16: [-65504.0, -128.0, -100.0, -88.5, -20.0, -1.0, -0.0, 0.0, 6e-8, 1.0, 20.0, 100.0, 65504.0],
}


def gates_and_ups(dtype: torch.dtype) -> Tensor:
    """[M, 16]: the gates in eight columns each, then ups of 1."""
    gate_M1 = torch.tensor(GATES[dtype], dtype=torch.float64).to(dtype)[:, None]
    return torch.cat([gate_M1.expand(-1, 8), torch.ones(len(gate_M1), 8, dtype=dtype)], dim=1)


def one_hot(num_rows: int, dtype: torch.dtype) -> Tensor:
    """Rows that pick the first of eight."""
    return torch.eye(8, dtype=dtype)[:1].expand(num_rows, -1).contiguous()


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_silu_is_right_for_every_gate(host_ops: ModuleType, dtype: torch.dtype) -> None:
    gate_up = gates_and_ups(dtype)
    num_rows = len(gate_up)
    # Each row is an expert of its own, whose weights hold its gate and up in the first of eight columns.
    w = torch.zeros(num_rows, 16, 8, dtype=dtype)
    w[:, :, 0] = gate_up
    hidden = torch.full((num_rows, 8), torch.nan, dtype=dtype)
    offsets = torch.arange(1, num_rows + 1, dtype=torch.int32)
    host_ops.grouped_swiglu_forward(one_hot(num_rows, dtype), w, hidden, None, offsets, None, "sm80")
    gate = gate_up[:, :8].double()
    wanted = (gate * torch.sigmoid(gate)).to(dtype)
    torch.testing.assert_close(hidden, wanted, rtol=1e-2, atol=1e-36)
    assert bool(hidden[gate < 0].signbit().all())  # down to -0


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_the_gradient_is_finite_for_every_gate(host_ops: ModuleType, dtype: torch.dtype) -> None:
    gate_up = gates_and_ups(dtype)
    num_rows = len(gate_up)
    w = torch.zeros(1, 8, 8, dtype=dtype)
    w[0, 0] = 1
    out = torch.full_like(gate_up, torch.nan)
    offsets = torch.tensor([num_rows], dtype=torch.int32)
    host_ops.grouped_swiglu_backward(one_hot(num_rows, dtype), w, gate_up, out, offsets, "sm80")
    gate = gate_up[:, :8].double()
    sigmoid = torch.sigmoid(gate)
    slope = sigmoid + gate * sigmoid * (1 - sigmoid)
    torch.testing.assert_close(out, torch.cat([slope, gate * sigmoid], dim=1).to(dtype), rtol=1e-2, atol=1e-5)


# ---- a wrong argument is an error, and nothing is launched ----


def arguments() -> dict[str, object]:
    return {
        "x": torch.zeros(5, 16, dtype=BF16),
        "w": torch.zeros(3, 8, 16, dtype=BF16),
        "y": torch.zeros(5, 8, dtype=BF16),
        "offsets": torch.zeros(3, dtype=torch.int32),
        "row_idx": None,
        "is_w_transposed": False,
        "arch": "sm80",
    }


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"x": torch.zeros(5, 16)}, TypeError, "x must be bfloat16 or float16, got float32"),
        ({"w": torch.zeros(3, 8, 16, dtype=FP16)}, TypeError, "w must be bfloat16, got float16"),
        ({"w": torch.zeros(3, 16, 8, dtype=BF16)}, ValueError, r"w must have shape \[3, 8, 16\]"),
        ({"is_w_transposed": True}, ValueError, r"w must have shape \[3, 16, 8\]"),
        ({"y": torch.zeros(4, 8, dtype=BF16)}, ValueError, "y must have shape"),
        ({"offsets": torch.zeros(2, dtype=torch.int32)}, ValueError, "w must have shape"),
        ({"offsets": torch.zeros(3)}, TypeError, "offsets must be int32, got float32"),
        ({"offsets": torch.zeros(513, dtype=torch.int32)}, ValueError, "at most 512 elements, got 513"),
        ({"row_idx": torch.zeros(4, dtype=torch.int32)}, ValueError, "y must have shape"),
        ({"row_idx": torch.zeros(5, dtype=torch.int64)}, TypeError, "row_idx must be int32, got int64"),
        (
            {"x": torch.zeros(81, dtype=BF16)[1:].view(5, 16)},
            ValueError,
            "x must start at a multiple of 16 bytes, is 2 past one",
        ),
        (
            {"x": torch.zeros(5, 12, dtype=BF16), "w": torch.zeros(3, 8, 12, dtype=BF16)},
            ValueError,
            "the depth must be a multiple of 8, got 12",
        ),
        ({"arch": "sm70"}, ValueError, "arch must be auto, sm80 or sm90, got sm70"),
        ({"tile": "1x1"}, ValueError, "there is no tile of 1x1 for this step"),
    ],
)
def test_a_wrong_argument_is_named(
    host_ops: ModuleType, fields: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"grouped_gemm: .*{message}"):
        host_ops.grouped_gemm_forward(**{**arguments(), **fields})


def test_the_gradients_have_no_tile_for_decoding(host_ops: ModuleType) -> None:
    w = torch.zeros(3, 16, 8, dtype=BF16)
    with pytest.raises(ValueError, match="there is no tile of 16x128"):
        host_ops.grouped_gemm_forward(**{**arguments(), "w": w, "is_w_transposed": True, "tile": "16x128"})


def test_a_weight_gradient_is_of_the_elements_type_or_float32(host_ops: ModuleType) -> None:
    grad, x = torch.zeros(5, 8, dtype=BF16), torch.zeros(5, 16, dtype=BF16)
    out, offsets = torch.zeros(3, 8, 16, dtype=FP16), torch.zeros(3, dtype=torch.int32)
    with pytest.raises(TypeError, match="grad_w must be bfloat16, got float16"):
        host_ops.grouped_gemm_weight_gradient(grad, x, out, offsets, None, False, "sm80")
