"""Prefill attention by the kernel of sm_90a on a GPU, from one stage to turns.

`arch` may name the step ("sm90 one stage", "sm90 one tile", "sm90 without turns"), so that the first test to
fail says which part of the kernel is wrong. docs/mla_prefill_sm90.md says what each step adds, and what to do
when all of them hold.

A wrong count of bytes shows as a kernel that waits forever, so every check runs in another process, which is
ended at a limit.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from dscoder.testing import gpu, prefill
from dscoder.testing.cases import generator
from dscoder.testing.compare import assert_same
from dscoder.testing.poison import with_strides
from dscoder.testing.prefill import (
    NUM_STRAY,
    SCALE,
    WIDTHS,
    PrefillCase,
    assert_prefills,
    prefill_case,
    stray_case,
)
from dscoder.testing.prefill_gradients import deterministic_algorithms

pytestmark = pytest.mark.skipif(not gpu.has_hopper(), reason="needs a GPU of compute capability 9.0")

STEPS = ["sm90 one stage", "sm90 one tile", "sm90 without turns", "sm90"]  # of the ladder
DTYPES = [torch.bfloat16, torch.float16]
Lengths = Sequence[tuple[int, int]]
# What a step is tried on, from the simplest; causal or not.
LADDER: dict[str, tuple[Lengths, bool]] = {
    "a whole block": ([(128, 128)], False),
    "a block and its mask": ([(128, 128)], True),
    "two blocks": ([(128, 256)], False),
    "many blocks": ([(128, 1024)], False),
    "one row": ([(1, 1)], True),
    "a block and a row": ([(129, 129)], True),
    "a piece of a prompt": ([(77, 1000)], True),
    "nothing to see": ([(300, 3), (40, 0), (0, 50)], True),
    "many tiles": ([(2048, 2048)] * 9, True),
    "many sequences": ([(n, n) for n in (64, 1, 0, 200, 127, 129, 2, 500, 63)] * 20, True),
}
EDGES = [(n, n) for n in (1, 0, 63, 64, 65, 127, 128, 129, 2, 255, 256, 257)]
PIECES = [(1, 200), (33, 97), (128, 129), (130, 261), (5, 64), (300, 3), (40, 0), (0, 50), (7, 5)]
LIMIT_S = 30.0  # of a check, which takes some milliseconds, and float64 products on the GPU

Apart = Callable[..., None]


def attend(case: Sequence[Tensor], arch: str, causal: bool = True) -> tuple[Tensor, Tensor]:
    """The op itself, which knows the steps."""
    out, lse = torch.ops.dscoder.mla_prefill.default(*case, SCALE, causal, False, arch)
    return out, lse


def check(case: PrefillCase, arch: str, causal: bool = True) -> None:
    """Between rows of no sequence, with results that hold NaN wherever nothing was written."""
    gpu.poison_free_memory(case[:1])
    with deterministic_algorithms(True):  # torch fills new memory with NaN
        results = attend(stray_case(case), arch, causal)
    torch.cuda.synchronize()
    for result in results:
        assert bool(result[:NUM_STRAY].isnan().all())
        assert bool(result[-NUM_STRAY:].isnan().all())
    out, lse = (result[NUM_STRAY:-NUM_STRAY] for result in results)
    assert_prefills((out, lse), case, causal=causal)


# ---- the ladder ----


def check_ladder(name: str, arch: str, kind: str, widths: tuple[int, int], num_heads: int) -> None:
    lengths, causal = LADDER[kind]
    rng = generator(name, gpu.DEVICE)
    check(prefill_case(rng, lengths, num_heads=num_heads, widths=widths), arch, causal)


@pytest.mark.sanitize("memcheck", "synccheck")
@pytest.mark.parametrize("kind", LADDER)
@pytest.mark.parametrize("arch", STEPS)
def test_step_by_step(arch: str, kind: str, apart: Apart) -> None:
    apart(check_ladder, arch, kind, (128, 128), 1)


@pytest.mark.parametrize("kind", LADDER)
@pytest.mark.parametrize("arch", STEPS)
def test_wide_keys_step_by_step(arch: str, kind: str, apart: Apart) -> None:
    apart(check_ladder, arch, kind, (192, 128), 3)


# ---- all sizes ----


def check_sizes(
    name: str, widths: tuple[int, int], dtype: torch.dtype, heads: tuple[int, int], causal: bool
) -> None:
    num_heads, num_key_heads = heads
    rng = generator(name, gpu.DEVICE)
    case = prefill_case(
        rng, [*EDGES, *PIECES], num_heads=num_heads, num_key_heads=num_key_heads, widths=widths, dtype=dtype
    )
    check(case, "sm90", causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(1, 1), (16, 16), (17, 17), (16, 4), (34, 17)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_edges_and_pieces_of_prompts(
    widths: tuple[int, int], dtype: torch.dtype, heads: tuple[int, int], causal: bool, apart: Apart
) -> None:
    apart(check_sizes, widths, dtype, heads, causal)


def check_lengths(name: str, lengths: Lengths, num_heads: int, causal: bool) -> None:
    rng = generator(name, gpu.DEVICE)
    check(prefill_case(rng, lengths, num_heads=num_heads), "sm90", causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1000, 4096, 8192, 32768])
def test_long_sequences(length: int, causal: bool, apart: Apart) -> None:
    apart(check_lengths, [(length, length)], 2, causal)


@pytest.mark.parametrize(
    "lengths", [[(100, 40000), (1, 20000), (700, 9000)], [(17, 17)] * 3000, [(0, 0)] * 5], ids=len
)
def test_pieces_over_a_cache_and_short_sequences(lengths: Lengths, apart: Apart) -> None:
    apart(check_lengths, lengths, 4, True)


def check_random_lengths(name: str, num_sequences: int, num_heads: int) -> None:
    rng = generator(name, gpu.DEVICE)
    drawn = torch.randint(0, 2049, (num_sequences, 2), generator=rng, device=gpu.DEVICE)
    lengths = [(num_queries, num_keys) for num_queries, num_keys in drawn.tolist()]
    check(prefill_case(rng, lengths, num_heads=num_heads), "sm90")


@pytest.mark.parametrize("num_heads", [2, 48])
def test_batches_of_random_lengths(num_heads: int, apart: Apart) -> None:
    apart(check_random_lengths, 20, num_heads)


# ---- numbers and memory ----


def check_growth(name: str, ends: tuple[float, float], dtype: torch.dtype) -> None:
    """Largest scores that rise or fall along the keys by more than a reference may lag."""
    rng = generator(name, gpu.DEVICE)
    q, k, v, ends_q, ends_k = prefill_case(rng, [(700, 700), (64, 64), (5, 5)], dtype=dtype)
    growth = torch.linspace(*ends, len(k), device=gpu.DEVICE)[:, None, None]
    check((q, (k * growth).to(dtype), v, ends_q, ends_k), "sm90")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ends", [(0.1, 6.0), (6.0, 0.1)], ids=str)
def test_references_that_move(ends: tuple[float, float], dtype: torch.dtype, apart: Apart) -> None:
    apart(check_growth, ends, dtype)


def check_nan(name: str) -> None:
    """Of one sequence and head, in a block that the next sequence's rows share."""
    case = prefill_case(generator(name, gpu.DEVICE), [(400, 400), (300, 300), (129, 129)])
    clean = attend(case, "sm90", causal=False)
    case[1][450, 1] = torch.nan
    case[2][451, 1] = torch.nan
    for result, wanted in zip(attend(case, "sm90", causal=False), clean, strict=True):
        assert bool(result[400:700, 1].isnan().all())
        for rows in (slice(0, 400), slice(700, 829)):
            assert_same(result[rows], wanted[rows])
        assert_same(result[400:700, 0], wanted[400:700, 0])


def test_nan_stays_in_its_sequence_and_its_head(apart: Apart) -> None:
    apart(check_nan)


def check_wild(name: str, ends: Sequence[int]) -> None:
    q, k, v, *_ = prefill_case(generator(name, gpu.DEVICE), [(60, 60)])
    wild = torch.tensor(ends, dtype=torch.int32, device=gpu.DEVICE)
    tame = torch.tensor([0, 30, 60], dtype=torch.int32, device=gpu.DEVICE)
    for pair in ((wild, wild), (wild, tame), (tame, wild)):
        attend((q, k, v, *pair), "sm90")
    torch.cuda.synchronize()


@pytest.mark.sanitize("memcheck")
@pytest.mark.parametrize(
    "ends", [[0, 2**31 - 1, 60], [-5, -(2**31), 40], [50, 20, 60], [2**31 - 1] * 3], ids=str
)
def test_wild_ends_lead_nowhere_else(ends: list[int], apart: Apart) -> None:
    apart(check_wild, ends)


def check_strides(name: str) -> None:
    """Strides that do not ascend with the dimensions of a tensor map among them."""
    case = prefill_case(generator(name, gpu.DEVICE), [*EDGES, *PIECES], num_heads=3, widths=(128, 128))
    q, k, v, *ends = case
    wanted = attend(case, "sm90")
    outer = tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    both = torch.cat([k, v], dim=-1)
    for views in (
        tuple(prefill.apart(x) for x in (q, k, v)),
        (q, both[..., :128], both[..., 128:]),
        outer,
        tuple(with_strides(x) for x in (q, k, v)),
    ):
        gpu.assert_all_same(attend((*views, *ends), "sm90"), wanted)


def test_heads_and_tokens_may_lie_apart(apart: Apart) -> None:
    apart(check_strides)


# ---- what it must not depend on ----


def check_same_bits(name: str, arch: str) -> None:
    """Twenty runs one behind the other: a race shows as a difference, in some of them."""
    rng = generator(name, gpu.DEVICE)
    drawn = torch.randint(0, 2049, (30,), generator=rng, device=gpu.DEVICE)
    case = prefill_case(rng, [(n, n) for n in drawn.tolist()], num_heads=16)
    runs = [attend(case, arch) for _ in range(20)]
    for run in runs:
        gpu.assert_all_same(run, runs[0])


@pytest.mark.parametrize("arch", STEPS)
def test_the_same_bits_every_time(arch: str, apart: Apart) -> None:
    apart(check_same_bits, arch)


def check_op(name: str) -> None:
    """On the caller's stream, replayed with other lengths, never waiting."""
    rng = generator(name, gpu.DEVICE)
    first, second = (
        prefill_case(rng, [(n, n) for n in lengths], num_heads=4)
        for lengths in ([300, 64, 0, 1000], [5, 1200, 65, 94])
    )

    def step(*case: Tensor) -> tuple[Tensor, ...]:
        return attend(case, "sm90")

    gpu.assert_replay_follows(step, first, second)
    gpu.assert_never_waits(step, *first)
    gpu.assert_runs_on_the_callers_stream(step, *first)


def test_the_op(apart: Apart) -> None:
    apart(check_op)


def check_chain(name: str) -> None:
    """Twenty calls that start early, each on the output of the one before."""
    _, k, v, *ends = prefill_case(generator(name, gpu.DEVICE), [*EDGES, (3000, 3000)], widths=(128, 128))

    def chain(*, is_apart: bool) -> Tensor:
        x = v
        for _ in range(20):
            x, _ = attend((x, k, v, *ends), "sm90")
            if is_apart:
                torch.cuda.synchronize()
        return x

    assert_same(chain(is_apart=False), chain(is_apart=True))


def test_a_chain_of_kernels_that_start_early_is_as_good_as_one_that_waits(apart: Apart) -> None:
    apart(check_chain)
