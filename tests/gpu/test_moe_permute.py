"""moe_permute on a GPU: the kernels give the reference's bits, and keep out of the host's way."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dscoder import ops
from dscoder.runtime import native
from dscoder.testing import gpu
from dscoder.testing.cases import randn, routing
from dscoder.testing.compare import assert_close, assert_op_registered, assert_same

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
MODELS = {"v2_lite": (2048, 64, 6), "v2": (5120, 160, 6)}  # D, E, K
WILD = [-(2**31), -1, 2**31 - 1]


def permute(num_experts: int) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    def run(x_TD: Tensor, idx_TK: Tensor) -> tuple[Tensor, ...]:
        rows_MD, handle = ops.moe_permute(x_TD, idx_TK, num_experts=num_experts)
        return rows_MD, handle.offsets_E, handle.row_TK, handle.token_M

    return run


def step(num_experts: int) -> gpu.Step:
    return gpu.forward_and_backward(permute(num_experts))


def any_idx(rng: torch.Generator, num_tokens: int, num_experts: int, num_topk: int) -> Tensor:
    """Choices of which a fifth is dropped; a token may choose an expert twice."""
    shape = (num_tokens, num_topk)
    idx = torch.randint(0, num_experts, shape, generator=rng, dtype=torch.int32)
    outside = torch.tensor([*WILD, num_experts], dtype=torch.int32)
    wild = outside[torch.randint(0, 4, shape, generator=rng)]
    return torch.where(torch.rand(shape, generator=rng) < 0.2, wild, idx)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "num_experts", "num_topk"), [(8, 4, 1), (136, 64, 6), (5128, 160, 16)])
def test_a_few_tokens(
    width: int, num_experts: int, num_topk: int, dtype: torch.dtype, rng: torch.Generator
) -> None:
    x = randn(rng, 19, width, dtype=dtype)
    gpu.assert_is_reference(step(num_experts), x, any_idx(rng, 19, num_experts, num_topk))


@pytest.mark.sanitize
def test_a_few_chunks(rng: torch.Generator) -> None:
    gpu.assert_is_reference(step(160), randn(rng, 701, 8), any_idx(rng, 701, 160, 6))


@pytest.mark.parametrize("num_tokens", [0, 1, 64])
@pytest.mark.parametrize("model", MODELS)
def test_it_is_the_reference(model: str, num_tokens: int, rng: torch.Generator) -> None:
    width, num_experts, num_topk = MODELS[model]
    x = randn(rng, num_tokens, width, dtype=torch.bfloat16)
    idx = routing(rng, num_tokens=num_tokens, num_experts=num_experts, num_topk=num_topk)
    gpu.assert_is_reference(step(num_experts), x, idx)


@pytest.mark.parametrize("model", MODELS)
def test_as_many_tokens_as_a_models_step_has(model: str, rng: torch.Generator) -> None:
    """Against plain torch on the GPU: the reference on the CPU would take most of a minute."""
    width, num_experts, num_topk = MODELS[model]
    idx = routing(rng, num_tokens=8192, num_experts=num_experts, num_topk=num_topk)
    x = randn(rng, 8192, width, dtype=torch.bfloat16).to(gpu.DEVICE)
    gpu.poison_free_memory()
    rows, offsets, row, token, grad_x = step(num_experts)(x, idx.to(gpu.DEVICE))
    wanted = ops.moe_permute_maps(idx, num_experts=num_experts)
    gpu.assert_agrees((offsets, row, token), (wanted.offsets_E, wanted.row_TK, wanted.token_M))
    assert_same(rows[row.long()], x[:, None].expand(-1, num_topk, -1))
    grad_rows = (torch.arange(rows.numel(), device=rows.device) % 17 - 8).div(8).view_as(rows)
    assert_close(grad_x, grad_rows[row.long()].sum(dim=1))


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "num_topk"),
    [(1, 1, 1), (170, 64, 6), (171, 64, 6), (8209, 512, 16), (99991, 257, 3), (300000, 37, 7)],
)
def test_the_maps_are_the_references(
    num_tokens: int, num_experts: int, num_topk: int, rng: torch.Generator
) -> None:
    def maps(idx_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        handle = ops.moe_permute_maps(idx_TK, num_experts=num_experts)
        return handle.offsets_E, handle.row_TK, handle.token_M

    gpu.assert_is_reference(maps, any_idx(rng, num_tokens, num_experts, num_topk))


@pytest.mark.parametrize("fill", [0, 63, -1])
def test_all_tokens_to_one_expert_or_to_none(fill: int, rng: torch.Generator) -> None:
    idx = torch.full((4099, 6), fill, dtype=torch.int32)
    gpu.assert_is_reference(step(64), randn(rng, 4099, 64), idx)


def test_rows_off_their_boundary_and_strided(rng: torch.Generator) -> None:
    memory = randn(rng, 1 + 101 * 64, dtype=torch.bfloat16).to(gpu.DEVICE)
    idx = any_idx(rng, 101, 64, 6).to(gpu.DEVICE)
    for x in (memory[1:].view(101, 64), memory[1:].view(64, 101).T):
        gpu.assert_agrees(step(64)(x, idx), step(64)(x.cpu(), idx.cpu()))


def test_float64_runs_the_reference(rng: torch.Generator) -> None:
    gpu.assert_is_reference(step(64), randn(rng, 37, 5, dtype=torch.float64), any_idx(rng, 37, 64, 6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_it_never_waits_for_the_gpu(dtype: torch.dtype, rng: torch.Generator) -> None:
    x = randn(rng, 300, 64, dtype=dtype)
    gpu.assert_never_waits(step(64), x, any_idx(rng, 300, 64, 6))


def test_it_passes_opcheck(rng: torch.Generator) -> None:
    x = randn(rng, 37, 64, dtype=torch.bfloat16).to(gpu.DEVICE).requires_grad_()
    idx = any_idx(rng, 37, 64, 6).to(gpu.DEVICE)
    assert_op_registered(torch.ops.dscoder.moe_permute.default, (x, idx, 64))
    assert_op_registered(torch.ops.dscoder.moe_permute_maps.default, (idx, 64))
    rows, _, row, _ = torch.ops.dscoder.moe_permute.default(x.detach(), idx, 64)
    assert_op_registered(torch.ops.dscoder.moe_permute_backward.default, (rows, row))


def test_it_compiles_in_one_graph(rng: torch.Generator) -> None:
    idx = any_idx(rng, 129, 64, 6).to(gpu.DEVICE)
    gpu.assert_compiles_whole(lambda x: permute(64)(x * 2, idx), randn(rng, 129, 64))


def test_a_captured_graph_follows_its_input(rng: torch.Generator) -> None:
    runs = [(randn(rng, 701, 64, dtype=torch.bfloat16), any_idx(rng, 701, 64, 6)) for _ in range(3)]
    runs.append((runs[0][0], torch.full_like(runs[0][1], -1)))
    gpu.assert_replay_follows(step(64), *runs)


def test_it_runs_on_the_callers_stream(rng: torch.Generator) -> None:
    gpu.assert_runs_on_the_callers_stream(step(64), randn(rng, 300, 64), any_idx(rng, 300, 64, 6))


def test_the_same_bits_every_time(rng: torch.Generator) -> None:
    x = randn(rng, 4099, 2048, dtype=torch.bfloat16)
    gpu.assert_same_bits_every_time(step(160), x, any_idx(rng, 4099, 160, 6))


def test_a_chain_of_kernels_that_start_early_is_as_good_as_one_that_waits(rng: torch.Generator) -> None:
    """Each link reads what the link ahead has just written, into memory that is used again and again."""

    def chain(x: Tensor, idx: Tensor, *, is_apart: bool) -> Tensor:
        for _ in range(20):
            rows, handle = ops.moe_permute(x, idx, num_experts=160)
            if is_apart:
                torch.cuda.synchronize()
            weight = torch.full(idx.shape, 1 / 6, device=x.device)
            x = ops.moe_unpermute(rows, weight, handle) + 1
            idx = (idx + 7) % 160
        return x

    x = randn(rng, 4096, 256).to(gpu.DEVICE)
    idx = routing(rng, num_tokens=4096, num_experts=160, num_topk=6).to(gpu.DEVICE)
    assert_same(chain(x, idx, is_apart=False), chain(x, idx, is_apart=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensors_device_counts_not_the_current_one(rng: torch.Generator) -> None:
    x, idx = randn(rng, 300, 64), any_idx(rng, 300, 64, 6)
    with torch.cuda.device(0):
        got = step(64)(x.to("cuda:1"), idx.to("cuda:1"))
        assert torch.cuda.current_device() == 0
    gpu.assert_agrees(got, step(64)(x, idx))


@pytest.mark.parametrize(
    ("width", "num_experts", "num_topk", "message"),
    [
        (12, 64, 6, r"^moe_permute: x in bfloat16 must be a multiple of 8 wide, got 12$"),
        (8, 513, 6, r"^moe_permute: num_experts must be <= 512, got 513$"),
        (8, 64, 17, r"^moe_permute: idx must have at most 16 columns, got 17$"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(
    width: int, num_experts: int, num_topk: int, message: str
) -> None:
    x = torch.zeros(2, width, device=gpu.DEVICE, dtype=torch.bfloat16)
    idx = torch.zeros(2, num_topk, device=gpu.DEVICE, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        ops.moe_permute(x, idx, num_experts=num_experts)


def test_an_output_on_another_device_is_refused() -> None:
    idx = torch.zeros(2, 1, dtype=torch.int32, device=gpu.DEVICE)
    counts = idx.new_empty(0, 3)
    message = r"^moe_permute_maps: row must be on a CUDA device, got cpu$"
    with pytest.raises(ValueError, match=message):
        native._C.moe_permute_maps_forward(idx, idx.new_empty(3), idx.cpu(), idx.new_empty(2), counts)
