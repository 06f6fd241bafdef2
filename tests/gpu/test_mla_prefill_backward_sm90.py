"""The gradients of prefill attention by the kernel of sm_90a on a GPU: one stage, then two.

`arch` may name the step ("sm90 one stage"), so that the first test to fail says which part of the kernel is
wrong. docs/mla_prefill_backward_sm90.md says what to do when all of them hold. The forward pass is by the
kernel of sm_80, so that nothing else of sm_90a takes part.

A wrong count of bytes shows as a kernel that waits forever, so every check runs in another process, which is
ended at a limit.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dscoder.testing import gpu, prefill
from dscoder.testing.cases import generator, randn
from dscoder.testing.compare import assert_same
from dscoder.testing.prefill import (
    NUM_STRAY,
    SCALE,
    WIDTHS,
    Lengths,
    PrefillCase,
    prefill_case,
    stray_case,
)
from dscoder.testing.prefill_gradients import Gradients, assert_gradients_near

pytestmark = pytest.mark.skipif(not gpu.has_hopper(), reason="needs a GPU of compute capability 9.0")

STEPS = ["sm90 one stage", "sm90"]  # of the ladder
DTYPES = [torch.bfloat16, torch.float16]
# What a step is tried on, from the simplest; causal or not.
LADDER: dict[str, tuple[Lengths, bool]] = {
    "a whole block": ([(64, 96)], False),
    "a block and its mask": ([(64, 96)], True),
    "two blocks": ([(128, 96)], False),
    "two tiles": ([(64, 192)], False),
    "many blocks": ([(1024, 96)], False),
    "one row": ([(1, 1)], True),
    "a block and a row": ([(65, 97)], True),
    "a piece of a prompt": ([(77, 1000)], True),
    "nothing to see": ([(300, 3), (40, 0), (0, 50)], True),
    "many tiles": ([(2048, 2048)] * 9, True),
    "many sequences": ([(n, n) for n in (64, 1, 0, 200, 95, 97, 2, 500, 63)] * 20, True),
}
EDGES = [(n, n) for n in (1, 0, 15, 16, 17, 63, 64, 65, 95, 96, 97, 2, 191, 192, 193)]
PIECES = [(1, 200), (33, 97), (64, 97), (130, 261), (5, 64), (300, 3), (40, 0), (0, 50), (7, 5)]
LIMIT_S = 30.0  # of a check, which takes some milliseconds, and float64 products on the GPU

Apart = Callable[..., None]


def gradients(case: PrefillCase, grad_out: Tensor, arch: str, causal: bool = True) -> Gradients:
    """The op of the gradients itself, which knows the steps."""
    out, lse = torch.ops.dscoder.mla_prefill.default(*case, SCALE, causal, False, "sm80")
    q, k, v, *ends = case
    gpu.poison_free_memory(case[:3])
    found = torch.ops.dscoder.mla_prefill_backward.default(
        grad_out, [q, k, v, out, lse], *ends, SCALE, causal, False, arch
    )
    torch.cuda.synchronize()
    grad_q, grad_k, grad_v = found
    return grad_q, grad_k, grad_v


def check(case: PrefillCase, rng: torch.Generator, arch: str, causal: bool = True) -> None:
    """Between rows of no sequence, in memory that holds NaN wherever nothing was written."""
    case = stray_case(case)
    q, _, v, *_ = case
    grad_out = randn(rng, *q.shape[:2], v.shape[2], dtype=q.dtype)
    grad_out[:NUM_STRAY], grad_out[-NUM_STRAY:] = torch.nan, torch.nan
    assert_gradients_near(gradients(case, grad_out, arch, causal), case, grad_out, causal=causal)


# ---- the ladder ----


def check_rung(name: str, arch: str, kind: str, widths: tuple[int, int]) -> None:
    rng = generator(name, gpu.DEVICE)
    lengths, causal = LADDER[kind]
    check(prefill_case(rng, lengths, widths=widths), rng, arch, causal)


@pytest.mark.sanitize("memcheck", "synccheck")
@pytest.mark.parametrize("kind", LADDER)
@pytest.mark.parametrize("arch", STEPS)
def test_192_wide_step_by_step(arch: str, kind: str, apart: Apart) -> None:
    apart(check_rung, arch, kind, (192, 128))


@pytest.mark.parametrize("kind", LADDER)
@pytest.mark.parametrize("arch", STEPS)
def test_128_wide_step_by_step(arch: str, kind: str, apart: Apart) -> None:
    apart(check_rung, arch, kind, (128, 128))


# ---- all sizes ----


def check_sizes(name: str, widths: tuple[int, int], heads: tuple[int, int], dtype: torch.dtype) -> None:
    rng = generator(name, gpu.DEVICE)
    num_heads, num_key_heads = heads
    case = prefill_case(
        rng, [*EDGES, *PIECES], num_heads=num_heads, num_key_heads=num_key_heads, widths=widths, dtype=dtype
    )
    for causal in (True, False):
        check(case, rng, "sm90", causal)


@pytest.mark.parametrize("heads", [(1, 1), (16, 16), (17, 17), (6, 2), (16, 1), (128, 128)])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edges_and_pieces_of_prompts(
    dtype: torch.dtype, widths: tuple[int, int], heads: tuple[int, int], apart: Apart
) -> None:
    apart(check_sizes, widths, heads, dtype)


def check_long(name: str, length: int, causal: bool) -> None:
    rng = generator(name, gpu.DEVICE)
    check(prefill_case(rng, [(length, length)], num_heads=2), rng, "sm90", causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1000, 4096, 8192])
def test_long_sequences(length: int, causal: bool, apart: Apart) -> None:
    apart(check_long, length, causal)


# ---- what it must not depend on ----


def check_views(name: str) -> None:
    """Rows that lie apart give the same bits for what is not added up by atomics."""
    rng = generator(name, gpu.DEVICE)
    case = prefill_case(rng, EDGES)
    q, k, v, *ends = case
    grad_out = randn(rng, *q.shape[:2], v.shape[2], dtype=q.dtype)
    views = (prefill.apart(q), prefill.apart(k), prefill.apart(v), ends[0], ends[1])
    _, *wanted = gradients(case, grad_out, "sm90")
    _, *got = gradients(views, prefill.apart(grad_out), "sm90")
    for one, other in zip(got, wanted, strict=True):
        assert_same(one, other)


def test_rows_that_lie_apart(apart: Apart) -> None:
    apart(check_views)


def check_same_bits(name: str, arch: str) -> None:
    """Twenty runs one behind the other: a race shows as a difference, in some of them."""
    rng = generator(name, gpu.DEVICE)
    case = prefill_case(rng, [(n, n) for n in (1000, 300, 77, 64, 1500)], num_heads=16)
    grad_out = randn(rng, *case[0].shape[:2], case[2].shape[2], dtype=case[0].dtype)
    _, *wanted = gradients(case, grad_out, arch)
    for _ in range(20):
        _, *got = gradients(case, grad_out, arch)
        for one, other in zip(got, wanted, strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("arch", STEPS)
def test_gradients_of_keys_and_values_have_the_same_bits_every_time(arch: str, apart: Apart) -> None:
    apart(check_same_bits, arch)
