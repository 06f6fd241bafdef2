"""Latent decoding by the kernel of sm_90a on a GPU, step by step: one buffer, two of them, scores first.

`arch` may name the step ("sm90 one buffer", "sm90 in order", "sm90 scores first"), so that the first test to
fail says which part of the kernel is wrong. docs/mla_decode_sm90.md says what each step adds, and what to do
when all of them hold.

A wrong count of bytes shows as a kernel that waits forever, so every check runs in another process, which is
ended at a limit.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from dscoder import ops
from dscoder.runtime import native
from dscoder.testing import gpu
from dscoder.testing.cases import generator
from dscoder.testing.compare import assert_same
from dscoder.testing.decode import (
    SCALE,
    VALUE_DIM,
    DecodeCase,
    assert_decodes,
    decode_case,
    plan_for,
    random_lengths,
)

pytestmark = pytest.mark.skipif(not gpu.has_hopper(), reason="needs a GPU of compute capability 9.0")

STEPS = ["sm90 one buffer", "sm90 in order", "sm90 scores first"]  # of the ladder
DTYPES = [torch.bfloat16, torch.float16]
# What a step is tried on, from the simplest: one block, one of the other warpgroup too, several pieces.
LADDER = {
    "a whole block": [64],
    "one row": [1],
    "two blocks": [128],
    "a block and a row": [65],
    "three blocks": [192],
    "many blocks": [1000],
    "many sequences": [64, 1, 0, 200, 127, 65, 2, 500, 63] * 20,
}
EDGES = [1, 0, 63, 64, 65, 2, 127, 200]
GUARD = 64  # elements round each output
LIMIT_S = 20.0  # of a check, which takes some milliseconds, and float64 products on the GPU

Apart = Callable[..., None]


class Guarded:
    """A poisoned output between elements that nobody may write."""

    def __init__(self, *shape: int, dtype: torch.dtype) -> None:
        num_elements = torch.Size(shape).numel()
        size = num_elements + 2 * GUARD
        self.memory = torch.full((size,), torch.nan, dtype=dtype, device=gpu.DEVICE)
        self.tensor = self.memory[GUARD : GUARD + num_elements].view(shape)

    def check(self) -> None:
        """Nothing round it was written."""
        assert self.memory[:GUARD].isnan().all()
        assert self.memory[-GUARD:].isnan().all()


def decode(case: DecodeCase, arch: str, plan: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The binding itself, which knows the steps, over guarded and poisoned outputs and scratch."""
    q, cache, table, seq_lens = case
    num_sequences, num_new, num_heads, _ = q.shape
    plan = plan_for(case) if plan is None else plan
    num_parts, num_rows = len(plan) - 1 - num_sequences, num_new * num_heads
    num_slots = 2 * num_parts if num_parts > 1 else 0
    out = Guarded(num_sequences, num_new, num_heads, VALUE_DIM, dtype=q.dtype)
    lse = Guarded(num_sequences, num_new, num_heads, dtype=torch.float32)
    partial_out = Guarded(num_slots, num_rows, VALUE_DIM, dtype=torch.float32)
    partial_lse = Guarded(num_slots, num_rows, dtype=torch.float32)
    native._C.mla_decode_forward(
        q,
        cache,
        table,
        seq_lens,
        plan,
        out.tensor,
        lse.tensor,
        partial_out.tensor,
        partial_lse.tensor,
        SCALE,
        arch,
    )
    for output in (out, lse, partial_out, partial_lse):
        output.check()
    return out.tensor, lse.tensor


# ---- the ladder ----


def check_lengths(
    name: str, arch: str, lengths: Sequence[int], sizes: tuple[int, int, int], dtype: torch.dtype
) -> None:
    num_new, num_heads, page_size = sizes
    rng = generator(name, gpu.DEVICE)
    case = decode_case(rng, lengths, num_new=num_new, num_heads=num_heads, page_size=page_size, dtype=dtype)
    assert_decodes(decode(case, arch), case)


@pytest.mark.sanitize("memcheck", "synccheck")
@pytest.mark.parametrize("kind", LADDER)
@pytest.mark.parametrize("arch", STEPS)
def test_64_rows_step_by_step(arch: str, kind: str, apart: Apart) -> None:
    apart(check_lengths, arch, LADDER[kind], (1, 64, 64), torch.bfloat16)


@pytest.mark.parametrize("sizes", [(1, 16, 64), (2, 8, 32), (4, 16, 16), (1, 128, 128), (3, 40, 64)])
@pytest.mark.parametrize("arch", STEPS)
def test_pages_and_rows_step_by_step(arch: str, sizes: tuple[int, int, int], apart: Apart) -> None:
    apart(check_lengths, arch, LADDER["many sequences"], sizes, torch.bfloat16)


# ---- all sizes ----


@pytest.mark.parametrize("num_heads", [1, 16, 17, 32, 64, 100, 128, 256])
@pytest.mark.parametrize("num_new", [1, 2, 3, 4])
@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
def test_all_pages_heads_and_new_tokens(page_size: int, num_new: int, num_heads: int, apart: Apart) -> None:
    sizes = (num_new, num_heads, page_size)
    apart(check_lengths, "sm90", [*EDGES, 1000, 777], sizes, DTYPES[num_new % 2])


@pytest.mark.parametrize("lengths", [[1 << 17], [1 << 14] * 7, [0] * 5, [0, 3, 1 << 15, 0, 0, 64] * 30])
@pytest.mark.parametrize("num_heads", [16, 128])
def test_long_and_empty_sequences(num_heads: int, lengths: list[int], apart: Apart) -> None:
    apart(check_lengths, "sm90", lengths, (1, num_heads, 64), torch.bfloat16)


def check_batch(name: str, num_sequences: int, num_heads: int) -> None:
    rng = generator(name, gpu.DEVICE)
    case = decode_case(rng, random_lengths(rng, num_sequences, 4096), num_heads=num_heads)
    assert_decodes(decode(case, "sm90"), case)


@pytest.mark.parametrize("num_heads", [16, 128])
@pytest.mark.parametrize("num_sequences", [1, 16, 128, 256])
def test_batches_of_random_lengths(num_sequences: int, num_heads: int, apart: Apart) -> None:
    apart(check_batch, num_sequences, num_heads)


def check_other_plan(name: str) -> None:
    rng = generator(name, gpu.DEVICE)
    case = decode_case(rng, [400, 30, 0, 200])
    planned = torch.tensor([64, 300, 100, 500], dtype=torch.int32, device=gpu.DEVICE)
    assert_decodes(decode(case, "sm90", plan_for((*case[:3], planned))), case)


def test_a_plan_for_other_lengths(apart: Apart) -> None:
    apart(check_other_plan)


def check_wild(name: str) -> None:
    rng = generator(name, gpu.DEVICE)
    q, cache, _, _ = decode_case(rng, [64] * 4)
    cache = torch.nan_to_num(cache)
    slots = [[0, 2**31 - 1, 1], [-1, 2, -(2**31)], [len(cache), 1, 0], [0, 1, 2]]
    table = torch.tensor(slots, dtype=torch.int32, device=gpu.DEVICE)
    seq_lens = torch.tensor([2**31 - 1, 150, 192, -7], dtype=torch.int32, device=gpu.DEVICE)
    got = decode((q, cache, table, seq_lens), "sm90")
    with_zeros = torch.cat([cache, torch.zeros_like(cache[:1])])
    tame = torch.where((table < 0) | (table >= len(cache)), len(cache), table).to(torch.int32)
    assert_decodes(got, (q, with_zeros, tame, seq_lens.clamp(0, 192)))


@pytest.mark.sanitize("memcheck")
def test_wild_lengths_and_pages_read_nothing_wild(apart: Apart) -> None:
    apart(check_wild)


def check_views(name: str) -> None:
    rng = generator(name, gpu.DEVICE)
    q, cache, table, seq_lens = case = decode_case(rng, EDGES)
    pool = cache.new_full((len(cache), 3, *cache.shape[1:]), torch.nan)
    pool[:, 1] = cache
    slots = table.new_full((len(table), table.shape[1] + 3), 2**31 - 1)
    slots[:, : table.shape[1]] = table
    views = (q, pool[:, 1], slots[:, : table.shape[1]], seq_lens)
    gpu.assert_all_same(decode(views, "sm90"), decode(case, "sm90"))


def test_pages_and_rows_of_the_table_that_lie_apart(apart: Apart) -> None:
    apart(check_views)


# ---- what it must not depend on ----


def check_same_bits(name: str, arch: str, num_heads: int) -> None:
    """Twenty runs one behind the other: a race shows as a difference, in some of them."""
    rng = generator(name, gpu.DEVICE)
    case = decode_case(rng, random_lengths(rng, 100, 2000), num_heads=num_heads)
    plan = plan_for(case)
    runs = [decode(case, arch, plan) for _ in range(20)]
    for out, lse in runs:
        assert_same(out, runs[0][0])
        assert_same(lse, runs[0][1])


@pytest.mark.parametrize("num_heads", [16, 128])
@pytest.mark.parametrize("arch", STEPS)
def test_the_same_bits_every_time(arch: str, num_heads: int, apart: Apart) -> None:
    apart(check_same_bits, arch, num_heads)


def check_op(name: str, num_heads: int) -> None:
    """The op with a plan of its own: on the caller's stream, replayed with other lengths, never waiting."""
    rng = generator(name, gpu.DEVICE)
    first, second = (
        decode_case(rng, lengths, num_heads=num_heads, num_pages=60, num_slots=20)
        for lengths in ([300, 64, 0, 1000], [5, 900, 65, 1])
    )

    def step(*case: Tensor) -> tuple[Tensor, ...]:
        return ops.mla_decode(*case, value_dim=VALUE_DIM, scale=SCALE, arch="sm90")

    assert_decodes(ops.mla_decode(*first, value_dim=VALUE_DIM, scale=SCALE, arch="sm90"), first)
    gpu.assert_replay_follows(step, first, second)
    gpu.assert_never_waits(step, *first)
    gpu.assert_runs_on_the_callers_stream(step, *first)


@pytest.mark.parametrize("num_heads", [16, 128])
def test_the_op(num_heads: int, apart: Apart) -> None:
    apart(check_op, num_heads)
