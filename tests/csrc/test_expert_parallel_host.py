"""The peer transport with several ranks in this process, their kernels on the host executor.

All ranks start a movement before the first lands it: they share one thread. Autograd keeps to that by itself,
since it undoes what came last first.
"""

import gc
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from dscoder import ops
from dscoder.ops import peer_transport
from dscoder.ops.exchange_statistics import Meter
from dscoder.ops.exchange_transport import Choices, ExchangeSizes
from dscoder.ops.expert_exchange import Exchange, start_gather, start_spread
from dscoder.ops.peer_transport import PeerTransport
from dscoder.testing import expert_ranks
from dscoder.testing.compare import assert_close, assert_same
from dscoder.testing.expert_ranks import Arrays, ExpertCase, ExpertProblem
from dscoder.testing.ranks import run_ranks

CPU = torch.device("cpu")
TOKENS = {1: (5,), 2: (7, 3), 4: (2, 0, 9, 5)}


def cases_of(num_ranks: int) -> tuple[ExpertCase, ...]:
    tokens, empty = TOKENS[num_ranks], (0,) * num_ranks
    wanted: list[dict[str, Any]] = [
        *({"tokens": tokens, "routing": routing} for routing in ("any", "dropped", "one_expert", "none")),
        *({"tokens": tokens, "dtype": dtype} for dtype in (torch.bfloat16, torch.float16)),
        {"tokens": empty},
        {"tokens": (*empty[:-1], 9), "routing": "one_rank", "num_topk": 2},
    ]
    return tuple(ExpertCase(**fields, hidden=8, exact=exact) for exact in (True, False) for fields in wanted)


def sizes_of(case: ExpertCase, rank: int) -> ExchangeSizes:
    return ExchangeSizes(
        rank=rank,
        num_ranks=len(case.tokens),
        num_experts=case.num_experts,
        hidden=case.hidden,
        max_tokens=case.max_tokens,
        num_topk=case.num_topk,
        dtype=case.dtype,
        exact=case.exact,
    )


def exchanges(host_ops: ModuleType, case: ExpertCase, timeout: float = 10.0) -> list[Exchange]:
    """One a rank, over buffers that reach each other."""
    num_ranks = len(case.tokens)
    buffers = [
        host_ops.CommBuffer(
            rank=rank,
            num_ranks=num_ranks,
            max_tokens=case.max_tokens,
            row_bytes=case.hidden * case.dtype.itemsize,
            num_topk=case.num_topk,
            timeout=timeout,
        )
        for rank in range(num_ranks)
    ]
    for buffer in buffers:
        for peer in buffers:
            if peer is not buffer:
                buffer.connect(peer)
    return [
        Exchange(PeerTransport(sizes_of(case, rank), buffer, device=CPU), Meter(sizes_of(case, rank), CPU))
        for rank, buffer in enumerate(buffers)
    ]


def layers_together(host_ops: ModuleType, case: ExpertCase) -> list[Arrays]:
    """The layer of every rank, step by step side by side, and the gradients of all from one backward."""
    ranks = range(len(case.tokens))
    inputs = [expert_ranks.rank_inputs(case, rank) for rank in ranks]
    each = exchanges(host_ops, case)
    routes = [each[rank].transport.route(inputs[rank].idx_TK) for rank in ranks]
    spreading = [
        start_spread(each[rank], routes[rank], inputs[rank].x_TD, choices_of(inputs[rank])) for rank in ranks
    ]
    arrived = [wait() for wait in spreading]
    rows = [experts_of(case, inputs[rank], *arrived[rank]) for rank in ranks]
    gathering = [start_gather(each[rank], routes[rank], rows[rank]) for rank in ranks]
    outs = [wait() for wait in gathering]
    leaves = [leaf for rank in ranks for leaf in inputs[rank].leaves()]
    grads = torch.autograd.grad(outs, leaves, [inputs[rank].grad_TD for rank in ranks])
    for rank in ranks:
        each[rank].transport.check()
        each[rank].transport.close()
    return [expert_ranks.named_results(outs[rank], grads[4 * rank : 4 * rank + 4]) for rank in ranks]


def choices_of(inputs: ExpertProblem) -> Choices:
    return Choices(idx_TK=inputs.idx_TK, weight_TK=inputs.weight_TK)


def experts_of(case: ExpertCase, inputs: ExpertProblem, x_SD: Tensor, choices: Choices) -> Tensor:
    """A rank's experts over its slots, summed by slot."""
    maps = ops.moe_permute_maps(choices.idx_TK, num_experts=case.num_experts // len(case.tokens))
    y_MD = ops.moe_experts(x_SD, inputs.gate_up_EFD, inputs.down_EDF, maps)
    return ops.moe_unpermute(y_MD, choices.weight_TK, maps)


@pytest.mark.dist
@pytest.mark.parametrize("num_ranks", sorted(TOKENS))
def test_kernels_do_what_the_collectives_do(
    num_ranks: int, host_ops: ModuleType, use_kernels: Callable[..., None]
) -> None:
    cases = cases_of(num_ranks)
    collective = run_ranks(expert_ranks.rank_layers, cases, num_ranks=num_ranks)
    for case in cases:
        peer = layers_together(host_ops, case)
        for rank in range(num_ranks):
            _, wanted = collective[rank][str(case)]
            for name, array in wanted.items():
                assert_close(torch.from_numpy(peer[rank][name]), torch.from_numpy(array), dtype=case.dtype)


CASE = ExpertCase(tokens=TOKENS[2], hidden=8)
SOON = 1e-5  # seconds; the executor itself gives up where threads only wait


def test_a_wait_in_vain_names_the_peer(host_ops: ModuleType, use_kernels: Callable[..., None]) -> None:
    worst = replace(CASE, exact=False)
    transport = exchanges(host_ops, worst, timeout=SOON)[0].transport
    inputs = expert_ranks.rank_inputs(worst, 0)
    spread = transport.start_spread(transport.route(inputs.idx_TK), inputs.x_TD, choices_of(inputs))()
    assert spread.x_SD.isnan().all()
    assert (spread.idx_SK == -1).all()
    slot = "dispatch_arrival[1]"
    wanted = re.escape(f"rank 0 waited in vain for rank 1 at {slot}: expected 1, seen 0")
    for _ in range(2):
        with pytest.raises(ops.ExchangeError, match=f"^expert_parallel: {wanted}$") as caught:
            transport.check()
        error = caught.value
        assert (error.rank, error.peer, error.slot, error.expected, error.seen) == (0, 1, slot, 1, 0)


def test_an_exact_wait_in_vain_raises_at_once(host_ops: ModuleType, use_kernels: Callable[..., None]) -> None:
    transport = exchanges(host_ops, CASE, timeout=SOON)[1].transport
    inputs = expert_ranks.rank_inputs(CASE, 1)
    land = transport.start_spread(transport.route(inputs.idx_TK), inputs.x_TD, choices_of(inputs))
    with pytest.raises(ops.ExchangeError, match=r"^expert_parallel: rank 1 waited in vain for rank 0 at "):
        land()


@pytest.mark.parametrize("exact", [True, False])
def test_a_movement_that_nobody_waits_for_leaves_the_next_ones_whole(
    exact: bool, host_ops: ModuleType, use_kernels: Callable[..., None]
) -> None:
    case = replace(CASE, tokens=(5,), exact=exact)
    transport = exchanges(host_ops, case)[0].transport
    inputs = expert_ranks.rank_inputs(case, 0)
    routes = transport.route(inputs.idx_TK)
    first = transport.start_spread(routes, inputs.x_TD, choices_of(inputs))
    second = transport.start_spread(routes, -inputs.x_TD, None)
    x_SD = second().x_SD
    assert_same(x_SD[:5], -inputs.x_TD.detach())
    assert_same(first().x_SD[:5], inputs.x_TD.detach())
    transport.start_gather(routes, -x_SD, None)
    gathered = transport.start_gather(routes, x_SD, None)()
    assert_same(gathered.out_TD, -inputs.x_TD.detach())
    assert gathered.weight_TK is None


def test_floats_travel_back_without_rows(host_ops: ModuleType, use_kernels: Callable[..., None]) -> None:
    each = [exchange.transport for exchange in exchanges(host_ops, CASE)]
    inputs = [expert_ranks.rank_inputs(CASE, rank) for rank in (0, 1)]
    routes = [each[rank].route(inputs[rank].idx_TK) for rank in (0, 1)]
    spreading = [
        each[rank].start_spread(routes[rank], inputs[rank].x_TD, choices_of(inputs[rank])) for rank in (0, 1)
    ]
    landed = [land() for land in spreading]
    own = [torch.where(spread.idx_SK >= 0, spread.weight_SK, 0.0) for spread in landed]
    gathering = [each[rank].start_gather(routes[rank], None, own[rank]) for rank in (0, 1)]
    for rank in (0, 1):
        gathered = gathering[rank]()
        assert gathered.out_TD is None
        assert_same(gathered.weight_TK, inputs[rank].weight_TK.detach())


class Aside:
    """Stands in for the lane of a GPU; its events are over when they are made, or when it is told."""

    is_aside = True
    is_done = True
    stream = "the caller's"

    def __init__(self, device: torch.device) -> None:
        self.log: list[str] = []

    def caller(self) -> str:
        return self.stream

    @contextmanager
    def alone(self) -> Iterator[None]:
        self.log.append("launch alone")
        yield

    @contextmanager
    def after_caller(self) -> Iterator[None]:
        self.log.append("launch")
        yield

    def record(self) -> "Aside":
        self.log.append("record")
        return self

    def has_passed(self, event: "Aside") -> bool:
        return self.is_done

    def hold_caller(self, event: "Aside") -> None:
        self.log.append("hold")


@pytest.mark.parametrize("exact", [True, False])
def test_on_a_gpu_the_receiver_starts_with_the_sender_and_the_wait_holds_the_caller(
    exact: bool,
    host_ops: ModuleType,
    use_kernels: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peer_transport, "Lane", Aside)
    case = replace(CASE, tokens=(5,), exact=exact)
    transport = exchanges(host_ops, case)[0].transport
    log = transport._lane.log
    inputs = expert_ranks.rank_inputs(case, 0)
    routes = transport.route(inputs.idx_TK)

    def steps(start: Callable[[], Callable[[], Any]]) -> tuple[list[str], list[str]]:
        log.clear()
        land = start()
        before = list(log)
        land()
        return before, log[len(before) :]

    started, landed = steps(lambda: transport.start_spread(routes, inputs.x_TD, choices_of(inputs)))
    if exact:  # how many rows come is read in the wait, which the caller's other work does not hold up
        assert (started, landed) == (["launch"], ["launch alone", "launch", "record", "hold"])
    else:
        assert (started, landed) == (["launch", "launch", "record"], ["hold"])
    for start in (
        lambda: transport.start_spread(routes, inputs.x_TD, None),
        lambda: transport.start_gather(routes, torch.zeros(5 if exact else 9, 8), None),
    ):
        assert steps(start) == (["launch", "launch", "record"], ["hold"])


def started_aside(
    host_ops: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> tuple[PeerTransport, Any, Callable[[], Any]]:
    """A rank by itself with rows on their way: its transport, their routes, their wait."""
    monkeypatch.setattr(peer_transport, "Lane", Aside)
    case = replace(CASE, tokens=(5,), exact=False)
    transport: Any = exchanges(host_ops, case)[0].transport
    inputs = expert_ranks.rank_inputs(case, 0)
    routes = transport.route(inputs.idx_TK)
    return transport, routes, transport.start_spread(routes, inputs.x_TD, choices_of(inputs))


def test_what_the_lane_writes_is_kept_until_it_has_where_nobody_waits(
    host_ops: ModuleType, use_kernels: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    transport, routes, land = started_aside(host_ops, monkeypatch)
    lane: Any = transport._lane
    lane.is_done = False
    written = [weakref.ref(routes.arrival.counts_R), weakref.ref(routes.slot_TR)]
    del routes, land
    gc.collect()
    transport._finish_earlier()
    assert all(ref() is not None for ref in written)
    lane.is_done = True
    transport._finish_earlier()
    gc.collect()
    assert all(ref() is None for ref in written)


def test_a_wait_on_another_stream_than_its_start_is_refused(
    host_ops: ModuleType, use_kernels: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    transport, _, land = started_aside(host_ops, monkeypatch)
    lane: Any = transport._lane
    lane.stream = "another"
    with pytest.raises(
        RuntimeError, match=r"^expert_parallel: a start and its wait must be on the same stream, got two$"
    ):
        land()
    lane.stream = Aside.stream
    assert land().x_SD.shape == (9, 8)


def test_the_lane_goes_ahead_of_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda *args, **kwargs: made.append((args, kwargs)))
    device = torch.device("cuda", 1)
    peer_transport.Lane(device)
    assert made == [((device,), {"priority": -1})]
