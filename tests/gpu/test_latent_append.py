"""latent_append on a GPU: the kernel writes what the reference writes, and nothing else."""

import pytest
import torch
from torch import Tensor

from dscoder import ops
from dscoder.testing import gpu
from dscoder.testing.cases import latent_case
from dscoder.testing.compare import assert_op_registered, assert_same

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EPS = 1e-6
NUM_PAGES, PAGE_SIZE = 40, 64


def step(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The cache and the query's place, both NaN where nothing is written."""
    *case, slots = tensors
    query, latent = case[:2]
    width = latent.shape[1]
    target = ops.AppendTarget(
        slots_T=slots,
        cache_PLd=query.new_full((NUM_PAGES, PAGE_SIZE, width), torch.nan),
        query_out_THd=query.new_full((*query.shape[:2], width), torch.nan),
    )
    ops.latent_append(*case, eps=EPS, target=target)
    return target.cache_PLd, target.query_out_THd


def inputs(
    rng: torch.Generator,
    num_tokens: int,
    num_heads: int = 16,
    *,
    widths: tuple[int, int, int] = (128, 64, 512),
    dtype: torch.dtype = torch.bfloat16,
    share_outside: float = 0.2,
) -> tuple[Tensor, ...]:
    """Arguments of latent_rope, and distinct slots, some of them outside the cache."""
    nope, rope, latent = widths
    slots = torch.randperm(NUM_PAGES * PAGE_SIZE, generator=rng)[:num_tokens]
    is_outside = torch.rand(num_tokens, generator=rng) < share_outside
    wild = torch.where(slots % 2 == 0, -1 - slots, slots + NUM_PAGES * PAGE_SIZE)
    case = latent_case(
        rng,
        num_tokens,
        num_heads=num_heads,
        nope_width=nope,
        rope_width=rope,
        latent_width=latent,
        dtype=dtype,
    )
    return *case, torch.where(is_outside, wild, slots)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", [(8, 8, 8), (0, 64, 256), (128, 64, 512), (24, 264, 264)], ids=str)
def test_a_few_tokens(widths: tuple[int, int, int], dtype: torch.dtype, rng: torch.Generator) -> None:
    gpu.assert_is_reference(step, *inputs(rng, 19, 3, widths=widths, dtype=dtype))


@pytest.mark.parametrize("share_outside", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_tokens", [0, 1, 16, 128, 2048])
@pytest.mark.parametrize("num_heads", [16, 128])
def test_it_writes_what_the_reference_writes(
    num_heads: int, num_tokens: int, share_outside: float, rng: torch.Generator
) -> None:
    gpu.assert_is_reference(step, *inputs(rng, num_tokens, num_heads, share_outside=share_outside))


@pytest.mark.parametrize(
    ("dtype", "latent_width"), [(torch.float64, 512), (torch.bfloat16, 520), (torch.bfloat16, 20)], ids=str
)
@pytest.mark.parametrize("share_outside", [0.0, 0.5, 1.0])
def test_what_the_kernels_do_not_take_runs_the_reference(
    dtype: torch.dtype, latent_width: int, share_outside: float, rng: torch.Generator
) -> None:
    widths = (128, 64, latent_width)
    gpu.assert_is_reference(step, *inputs(rng, 37, widths=widths, dtype=dtype, share_outside=share_outside))


def test_a_cache_whose_pages_lie_apart(rng: torch.Generator) -> None:
    *case, slots = (x.to(gpu.DEVICE) for x in inputs(rng, 64))
    wanted, _ = step(*case, slots)
    wide = torch.full((NUM_PAGES, 2, PAGE_SIZE, 576), torch.nan, dtype=torch.bfloat16, device=gpu.DEVICE)
    query_out = case[0].new_empty(64, 16, 576)
    target = ops.AppendTarget(slots_T=slots, cache_PLd=wide[:, 1], query_out_THd=query_out)
    ops.latent_append(*case, eps=EPS, target=target)
    gpu.assert_agrees([wide[:, 1]], [wanted])
    assert wide[:, 0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_it_never_waits_for_the_gpu(dtype: torch.dtype, rng: torch.Generator) -> None:
    gpu.assert_never_waits(step, *inputs(rng, 300, dtype=dtype))


def test_it_passes_opcheck(rng: torch.Generator) -> None:
    *case, slots = (x.to(gpu.DEVICE) for x in inputs(rng, 37, 3))
    cache, query_out = case[1].new_zeros(NUM_PAGES, PAGE_SIZE, 576), case[0].new_zeros(37, 3, 576)
    assert_op_registered(torch.ops.dscoder.latent_append.default, (*case, EPS, slots, cache, query_out))


def test_it_compiles_in_one_graph_and_still_writes_in_place(rng: torch.Generator) -> None:
    tensors = [x.to(gpu.DEVICE) for x in inputs(rng, 129, dtype=torch.float32)]
    torch.compiler.reset()
    gpu.assert_agrees(torch.compile(step, fullgraph=True)(*tensors), step(*tensors))


def test_a_captured_graph_follows_its_input(rng: torch.Generator) -> None:
    runs = [inputs(rng, 701, share_outside=share) for share in (0.2, 0.0, 0.9, 1.0)]
    gpu.assert_replay_follows(step, *runs)


def test_it_runs_on_the_callers_stream(rng: torch.Generator) -> None:
    gpu.assert_runs_on_the_callers_stream(step, *inputs(rng, 300))


def test_the_same_bits_every_time_and_as_latent_rope(rng: torch.Generator) -> None:
    tensors = inputs(rng, 2039, share_outside=0.0)
    gpu.assert_same_bits_every_time(step, *tensors)
    *case, slots = (x.to(gpu.DEVICE) for x in tensors)
    query, row = ops.latent_rope(*case, eps=EPS)
    cache, query_out = step(*case, slots)
    assert_same(cache.flatten(0, 1)[slots], row)
    assert_same(query_out[..., 512:], query[..., 128:])
