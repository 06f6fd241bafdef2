"""mla_decode on a GPU: as exact as it has to be, in poisoned memory, out of the host's way.

"auto" is whatever a call gets, on any GPU. tests/gpu/test_mla_decode_sm90.py runs the kernel of sm_90a apart.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dscoder import ops
from dscoder.testing import gpu
from dscoder.testing.cases import generator, randn
from dscoder.testing.compare import assert_op_registered, assert_same
from dscoder.testing.decode import (
    SCALE,
    VALUE_DIM,
    WIDTH,
    DecodeCase,
    assert_decodes,
    decode_case,
    plan_for,
    random_lengths,
)
from dscoder.testing.poison import with_strides

ARCHS = ["auto", "sm80"]
DTYPES = [torch.bfloat16, torch.float16]
PAGE_SIZES = [16, 32, 64, 128]
HEADS = [16, 32, 64, 128]
EDGES = [1, 0, 63, 64, 65, 2, 127, 200]
LONG = {"1": 1, "63": 63, "64": 64, "65": 65, "1k": 1 << 10, "4k": 1 << 12, "16k": 1 << 14, "128k": 1 << 17}


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    """Cases are drawn where they are used."""
    return generator(request.node.nodeid, gpu.DEVICE)


def decode(
    q: Tensor, cache: Tensor, table: Tensor, seq_lens: Tensor, *, arch: str = "auto", has_plan: bool = True
) -> tuple[Tensor, Tensor]:
    plan = plan_for((q, cache, table, seq_lens)) if has_plan else None
    return ops.mla_decode(q, cache, table, seq_lens, value_dim=VALUE_DIM, scale=SCALE, plan=plan, arch=arch)


def step(arch: str) -> gpu.Step:
    """Without a gradient, as there is none; a plan made by the call itself."""
    return lambda *case: decode(*case, arch=arch, has_plan=False)


def check(case: DecodeCase, arch: str = "auto") -> None:
    """With a plan and without, in memory that holds NaN wherever nothing was written."""
    gpu.poison_free_memory(case[:1])
    planned = decode(*case, arch=arch)
    assert_decodes(planned, case)
    gpu.poison_free_memory(case[:1])
    gpu.assert_all_same(decode(*case, arch=arch, has_plan=False), planned)


# ---- what comes out ----


@pytest.mark.sanitize
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("num_heads", [16, 33])
def test_a_few_rows_by_sm80(num_heads: int, page_size: int, rng: torch.Generator) -> None:
    case = decode_case(rng, EDGES, num_new=2, num_heads=num_heads, page_size=page_size)
    assert_decodes(decode(*case, arch="sm80"), case)


@pytest.mark.sanitize("memcheck", "synccheck")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_few_rows_by_whatever_a_call_gets(dtype: torch.dtype, rng: torch.Generator) -> None:
    case = decode_case(rng, EDGES, num_heads=128, dtype=dtype)
    assert_decodes(decode(*case), case)


@pytest.mark.parametrize("num_heads", HEADS)
@pytest.mark.parametrize("num_new", [1, 2, 3, 4])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("arch", ARCHS)
def test_all_pages_heads_and_new_tokens(
    arch: str, page_size: int, num_new: int, num_heads: int, rng: torch.Generator
) -> None:
    dtype = DTYPES[num_new % 2]
    lengths = [*EDGES, 1000, 777]
    case = decode_case(rng, lengths, num_new=num_new, num_heads=num_heads, page_size=page_size, dtype=dtype)
    check(case, arch)


@pytest.mark.parametrize("num_heads", [1, 5, 17, 40, 100, 256])
@pytest.mark.parametrize("arch", ARCHS)
def test_any_number_of_heads(arch: str, num_heads: int, rng: torch.Generator) -> None:
    check(decode_case(rng, EDGES, num_new=3, num_heads=num_heads), arch)


@pytest.mark.parametrize("num_new", [7, 150])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_piece_of_a_prompt(arch: str, num_new: int, rng: torch.Generator) -> None:
    check(decode_case(rng, [num_new, 300, 3, 1024], num_new=num_new), arch)


@pytest.mark.parametrize("num_heads", [16, 128])
@pytest.mark.parametrize("num_sequences", [1, 4, 16, 64, 128, 256])
@pytest.mark.parametrize("arch", ARCHS)
def test_batches_of_random_lengths(
    arch: str, num_sequences: int, num_heads: int, rng: torch.Generator
) -> None:
    check(decode_case(rng, random_lengths(rng, num_sequences, 4096), num_heads=num_heads), arch)


@pytest.mark.parametrize("num_heads", [16, 128])
@pytest.mark.parametrize("num_sequences", [1, 7])
@pytest.mark.parametrize("length", LONG)
@pytest.mark.parametrize("arch", ARCHS)
def test_all_lengths(
    arch: str, length: str, num_sequences: int, num_heads: int, rng: torch.Generator
) -> None:
    check(decode_case(rng, [LONG[length]] * num_sequences, num_heads=num_heads), arch)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_long_one_among_short_and_empty_ones(arch: str, rng: torch.Generator) -> None:
    lengths = [0, 3, 1 << 17, 0, 0, 64, *random_lengths(rng, 120, 90), 1 << 15, 0]
    check(decode_case(rng, lengths), arch)


@pytest.mark.parametrize("arch", ARCHS)
def test_scores_that_leave_one_row_the_weight(arch: str, rng: torch.Generator) -> None:
    case = decode_case(rng, [700, 64, 4096, 5], num_heads=32)
    assert_decodes(ops.mla_decode(*case, value_dim=VALUE_DIM, scale=1.0, arch=arch), case, scale=1.0)


@pytest.mark.parametrize("num_sequences", [1, 5, 200])
@pytest.mark.parametrize("arch", ARCHS)
def test_empty_sequences_alone(arch: str, num_sequences: int, rng: torch.Generator) -> None:
    check(decode_case(rng, [0] * num_sequences), arch)


@pytest.mark.parametrize(("num_sequences", "num_new"), [(0, 1), (3, 0), (0, 0)])
def test_nothing_to_do(num_sequences: int, num_new: int, rng: torch.Generator) -> None:
    q, *rest = decode_case(rng, [5] * num_sequences)
    q = q.new_empty(num_sequences, num_new, 16, WIDTH)
    out, lse = ops.mla_decode(q, *rest, value_dim=VALUE_DIM, scale=SCALE)
    assert (out.shape, lse.shape) == ((num_sequences, num_new, 16, VALUE_DIM), (num_sequences, num_new, 16))


@pytest.mark.parametrize("arch", ARCHS)
def test_nan_stays_in_its_sequence(arch: str, rng: torch.Generator) -> None:
    q, cache, table, seq_lens = decode_case(rng, [700, 300, 1])
    clean = decode(q, cache, table, seq_lens, arch=arch)
    cache[table[1, 0].long(), 5] = torch.nan
    out, lse = decode(q, cache, table, seq_lens, arch=arch)
    assert bool(out[1].isnan().all())
    assert bool(lse[1].isnan().all())
    others = torch.tensor([0, 2], device=gpu.DEVICE)
    assert_same(out[others], clean[0][others])
    assert_same(lse[others], clean[1][others])


@pytest.mark.sanitize("memcheck")
@pytest.mark.parametrize("arch", ARCHS)
def test_wild_lengths_and_pages_read_nothing_wild(arch: str, rng: torch.Generator) -> None:
    """A length beyond the table counts as all of it, a page that is not there as zeros."""
    q, cache, _, _ = decode_case(rng, [64] * 4)
    cache = torch.nan_to_num(cache)
    slots = [[0, 2**31 - 1, 1], [-1, 2, -(2**31)], [len(cache), 1, 0], [0, 1, 2]]
    table = torch.tensor(slots, dtype=torch.int32, device=gpu.DEVICE)
    seq_lens = torch.tensor([2**31 - 1, 150, 192, -7], dtype=torch.int32, device=gpu.DEVICE)
    out, lse = decode(q, cache, table, seq_lens, arch=arch)
    with_zeros = torch.cat([cache, torch.zeros_like(cache[:1])])
    tame = torch.where((table < 0) | (table >= len(cache)), len(cache), table).to(torch.int32)
    assert_decodes((out, lse), (q, with_zeros, tame, seq_lens.clamp(0, 192)))


# ---- where things lie ----


@pytest.mark.parametrize("arch", ARCHS)
def test_views_of_a_larger_cache_and_table(arch: str, rng: torch.Generator) -> None:
    q, cache, table, seq_lens = case = decode_case(rng, EDGES)
    pages = cache.new_full((len(cache), 80, WIDTH), torch.nan)
    pages[:, :64] = cache
    slots = table.new_full((len(table), table.shape[1] + 3), 2**31 - 1)
    slots[:, : table.shape[1]] = table
    views = (q, pages[:, :64], slots[:, : table.shape[1]], seq_lens)
    gpu.assert_all_same(decode(*views, arch=arch), decode(*case, arch=arch))


def test_layers_may_share_the_pages_of_one_pool(rng: torch.Generator) -> None:
    """The pages of one layer of [P, layers, L, d], as a cache that keeps all layers of a page together."""
    q, cache, table, seq_lens = case = decode_case(rng, EDGES)
    pool = cache.new_full((len(cache), 3, *cache.shape[1:]), torch.nan)
    pool[:, 1] = cache
    gpu.assert_all_same(decode(q, pool[:, 1], table, seq_lens), decode(*case))


@pytest.mark.parametrize("arch", ARCHS)
def test_other_inputs_may_lie_anywhere(arch: str, rng: torch.Generator) -> None:
    q, cache, table, seq_lens = case = decode_case(rng, EDGES, num_new=2)
    wanted = decode(*case, arch=arch)
    strided = (with_strides(q), cache, with_strides(table), with_strides(seq_lens))
    gpu.assert_all_same(decode(*strided, arch=arch), wanted)
    shifted = q.new_empty(q.numel() + 1)[1:].view(q.shape).copy_(q)
    gpu.assert_all_same(decode(shifted, cache, table, seq_lens, arch=arch), wanted)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_cache_of_more_than_2_gib(arch: str, rng: torch.Generator) -> None:
    """Elements behind the 2^31st, of pages that only the last sequence has."""
    num_pages = (2**31 + 2**28) // (64 * WIDTH)
    if torch.cuda.mem_get_info()[0] < 3 * num_pages * 64 * WIDTH * 2:
        pytest.skip("needs 16 GB of free memory on the GPU")
    q, small, table, seq_lens = case = decode_case(rng, [100, 300])
    cache = torch.empty(num_pages, 64, WIDTH, dtype=q.dtype, device=gpu.DEVICE)
    cache[-len(small) :] = small
    is_used = (table >= 0) & (table < len(small))
    far = torch.where(is_used, table + (num_pages - len(small)), table).to(torch.int32)
    gpu.assert_all_same(decode(q, cache, far, seq_lens, arch=arch), decode(*case, arch=arch))


# ---- out of the host's way ----


@pytest.mark.parametrize("has_plan", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_it_never_waits_for_the_gpu(arch: str, has_plan: bool, rng: torch.Generator) -> None:
    case = decode_case(rng, EDGES)
    gpu.assert_never_waits(lambda *x: decode(*x, arch=arch, has_plan=has_plan), *case)


def replayed(rng: torch.Generator, num_new: int = 1) -> Sequence[DecodeCase]:
    """Cases of the same shapes, lengths and pages their own."""
    lengths = (
        [300] * 6,
        [0] * 6,
        [1, 0, 2048, 64, 5, 0],
        [2048] * 6,
        EDGES[:6],
        random_lengths(rng, 6, 2048),
    )
    return [decode_case(rng, each, num_new=num_new, num_pages=200, num_slots=33) for each in lengths]


@pytest.mark.parametrize("num_new", [1, 2])
@pytest.mark.parametrize("has_plan", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_captured_graph_follows_its_lengths_and_pages(
    arch: str, has_plan: bool, num_new: int, rng: torch.Generator
) -> None:
    runs = replayed(rng, num_new)
    gpu.assert_replay_follows(lambda *x: decode(*x, arch=arch, has_plan=has_plan), *runs)
    for case in runs:
        assert_decodes(decode(*case, arch=arch, has_plan=has_plan), case)


def test_a_captured_graph_of_layers_follows_its_lengths(rng: torch.Generator) -> None:
    """One plan, then a call a layer: each link reads what the link ahead has just written."""

    def layers(q: Tensor, cache: Tensor, table: Tensor, seq_lens: Tensor) -> tuple[Tensor, ...]:
        plan = plan_for((q, cache, table, seq_lens))
        lse = None
        for _ in range(8):
            out, lse = ops.mla_decode(q, cache, table, seq_lens, value_dim=VALUE_DIM, scale=SCALE, plan=plan)
            q = torch.cat([out, q[..., VALUE_DIM:]], dim=-1)
        assert lse is not None
        return q, lse

    gpu.assert_replay_follows(layers, *replayed(rng))


@pytest.mark.parametrize("arch", ARCHS)
def test_it_runs_on_the_callers_stream(arch: str, rng: torch.Generator) -> None:
    gpu.assert_runs_on_the_callers_stream(step(arch), *decode_case(rng, EDGES))


@pytest.mark.parametrize("arch", ARCHS)
def test_the_same_bits_every_time(arch: str, rng: torch.Generator) -> None:
    case = decode_case(rng, [*random_lengths(rng, 60, 4096), 1 << 15], num_heads=32)
    gpu.assert_same_bits_every_time(step(arch), *case)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_chain_of_kernels_that_start_early_is_as_good_as_one_that_waits(
    arch: str, rng: torch.Generator
) -> None:
    q, cache, table, seq_lens = decode_case(rng, [*EDGES, 5000, 900])

    def chain(*, is_apart: bool) -> Tensor:
        x = q
        for _ in range(20):
            out, _ = decode(x, cache, table, seq_lens, arch=arch, has_plan=False)
            x = torch.cat([out, q[..., VALUE_DIM:]], dim=-1)
            if is_apart:
                torch.cuda.synchronize()
        return x

    assert_same(chain(is_apart=False), chain(is_apart=True))


@pytest.mark.parametrize("has_plan", [False, True])
def test_it_compiles_in_one_graph(has_plan: bool, rng: torch.Generator) -> None:
    q, cache, table, seq_lens = decode_case(rng, EDGES)

    def function(q: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = decode(q * 2, cache, table, seq_lens, has_plan=has_plan)
        return out + 1, lse

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True)
    gpu.assert_all_same(compiled(q, seq_lens), function(q, seq_lens))


def test_it_passes_opcheck(rng: torch.Generator) -> None:
    q, cache, table, seq_lens = case = decode_case(rng, EDGES)
    cache = torch.nan_to_num(cache)  # opcheck compares inputs by value
    library = torch.ops.dscoder
    for plan in (None, plan_for(case)):
        args = (q, cache, table, seq_lens, plan, VALUE_DIM, SCALE, "auto")
        assert_op_registered(library.mla_decode.default, args)
    assert_op_registered(library.mla_decode_plan.default, (seq_lens, 1, 16, 1 << 14))


# ---- what the kernels are not for ----


@pytest.mark.parametrize(
    ("dtype", "width", "value_dim", "page_size"),
    [
        (torch.float32, 576, 512, 64),
        (torch.float64, 576, 512, 64),
        (torch.bfloat16, 80, 64, 64),
        (torch.bfloat16, 576, 512, 24),
        (torch.float16, 576, 576, 64),
    ],
)
def test_anything_else_runs_the_reference(
    dtype: torch.dtype, width: int, value_dim: int, page_size: int
) -> None:
    rng = generator(f"{dtype} {width} {value_dim} {page_size}")
    q, cache = randn(rng, 2, 2, 4, width, dtype=dtype), randn(rng, 9, page_size, width, dtype=dtype)
    table = torch.arange(8, dtype=torch.int32).view(2, 4)
    seq_lens = torch.tensor([70, 33], dtype=torch.int32)
    gpu.assert_is_reference(
        lambda *case: ops.mla_decode(*case, value_dim=value_dim, scale=0.1), q, cache, table, seq_lens
    )


def test_the_reference_can_be_asked_for(rng: torch.Generator) -> None:
    case = decode_case(rng, EDGES)
    assert_decodes(decode(*case, arch="reference"), case)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dtype": torch.float32}, "q of bfloat16 or float16, got float32"),
        ({"value_dim": 576}, r"widths \(576, 512\) of rows and values, got \(576, 576\)"),
        ({"page_size": 24}, "page_size to be one of 16, 32, 64, 128, got 24"),
    ],
)
def test_kernels_that_were_asked_for_and_cannot_say_why(
    changed: dict[str, Any], message: str, rng: torch.Generator
) -> None:
    sizes: dict[str, Any] = {"value_dim": VALUE_DIM, **changed}
    value_dim = sizes.pop("value_dim")
    case = decode_case(rng, [5], **sizes)
    with pytest.raises(ValueError, match=f"^mla_decode: arch sm80 wants {message}$"):
        ops.mla_decode(*case, value_dim=value_dim, scale=SCALE, arch="sm80")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensors_device_counts_not_the_current_one(rng: torch.Generator) -> None:
    case = decode_case(rng, EDGES)
    with torch.cuda.device(0):
        got = decode(*(x.to("cuda:1") for x in case))
        assert torch.cuda.current_device() == 0
    assert_decodes((got[0].to("cuda:0"), got[1].to("cuda:0")), case)
