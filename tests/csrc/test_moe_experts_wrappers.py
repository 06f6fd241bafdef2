"""The Python side of the kernels of grouped_gemm and moe_experts, the host executor in place of a GPU."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from dscoder import ops
from dscoder.config import MoeConfig, preset
from dscoder.models.moe import Moe
from dscoder.models.placement import place
from dscoder.ops import PermuteHandle
from dscoder.ops.grouped_gemm_plan import KERNEL_EXPERTS, KERNEL_MULTIPLE
from dscoder.testing.cases import generator, randn, routing
from dscoder.testing.compare import assert_close, assert_same
from dscoder.testing.gpu import Function, assert_agrees, forward_and_backward
from dscoder.testing.poison import poison_rows_from, with_strides

UseKernels = Callable[..., None]

GEMM = ("grouped_gemm", "grouped_gemm_weight_gradient", "grouped_gemm_weight_gradient_into")
EXPERTS = (*GEMM, "moe_experts", "moe_experts_gate_up_gradient", "moe_experts_rows", "moe_permute_backward")
HALVES = [torch.bfloat16, torch.float16]
NUM_EXPERTS, WIDTH, EXPERT_WIDTH = 4, 40, 24
OFFSETS = torch.tensor([3, 3, 20, 21], dtype=torch.int32)  # of 23 rows
NUM_ROWS = 23


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    return generator(request.node.nodeid)


def check(use_kernels: UseKernels, function: Function, *inputs: Tensor) -> None:
    """The kernels through the op agree with the reference in float64, gradients included."""
    step = forward_and_backward(function)
    wanted = step(*(x.double() for x in inputs))
    use_kernels(*EXPERTS)
    dtype = inputs[0].dtype
    for got, want in zip(step(*inputs), wanted, strict=True):
        assert got.dtype == dtype
        assert_close(got, want)


def weights(rng: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    gate_up = randn(rng, NUM_EXPERTS, 2 * EXPERT_WIDTH, WIDTH) / 4
    down = randn(rng, NUM_EXPERTS, WIDTH, EXPERT_WIDTH) / 4
    return gate_up.to(dtype), down.to(dtype)


def dropping_maps(rng: torch.Generator) -> PermuteHandle:
    idx = routing(rng, num_tokens=19, num_experts=NUM_EXPERTS, num_topk=2)
    idx[5] = idx[8, 1] = -1
    return ops.moe_permute_maps(idx, num_experts=NUM_EXPERTS)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_product_and_its_gradients(
    use_kernels: UseKernels, dtype: torch.dtype, rng: torch.Generator
) -> None:
    x, (_, down) = randn(rng, NUM_ROWS, EXPERT_WIDTH, dtype=dtype), weights(rng, dtype)
    check(use_kernels, lambda x, w: ops.grouped_gemm(x, w, OFFSETS), x, down)


def test_weights_are_read_as_they_lie(use_kernels: UseKernels, rng: torch.Generator) -> None:
    x, (_, down) = randn(rng, NUM_ROWS, WIDTH, dtype=torch.bfloat16), weights(rng, torch.bfloat16)
    wanted = ops.grouped_gemm(x, down.mT, OFFSETS)
    use_kernels(*EXPERTS)
    assert_close(ops.grouped_gemm(x, down.mT, OFFSETS), wanted)
    for strange in (with_strides(down.mT), down.flatten()[: down.numel()].view(down.shape).mT):
        assert_close(ops.grouped_gemm(with_strides(x), strange, with_strides(OFFSETS)), wanted)


def test_inputs_off_a_16_byte_boundary_are_copied(use_kernels: UseKernels, rng: torch.Generator) -> None:
    shifted = torch.empty(NUM_ROWS * WIDTH + 1, dtype=torch.bfloat16)[1:].view(NUM_ROWS, WIDTH)
    x, (gate_up, _) = shifted.copy_(randn(rng, NUM_ROWS, WIDTH)), weights(rng, torch.bfloat16)
    wanted = ops.grouped_gemm(x, gate_up, OFFSETS)
    use_kernels(*EXPERTS)
    assert_close(ops.grouped_gemm(x, gate_up, OFFSETS), wanted)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_the_weight_gradient_by_itself(
    use_kernels: UseKernels, out_dtype: torch.dtype, accumulate: bool, rng: torch.Generator
) -> None:
    grad = poison_rows_from(randn(rng, NUM_ROWS, EXPERT_WIDTH, dtype=torch.bfloat16), 21)
    x = poison_rows_from(randn(rng, NUM_ROWS, WIDTH, dtype=torch.bfloat16), 21)
    before = randn(rng, NUM_EXPERTS, EXPERT_WIDTH, WIDTH, dtype=out_dtype)
    wanted = ops.grouped_gemm_weight_gradient(grad.double(), x.double(), OFFSETS)
    wanted += before.double() if accumulate else 0
    use_kernels(*EXPERTS)
    out = before.clone() if accumulate else torch.full_like(before, torch.nan)
    assert ops.grouped_gemm_weight_gradient(grad, x, OFFSETS, out=out, accumulate=accumulate) is out
    assert_close(out, wanted)
    if not accumulate:
        assert_same(ops.grouped_gemm_weight_gradient(grad, x, OFFSETS, dtype=out_dtype), out)


@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_the_experts_and_their_gradients(
    use_kernels: UseKernels, gathers: bool, dtype: torch.dtype, rng: torch.Generator
) -> None:
    handle, x = dropping_maps(rng), randn(rng, 19, WIDTH, dtype=dtype)
    check(
        use_kernels,
        lambda *tensors: ops.moe_experts(*tensors, handle, gathers=gathers),
        x,
        *weights(rng, dtype),
    )


def test_kernels_that_cannot_gather_get_a_copy(
    use_kernels: UseKernels, host_ops: ModuleType, monkeypatch: pytest.MonkeyPatch, rng: torch.Generator
) -> None:
    """As those of sm_90, whose place the ones of sm_80 take here."""
    rows_loaded: list[object] = []

    def spy(name: str, map_idx: int) -> None:
        binding = getattr(host_ops, name)

        def run(*args: object) -> None:
            rows_loaded.append(args[map_idx])
            binding(*args)

        monkeypatch.setattr(host_ops, name, run)

    spy("grouped_swiglu_forward", 5)
    spy("grouped_gemm_weight_gradient", 4)
    monkeypatch.setattr(host_ops, "grouped_gemm_plan", lambda *_: {"arch": "sm90"})
    handle, x = dropping_maps(rng), randn(rng, 19, WIDTH, dtype=torch.bfloat16)
    inputs = (x, *weights(rng, torch.bfloat16))
    check(use_kernels, lambda *tensors: ops.moe_experts(*tensors, handle, gathers=True), *inputs)
    assert rows_loaded == [None, None, None]


def test_the_experts_of_rows_and_their_gradients(use_kernels: UseKernels, rng: torch.Generator) -> None:
    rows = poison_rows_from(randn(rng, NUM_ROWS, WIDTH, dtype=torch.bfloat16), 21)
    inputs = (rows, *weights(rng, torch.bfloat16))
    check(use_kernels, lambda *tensors: ops.moe_experts(*tensors, OFFSETS), *inputs)


def test_strided_experts(use_kernels: UseKernels, rng: torch.Generator) -> None:
    handle, x = dropping_maps(rng), randn(rng, 19, WIDTH, dtype=torch.bfloat16)
    inputs = (x, *weights(rng, torch.bfloat16))
    use_kernels(*EXPERTS)
    step = forward_and_backward(lambda *tensors: ops.moe_experts(*tensors, handle, gathers=True))
    for got, want in zip(step(*(with_strides(t) for t in inputs)), step(*inputs), strict=True):
        assert_same(got, want)


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens(use_kernels: UseKernels, num_tokens: int, rng: torch.Generator) -> None:
    idx = routing(rng, num_tokens=num_tokens, num_experts=NUM_EXPERTS, num_topk=2)
    handle = ops.moe_permute_maps(idx, num_experts=NUM_EXPERTS)
    x = randn(rng, num_tokens, WIDTH, dtype=torch.bfloat16)
    inputs = (x, *weights(rng, torch.bfloat16))
    check(use_kernels, lambda *tensors: ops.moe_experts(*tensors, handle, gathers=True), *inputs)


def test_without_a_gradient_the_same_comes_out(use_kernels: UseKernels, rng: torch.Generator) -> None:
    handle, x = dropping_maps(rng), randn(rng, 19, WIDTH, dtype=torch.bfloat16)
    gate_up, down = weights(rng, torch.bfloat16)
    use_kernels(*EXPERTS)
    wanted = ops.moe_experts(x.requires_grad_(), gate_up, down, handle, gathers=True)
    with torch.no_grad():
        assert_same(ops.moe_experts(x, gate_up, down, handle, gathers=True), wanted.detach())


@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize(
    ("dtype", "expert_width"),
    [(torch.float32, EXPERT_WIDTH), (torch.float64, EXPERT_WIDTH), (torch.bfloat16, 23)],
)
def test_what_kernels_cannot_do_is_the_reference_in_pieces(
    use_kernels: UseKernels, gathers: bool, dtype: torch.dtype, expert_width: int, rng: torch.Generator
) -> None:
    handle, x = dropping_maps(rng), randn(rng, 19, WIDTH, dtype=dtype)
    gate_up, down = weights(rng, dtype)
    step = forward_and_backward(lambda *tensors: ops.moe_experts(*tensors, handle, gathers=gathers))
    inputs = (x, gate_up[:, : 2 * expert_width], down[..., :expert_width])
    wanted = step(*inputs)
    use_kernels(*EXPERTS)
    assert_agrees(step(*inputs), wanted)


def test_the_model_trains_through_the_kernels(use_kernels: UseKernels, rng: torch.Generator) -> None:
    """Gate, maps, experts and unpermute in bfloat16 against the same layer in float64."""
    config = MoeConfig(
        num_experts=NUM_EXPERTS,
        num_shared_experts=0,
        num_topk=2,
        expert_width=EXPERT_WIDTH,
        num_groups=1,
        num_groups_kept=1,
    )
    moe = Moe(WIDTH, config).eval()
    for parameter in moe.parameters():
        parameter.data = (randn(rng, *parameter.shape) / 4).bfloat16()
    x = randn(rng, 19, WIDTH, dtype=torch.bfloat16)
    tokens = torch.zeros(1, 19, dtype=torch.long)
    placement = place(
        preset("tiny_moe"), tokens, cu_seqlens=None, cache=None, num_new_B=None, drops_tokens=False
    )
    names = [name for name, _ in moe.named_parameters()]

    def layer(x: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(names, parameters, strict=True))
        out: Tensor = torch.func.functional_call(moe, named, (x, placement))[0]
        return out

    use_kernels(
        "moe_gate", "moe_gate_backward", "moe_permute_maps", "moe_unpermute", "moe_unpermute_backward"
    )
    check(use_kernels, layer, x, *moe.parameters())


def test_the_limits_of_the_kernels_are_those_that_the_dispatch_knows(host_ops: ModuleType) -> None:
    def run(num_experts: int, width: int) -> None:
        x, w = torch.zeros(1, width).bfloat16(), torch.zeros(num_experts, 8, width).bfloat16()
        y, offsets = torch.zeros(1, 8).bfloat16(), torch.ones(num_experts, dtype=torch.int32)
        host_ops.grouped_gemm_forward(x, w, y, offsets, None, False, "sm80")

    run(KERNEL_EXPERTS, KERNEL_MULTIPLE)
    with pytest.raises(ValueError, match=rf"at most {KERNEL_EXPERTS} elements, got {KERNEL_EXPERTS + 1}"):
        run(KERNEL_EXPERTS + 1, KERNEL_MULTIPLE)
    with pytest.raises(ValueError, match=rf"multiple of {KERNEL_MULTIPLE}, got {KERNEL_MULTIPLE // 2}"):
        run(1, KERNEL_MULTIPLE // 2)
