"""The sm_90a kernels of the grouped products beside those of sm_80, on a Hopper GPU, whichever "auto" takes.

Each case's kernels first run in another process, which is ended if they hang: such a case, and what follows,
is not measured, and takes no other result with it.
"""

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from benchmarks.bench_grouped_gemm import DECODING, GRADIENTS, LARGE, MODELS, case_of, operands, product_peers
from benchmarks.bench_moe_experts import TOKENS, layer, problem_of
from dscoder import ops
from dscoder.testing import gpu
from dscoder.testing.aside import Aside
from dscoder.testing.measure import Problem, run_for

pytestmark = pytest.mark.skipif(not gpu.has_hopper(), reason="needs a GPU of compute capability 9.0")

LIMIT_S = 20.0  # of a first call, which takes some milliseconds
STEPS = ("forward", "input gradient", "weight gradient")
FIRST = next(iter(MODELS))
PRODUCTS = [
    *(("forward", FIRST, num_tokens, 0) for num_tokens in (DECODING[-1], LARGE // 4, LARGE // 2)),
    *((step, model, LARGE, projection) for step in STEPS for model, projection in GRADIENTS),
]
LAYERS = [(model, TOKENS[model], step) for model in MODELS for step in ("forward", "forward + backward")]


def op_of(step: str) -> Callable[..., torch.Tensor]:
    return ops.grouped_gemm_weight_gradient if step == "weight gradient" else ops.grouped_gemm


def call_product(step: str, model: str, num_tokens: int, projection: int) -> None:
    op_of(step)(*operands(model, num_tokens, "uniform", projection, step), arch="sm90")
    torch.cuda.synchronize()


def call_layer(model: str, num_tokens: int, step: str) -> None:
    case, problem = problem_of(model, num_tokens, "uniform", step)
    run_for(functools.partial(layer, arch="sm90"), problem, case.step)()
    torch.cuda.synchronize()


@pytest.mark.parametrize(("step", "model", "num_tokens", "projection"), PRODUCTS)
def test_product(
    measure: Callable[..., None], aside: Aside, step: str, model: str, num_tokens: int, projection: int
) -> None:
    aside.run(call_product, step, model, num_tokens, projection)
    args = operands(model, num_tokens, "uniform", projection, step)
    case = case_of(f"{step} sm90", model, "uniform", args)
    peers = {} if step == "weight gradient" else product_peers(step)
    peers = {name: peer for name, peer in peers.items() if name in ("torch", "deep_gemm")}
    ours, sm80 = (functools.partial(op_of(step), arch=arch) for arch in ("sm90", "sm80"))
    measure(case, Problem(args=args), ours, {"sm80": sm80, **peers})


@pytest.mark.parametrize(("model", "num_tokens", "step"), LAYERS)
def test_layer(measure: Callable[..., None], aside: Aside, model: str, num_tokens: int, step: str) -> None:
    aside.run(call_layer, model, num_tokens, step)
    case, problem = problem_of(model, num_tokens, "uniform", step)
    ours, sm80 = (functools.partial(layer, arch=arch) for arch in ("sm90", "sm80"))
    measure(replace(case, step=f"{step} sm90"), problem, ours, {"sm80": sm80})
