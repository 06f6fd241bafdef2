"""rope on a GPU: the kernels give the reference's answer, and keep out of the host's way."""

import pytest
import torch
from torch import Tensor

from dscoder import ops
from dscoder.testing import gpu
from dscoder.testing.cases import randn
from dscoder.testing.compare import assert_close, assert_op_registered, assert_same

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
MODELS = {"v2_lite": (16, 1, 64, True), "v2": (128, 1, 64, True), "coder_33b": (56, 8, 128, False)}
NUM_POSITIONS = 4096


def step(*, interleaved: bool = True) -> gpu.Step:
    """The tables get no gradient."""

    def run(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        def turn(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            return ops.rope(q, k, cos, sin, positions, interleaved=interleaved)

        return gpu.forward_and_backward(turn)(q, k)

    return run


def inputs(
    rng: torch.Generator,
    num_tokens: int,
    num_q_heads: int = 16,
    num_k_heads: int = 1,
    width: int = 64,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, ...]:
    """q, k, tables and positions."""
    angle = randn(rng, NUM_POSITIONS, width // 2, dtype=torch.promote_types(dtype, torch.float32))
    return (
        randn(rng, num_tokens, num_q_heads, width, dtype=dtype),
        randn(rng, num_tokens, num_k_heads, width, dtype=dtype),
        *(angle.cos(), angle.sin()),
        torch.randint(NUM_POSITIONS, (num_tokens,), generator=rng),
    )


@pytest.mark.sanitize
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 64, 144])
def test_a_few_tokens(width: int, dtype: torch.dtype, interleaved: bool, rng: torch.Generator) -> None:
    gpu.assert_is_reference(step(interleaved=interleaved), *inputs(rng, 19, 5, 2, width, dtype=dtype))


@pytest.mark.parametrize("num_tokens", [0, 1, 128, 2048])
@pytest.mark.parametrize("model", MODELS)
def test_it_is_the_reference(model: str, num_tokens: int, rng: torch.Generator) -> None:
    *heads, interleaved = MODELS[model]
    gpu.assert_is_reference(step(interleaved=interleaved), *inputs(rng, num_tokens, *heads))


@pytest.mark.parametrize(("width", "dtype"), [(12, torch.bfloat16), (64, torch.float64)], ids=str)
def test_what_the_kernels_do_not_take_runs_the_reference(
    width: int, dtype: torch.dtype, rng: torch.Generator
) -> None:
    gpu.assert_is_reference(step(), *inputs(rng, 37, 3, 1, width, dtype=dtype))


def test_heads_that_lie_apart_or_off_their_boundary(rng: torch.Generator) -> None:
    q, k, cos, sin, positions = (x.to(gpu.DEVICE) for x in inputs(rng, 301))
    wanted = step()(q, k, cos, sin, positions)
    wide = torch.full((301, 20, 192), torch.nan, dtype=q.dtype, device=gpu.DEVICE)
    apart, off = wide[:, 2:18, 128:], torch.empty(q.numel() + 1, dtype=q.dtype, device=gpu.DEVICE)[1:]
    for memory in (apart, off.view(q.shape)):
        gpu.assert_all_same(step()(memory.copy_(q), k, cos, sin, positions.int()), wanted)


def test_a_position_outside_the_tables_makes_its_token_nan(rng: torch.Generator) -> None:
    q, k, cos, sin, positions = (x.to(gpu.DEVICE) for x in inputs(rng, 5))
    wanted, _ = ops.rope(q, k, cos, sin, positions)
    positions[1], positions[3] = NUM_POSITIONS, -1
    got, _ = ops.rope(q, k, cos, sin, positions)
    assert got[[1, 3]].isnan().all()
    assert_same(got[::2], wanted[::2])


def test_turning_back_undoes_it(rng: torch.Generator) -> None:
    q, k, cos, sin, positions = (x.to(gpu.DEVICE) for x in inputs(rng, 4099, dtype=torch.float32))
    turned = ops.rope(q, k, cos, sin, positions)
    for got, want in zip(ops.rope(*turned, cos, -sin, positions), (q, k), strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_it_never_waits_for_the_gpu(dtype: torch.dtype, rng: torch.Generator) -> None:
    gpu.assert_never_waits(step(), *inputs(rng, 300, dtype=dtype))


@pytest.mark.parametrize("interleaved", [True, False])
def test_it_passes_opcheck(interleaved: bool, rng: torch.Generator) -> None:
    q, k, cos, sin, positions = (x.to(gpu.DEVICE) for x in inputs(rng, 37, 3))
    leaves = (q.requires_grad_(), k.requires_grad_())
    args = (*leaves, cos, sin, positions, interleaved, False)
    assert_op_registered(torch.ops.dscoder.rope.default, args)


def test_it_compiles_in_one_graph(rng: torch.Generator) -> None:
    q, k, cos, sin, positions = (x.to(gpu.DEVICE) for x in inputs(rng, 129, dtype=torch.float32))
    gpu.assert_compiles_whole(lambda q, k: ops.rope(q * 2, k + 1, cos, sin, positions), q, k)


def test_a_captured_graph_follows_its_input(rng: torch.Generator) -> None:
    gpu.assert_replay_follows(step(), *(inputs(rng, 701) for _ in range(3)))


def test_it_runs_on_the_callers_stream(rng: torch.Generator) -> None:
    gpu.assert_runs_on_the_callers_stream(step(), *inputs(rng, 300))


def test_the_same_bits_every_time(rng: torch.Generator) -> None:
    gpu.assert_same_bits_every_time(step(), *inputs(rng, 4099))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensors_device_counts_not_the_current_one(rng: torch.Generator) -> None:
    tensors = inputs(rng, 300)
    with torch.cuda.device(0):
        got = step()(*(x.to("cuda:1") for x in tensors))
        assert torch.cuda.current_device() == 0
    gpu.assert_agrees(got, step()(*tensors))
