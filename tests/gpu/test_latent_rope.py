"""latent_rope on a GPU: the kernels give the reference's answer, and keep out of the host's way."""

import pytest
import torch
from torch import Tensor

from dscoder import ops
from dscoder.testing import gpu
from dscoder.testing.cases import latent_case
from dscoder.testing.compare import assert_op_registered, assert_same

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
WIDTHS = {"nope_width": 128, "rope_width": 64, "latent_width": 512}
EPS = 1e-6


def step(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tables get no gradient."""

    def run(query: Tensor, latent: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return ops.latent_rope(query, latent, weight, *tensors[3:], eps=EPS)

    return gpu.forward_and_backward(run)(*tensors[:3])


def inputs(
    rng: torch.Generator, num_tokens: int, num_heads: int = 16, *, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, ...]:
    return latent_case(rng, num_tokens, num_heads=num_heads, dtype=dtype, **WIDTHS)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", [(8, 8, 8), (0, 64, 256), (128, 64, 512), (24, 264, 264)], ids=str)
def test_a_few_tokens(widths: tuple[int, int, int], dtype: torch.dtype, rng: torch.Generator) -> None:
    nope, rope, latent = widths
    tensors = latent_case(rng, 19, nope_width=nope, rope_width=rope, latent_width=latent, dtype=dtype)
    gpu.assert_is_reference(step, *tensors)


@pytest.mark.parametrize("num_tokens", [0, 1, 128, 2048])
@pytest.mark.parametrize("num_heads", [16, 128])
def test_it_is_the_reference(num_heads: int, num_tokens: int, rng: torch.Generator) -> None:
    gpu.assert_is_reference(step, *inputs(rng, num_tokens, num_heads))


def test_weights_of_float32(rng: torch.Generator) -> None:
    query, latent, weight, *angles = inputs(rng, 301)
    gpu.assert_is_reference(step, query, latent, weight.float(), *angles)


@pytest.mark.parametrize(
    ("dtype", "latent_width"), [(torch.float64, 512), (torch.bfloat16, 520), (torch.bfloat16, 20)], ids=str
)
def test_what_the_kernels_do_not_take_runs_the_reference(
    dtype: torch.dtype, latent_width: int, rng: torch.Generator
) -> None:
    gpu.assert_is_reference(step, *latent_case(rng, 37, latent_width=latent_width, dtype=dtype))


def test_views_of_one_projection_and_rows_off_their_boundary(rng: torch.Generator) -> None:
    query, latent, *rest = (x.to(gpu.DEVICE) for x in inputs(rng, 301))
    wanted = step(query, latent, *rest)
    for margin in (8, 1):  # elements on both sides; rows after an odd number of them are copied
        both = torch.full((301, 16 * 192 + 576 + 2 * margin), torch.nan, device=gpu.DEVICE, dtype=query.dtype)
        views = both[:, margin : margin + 16 * 192].view(query.shape), both[:, margin + 16 * 192 : -margin]
        views[0].copy_(query)
        views[1].copy_(latent)
        gpu.assert_all_same(step(*views, *rest), wanted)


def test_a_position_outside_the_tables_makes_what_it_turns_nan(rng: torch.Generator) -> None:
    tensors = [x.to(gpu.DEVICE) for x in inputs(rng, 5)]
    _, wanted = ops.latent_rope(*tensors, eps=EPS)
    tensors[5][1] = 12
    query, row = ops.latent_rope(*tensors, eps=EPS)
    assert query[1, :, 128:].isnan().all()
    assert row[1, 512:].isnan().all()
    assert_same(row[:, :512], wanted[:, :512])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_it_never_waits_for_the_gpu(dtype: torch.dtype, rng: torch.Generator) -> None:
    gpu.assert_never_waits(step, *inputs(rng, 300, dtype=dtype))


def test_it_passes_opcheck(rng: torch.Generator) -> None:
    query, latent, weight, *angles = (x.to(gpu.DEVICE) for x in inputs(rng, 37, 3))
    scale = torch.rand(37, device=gpu.DEVICE)
    args = (query, latent, latent, weight, scale, *angles)
    assert_op_registered(torch.ops.dscoder.latent_rope_backward.default, args)
    leaves = [x.requires_grad_() for x in (query, latent, weight)]
    assert_op_registered(torch.ops.dscoder.latent_rope.default, (*leaves, *angles, EPS))


def test_it_compiles_in_one_graph(rng: torch.Generator) -> None:
    query, latent, weight, *angles = (x.to(gpu.DEVICE) for x in inputs(rng, 129, dtype=torch.float32))

    def run(query: Tensor, latent: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return ops.latent_rope(query * 2, latent + 1, weight, *angles, eps=EPS)

    gpu.assert_compiles_whole(run, query, latent, weight)


def test_a_captured_graph_follows_its_input(rng: torch.Generator) -> None:
    gpu.assert_replay_follows(step, *(inputs(rng, 701) for _ in range(3)))


def test_it_runs_on_the_callers_stream(rng: torch.Generator) -> None:
    gpu.assert_runs_on_the_callers_stream(step, *inputs(rng, 300))


def test_the_same_bits_every_time(rng: torch.Generator) -> None:
    gpu.assert_same_bits_every_time(step, *inputs(rng, 4099))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensors_device_counts_not_the_current_one(rng: torch.Generator) -> None:
    tensors = inputs(rng, 300)
    with torch.cuda.device(0):
        got = step(*(x.to("cuda:1") for x in tensors))
        assert torch.cuda.current_device() == 0
    gpu.assert_agrees(got, step(*tensors))
