"""expert_parallel: dispatch and combine between 2, 4 and 8 ranks that share one card, at models' sizes.

On a GPU each rank has its own buffers, and the kernels are those that move rows between cards; all memory is
one card's, so what bounds them is its copy rate. Nothing here says how fast a link between cards is. On a CPU
two processes exchange tokens over gloo; the host executor is not timed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks import gloo_pair
from benchmarks.peers import eager_exchange
from benchmarks.shapes import DECODE, DEVICE, DTYPE, IS_ON_GPU, ITEM, LAYERS, ExpertLayer
from dscoder import ops
from dscoder.runtime import native
from dscoder.testing import cases
from dscoder.testing.measure import Problem
from dscoder.testing.peer import Peer
from dscoder.testing.results import Case
from dscoder.testing.virtual_exchange import Exchange, ExchangeCase
from dscoder.testing.virtual_ranks import Sent, VirtualRanks

NEEDS_GPU = pytest.mark.skipif(not IS_ON_GPU, reason="ranks share a GPU: there is none that has kernels here")
NEEDS_CPU = pytest.mark.skipif(IS_ON_GPU, reason="over gloo: measured where there is no GPU")

TOKENS = 4096  # of each rank
STEPS = ("dispatch", "combine")
# model, ranks, tokens of each; what has targets first
CASES = [
    *((model, 8, TOKENS) for model in LAYERS),
    *((model, 8, DECODE) for model in LAYERS),
    *(("v2_lite", num_ranks, TOKENS) for num_ranks in (4, 2)),
]

Tensors = tuple[Tensor, ...]


def shape_of(model: str, num_ranks: int, num_tokens: int) -> str:
    """As a record holds it."""
    return f"R={num_ranks} {LAYERS[model].shape(num_tokens)}"


def exchange_case(layer: ExpertLayer, num_ranks: int, num_tokens: int) -> ExchangeCase:
    """Rows where they come to lie without gaps, so that peers can be compared."""
    return ExchangeCase(
        num_ranks=num_ranks,
        max_tokens=num_tokens,
        width=layer.width,
        num_topk=layer.num_topk,
        num_local_experts=layer.num_experts // num_ranks,
        dtype=DTYPE,
        is_exact=True,
    )


def tokens_of(ranks: VirtualRanks, case: ExchangeCase, layer: ExpertLayer) -> Sent:
    """A step's tokens on every rank, routed as the model's gate does, over logits of every kind alike."""
    rng = cases.generator(f"{case.width} {case.num_ranks}", DEVICE)
    x, idx, weight = [], [], []
    for _ in range(case.num_ranks):
        logits_TE = cases.routing_logits(
            rng, num_tokens=case.max_tokens, num_experts=layer.num_experts, num_topk=layer.num_topk
        )
        idx_TK, weight_TK = ops.moe_gate(
            logits_TE,
            num_topk=layer.num_topk,
            num_groups=layer.num_groups,
            num_groups_kept=layer.num_groups_kept,
        )
        x.append(cases.randn(rng, case.max_tokens, layer.width, dtype=DTYPE))
        idx.append(idx_TK)
        weight.append(weight_TK)
    slot, count = ranks.routes(idx, num_experts=layer.num_experts)
    return Sent(x=x, idx=idx, weight=weight, slot=slot, count=count)


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """What a step has to move, from what the tokens chose."""

    num_tokens: int  # of all ranks
    num_pairs: int  # of a token and a rank it goes to
    num_own_pairs: int  # to the token's own rank

    def moved(self, row_bytes: int) -> float:
        """Each token's row is read or written once; each pair's is written to a slot, read, and dispatch
        writes it where it stays, while combine read it there.
        """
        return float(row_bytes * (self.num_tokens + 3 * self.num_pairs))

    def figures(self, row_bytes: int, seconds: float | None) -> dict[str, Any]:
        """Bytes that all ranks send in a step, with those to themselves and without, and their rates."""
        sent = {"logical": self.num_pairs, "remote": self.num_pairs - self.num_own_pairs}
        found: dict[str, Any] = {f"{name}_bytes": pairs * row_bytes for name, pairs in sent.items()}
        if seconds is not None:
            rates = {f"{name}_GB/s": pairs * row_bytes / seconds / 1e9 for name, pairs in sent.items()}
            found |= {name: float(f"{rate:.4g}") for name, rate in rates.items()}
        return found


def traffic_of(sent: Sent) -> Traffic:
    return Traffic(
        num_tokens=sum(len(x_TD) for x_TD in sent.x),
        num_pairs=sum(int(count_R.sum()) for count_R in sent.count),
        num_own_pairs=sum(int(count_R[rank]) for rank, count_R in enumerate(sent.count)),
    )


def dispatch_by(exchange: Exchange, begins: list[list[int]]) -> Callable[..., Any]:
    def dispatch(x: Tensors, idx: Tensors, weight: Tensors, slot: Tensors, count: Tensors) -> Any:
        sent = Sent(x=list(x), idx=list(idx), weight=list(weight), slot=list(slot), count=list(count))
        received = exchange.dispatch(sent, begins)
        return tuple(received.x), tuple(received.idx), tuple(received.weight)

    return dispatch


def combine_by(exchange: Exchange, begins: list[list[int]], num_tokens: int) -> Callable[..., Any]:
    def combine(y: Tensors, slot: Tensors, count: Tensors, came: Tensors) -> Any:
        out = [y_SD.new_empty(num_tokens, y_SD.shape[1]) for y_SD in y]
        exchange.launch("combine", (y, came, None, begins), (out, slot, count, None), ())
        return tuple(out)

    return combine


@NEEDS_GPU
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("model", "num_ranks", "num_tokens"), CASES)
def test_step(
    measure: Callable[..., None],
    benchmark: BenchmarkFixture,
    model: str,
    num_ranks: int,
    num_tokens: int,
    step: str,
) -> None:
    """All ranks' sends in one launch, all receives in the next; beside them both in one grid."""
    layer = LAYERS[model]
    setting = exchange_case(layer, num_ranks, num_tokens)
    ranks = setting.ranks(native._C)
    sent = tokens_of(ranks, setting, layer)
    ways = {how: Exchange(ranks, replace(setting, how=how)) for how in ("launches", "one_grid", "streams")}
    begins = ways["launches"].begins(sent.count)
    came = torch.stack(sent.count).T.contiguous().unbind()
    slot, count = tuple(sent.slot), tuple(sent.count)
    if step == "dispatch":
        problem = Problem(args=(tuple(sent.x), tuple(sent.idx), tuple(sent.weight), slot, count))
        contenders = {how: dispatch_by(exchange, begins) for how, exchange in ways.items()}
        row_bytes = ITEM * layer.width + 8 * layer.num_topk
        peer = Peer(prepare=eager_exchange.dispatch(setting.num_local_experts))
    else:
        rng = cases.generator(f"{model} {num_ranks} combine", DEVICE)
        y = tuple(cases.randn(rng, begin[-1], layer.width, dtype=DTYPE) for begin in begins)
        problem = Problem(args=(y, slot, count, came))
        contenders = {how: combine_by(exchange, begins, num_tokens) for how, exchange in ways.items()}
        row_bytes = ITEM * layer.width
        peer = Peer(prepare=eager_exchange.combine)
    traffic = traffic_of(sent)
    case = Case(
        op="expert_parallel",
        step=step,
        model=model,
        shape=shape_of(model, num_ranks, num_tokens),
        dtype=DTYPE,
        num_bytes=traffic.moved(row_bytes),
    )
    ours = contenders.pop("launches")
    measure(case, problem, ours, {**contenders, "torch": peer})
    microseconds = benchmark.extra_info.get("us")
    benchmark.extra_info.update(traffic.figures(row_bytes, microseconds and microseconds / 1e6))
    assert ranks.status() == [None] * num_ranks


@NEEDS_CPU
@pytest.mark.dist
@pytest.mark.parametrize("step", STEPS)
def test_over_gloo(measure: Callable[..., None], benchmark: BenchmarkFixture, step: str) -> None:
    """Exact sizes, 512 tokens a rank, the second rank on one thread, told with each call what is next."""
    with gloo_pair.first_of_two() as rank:
        case = Case(
            op="expert_parallel",
            step=f"{step} over gloo",
            model=gloo_pair.MODEL,
            shape=shape_of(gloo_pair.MODEL, gloo_pair.NUM_RANKS, gloo_pair.NUM_TOKENS),
            dtype=torch.float32,
        )
        torch_step = f"{step} by torch"
        measure(case, Problem(args=()), lambda: rank.do(step), {"torch": lambda: rank.do(torch_step)})
        traffic = Traffic(
            num_tokens=gloo_pair.NUM_TOKENS, num_pairs=sum(rank.sent), num_own_pairs=rank.sent[0]
        )
        microseconds = benchmark.extra_info.get("us")
        row_bytes = 4 * LAYERS[gloo_pair.MODEL].width
        benchmark.extra_info.update(traffic.figures(row_bytes, microseconds and microseconds / 1e6))
