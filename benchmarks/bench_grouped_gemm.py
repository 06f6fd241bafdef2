"""grouped_gemm and its two gradients beside torch's grouped product, torch.mm expert by expert, and others.

The sizes are the expert layers' of the published models, from decoding (a row or none an expert, bound by the
weights' bytes) to training. The loop knows every expert's rows before it is timed, which no model does.
"""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import DEVICE, DTYPE, IS_ON_GPU, TOKENS, peers_of
from dscoder import ops
from dscoder.testing import cases
from dscoder.testing.measure import Contender, Problem
from dscoder.testing.peer import Peer, Run, UnsupportedError
from dscoder.testing.results import Case

# E, K, then N, K of the two projections; V2 is one rank of eight.
MODELS = (
    {"v2_lite": (64, 6, (2816, 2048), (2048, 1408)), "v2_ep8": (20, 6, (3072, 5120), (5120, 1536))}
    if IS_ON_GPU
    else {"tiny_moe": (16, 4, (192, 256), (256, 96)), "v2_lite": (4, 2, (2816, 2048), (2048, 1408))}
)
DECODING = [1, 8, 32, 128] if IS_ON_GPU else [1, 128]
LARGE = TOKENS if IS_ON_GPU else 256
GRADIENT_DTYPES = [DTYPE, torch.float32] if IS_ON_GPU else [DTYPE]  # of the weights' gradient


def forward_cases() -> list[tuple[str, int, str, int]]:
    """(model, tokens, routing, projection): all sizes of one projection, some of the others."""
    first, *others = MODELS
    tokens = [*DECODING, LARGE, *([512, 2048, 4096, 32768] if IS_ON_GPU else [])]
    found = [(first, num_tokens, "uniform", 0) for num_tokens in sorted(tokens)]
    found += [(first, LARGE, kind, 0) for kind in cases.ROUTINGS if kind != "uniform"]
    found += [(first, num_tokens, "uniform", 1) for num_tokens in (*DECODING[-1:], LARGE)]
    return found + [
        (model, num_tokens, "uniform", i)
        for model in others
        for i in (0, 1)
        for num_tokens in (*DECODING[-1:], LARGE // 2)
    ]


GRADIENTS = [(model, projection) for model in MODELS for projection in (0, 1)]


def ends(rng: torch.Generator, model: str, num_tokens: int, kind: str) -> Tensor:
    num_experts, num_topk, *_ = MODELS[model]
    idx = cases.routing(rng, num_tokens=num_tokens, num_experts=num_experts, num_topk=num_topk, kind=kind)
    return ops.moe_permute_maps(idx, num_experts=num_experts).offsets_E


def counts_of(offsets: Tensor) -> list[int]:
    return [end - start for start, end in pairwise([0, *offsets.tolist()])]


def loop(x: Tensor, w: Tensor, offsets: Tensor) -> Run:
    counts = counts_of(offsets)

    def call() -> Tensor:
        y = x.new_empty(x.shape[0], w.shape[1])
        pieces = zip(counts, x.split(counts), w, y.split(counts), strict=True)
        for count, rows, w_e, out in pieces:
            if count:
                torch.mm(rows, w_e.t(), out=out)
        return y

    return Run(call=call)


def loop_of_gradients(grad: Tensor, x: Tensor, offsets: Tensor, dtype: torch.dtype) -> Run:
    if dtype != x.dtype:
        raise UnsupportedError(f"writes {x.dtype} alone, got {dtype}")
    counts = counts_of(offsets)

    def call() -> Tensor:
        out = x.new_zeros(len(counts), grad.shape[1], x.shape[1])
        for count, g, rows, out_e in zip(counts, grad.split(counts), x.split(counts), out, strict=True):
            if count:
                torch.mm(g.t(), rows, out=out_e)
        return out

    return Run(call=call)


def torch_gradient(grad: Tensor, x: Tensor, offsets: Tensor, dtype: torch.dtype) -> Run:
    if dtype != x.dtype:
        raise UnsupportedError(f"writes {x.dtype} alone, got {dtype}")
    return Run(call=lambda: F.grouped_mm(grad.t(), x, offs=offsets))


def case_of(
    step: str, model: str, routing: str, args: tuple[Tensor, ...], out_item: int = DTYPE.itemsize
) -> Case:
    """Bytes and FLOPs of a call with `args` count no expert that has no rows; a weight gradient writes all.

    `out_item`: bytes read and written for each element of a weight gradient.
    """
    x, other, offsets = args
    num_rows, depth = x.shape
    if "weight" in step:
        num_columns, depth = depth, other.shape[1]
        num_bytes = (
            DTYPE.itemsize * (x.numel() + other.numel()) + out_item * len(offsets) * num_columns * depth
        )
    else:
        num_columns = other.shape[1]
        num_used = sum(count > 0 for count in counts_of(offsets))
        elements = num_rows * (depth + num_columns) + num_used * num_columns * depth
        num_bytes = DTYPE.itemsize * elements
    num_tokens = num_rows // MODELS[model][1]
    return Case(
        op="grouped_gemm",
        step=step,
        model=model,
        routing=routing,
        shape=f"T={num_tokens} N={num_columns} K={depth} E={len(offsets)}",
        dtype=DTYPE,
        flops=2.0 * num_rows * num_columns * depth,
        num_bytes=num_bytes,
    )


def operands(
    model: str, num_tokens: int, routing: str, projection: int, step: str = "forward"
) -> tuple[Tensor, Tensor, Tensor]:
    """What a projection's step is called with: x_MK or grad_MN; w_ENK, its transpose or x_MK; offsets_E."""
    num_experts, num_topk, *projections = MODELS[model]
    num_columns, depth = projections[projection]
    rng = cases.generator(f"{model} {num_tokens} {routing}", DEVICE)
    offsets = ends(rng, model, num_tokens, routing)
    x = cases.randn(rng, num_tokens * num_topk, depth, dtype=DTYPE)
    if step == "forward":
        return x, cases.randn(rng, num_experts, num_columns, depth, dtype=DTYPE), offsets
    grad = cases.randn(rng, num_tokens * num_topk, num_columns, dtype=DTYPE)
    if "weight" in step:
        return grad, x, offsets
    return grad, cases.randn(rng, num_experts, num_columns, depth, dtype=DTYPE).transpose(1, 2), offsets


def on_stored_weights(peer: Peer) -> Peer:
    """The peer on a copy of the weights as it reads them, made before it is timed."""
    return Peer(prepare=lambda x, w, offsets: peer.prepare(x, w.contiguous(), offsets))


def product_peers(step: str) -> dict[str, Contender]:
    """Those of a forward product; torch reads transposed weights as they lie."""
    found = peers_of("grouped_gemm", "forward")
    if step != "forward":
        found = {name: peer if name == "torch" else on_stored_weights(peer) for name, peer in found.items()}
    return {**found, "loop": Peer(prepare=loop)}


@pytest.mark.parametrize(("model", "num_tokens", "routing", "projection"), forward_cases())
def test_forward(
    measure: Callable[..., None], model: str, num_tokens: int, routing: str, projection: int
) -> None:
    args = operands(model, num_tokens, routing, projection)
    case = case_of("forward", model, routing, args)
    measure(case, Problem(args=args), ops.grouped_gemm, product_peers("forward"))


@pytest.mark.parametrize(("model", "projection"), GRADIENTS)
def test_input_gradient(measure: Callable[..., None], model: str, projection: int) -> None:
    """The same product on the weights as they lie: a transposed view of them."""
    step = "input gradient"
    args = operands(model, LARGE, "uniform", projection, step)
    measure(case_of(step, model, "uniform", args), Problem(args=args), ops.grouped_gemm, product_peers(step))


@pytest.mark.parametrize("dtype", GRADIENT_DTYPES, ids=str)
@pytest.mark.parametrize(("model", "projection"), GRADIENTS)
def test_weight_gradient(
    measure: Callable[..., None], model: str, projection: int, dtype: torch.dtype
) -> None:
    step = "weight gradient" if dtype == DTYPE else "weight gradient in float32"
    args = operands(model, LARGE, "uniform", projection, step)
    problem = Problem(args=args, kwargs={"dtype": dtype})
    peers = {"torch": Peer(prepare=torch_gradient), "loop": Peer(prepare=loop_of_gradients)}
    case = case_of(step, model, "uniform", args, dtype.itemsize)
    measure(case, problem, ops.grouped_gemm_weight_gradient, peers)


def sums_of(grad: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """The float32 gradient that a training loop keeps, before the first step."""
    return x.new_zeros(len(offsets), grad.shape[1], x.shape[1], dtype=torch.float32)


def added(grad: Tensor, x: Tensor, offsets: Tensor) -> Run:
    out = sums_of(grad, x, offsets)
    return Run(call=lambda: ops.grouped_gemm_weight_gradient(grad, x, offsets, out=out, accumulate=True))


def torch_added(grad: Tensor, x: Tensor, offsets: Tensor) -> Run:
    out = sums_of(grad, x, offsets)
    return Run(call=lambda: out.add_(F.grouped_mm(grad.t(), x, offs=offsets)))


@pytest.mark.parametrize(("model", "projection"), GRADIENTS)
def test_weight_gradient_added_to_float32(measure: Callable[..., None], model: str, projection: int) -> None:
    """Each call adds to what the one ahead left, as a step of several micro-batches does."""
    step = "weight gradient added to float32"
    args = operands(model, LARGE, "uniform", projection, step)
    case = case_of(step, model, "uniform", args, 2 * torch.float32.itemsize)
    measure(case, Problem(args=args), Peer(prepare=added), {"torch": Peer(prepare=torch_added)})
