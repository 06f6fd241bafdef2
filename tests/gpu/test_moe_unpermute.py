"""moe_unpermute on a GPU: the kernels give the reference's answer, and keep out of the host's way."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dscoder import ops
from dscoder.testing import gpu
from dscoder.testing.cases import randn, routing
from dscoder.testing.compare import assert_close, assert_op_registered, assert_same
from dscoder.testing.poison import poison_rows_from

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
MODELS = {"v2_lite": (2048, 64, 6), "v2": (5120, 160, 6)}  # D, E, K
NUM_EXPERTS = 64


def unpermute(num_experts: int = NUM_EXPERTS) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def run(y_MD: Tensor, weight_TK: Tensor, idx_TK: Tensor) -> Tensor:
        return ops.moe_unpermute(y_MD, weight_TK, ops.moe_permute_maps(idx_TK, num_experts=num_experts))

    return run


def step(num_experts: int = NUM_EXPERTS) -> gpu.Step:
    return gpu.forward_and_backward(unpermute(num_experts))


def inputs(
    rng: torch.Generator,
    *shape: int,
    num_experts: int = NUM_EXPERTS,
    share_dropped: float = 0.2,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor, Tensor]:
    """y with NaN in the rows of nobody, weights with NaN where dropped, and idx; shape: T, D, K."""
    num_tokens, width, num_topk = shape
    idx = routing(rng, num_tokens=num_tokens, num_experts=num_experts, num_topk=num_topk)
    idx[torch.rand(idx.shape, generator=rng) < share_dropped] = -1
    y = poison_rows_from(randn(rng, idx.numel(), width, dtype=dtype), int((idx >= 0).sum()))
    return y, torch.rand(idx.shape, generator=rng).masked_fill_(idx < 0, torch.nan), idx


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "num_topk"), [(8, 1), (136, 3), (136, 6), (5120, 8), (2568, 16)])
def test_a_few_tokens(width: int, num_topk: int, dtype: torch.dtype, rng: torch.Generator) -> None:
    gpu.assert_is_reference(step(), *inputs(rng, 19, width, num_topk, dtype=dtype))


@pytest.mark.parametrize("num_tokens", [0, 1, 64])
@pytest.mark.parametrize("model", MODELS)
def test_it_is_the_reference(model: str, num_tokens: int, rng: torch.Generator) -> None:
    width, num_experts, num_topk = MODELS[model]
    tensors = inputs(rng, num_tokens, width, num_topk, num_experts=num_experts, share_dropped=0.0)
    gpu.assert_is_reference(step(num_experts), *tensors)


@pytest.mark.parametrize("model", MODELS)
def test_as_many_tokens_as_a_models_step_has(model: str, rng: torch.Generator) -> None:
    """Against plain torch on the GPU: the reference on the CPU would take most of a minute."""
    width, num_experts, num_topk = MODELS[model]
    tensors = inputs(rng, 8192, width, num_topk, num_experts=num_experts, share_dropped=0.0)
    y, weight, idx = (x.to(gpu.DEVICE) for x in tensors)
    gpu.poison_free_memory()
    out, grad_y, grad_weight = step(num_experts)(y, weight, idx)
    row = ops.moe_permute_maps(idx, num_experts=num_experts).row_TK.long()
    rows = y[row].float()
    assert_close(out, (rows * weight[..., None]).sum(dim=1))
    grad = (torch.arange(out.numel(), device=out.device) % 17 - 8).div(8).view_as(out)
    assert_same(grad_y[row], (grad[:, None] * weight[..., None]).to(y.dtype))
    assert_close(grad_weight, (rows * grad[:, None]).sum(dim=2))


@pytest.mark.parametrize("share_dropped", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("num_topk", [2, 4, 5, 7, 12])
def test_dropped_choices(num_topk: int, share_dropped: float, rng: torch.Generator) -> None:
    tensors = inputs(rng, 1021, 648, num_topk, share_dropped=share_dropped, dtype=torch.float32)
    gpu.assert_is_reference(step(), *tensors)


def test_rows_off_their_boundary_and_strided(rng: torch.Generator) -> None:
    y, weight, idx = (x.to(gpu.DEVICE) for x in inputs(rng, 101, 64, 6))
    wanted = step()(y, weight, idx)
    crooked = torch.empty(y.numel() + 1, dtype=y.dtype, device=gpu.DEVICE)[1:].view(y.shape)
    for memory in (crooked, torch.empty_like(y.T).T):
        gpu.assert_all_same(step()(memory.copy_(y), weight.T.contiguous().T, idx), wanted)


def test_float64_runs_the_reference(rng: torch.Generator) -> None:
    y, weight, idx = inputs(rng, 37, 5, 6, dtype=torch.float64)
    gpu.assert_is_reference(step(), y, weight.double(), idx)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_it_never_waits_for_the_gpu(dtype: torch.dtype, rng: torch.Generator) -> None:
    gpu.assert_never_waits(step(), *inputs(rng, 300, 64, 6, dtype=dtype))


def test_it_passes_opcheck(rng: torch.Generator) -> None:
    y, weight, idx = (x.to(gpu.DEVICE) for x in inputs(rng, 37, 64, 6, share_dropped=0.0))
    handle = ops.moe_permute_maps(idx, num_experts=NUM_EXPERTS)
    maps = (handle.row_TK, handle.offsets_E)
    grad = randn(rng, 37, 64, dtype=torch.bfloat16).to(gpu.DEVICE)
    assert_op_registered(torch.ops.dscoder.moe_unpermute_backward.default, (grad, y, weight, *maps))
    leaves = (y.requires_grad_(), weight.requires_grad_())
    assert_op_registered(torch.ops.dscoder.moe_unpermute.default, (*leaves, *maps))


def test_it_compiles_in_one_graph(rng: torch.Generator) -> None:
    y, weight, idx = inputs(rng, 129, 64, 6, share_dropped=0.0, dtype=torch.float32)
    on_gpu = idx.to(gpu.DEVICE)
    gpu.assert_compiles_whole(lambda y, w: unpermute()(y * 2, w + 1, on_gpu), y, weight)


def test_a_captured_graph_follows_its_input(rng: torch.Generator) -> None:
    runs = [inputs(rng, 701, 64, 6, share_dropped=share) for share in (0.2, 0.0, 0.9, 1.0)]
    gpu.assert_replay_follows(step(), *runs)


def test_it_runs_on_the_callers_stream(rng: torch.Generator) -> None:
    gpu.assert_runs_on_the_callers_stream(step(), *inputs(rng, 300, 64, 6))


def test_the_same_bits_every_time(rng: torch.Generator) -> None:
    gpu.assert_same_bits_every_time(step(160), *inputs(rng, 4099, 2048, 6, num_experts=160))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensors_device_counts_not_the_current_one(rng: torch.Generator) -> None:
    tensors = inputs(rng, 300, 64, 6)
    with torch.cuda.device(0):
        got = step()(*(x.to("cuda:1") for x in tensors))
        assert torch.cuda.current_device() == 0
    gpu.assert_agrees(got, step()(*tensors))


@pytest.mark.parametrize(
    ("width", "num_topk", "message"),
    [
        (12, 6, r"^moe_unpermute: y in bfloat16 must be a multiple of 8 wide, got 12$"),
        (8, 17, r"^moe_unpermute: idx must have at most 16 columns, got 17$"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(
    width: int, num_topk: int, message: str, rng: torch.Generator
) -> None:
    y, weight, idx = (x.to(gpu.DEVICE) for x in inputs(rng, 2, width, num_topk))
    with pytest.raises(ValueError, match=message):
        unpermute()(y, weight, idx)
