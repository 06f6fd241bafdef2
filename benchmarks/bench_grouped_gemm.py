"""grouped_gemm and its two gradients beside torch's grouped product, torch.mm expert by expert, and others.

The sizes are the expert layers' of the published models, from decoding (a row or none an expert, bound by the
weights' bytes) to training. The loop knows every expert's rows before it is timed, which no model does.
"""

from collections.abc import Callable, Sequence
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
    tokens = [*DECODING, LARGE, *([512, 2048, 32768] if IS_ON_GPU else [])]
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
    step: str, model: str, routing: str, offsets: Tensor, shape: Sequence[int], num_bytes: float
) -> Case:
    """`shape` is M, N, K; bytes and FLOPs count no expert that has no rows."""
    num_rows, num_columns, depth = shape
    num_tokens = num_rows // MODELS[model][1]
    text = f"T={num_tokens} N={num_columns} K={depth} E={len(offsets)}"
    return Case(
        op="grouped_gemm",
        step=step,
        model=model,
        routing=routing,
        shape=text,
        dtype=DTYPE,
        flops=2.0 * num_rows * num_columns * depth,
        num_bytes=num_bytes,
    )


def measure_product(
    measure: Callable[..., None],
    step: str,
    model: str,
    routing: str,
    tensors: tuple[Tensor, Tensor, Tensor],
    peers: dict[str, Contender],
) -> None:
    x, w, offsets = tensors
    (num_rows, depth), num_columns = x.shape, w.shape[1]
    num_used = sum(count > 0 for count in counts_of(offsets))
    elements = num_rows * depth + num_used * num_columns * depth + num_rows * num_columns
    shape = (num_rows, num_columns, depth)
    case = case_of(step, model, routing, offsets, shape, DTYPE.itemsize * elements)
    peers = {**peers, "loop": Peer(prepare=loop)}
    measure(case, Problem(args=tensors), ops.grouped_gemm, peers)


def operands(model: str, num_tokens: int, routing: str, projection: int) -> tuple[Tensor, Tensor, Tensor]:
    """x_MK, w_ENK and offsets_E of a projection."""
    num_experts, num_topk, *projections = MODELS[model]
    num_columns, depth = projections[projection]
    rng = cases.generator(f"{model} {num_tokens} {routing}", DEVICE)
    offsets = ends(rng, model, num_tokens, routing)
    x = cases.randn(rng, num_tokens * num_topk, depth, dtype=DTYPE)
    return x, cases.randn(rng, num_experts, num_columns, depth, dtype=DTYPE), offsets


@pytest.mark.parametrize(("model", "num_tokens", "routing", "projection"), forward_cases())
def test_forward(
    measure: Callable[..., None], model: str, num_tokens: int, routing: str, projection: int
) -> None:
    tensors = operands(model, num_tokens, routing, projection)
    measure_product(measure, "forward", model, routing, tensors, peers_of("grouped_gemm", "forward"))


@pytest.mark.parametrize(("model", "projection"), GRADIENTS)
def test_input_gradient(measure: Callable[..., None], model: str, projection: int) -> None:
    """The same product on the weights as they lie: a transposed view of them."""
    _, w, offsets = operands(model, LARGE, "uniform", projection)
    rng = cases.generator(f"{model} input gradient", DEVICE)
    grad = cases.randn(rng, int(offsets[-1]), w.shape[1], dtype=DTYPE)
    tensors = (grad, w.transpose(1, 2), offsets)
    measure_product(
        measure, "input gradient", model, "uniform", tensors, peers_of("grouped_gemm", "forward + backward")
    )


@pytest.mark.parametrize("dtype", GRADIENT_DTYPES, ids=str)
@pytest.mark.parametrize(("model", "projection"), GRADIENTS)
def test_weight_gradient(
    measure: Callable[..., None], model: str, projection: int, dtype: torch.dtype
) -> None:
    x, w, offsets = operands(model, LARGE, "uniform", projection)
    rng = cases.generator(f"{model} weight gradient", DEVICE)
    grad = cases.randn(rng, len(x), w.shape[1], dtype=DTYPE)
    num_bytes = DTYPE.itemsize * (grad.numel() + x.numel()) + dtype.itemsize * w.numel()
    case = case_of(
        "weight gradient" if dtype == DTYPE else "weight gradient in float32",
        *(model, "uniform", offsets, (len(x), w.shape[1], w.shape[2]), num_bytes),
    )
    problem = Problem(args=(grad, x, offsets), kwargs={"dtype": dtype})
    peers = {"torch": Peer(prepare=torch_gradient), "loop": Peer(prepare=loop_of_gradients)}
    measure(case, problem, ops.grouped_gemm_weight_gradient, peers)
