"""mla_prefill on a GPU, forward: as exact as it has to be, in poisoned memory, out of the host's way.

"auto" is whatever a call gets, on any GPU.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dscoder import ops
from dscoder.runtime import native
from dscoder.testing import gpu
from dscoder.testing.cases import cu_seqlens, generator
from dscoder.testing.compare import assert_op_registered, assert_same
from dscoder.testing.poison import with_strides
from dscoder.testing.prefill import (
    NUM_STRAY,
    SCALE,
    WIDTHS,
    PrefillCase,
    apart,
    assert_prefills,
    prefill_case,
    stray_case,
)

ARCHS = ["auto", "sm80", "sm80 32 keys", "sm80 64 keys"]
DTYPES = [torch.bfloat16, torch.float16]
EDGES = [(n, n) for n in (1, 0, 31, 32, 33, 63, 64, 65, 2, 127, 128, 129, 255, 256, 257)]
PIECES = [(1, 200), (33, 97), (128, 129), (130, 261), (5, 64), (300, 3), (40, 0), (0, 50), (7, 5)]


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    """Cases are drawn where they are used."""
    return generator(request.node.nodeid, gpu.DEVICE)


def attend(
    q: Tensor, k: Tensor, v: Tensor, *ends: Tensor, arch: str = "auto", causal: bool = True
) -> tuple[Tensor, Tensor]:
    """The op itself, which takes what the public function knows nothing of: the keys in a block."""
    out, lse = torch.ops.dscoder.mla_prefill.default(q, k, v, *ends, SCALE, causal, False, arch)
    return out, lse


def step(arch: str, *, causal: bool = True) -> gpu.Step:
    return lambda *case: attend(*case, arch=arch, causal=causal)


def check(case: PrefillCase, arch: str = "auto", *, causal: bool = True) -> None:
    """In memory that holds NaN wherever nothing was written."""
    gpu.poison_free_memory(case[:1])
    assert_prefills(attend(*case, arch=arch, causal=causal), case, causal=causal)


def same(lengths: Sequence[int]) -> list[tuple[int, int]]:
    return [(n, n) for n in lengths]


def random_lengths(rng: torch.Generator, num_sequences: int, longest: int) -> list[int]:
    drawn = torch.randint(0, longest + 1, (num_sequences,), generator=rng, device=rng.device)
    lengths: list[int] = drawn.tolist()
    return lengths


# ---- what comes out ----


@pytest.mark.sanitize
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("arch", ARCHS[1:])
def test_a_few_rows_by_sm80(arch: str, causal: bool, rng: torch.Generator) -> None:
    case = prefill_case(rng, [*EDGES[:8], *PIECES[:3]], num_heads=2)
    assert_prefills(attend(*case, arch=arch, causal=causal), case, causal=causal)


@pytest.mark.sanitize("memcheck", "synccheck")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_few_rows_by_whatever_a_call_gets(dtype: torch.dtype, rng: torch.Generator) -> None:
    case = prefill_case(rng, [*EDGES[:8], *PIECES[:3]], num_heads=3, dtype=dtype)
    out, lse = ops.mla_prefill(*case, scale=SCALE)
    assert_prefills((out, lse), case, causal=True)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_heads", [1, 16, 17])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_edges_and_pieces_of_prompts(
    arch: str,
    dtype: torch.dtype,
    widths: tuple[int, int],
    num_heads: int,
    causal: bool,
    rng: torch.Generator,
) -> None:
    case = prefill_case(rng, [*EDGES, *PIECES], num_heads=num_heads, widths=widths, dtype=dtype)
    check(case, arch, causal=causal)


@pytest.mark.parametrize(("num_heads", "num_key_heads"), [(16, 1), (16, 4), (128, 128), (48, 16), (34, 17)])
@pytest.mark.parametrize("arch", ARCHS)
def test_heads_in_groups(arch: str, num_heads: int, num_key_heads: int, rng: torch.Generator) -> None:
    case = prefill_case(
        rng, [*EDGES, (500, 700)], num_heads=num_heads, num_key_heads=num_key_heads, widths=(128, 128)
    )
    check(case, arch)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1000, 4096, 8192, 32768])
@pytest.mark.parametrize("arch", ARCHS)
def test_long_sequences(arch: str, length: int, causal: bool, rng: torch.Generator) -> None:
    check(prefill_case(rng, [(length, length)], num_heads=2), arch, causal=causal)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_short_piece_over_a_long_cache(arch: str, rng: torch.Generator) -> None:
    check(prefill_case(rng, [(100, 40000), (1, 20000), (700, 9000)], num_heads=4), arch)


@pytest.mark.parametrize("num_sequences", [16, 200, 3000])
@pytest.mark.parametrize("arch", ARCHS)
def test_batches_of_random_lengths(arch: str, num_sequences: int, rng: torch.Generator) -> None:
    longest = min(2048, 200000 // num_sequences)
    lengths = same(random_lengths(rng, num_sequences, longest))
    check(prefill_case(rng, lengths, num_heads=2), arch)


@pytest.mark.parametrize("lengths", [[], [(0, 0)] * 5, [(0, 5), (0, 0)], [(4, 0)]], ids=str)
def test_nothing_to_do(lengths: list[tuple[int, int]], rng: torch.Generator) -> None:
    case = prefill_case(rng, lengths)
    assert_prefills(ops.mla_prefill(*case, scale=SCALE), case, causal=True)


@pytest.mark.sanitize("memcheck")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("arch", ARCHS)
def test_rows_of_no_sequence_reach_no_result(arch: str, causal: bool, rng: torch.Generator) -> None:
    """NaN that a masked weight multiplied, 0 * NaN, would show; whole blocks of it ahead and behind."""
    case = prefill_case(rng, [(30, 30), (70, 100), (33, 33), (257, 200)])
    out, lse = attend(*stray_case(case), arch=arch, causal=causal)
    inner = slice(NUM_STRAY, -NUM_STRAY)
    assert_prefills((out[inner], lse[inner]), case, causal=causal)


@pytest.mark.parametrize("arch", ARCHS)
def test_nan_stays_in_its_sequence_and_its_head(arch: str, rng: torch.Generator) -> None:
    case = prefill_case(rng, [(400, 400), (300, 300), (129, 129)])
    clean = attend(*case, arch=arch, causal=False)
    case[1][450, 1] = torch.nan
    for result, wanted in zip(attend(*case, arch=arch, causal=False), clean, strict=True):
        assert bool(result[400:700, 1].isnan().all())
        for rows in (slice(0, 400), slice(700, 829)):
            assert_same(result[rows], wanted[rows])
        assert_same(result[400:700, 0], wanted[400:700, 0])


@pytest.mark.parametrize("arch", ARCHS)
def test_scores_that_leave_one_key_the_weight(arch: str, rng: torch.Generator) -> None:
    q, k, *rest = prefill_case(rng, [(700, 700), (64, 64), (5, 5)])
    growth = torch.linspace(0.1, 6, len(k), device=gpu.DEVICE)[:, None, None]
    case = (q, (k * growth).to(k.dtype), *rest)
    check(case, arch)


@pytest.mark.sanitize("memcheck")
@pytest.mark.parametrize(
    "ends", [[0, 2**31 - 1, 60], [-5, -(2**31), 40], [50, 20, 60], [2**31 - 1] * 3, [0, 60, 0]], ids=str
)
@pytest.mark.parametrize("arch", ARCHS)
def test_wild_ends_lead_nowhere_else(arch: str, ends: list[int], rng: torch.Generator) -> None:
    q, k, v, *_ = prefill_case(rng, [(60, 60)])
    wild = torch.tensor(ends, dtype=torch.int32, device=gpu.DEVICE)
    tame = torch.tensor([0, 30, 60], dtype=torch.int32, device=gpu.DEVICE)
    for pair in ((wild, wild), (wild, tame), (tame, wild)):
        attend(q, k, v, *pair, arch=arch)
    torch.cuda.synchronize()


# ---- the plan ----


@pytest.mark.sanitize
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("side", ["queries", "keys"])
@pytest.mark.parametrize("num_sequences", [0, 1, 40, 1500])
def test_the_plan_is_the_hosts(num_sequences: int, side: str, causal: bool, rng: torch.Generator) -> None:
    ends = [cu_seqlens(random_lengths(rng, num_sequences, 900)) for _ in range(2)]
    rows = [int(x[-1]) for x in ends]
    size = native._C.mla_prefill_plan_size(max(rows), num_sequences)
    plan = torch.full((size,), 2**31 - 1, dtype=torch.int32, device=gpu.DEVICE)
    on_gpu = (x.to(gpu.DEVICE) for x in ends)
    native._C.mla_prefill_plan(*on_gpu, plan, *rows, side, 64, 32, causal)
    wanted = native._C.mla_prefill_plan_of(*(x.tolist() for x in ends), *rows, side, 64, 32, causal)
    num_tiles = int(plan[0])
    assert num_tiles == len(wanted)
    assert [tuple(tile) for tile in plan[2 : 2 + 2 * num_tiles].view(-1, 2).tolist()] == wanted


# ---- where things lie ----


@pytest.mark.parametrize("arch", ARCHS)
def test_heads_and_tokens_may_lie_apart(arch: str, rng: torch.Generator) -> None:
    q, k, v, *ends = case = prefill_case(rng, [*EDGES, *PIECES], num_heads=3)
    wanted = attend(*case, arch=arch)
    gpu.assert_all_same(attend(apart(q), apart(k), apart(v), *ends, arch=arch), wanted)
    strided = (with_strides(x) for x in (q, k, v, *ends))
    gpu.assert_all_same(attend(*strided, arch=arch), wanted)
    shifted = q.new_empty(q.numel() + 1)[1:].view(q.shape).copy_(q)
    gpu.assert_all_same(attend(shifted, k, v, *ends, arch=arch), wanted)


@pytest.mark.parametrize("arch", ARCHS)
def test_rows_behind_the_2_to_the_31st_element(arch: str, rng: torch.Generator) -> None:
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free memory on the GPU")
    q, k, v, ends_q, ends_k = case = prefill_case(rng, [(300, 300)], num_heads=16)
    far = (2**31 + 2**20) // (16 * 192)
    views = []
    for x in (q, k, v):
        memory = x.new_empty(far + len(x), *x.shape[1:])
        memory[far:] = x
        views.append(memory)
    out, lse = attend(*views, ends_q + far, ends_k + far, arch=arch)
    gpu.assert_all_same((out[far:], lse[far:]), attend(*case, arch=arch))


# ---- out of the host's way ----


@pytest.mark.parametrize("arch", ARCHS)
def test_it_never_waits_for_the_gpu(arch: str, rng: torch.Generator) -> None:
    gpu.assert_never_waits(step(arch), *prefill_case(rng, EDGES))


@pytest.mark.parametrize("arch", ARCHS)
def test_a_captured_graph_follows_its_lengths(arch: str, rng: torch.Generator) -> None:
    all_lengths = ([300] * 4, [1200, 0, 0, 0], [0, 64, 1, 1135], [0, 0, 0, 1200], [500, 400, 200, 100])
    runs = [prefill_case(rng, same(lengths)) for lengths in all_lengths]
    gpu.assert_replay_follows(step(arch), *runs)


@pytest.mark.parametrize("arch", ARCHS)
def test_it_runs_on_the_callers_stream(arch: str, rng: torch.Generator) -> None:
    gpu.assert_runs_on_the_callers_stream(step(arch), *prefill_case(rng, EDGES))


@pytest.mark.parametrize("arch", ARCHS)
def test_the_same_bits_every_time(arch: str, rng: torch.Generator) -> None:
    lengths = same([*random_lengths(rng, 60, 1024), 5000])
    gpu.assert_same_bits_every_time(step(arch), *prefill_case(rng, lengths, num_heads=16))


@pytest.mark.parametrize("arch", ARCHS)
def test_a_chain_of_kernels_that_start_early_is_as_good_as_one_that_waits(
    arch: str, rng: torch.Generator
) -> None:
    _, k, v, *ends = prefill_case(rng, EDGES, widths=(128, 128))

    def chain(*, is_apart: bool) -> Tensor:
        x = v
        for _ in range(20):
            x, _ = attend(x, k, v, *ends, arch=arch)
            if is_apart:
                torch.cuda.synchronize()
        return x

    assert_same(chain(is_apart=False), chain(is_apart=True))


def test_it_compiles_in_one_graph(rng: torch.Generator) -> None:
    q, *rest = prefill_case(rng, EDGES)

    def function(q: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = ops.mla_prefill(q * 2, *rest, scale=SCALE)
        return out + 1, lse

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True)
    gpu.assert_all_same(compiled(q), function(q))


def test_it_passes_opcheck(rng: torch.Generator) -> None:
    case = prefill_case(rng, EDGES)
    assert_op_registered(torch.ops.dscoder.mla_prefill.default, (*case, SCALE, True, False, "auto"))


# ---- what the kernels are not for ----


@pytest.mark.parametrize(
    ("dtype", "widths", "scale"),
    [
        (torch.float32, (192, 128), SCALE),
        (torch.float64, (128, 128), SCALE),
        (torch.bfloat16, (48, 32), SCALE),
        (torch.float16, (192, 192), SCALE),
        (torch.bfloat16, (192, 128), 0.0),
        (torch.bfloat16, (192, 128), -SCALE),
    ],
)
def test_anything_else_runs_the_reference(dtype: torch.dtype, widths: tuple[int, int], scale: float) -> None:
    case = prefill_case(generator(f"{dtype} {widths}"), [(70, 70), (33, 40)], widths=widths, dtype=dtype)
    gpu.assert_is_reference(lambda *x: ops.mla_prefill(*x, scale=scale), *case)


def test_the_reference_can_be_asked_for(rng: torch.Generator) -> None:
    case = prefill_case(rng, EDGES)
    assert_prefills(ops.mla_prefill(*case, scale=SCALE, arch="reference"), case, causal=True)


@pytest.mark.parametrize(
    ("changed", "scale", "message"),
    [
        ({"dtype": torch.float32}, SCALE, "q of bfloat16 or float16, got float32"),
        (
            {"widths": (192, 192)},
            SCALE,
            r"widths of k and v to be \(192, 128\) or \(128, 128\), got \(192, 192\)",
        ),
        ({}, -0.5, r"scale > 0, got -0\.5"),
    ],
)
def test_kernels_that_were_asked_for_and_cannot_say_why(
    changed: dict[str, Any], scale: float, message: str, rng: torch.Generator
) -> None:
    case = prefill_case(rng, [(5, 5)], **changed)
    with pytest.raises(ValueError, match=f"^mla_prefill: arch sm80 wants {message}$"):
        ops.mla_prefill(*case, scale=scale, arch="sm80")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensors_device_counts_not_the_current_one(rng: torch.Generator) -> None:
    case = prefill_case(rng, EDGES)
    with torch.cuda.device(0):
        got = ops.mla_prefill(*(x.to("cuda:1") for x in case), scale=SCALE)
        assert torch.cuda.current_device() == 0
    assert_prefills((got[0].to("cuda:0"), got[1].to("cuda:0")), case, causal=True)
