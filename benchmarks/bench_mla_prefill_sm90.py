"""The sm_90a kernels of mla_prefill, both directions, beside those of sm_80, whichever "auto" takes.

On a Hopper GPU. Each case first runs in another process, which is ended if it hangs: such a case, and what
follows, is not measured, and takes no other result with it.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.shapes import DTYPE, ITEM, peers_of
from dscoder import ops
from dscoder.testing import cases, gpu
from dscoder.testing.aside import Aside
from dscoder.testing.measure import Contender, Problem
from dscoder.testing.results import Case

pytestmark = pytest.mark.skipif(not gpu.has_hopper(), reason="needs a GPU of compute capability 9.0")

LIMIT_S = 20.0  # of a first call, which takes some milliseconds
WIDTHS = (192, 128)
# Heads, sequences and their length; 0: lengths drawn from 128 to 4096, a mean of 2112.
SHAPES = [
    *((16, 1, 32768), (16, 4, 8192), (16, 2, 4096), (16, 16, 2048), (16, 32, 1024)),
    *((128, 2, 4096), (128, 2, 2048), (16, 16, 0), (128, 16, 0)),
]


def drawn(num_heads: int, num_sequences: int, length: int) -> tuple[list[int], list[Tensor]]:
    """Lengths, and the inputs."""
    rng = cases.generator(f"{num_heads} {num_sequences} {length}", gpu.DEVICE)
    least, most = (length, length) if length else (128, 4096)
    lengths = torch.randint(least, most + 1, (num_sequences,), generator=rng, device=gpu.DEVICE).tolist()
    rows = [cases.randn(rng, sum(lengths), num_heads, w, dtype=DTYPE) for w in (WIDTHS[0], *WIDTHS)]
    ends = cases.cu_seqlens(lengths).to(gpu.DEVICE)
    return lengths, [*rows, ends, ends]


def attention(arch: str, causal: bool) -> Contender:
    def call(*inputs: Tensor, scale: float) -> Tensor:
        return ops.mla_prefill(*inputs, scale=scale, causal=causal, arch=arch)[0]

    return call


def try_once(num_heads: int, num_sequences: int, length: int, causal: bool) -> None:
    _, inputs = drawn(num_heads, num_sequences, length)
    attention("sm90", causal)(*inputs, scale=WIDTHS[0] ** -0.5)
    torch.cuda.synchronize()


def try_gradients_once(num_heads: int, num_sequences: int, length: int, causal: bool) -> None:
    _, inputs = drawn(num_heads, num_sequences, length)
    for rows in inputs[:3]:
        rows.requires_grad_()
    attention("sm90", causal)(*inputs, scale=WIDTHS[0] ** -0.5).sum().backward()
    torch.cuda.synchronize()


def case_of(step: str, sizes: tuple[int, int, int], lengths: list[int], causal: bool) -> Case:
    """Backward makes the scores again, and a gradient for each of five operands."""
    (num_heads, num_sequences, _), num_tokens = sizes, sum(lengths)
    width, value_width = WIDTHS
    products = {"forward": width + value_width, "backward": 3 * width + 2 * value_width}[step]
    elements = {"forward": 1, "backward": 2}[step] * num_tokens * num_heads
    return Case(
        op="mla_prefill",
        step=f"{step} sm90 {'causal' if causal else 'full'}",
        model="v2" if num_heads == 128 else "v2_lite",
        shape=f"T={num_tokens} B={num_sequences} H={num_heads} d={WIDTHS[0]}/{WIDTHS[1]}",
        dtype=DTYPE,
        # Half of all pairs, where causal.
        flops=num_heads * products * sum(n * n for n in lengths) * (1 if causal else 2),
        num_bytes=ITEM * elements * 2 * sum(WIDTHS),
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("num_heads", "num_sequences", "length"), SHAPES)
def test_forward(
    measure: Callable[..., None], aside: Aside, num_heads: int, num_sequences: int, length: int, causal: bool
) -> None:
    aside.run(try_once, num_heads, num_sequences, length, causal)
    lengths, inputs = drawn(num_heads, num_sequences, length)
    case = case_of("forward", (num_heads, num_sequences, length), lengths, causal)
    problem = Problem(args=tuple(inputs), kwargs={"scale": WIDTHS[0] ** -0.5})
    peers = peers_of("mla_prefill", "forward") if causal else {}
    measure(case, problem, attention("sm90", causal), {"sm80": attention("sm80", causal), **peers})


@pytest.mark.parametrize(("num_heads", "num_sequences", "length"), SHAPES)
def test_backward(
    measure: Callable[..., None], aside: Aside, num_heads: int, num_sequences: int, length: int
) -> None:
    aside.run(try_gradients_once, num_heads, num_sequences, length, True)
    lengths, inputs = drawn(num_heads, num_sequences, length)
    rng = cases.generator(f"gradient of {num_heads} {num_sequences} {length}", gpu.DEVICE)
    grad = cases.randn(rng, sum(lengths), num_heads, WIDTHS[1], dtype=DTYPE)
    problem = Problem(args=tuple(inputs), kwargs={"scale": WIDTHS[0] ** -0.5}, num_leaves=3, grads=(grad,))
    case = case_of("backward", (num_heads, num_sequences, length), lengths, True)
    others = {"sm80": attention("sm80", True), **peers_of("mla_prefill", "backward")}
    measure(case, problem, attention("sm90", True), others)
