"""The gradients of mla_prefill on a GPU: exact enough, in poisoned memory, out of the host's way.

"auto" is whatever a call gets, on any GPU.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from dscoder import ops
from dscoder.testing import gpu
from dscoder.testing.cases import generator, randn
from dscoder.testing.compare import assert_op_registered, assert_same
from dscoder.testing.poison import with_strides
from dscoder.testing.prefill import (
    NUM_STRAY,
    SCALE,
    WIDTHS,
    Lengths,
    PrefillCase,
    apart,
    prefill_case,
    stray_case,
)
from dscoder.testing.prefill_gradients import Gradients, assert_gradients_near, deterministic_algorithms

ARCHS = ["auto", "sm80"]
DTYPES = [torch.bfloat16, torch.float16]
SHORT: Lengths = tuple((length, length) for length in (0, 1, 2, 15, 16, 17, 31, 33, 63, 64))
LONG: Lengths = ((1, 1), (65, 65), (127, 127), (128, 128), (129, 129), (300, 300), (0, 0), (1000, 1000))
UNEQUAL: Lengths = ((1, 700), (130, 261), (300, 3), (40, 0), (0, 50), (257, 512))


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    """Cases are drawn where they are used."""
    return generator(request.node.nodeid, gpu.DEVICE)


def step(*, deterministic: bool = True, **options: Any) -> gpu.Step:
    """out and the gradients."""

    def attend(q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor) -> Tensor:
        with deterministic_algorithms(deterministic):
            return ops.mla_prefill(q, k, v, ends_q, ends_k, scale=SCALE, **options)[0]

    return gpu.forward_and_backward(attend)


def grad_of(rng: torch.Generator, case: PrefillCase) -> Tensor:
    q, _, v, *_ = case
    return randn(rng, *q.shape[:2], v.shape[2], dtype=q.dtype)


def gradients(
    case: PrefillCase, grad_out: Tensor, *, deterministic: bool = False, **options: Any
) -> Gradients:
    q, k, v, *ends = case
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with deterministic_algorithms(deterministic):
        out, _ = ops.mla_prefill(*leaves, *ends, scale=SCALE, **options)
    grad_q, grad_k, grad_v = torch.autograd.grad(out, leaves, grad_out)
    return grad_q, grad_k, grad_v


def check(case: PrefillCase, rng: torch.Generator, **options: Any) -> None:
    """With atomics and without, in memory that holds NaN wherever nothing was written."""
    grad_out = grad_of(rng, case)
    for deterministic in (False, True):
        gpu.poison_free_memory(case[:3])
        actual = gradients(case, grad_out, deterministic=deterministic, **options)
        assert_gradients_near(actual, case, grad_out, causal=options.get("causal", True))


# ---- what comes out ----


@pytest.mark.sanitize
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("lengths", [SHORT, ((200, 129), (1, 65))], ids=["short", "long"])
def test_a_few_rows_by_sm80(lengths: Lengths, deterministic: bool, rng: torch.Generator) -> None:
    case = prefill_case(rng, lengths, num_heads=2, num_key_heads=1)
    grad_out = grad_of(rng, case)
    actual = gradients(case, grad_out, deterministic=deterministic, arch="sm80")
    assert_gradients_near(actual, case, grad_out, causal=True)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [SHORT, LONG, UNEQUAL], ids=["short", "long", "unequal"])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_all_types_widths_and_lengths(
    arch: str,
    dtype: torch.dtype,
    widths: tuple[int, int],
    lengths: Lengths,
    causal: bool,
    rng: torch.Generator,
) -> None:
    case = prefill_case(rng, lengths, num_heads=3, widths=widths, dtype=dtype)
    check(case, rng, causal=causal, arch=arch)


@pytest.mark.parametrize(
    ("num_heads", "num_key_heads"), [(1, 1), (16, 16), (128, 128), (32, 8), (32, 32), (6, 1)]
)
@pytest.mark.parametrize("arch", ARCHS)
def test_any_number_of_heads(arch: str, num_heads: int, num_key_heads: int, rng: torch.Generator) -> None:
    case = prefill_case(rng, ((130, 130), (40, 90)), num_heads=num_heads, num_key_heads=num_key_heads)
    check(case, rng, arch=arch)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_long_sequence_among_short_ones(arch: str, causal: bool, rng: torch.Generator) -> None:
    lengths = ((3, 3), (4096, 4096), (0, 0), (64, 64), (900, 2500), (17, 17))
    check(prefill_case(rng, lengths, num_heads=4), rng, causal=causal, arch=arch)


def test_many_sequences(rng: torch.Generator) -> None:
    drawn = torch.randint(0, 90, (700,), generator=rng, device=rng.device).tolist()
    check(prefill_case(rng, [(length, length) for length in drawn]), rng)


@pytest.mark.parametrize("deterministic", [False, True])
def test_rows_of_no_sequence_reach_nothing_and_get_zeros(deterministic: bool, rng: torch.Generator) -> None:
    case = prefill_case(rng, ((70, 70), (0, 3), (12, 40)))
    grad_out = grad_of(rng, case)
    nothing = grad_out.new_full((NUM_STRAY, *grad_out.shape[1:]), torch.nan)
    stray = stray_case(case)
    gpu.poison_free_memory(case[:3])
    actual = gradients(stray, torch.cat([nothing, grad_out, nothing]), deterministic=deterministic)
    for grad in actual:
        for margin in (grad[:NUM_STRAY], grad[-NUM_STRAY:]):
            assert_same(margin, torch.zeros_like(margin))
    grad_q, grad_k, grad_v = (grad[NUM_STRAY:-NUM_STRAY] for grad in actual)
    assert_gradients_near((grad_q, grad_k, grad_v), case, grad_out, causal=True)


@pytest.mark.sanitize("memcheck")
@pytest.mark.parametrize("deterministic", [False, True])
def test_wild_ends_read_and_write_nothing_wild(deterministic: bool, rng: torch.Generator) -> None:
    q, k, v, *_ = case = prefill_case(rng, ((70, 70), (12, 12)))
    grad_out = grad_of(rng, case)
    for ends in ((0, 500, 82), (0, -7, 82), (40, 20, 82), (2**31 - 1, -(2**31), 2**31 - 1)):
        wild = torch.tensor(ends, dtype=torch.int32, device=gpu.DEVICE)
        gradients((q, k, v, wild, wild), grad_out, deterministic=deterministic)
    torch.cuda.synchronize()


@pytest.mark.parametrize(("num_queries", "num_keys"), [(0, 0), (0, 5), (5, 0)])
@pytest.mark.parametrize("num_sequences", [0, 1])
def test_nothing_to_do(num_queries: int, num_keys: int, num_sequences: int, rng: torch.Generator) -> None:
    q, k, v, ends_q, ends_k = prefill_case(rng, ((num_queries, num_keys),))
    case = (q, k, v, ends_q[: num_sequences + 1], ends_k[: num_sequences + 1])
    for grad, x in zip(gradients(case, grad_of(rng, case)), case, strict=False):
        assert_same(grad, torch.zeros_like(x))


# ---- where things lie ----


@pytest.mark.parametrize("arch", ARCHS)
def test_inputs_may_lie_anywhere(arch: str, rng: torch.Generator) -> None:
    q, k, v, ends_q, ends_k = case = prefill_case(rng, ((300, 300), (7, 90)), num_heads=3)
    grad_out = grad_of(rng, case)
    wanted = gradients(case, grad_out, deterministic=True, arch=arch)
    for lay in (apart, with_strides):
        views = (lay(q), lay(k), lay(v), ends_q, ends_k)
        gpu.assert_all_same(gradients(views, lay(grad_out), deterministic=True, arch=arch), wanted)


# ---- out of the host's way ----


@pytest.mark.parametrize("deterministic", [False, True])
def test_it_never_waits_for_the_gpu(deterministic: bool, rng: torch.Generator) -> None:
    gpu.assert_never_waits(step(deterministic=deterministic), *prefill_case(rng, UNEQUAL))


def test_it_passes_opcheck(rng: torch.Generator) -> None:
    q, k, v, *ends = case = prefill_case(rng, ((37, 37), (5, 9)))
    outputs = torch.ops.dscoder.mla_prefill.default(*case, SCALE, True, True, "auto")
    args = (grad_of(rng, case), [q, k, v, *outputs], *ends, SCALE, True, True, "auto")
    assert_op_registered(torch.ops.dscoder.mla_prefill_backward.default, args)


def test_it_compiles_in_one_graph(rng: torch.Generator) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor) -> Tensor:
        return ops.mla_prefill(q * 2, k + 1, v, ends_q, ends_k, scale=SCALE)[0]

    case = prefill_case(rng, ((129, 129), (5, 64)))
    with deterministic_algorithms(True):
        gpu.assert_compiles_whole(attend, *case)


def test_a_captured_graph_follows_its_input(rng: torch.Generator) -> None:
    lengths = (((300, 300), (45, 45)), ((5, 5), (340, 340)), ((345, 345), (0, 0)))
    gpu.assert_replay_follows(step(), *(prefill_case(rng, pairs) for pairs in lengths))


def test_it_runs_on_the_callers_stream(rng: torch.Generator) -> None:
    gpu.assert_runs_on_the_callers_stream(step(), *prefill_case(rng, ((300, 300),)))


@pytest.mark.parametrize("causal", [True, False])
def test_the_same_bits_every_time_where_they_are_asked_for(causal: bool, rng: torch.Generator) -> None:
    case = prefill_case(rng, ((2048, 2048), (900, 1300), (70, 70)), num_heads=16)
    gpu.assert_same_bits_every_time(step(causal=causal), *case, num_times=10)
