"""moe_gate on a GPU: the kernels give the reference's answer, and keep out of the host's way."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dscoder import ops
from dscoder.runtime import native
from dscoder.testing import gpu
from dscoder.testing.cases import randn
from dscoder.testing.compare import assert_op_registered, assert_same

NAN, INF = float("nan"), float("inf")
SHAPES = [  # E, K, groups, kept
    (64, 6, 1, 1),  # V2-Lite
    (160, 6, 8, 3),  # V2
    (160, 6, 8, 4),
    (160, 16, 8, 1),
    (160, 6, 1, 1),
    (64, 6, 8, 3),
    (256, 8, 8, 4),
    (512, 16, 512, 100),
    (500, 16, 5, 2),
    (33, 16, 1, 1),
    (13, 13, 1, 1),
    (1, 1, 1, 1),
]
V2 = {"num_topk": 6, "num_groups": 8, "num_groups_kept": 3, "scale": 16.0}


def gate(**options: int | float | bool) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return lambda logits_TE: ops.moe_gate(logits_TE, **options)


V2_STEP = gpu.forward_and_backward(gate(**V2))


def check(logits: Tensor, **options: int | float | bool) -> None:
    step = gpu.forward_and_backward(gate(**options)) if logits.isfinite().all() else gate(**options)
    gpu.assert_is_reference(step, logits)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 17, 4099])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_reference(
    shape: tuple[int, int, int, int], num_tokens: int, renormalize: bool, rng: torch.Generator
) -> None:
    num_experts, num_topk, num_groups, num_groups_kept = shape
    check(
        3 * randn(rng, num_tokens, num_experts),
        num_topk=num_topk,
        num_groups=num_groups,
        num_groups_kept=num_groups_kept,
        scale=16.0,
        renormalize=renormalize,
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_ties_and_signed_zeros_go_to_the_smaller_index(
    shape: tuple[int, int, int, int], rng: torch.Generator
) -> None:
    num_experts, num_topk, num_groups, num_groups_kept = shape
    logits = randn(rng, 257, num_experts).round() * torch.tensor(-1.0)  # holds -0.0 and 0.0
    check(logits, num_topk=num_topk, num_groups=num_groups, num_groups_kept=num_groups_kept)


@pytest.mark.parametrize("shape", SHAPES)
def test_wild_values_give_the_references_indices(
    shape: tuple[int, int, int, int], rng: torch.Generator
) -> None:
    num_experts, num_topk, num_groups, num_groups_kept = shape
    logits = randn(rng, 257, num_experts)
    chance = torch.rand(logits.shape, generator=rng)
    logits[chance < 0.6] = -INF
    logits[chance < 0.1] = INF
    logits[chance < 0.05] = NAN
    logits[chance < 0.02] = -NAN
    check(logits, num_topk=num_topk, num_groups=num_groups, num_groups_kept=num_groups_kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits(dtype: torch.dtype, rng: torch.Generator) -> None:
    check(randn(rng, 513, 160, dtype=dtype), **V2)


@pytest.mark.parametrize("num_experts", [64, 160])
def test_rows_off_their_boundary(num_experts: int, rng: torch.Generator) -> None:
    memory = randn(rng, 1 + 101 * num_experts).to(gpu.DEVICE)
    logits = memory[1:].view(101, num_experts)  # contiguous, 4 bytes off
    options = {**V2, "num_groups": num_experts // 20} if num_experts == 160 else {"num_topk": 6}
    step = gpu.forward_and_backward(gate(**options))
    gpu.assert_agrees(step(logits), step(logits.cpu()))


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", SHAPES)
def test_a_few_tokens(shape: tuple[int, int, int, int], rng: torch.Generator) -> None:
    num_experts, num_topk, num_groups, num_groups_kept = shape
    check(
        randn(rng, 19, num_experts), num_topk=num_topk, num_groups=num_groups, num_groups_kept=num_groups_kept
    )


@pytest.mark.parametrize(
    ("num_experts", "num_groups", "num_groups_kept"), [(64, 1, 1), (160, 8, 3), (96, 6, 2)]
)
def test_it_passes_opcheck(
    num_experts: int, num_groups: int, num_groups_kept: int, rng: torch.Generator
) -> None:
    logits = randn(rng, 37, num_experts).to(gpu.DEVICE).requires_grad_()
    args = (logits, 6, num_groups, num_groups_kept, 16.0, False)
    assert_op_registered(torch.ops.dscoder.moe_gate.default, args)


def test_it_compiles_in_one_graph(rng: torch.Generator) -> None:
    gpu.assert_compiles_whole(gate(**V2), randn(rng, 129, 160))


def test_a_captured_graph_follows_its_input(rng: torch.Generator) -> None:
    first, second = randn(rng, 2, 300, 160)
    gpu.assert_replay_follows(V2_STEP, [first], [second])


def test_it_runs_on_the_callers_stream(rng: torch.Generator) -> None:
    gpu.assert_runs_on_the_callers_stream(V2_STEP, randn(rng, 300, 160))


def test_it_never_waits_for_the_gpu(rng: torch.Generator) -> None:
    gpu.assert_never_waits(V2_STEP, randn(rng, 300, 160))


def test_the_same_bits_every_time(rng: torch.Generator) -> None:
    gpu.assert_same_bits_every_time(V2_STEP, randn(rng, 4099, 160))


def test_a_chain_of_kernels_that_start_early_is_as_good_as_one_that_waits(rng: torch.Generator) -> None:
    """Each link reads what the link ahead has just written, into memory that is used again and again."""

    def chain(logits: Tensor, *, is_apart: bool) -> Tensor:
        for _ in range(20):
            _, weight = ops.moe_gate(logits, num_topk=16)
            if is_apart:
                torch.cuda.synchronize()
            _, narrow = ops.moe_gate(weight, num_topk=8, scale=8.0)
            if is_apart:
                torch.cuda.synchronize()
            logits = logits + narrow.repeat(1, 20)
        return logits

    logits = randn(rng, 4096, 160).to(gpu.DEVICE)
    assert_same(chain(logits, is_apart=False), chain(logits, is_apart=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensors_device_counts_not_the_current_one(rng: torch.Generator) -> None:
    logits = randn(rng, 300, 160)
    with torch.cuda.device(0):
        idx, _ = ops.moe_gate(logits.to("cuda:1"), **V2)
        assert torch.cuda.current_device() == 0
    assert_same(idx.cpu(), ops.moe_gate(logits, **V2)[0])


@pytest.mark.parametrize(
    ("num_experts", "num_topk", "message"),
    [
        (513, 1, r"^moe_gate: num_experts must be <= 512, got 513$"),
        (64, 17, r"^moe_gate: num_topk must be <= 16, got 17$"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(num_experts: int, num_topk: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.moe_gate(torch.zeros(2, num_experts, device=gpu.DEVICE), num_topk=num_topk)


def test_an_output_on_another_device_is_refused() -> None:
    logits = torch.zeros(2, 4, device=gpu.DEVICE)
    idx = torch.zeros(2, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^moe_gate: idx must be on a CUDA device, got cpu$"):
        native._C.moe_gate_forward(logits, idx, logits[:, :1].contiguous(), 1, 1, 1.0, False)
