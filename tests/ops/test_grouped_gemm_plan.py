"""Which kernels a grouped product gets, and what they want: known without a GPU."""

from typing import Any

import pytest
import torch

from dscoder import ops
from dscoder.ops.grouped_gemm_plan import KERNEL_EXPERTS, kernel_refusal, runs_reference, size_refusal

SIZES = {"num_rows": 49152, "num_experts": 64, "num_columns": 2816, "depth": 2048}
A100, H200 = (8, 0, 108), (9, 0, 132)
STEPS = ["forward", "input_gradient", "weight_gradient", "swiglu", "swiglu_backward"]


@pytest.mark.parametrize("gpu", [A100, H200])
@pytest.mark.parametrize("step", STEPS)
def test_the_plan_of_a_call_is_told_without_a_gpu(step: str, gpu: tuple[int, int, int]) -> None:
    plan = ops.grouped_gemm_plan(step, **SIZES, gpu=gpu)
    assert plan["arch"] == "sm80" or gpu == H200
    assert 1 <= int(plan["blocks"]) <= gpu[2] * int(plan["blocks_per_sm"])
    assert ops.grouped_gemm_plan(step, **SIZES, gpu=gpu, arch="sm80")["arch"] == "sm80"


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({"arch": "reference"}, "arch"),
        ({"dtype": torch.float32}, "x of bfloat16 or float16, got float32"),
        ({"num_columns": 2815}, "N to be a positive multiple of 8, got 2815"),
        ({"num_experts": 513}, "1 to 512 experts, got 513"),
        ({"gpu": (7, 5, 40)}, "compute capability 8.x or 9.0, got 7.5"),
        ({"gpu": (9, 1, 132)}, "compute capability 8.x or 9.0, got 9.1"),
        ({"gpu": (10, 0, 148)}, "compute capability 8.x or 9.0, got 10.0"),
        ({"gpu": (12, 0, 188)}, "compute capability 8.x or 9.0, got 12.0"),
    ],
)
def test_the_plan_says_why_the_reference_runs(changed: dict[str, Any], wanted: str) -> None:
    plan = ops.grouped_gemm_plan("forward", **{**SIZES, "gpu": H200, **changed})
    assert plan == {"arch": "reference", "wanted": wanted}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"arch": "sm70"}, "grouped_gemm_plan: arch must be one of auto, sm80, sm90, reference, got 'sm70'"),
        ({"arch": "sm80", "depth": 7}, "grouped_gemm_plan: arch sm80 wants K to be a positive .*, got 7"),
        ({"step": "backward"}, "grouped_gemm_plan: step must be forward, .*, got backward"),
        ({"arch": "sm80", "gpu": (7, 5, 40)}, "grouped_gemm_plan: arch sm80 wants compute .*, got 7.5"),
        ({"arch": "sm90", "gpu": (10, 0, 148)}, "grouped_gemm_plan: arch sm90 wants compute .*, got 10.0"),
        ({"num_rows": -1}, "grouped_gemm: sizes must be >= 0, got -1 rows, .*"),
    ],
)
def test_wrong_arguments_of_the_plan_are_named(changed: dict[str, Any], message: str) -> None:
    arguments = {"step": "forward", **SIZES, "gpu": H200, **changed}
    with pytest.raises(ValueError, match=f"^{message}$"):
        ops.grouped_gemm_plan(arguments.pop("step"), **arguments)


# ---- what a call is refused ----


@pytest.mark.parametrize(
    ("dtype", "num_experts", "widths", "wanted"),
    [
        (torch.bfloat16, 64, {"N": 2816, "K": 2048}, None),
        (torch.float16, KERNEL_EXPERTS, {"N": 8, "K": 8}, None),
        (torch.float32, 64, {"N": 8, "K": 8}, "x of bfloat16 or float16, got float32"),
        (torch.float64, 64, {"N": 8, "K": 8}, "x of bfloat16 or float16, got float64"),
        (torch.bfloat16, KERNEL_EXPERTS + 1, {"N": 8, "K": 8}, "1 to 512 experts, got 513"),
        (torch.bfloat16, 0, {"N": 8, "K": 8}, "1 to 512 experts, got 0"),
        (torch.bfloat16, 64, {"N": 12, "K": 8}, "N to be a positive multiple of 8, got 12"),
        (torch.bfloat16, 64, {"N": 8, "K": 0}, "K to be a positive multiple of 8, got 0"),
    ],
)
def test_kernels_refuse_what_they_cannot_do(
    dtype: torch.dtype, num_experts: int, widths: dict[str, int], wanted: str | None
) -> None:
    assert size_refusal(dtype, num_experts, **widths) == wanted


@pytest.mark.parametrize(
    ("capability", "wanted"),
    [((8, 0), None), ((8, 9), None), ((9, 0), None), ((12, 0), "compute capability 8.x or 9.0, got 12.0")],
)
def test_a_gpu_that_kernels_do_not_know_runs_the_reference(
    capability: tuple[int, int], wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def capability_of(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return capability

    class OnGpu:
        """What is asked of a tensor."""

        dtype = torch.bfloat16
        device = torch.device("cuda", 10 * capability[0] + capability[1])  # of this case alone

    monkeypatch.setattr(torch.cuda, "get_device_capability", capability_of)
    x: Any = OnGpu()
    assert kernel_refusal(x, 64, N=8, K=8) == wanted
    assert runs_reference("auto", x, 64, N=8, K=8) == (wanted is not None)
    assert not runs_reference("sm80", x, 64, N=8, K=8)
    assert asked == [OnGpu.device], "a call asks the driver once"


def test_the_choice_is_a_constant_to_tracing() -> None:
    def choose(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if runs_reference("auto", x, 64, N=8, K=8) else x - 1

    traced = torch.compile(choose, fullgraph=True, backend="eager")
    assert traced(torch.ones(1, dtype=torch.bfloat16)).tolist() == [0.0]
    assert traced(torch.ones(1)).tolist() == [2.0]
