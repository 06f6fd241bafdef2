"""moe_experts on a GPU: kernels of each arch give the reference's answer, and keep out of the host's way."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dscoder import ops
from dscoder.config import MoeConfig, preset
from dscoder.models.moe import Moe
from dscoder.models.placement import place
from dscoder.ops import PermuteHandle
from dscoder.testing import gpu
from dscoder.testing.cases import ROUTINGS, generator, randn, routing
from dscoder.testing.compare import assert_op_registered, assert_product, assert_same
from dscoder.testing.poison import poison_rows_from, with_strides

DTYPES = [torch.bfloat16, torch.float16]
SMALL = (136, 72, 5, 2)  # D, F, E, K: tiles in part
V2_LITE = (2048, 1408, 64, 6)


ARCHS = gpu.archs()
Sizes = tuple[int, int, int, int]


def inputs_of(
    rng: torch.Generator,
    num_tokens: int,
    sizes: Sizes = SMALL,
    *,
    kind: str = "uniform",
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, ...]:
    """x, gate_up, down and the choices of a layer, on the device of `rng`."""
    width, expert_width, num_experts, num_topk = sizes
    idx = routing(rng, num_tokens=num_tokens, num_experts=num_experts, num_topk=num_topk, kind=kind)
    gate_up = (randn(rng, num_experts, 2 * expert_width, width) / width**0.5).to(dtype)
    down = (randn(rng, num_experts, width, expert_width) / expert_width**0.5).to(dtype)
    return randn(rng, num_tokens, width, dtype=dtype), gate_up, down, idx


def experts(arch: str, gathers: bool | None = None) -> gpu.Function:
    def run(x: Tensor, gate_up: Tensor, down: Tensor, idx: Tensor) -> Tensor:
        handle = ops.moe_permute_maps(idx, num_experts=len(down))
        where = arch if x.is_cuda else "auto"
        return ops.moe_experts(x, gate_up, down, handle, gathers=gathers, arch=where)

    return run


def step(arch: str, gathers: bool | None = None) -> gpu.Step:
    return gpu.forward_and_backward(experts(arch, gathers))


@pytest.fixture
def gpu_rng(request: pytest.FixtureRequest) -> torch.Generator:
    return generator(request.node.nodeid, gpu.DEVICE)


@pytest.mark.sanitize("memcheck", "synccheck")
@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_a_few_tokens(arch: str, dtype: torch.dtype, gathers: bool, rng: torch.Generator) -> None:
    inputs = inputs_of(rng, 90, dtype=dtype)
    inputs[3][4] = inputs[3][70, 1] = -1
    gpu.assert_is_reference(step(arch, gathers), *inputs)


@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 301])
@pytest.mark.parametrize("arch", ARCHS)
def test_it_is_the_reference(arch: str, num_tokens: int, gathers: bool, rng: torch.Generator) -> None:
    gpu.assert_is_reference(step(arch, gathers), *inputs_of(rng, num_tokens))


def by_loop(x: Tensor, gate_up: Tensor, down: Tensor, handle: PermuteHandle) -> Tensor:
    """The definition in float32, expert by expert, with its roundings; differentiable."""
    token_M = torch.empty_like(handle.row_TK.flatten(), dtype=torch.int64)
    num_topk = handle.row_TK.shape[1]
    token_M[handle.row_TK.flatten().long()] = torch.arange(len(token_M), device=x.device) // num_topk
    counts = handle.offsets_E.diff(prepend=handle.offsets_E.new_zeros(1)).tolist()
    pieces = []
    for rows, gate_up_e, down_e in zip(x.float()[token_M].split(counts), gate_up, down, strict=True):
        gate, up = (rows @ gate_up_e.float().T).to(x.dtype).float().chunk(2, dim=-1)
        hidden = (F.silu(gate) * up).to(x.dtype).float()
        pieces.append(hidden @ down_e.float().T)
    return torch.cat(pieces)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("num_tokens", [1, 32, 512, 4099, 8192])
def test_v2_lite(num_tokens: int, kind: str, arch: str, gpu_rng: torch.Generator) -> None:
    """Against plain torch on the GPU: the reference on the CPU would take minutes."""
    *tensors, idx = inputs_of(gpu_rng, num_tokens, V2_LITE, kind=kind)
    handle = ops.moe_permute_maps(idx, num_experts=64)
    wanted = gpu.forward_and_backward(lambda *x: by_loop(*x, handle))(*tensors)
    gpu.poison_free_memory()
    got = step(arch)(*tensors, idx)
    for ours, want in zip(got, wanted, strict=True):
        assert_product(ours, want)


@pytest.mark.parametrize("arch", ARCHS)
def test_rows_in_expert_order_come_with_their_offsets(arch: str, rng: torch.Generator) -> None:
    _, gate_up, down, _ = inputs_of(rng, 1)
    rows = poison_rows_from(randn(rng, 200, 136, dtype=torch.bfloat16), 150)
    offsets = torch.tensor([3, 3, 130, 149, 150], dtype=torch.int32)

    def run(rows: Tensor, gate_up: Tensor, down: Tensor, offsets: Tensor) -> Tensor:
        return ops.moe_experts(rows, gate_up, down, offsets, arch=arch if rows.is_cuda else "auto")

    gpu.assert_is_reference(gpu.forward_and_backward(run), rows, gate_up, down, offsets)


@pytest.mark.parametrize("arch", ARCHS)
def test_gathering_on_load_changes_nothing(arch: str, rng: torch.Generator) -> None:
    inputs = [tensor.to(gpu.DEVICE) for tensor in inputs_of(rng, 301)]
    gpu.assert_agrees(step(arch, True)(*inputs), step(arch, False)(*inputs))


@pytest.mark.parametrize("arch", ARCHS)
def test_strides_change_nothing(arch: str, rng: torch.Generator) -> None:
    inputs = [tensor.to(gpu.DEVICE) for tensor in inputs_of(rng, 90)]
    gpu.assert_agrees(step(arch)(*(with_strides(x) for x in inputs[:3]), inputs[3]), step(arch)(*inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_kernels_cannot_do_runs_the_reference_without_waiting(
    dtype: torch.dtype, rng: torch.Generator
) -> None:
    inputs = inputs_of(rng, 90, dtype=dtype)
    gpu.assert_is_reference(step("auto"), *inputs)
    gpu.assert_never_waits(step("auto"), *inputs)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("gathers", [False, True])
def test_it_never_waits_for_the_gpu(gathers: bool, arch: str, rng: torch.Generator) -> None:
    gpu.assert_never_waits(step(arch, gathers), *inputs_of(rng, 90))


@pytest.mark.parametrize("arch", ARCHS)
def test_a_captured_graph_follows_its_choices(arch: str, rng: torch.Generator) -> None:
    runs = [inputs_of(rng, 301, kind=kind) for kind in ROUTINGS]
    runs.append((*runs[0][:3], torch.full_like(runs[0][3], -1)))
    gpu.assert_replay_follows(step(arch), *runs)


@pytest.mark.parametrize("arch", ARCHS)
def test_it_runs_on_the_callers_stream(arch: str, rng: torch.Generator) -> None:
    gpu.assert_runs_on_the_callers_stream(step(arch), *inputs_of(rng, 90))


@pytest.mark.parametrize("arch", ARCHS)
def test_the_same_bits_every_time(arch: str, rng: torch.Generator) -> None:
    gpu.assert_same_bits_every_time(step(arch), *inputs_of(rng, 701, (520, 264, 64, 6), kind="skewed"))


def test_it_compiles_in_one_graph(rng: torch.Generator) -> None:
    x, gate_up, down, idx = inputs_of(rng, 90)
    idx = idx.to(gpu.DEVICE)
    gpu.assert_compiles_whole(
        lambda x, gate_up, down: experts("auto")(x * 2, gate_up, down, idx), x, gate_up, down
    )


@pytest.mark.parametrize("gathers", [False, True])
def test_it_passes_opcheck(gathers: bool, rng: torch.Generator) -> None:
    x, gate_up, down, idx = (tensor.to(gpu.DEVICE) for tensor in inputs_of(rng, 90))
    handle = ops.moe_permute_maps(idx, num_experts=len(down))
    token = torch.arange(180, dtype=torch.int32, device=gpu.DEVICE) // 2
    rows = x if gathers else x.repeat_interleave(2, dim=0)
    maps = (handle.row_TK, token) if gathers else (None, None)
    leaves = [tensor.requires_grad_() for tensor in (rows, gate_up, down)]
    args = (*leaves, handle.offsets_E, *maps, True, "auto")
    assert_op_registered(torch.ops.dscoder.moe_experts.default, args)


@pytest.mark.parametrize("arch", ARCHS)
def test_without_a_gradient_the_same_comes_out(arch: str, rng: torch.Generator) -> None:
    inputs = [tensor.to(gpu.DEVICE) for tensor in inputs_of(rng, 301)]
    wanted = step(arch)(*inputs)[0]
    with torch.no_grad():
        assert_same(experts(arch)(*inputs), wanted)


def test_a_layer_of_the_model_trains_as_its_reference_does(rng: torch.Generator) -> None:
    """Gate, maps, experts, unpermute and the shared experts, whole, in one graph of kernels."""
    config = MoeConfig(
        num_experts=16, num_shared_experts=2, num_topk=4, expert_width=72, num_groups=4, num_groups_kept=2
    )
    moe = Moe(136, config).eval()
    names = [name for name, _ in moe.named_parameters()]
    parameters = [(randn(rng, *p.shape) / p.shape[-1] ** 0.5).bfloat16() for p in moe.parameters()]
    tokens = torch.zeros(1, 150, dtype=torch.long)
    options = {"cu_seqlens": None, "cache": None, "num_new_B": None, "drops_tokens": False}
    placements = {
        device: place(preset("tiny_moe"), tokens.to(device), **options) for device in ("cpu", gpu.DEVICE)
    }

    def layer(x: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(names, parameters, strict=True))
        out: Tensor = torch.func.functional_call(moe, named, (x, placements[x.device.type]))[0]
        return out

    inputs = (randn(rng, 150, 136, dtype=torch.bfloat16), *parameters)
    gpu.assert_is_reference(gpu.forward_and_backward(layer), *inputs)
    gpu.assert_never_waits(gpu.forward_and_backward(layer), *inputs)
