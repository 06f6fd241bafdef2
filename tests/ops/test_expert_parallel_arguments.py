"""What an exchange refuses, its routes, and a group of one rank, all in this process."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed import ProcessGroup

from dscoder import ops
from dscoder.ops.collective_transport import CollectiveTransport
from dscoder.ops.exchange_statistics import Meter
from dscoder.ops.exchange_transport import Choices, ExchangeSizes, Transport, find_slots
from dscoder.ops.expert_exchange import Exchange, start_gather, start_spread
from dscoder.ops.peer_memory import group_refusal
from dscoder.ops.peer_transport import PeerTransport
from dscoder.runtime import native
from dscoder.testing.compare import assert_close, assert_gradients, assert_same

NUM_EXPERTS, HIDDEN, MAX_TOKENS, NUM_TOPK = 4, 6, 5, 2
SIZES = {
    **{"num_experts": NUM_EXPERTS, "hidden": HIDDEN, "max_tokens": MAX_TOKENS, "num_topk": NUM_TOPK},
    "dtype": torch.float32,
}


@pytest.fixture(scope="module")
def alone() -> Iterator[ProcessGroup]:
    """A group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    yield group
    dist.destroy_process_group()


@pytest.fixture
def group(alone: ProcessGroup) -> ops.ExpertParallel:
    return ops.ExpertParallel(alone, **SIZES)


def inputs(num_tokens: int = 3) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(num_tokens, HIDDEN, generator=rng),
        "idx": torch.randint(0, NUM_EXPERTS, (num_tokens, NUM_TOPK), generator=rng, dtype=torch.int32),
        "weight": torch.rand(num_tokens, NUM_TOPK, generator=rng),
    }


def test_one_rank_keeps_its_tokens_and_has_all_experts(group: ops.ExpertParallel) -> None:
    assert (group.rank, group.num_ranks, group.first_expert, group.num_local_experts) == (
        0,
        1,
        0,
        NUM_EXPERTS,
    )
    assert (group.transport, group.exact, group.device) == ("collective", True, torch.device("cpu"))
    given_ = inputs()
    x_SD, handle = group.start_dispatch(*given_.values()).wait()
    for found, wanted in ((x_SD, "x"), (handle.idx_SK, "idx"), (handle.weight_SK, "weight")):
        assert_same(found, given_[wanted])
    assert_same(group.start_combine(x_SD, handle).wait(), given_["x"])
    x_MD, offsets_E, handle = group.dispatch(*given_.values())
    wanted_MD, maps = ops.moe_permute(given_["x"], given_["idx"], num_experts=NUM_EXPERTS)
    assert_same(x_MD, wanted_MD)
    assert_same(offsets_E, maps.offsets_E)
    wanted_TD = ops.moe_unpermute(x_MD, given_["weight"], maps)
    assert_close(group.combine(x_MD, handle), wanted_TD)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": torch.zeros(3, HIDDEN).half()}, TypeError, "x must be float32, got float16"),
        ({"x": torch.zeros(3)}, ValueError, r"x must have 2 dimensions, got shape \(3,\)"),
        ({"x": torch.zeros(3, 5)}, ValueError, r"x must have shape \(3, 6\), got \(3, 5\)"),
        ({"idx": torch.zeros(3, NUM_TOPK).long()}, TypeError, "idx must be int32, got int64"),
        ({"idx": torch.zeros(2, NUM_TOPK).int()}, ValueError, r"idx must have shape \(3, 2\), got \(2, 2\)"),
        ({"idx": torch.zeros(3, 3).int()}, ValueError, r"idx must have shape \(3, 2\), got \(3, 3\)"),
        ({"weight": torch.zeros(3, NUM_TOPK).double()}, TypeError, "weight must be float32, got float64"),
        ({"weight": torch.zeros(3, 1)}, ValueError, r"weight must have shape \(3, 2\), got \(3, 1\)"),
        (
            {"idx": torch.zeros(3, NUM_TOPK, dtype=torch.int32, device="meta")},
            ValueError,
            "idx must be on cpu like x, got meta",
        ),
        (inputs(MAX_TOKENS + 1), ValueError, "number of tokens must be <= 5, got 6"),
        (
            {name: part.to("meta") for name, part in inputs().items()},
            ValueError,
            "x must be on cpu, got meta",
        ),
    ],
)
def test_wrong_tokens_are_named(
    group: ops.ExpertParallel, changed: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^expert_parallel dispatch: {message}$"):
        group.dispatch(*(inputs() | changed).values())


@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        (torch.zeros(3, HIDDEN).half(), TypeError, "y must be float32, got float16"),
        (torch.zeros(2, HIDDEN), ValueError, r"y must have shape \(3, 6\), got \(2, 6\)"),
        (torch.zeros(3, 5), ValueError, r"y must have shape \(3, 6\), got \(3, 5\)"),
        (torch.zeros(3, HIDDEN, device="meta"), ValueError, "y must be on cpu like idx, got meta"),
    ],
)
def test_wrong_rows_are_named(
    group: ops.ExpertParallel, y: Tensor, error: type[Exception], message: str
) -> None:
    _, handle = group.start_dispatch(*inputs().values()).wait()
    with pytest.raises(error, match=f"^expert_parallel combine: {message}$"):
        group.start_combine(y, handle)


def test_a_foreign_handle_is_named(group: ops.ExpertParallel) -> None:
    maps = ops.moe_permute_maps(inputs()["idx"], num_experts=NUM_EXPERTS)
    handle: Any = maps
    with pytest.raises(
        TypeError, match=r"^expert_parallel combine: handle must be a DispatchHandle, got Perm"
    ):
        group.combine(torch.zeros(6, HIDDEN), handle)


def test_a_travel_is_waited_for_once(group: ops.ExpertParallel) -> None:
    travel = group.start_dispatch(*inputs().values())
    travel.wait()
    with pytest.raises(RuntimeError, match=r"^expert_parallel: wait must be called once, got a second call$"):
        travel.wait()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"num_experts": 0}, ValueError, "num_experts must be >= 1, got 0"),
        ({"hidden": 0}, ValueError, "hidden must be >= 1, got 0"),
        ({"max_tokens": 0}, ValueError, "max_tokens must be >= 1, got 0"),
        ({"num_topk": 0}, ValueError, "num_topk must be >= 1, got 0"),
        ({"num_topk": 2.0}, TypeError, "num_topk must be int, got float"),
        ({"dtype": torch.int32}, TypeError, "dtype must be float32 or bfloat16 or .*, got torch.int32"),
    ],
)
def test_wrong_sizes_are_named(
    alone: ProcessGroup, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^expert_parallel: {message}$"):
        ops.ExpertParallel(alone, **{**SIZES, **changed})


def test_experts_that_ranks_cannot_share_evenly_are_refused() -> None:
    three: Any = SimpleNamespace(rank=lambda: 0, size=lambda: 3)
    options = ops.ExchangeOptions(device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"num_experts must be a multiple of the group's 3 ranks, got 4$"):
        ops.ExpertParallel(three, **SIZES, options=options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"transport": "ring"}, "transport must be one of auto, peer, collective, got 'ring'"),
        *(
            ({"timeout": timeout}, rf"timeout must be > 0 and <= 1e\+06, got {timeout}")
            for timeout in (0.0, float("inf"), float("nan"), 1000001.0)
        ),
    ],
)
def test_wrong_options_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        ops.ExchangeOptions(**fields)


def split_layer(group: ops.ExpertParallel, x_TD: Tensor, idx_TK: Tensor, weight_TK: Tensor) -> Tensor:
    travel = group.start_dispatch(2 * x_TD, idx_TK, weight_TK)
    shared_TD = x_TD.sin()
    x_SD, handle = travel.wait()
    y_MD, maps = ops.moe_permute(x_SD.square(), handle.idx_SK, num_experts=NUM_EXPERTS)
    return group.start_combine(ops.moe_unpermute(y_MD, handle.weight_SK, maps), handle).wait() + shared_TD


def test_the_gradient_is_that_of_finite_differences(alone: ProcessGroup) -> None:
    group = ops.ExpertParallel(alone, **{**SIZES, "dtype": torch.float64})
    given_ = inputs()
    assert_gradients(
        lambda x_TD: split_layer(group, x_TD, given_["idx"], given_["weight"]), given_["x"].double()
    )


@pytest.mark.parametrize("wanted", ["x", "weight"])
def test_what_needs_no_gradient_arrives_without_one(wanted: str, group: ops.ExpertParallel) -> None:
    given_ = inputs()
    given_[wanted].requires_grad_()
    x_SD, handle = group.start_dispatch(*given_.values()).wait()
    assert (x_SD.requires_grad, handle.weight_SK.requires_grad) == (wanted == "x", wanted == "weight")
    assert not handle.idx_SK.requires_grad


def test_compiled_code_breaks_off_round_an_exchange(group: ops.ExpertParallel) -> None:
    x_TD, idx_TK, weight_TK = inputs().values()
    leaves = (x_TD.requires_grad_(), weight_TK.requires_grad_())
    compiled = torch.compile(split_layer, backend="aot_eager")
    found = []
    for layer in (split_layer, compiled):
        out_TD = layer(group, x_TD, idx_TK, weight_TK)
        found.append((out_TD, *torch.autograd.grad(out_TD.sum(), leaves)))
    for actual, wanted in zip(*found, strict=True):
        assert_close(actual, wanted)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_computes_the_same(
    mode: Callable[[], AbstractContextManager[None]], group: ops.ExpertParallel
) -> None:
    x_TD, idx_TK, weight_TK = inputs().values()
    wanted_TD = split_layer(group, x_TD.requires_grad_(), idx_TK, weight_TK)
    with mode():
        assert_same(split_layer(group, x_TD, idx_TK, weight_TK), wanted_TD.detach())
    assert split_layer(group, x_TD, idx_TK, weight_TK).requires_grad


@pytest.mark.parametrize("num_ranks", [1, 3, 8])
@pytest.mark.parametrize("kind", ["collective", "peer"])
def test_the_worst_case_reads_nothing_on_the_host(
    kind: str, num_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of the device meta have no values that could be read."""
    nothing = SimpleNamespace(wait=lambda *_: True)
    monkeypatch.setattr(dist, "all_to_all_single", lambda *_, **__: nothing)
    launches = ("expert_routes", "dispatch_send", "dispatch_receive", "combine_send", "combine_receive")
    monkeypatch.setattr(native, "_C", SimpleNamespace(**{name: lambda *_: None for name in launches}))
    sizes = ExchangeSizes(rank=0, num_ranks=num_ranks, exact=False, **{**SIZES, "num_experts": 24})
    buffer: Any = SimpleNamespace(status=lambda: None)
    group: Any = None
    meta = torch.device("meta")
    transport: Transport = (
        PeerTransport(sizes, buffer, device=meta)
        if kind == "peer"
        else CollectiveTransport(group, sizes, roll_call=group, timeout=1.0)
    )
    exchange = Exchange(transport, Meter(sizes, meta))
    x_TD, idx_TK, weight_TK = (part.to(meta) for part in inputs().values())
    leaves = (x_TD.requires_grad_(), weight_TK.requires_grad_())
    routes = transport.route(idx_TK)
    choices = Choices(idx_TK=idx_TK, weight_TK=weight_TK)
    x_SD, arrived = start_spread(exchange, routes, x_TD, choices)()
    assert x_SD.shape == (num_ranks * MAX_TOKENS, HIDDEN)
    out_TD = start_gather(exchange, routes, x_SD * arrived.weight_TK.sum(dim=1, keepdim=True))()
    grads = torch.autograd.grad(out_TD.sum(), leaves)
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves]


def test_the_kernels_say_what_they_miss(alone: ProcessGroup) -> None:
    wanted = r"^expert_parallel: transport peer wants tensors on a GPU, got cpu on rank 0$"
    with pytest.raises(ValueError, match=wanted):
        ops.ExpertParallel(alone, **SIZES, options=ops.ExchangeOptions(transport="peer"))


def test_who_gets_collectives_for_auto_is_told_why(
    alone: ProcessGroup, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("dscoder")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, logger="dscoder"):
            ops.ExpertParallel(alone, **SIZES)
            ops.ExpertParallel(alone, **SIZES, options=ops.ExchangeOptions(transport="collective"))
    finally:
        logger.removeHandler(caplog.handler)
    told = {record.getMessage() for record in caplog.records}
    wanted = "transport peer wants tensors on a GPU, got cpu on rank 0"
    assert told == {f"expert_parallel: rows travel by collectives, for {wanted}"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_collectives_add_up_in_the_order_of_the_ranks(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def to_oneself(received: Tensor, sent: Tensor, *_: Any, **__: Any) -> Any:
        received.copy_(sent)
        return SimpleNamespace(wait=lambda *_: True)

    monkeypatch.setattr(dist, "all_to_all_single", to_oneself)
    num_ranks, group = 8, cast(Any, None)
    sizes = ExchangeSizes(
        rank=0, num_ranks=num_ranks, exact=False, **{**SIZES, "num_experts": 8, "num_topk": 8, "dtype": dtype}
    )
    transport = CollectiveTransport(group, sizes, roll_call=group, timeout=1.0)
    routes = transport.route(torch.arange(num_ranks, dtype=torch.int32).repeat(MAX_TOKENS, 1))
    rng = torch.Generator().manual_seed(1)
    rows = torch.randn(num_ranks * MAX_TOKENS, HIDDEN, generator=rng, dtype=torch.float64).to(dtype)
    # A sum of several accumulators loses what comes between these two.
    rows[:MAX_TOKENS], rows[4 * MAX_TOKENS : 5 * MAX_TOKENS] = 1e30, -1e30
    wanted_TD = torch.zeros(MAX_TOKENS, HIDDEN, dtype=torch.promote_types(dtype, torch.float32))
    for rank in range(num_ranks):
        wanted_TD += rows[rank * MAX_TOKENS : (rank + 1) * MAX_TOKENS]
    assert_same(transport.start_gather(routes, rows, None)().out_TD, wanted_TD.to(dtype))


def test_spans_are_recorded_on_the_stream_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[Any] = []
    event = SimpleNamespace(record=streams.append, synchronize=lambda: None, elapsed_time=lambda end: 1000.0)
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    sizes = ExchangeSizes(rank=0, num_ranks=1, exact=False, **SIZES)
    meter = Meter(sizes, torch.device("cpu"))
    monkeypatch.setattr(meter, "_device", torch.device("cuda", 1))
    with meter.timed("dispatch"):
        pass
    assert streams == ["the stream of cuda:1"] * 2
    assert meter.read().dispatch_seconds == 1.0


def test_ranks_of_several_hosts_do_not_reach_each_other() -> None:
    def place(host: str, boot: str, refusal: str | None = None) -> dict[str, Any]:
        return {"host": [host, boot], "gpu": "", "refusal": refusal}

    assert group_refusal([place("a", "1"), place("a", "1")]) is None
    assert (
        group_refusal([place("a", "1"), place("b", "1")]) == "all ranks on one host, got a and, on rank 1, b"
    )
    assert (
        group_refusal([place("a", "1"), place("a", "2")]) == "all ranks on one host, got a and, on rank 1, a"
    )
    assert group_refusal([place("a", "1"), place("a", "1", "a GPU")]) == "a GPU on rank 1"


@given(st.data())
def test_slots_number_the_tokens_of_each_rank(data: st.DataObject) -> None:
    num_ranks, num_local = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    num_experts, num_topk = num_ranks * num_local, data.draw(st.integers(1, 4))
    expert = st.integers(-2, num_experts + 1) | st.sampled_from([-(2**31), 2**31 - 1])
    choices = data.draw(st.lists(st.lists(expert, min_size=num_topk, max_size=num_topk), max_size=6))
    idx_TK = torch.tensor(choices, dtype=torch.int32).view(len(choices), num_topk)
    slot_TR, counts_R = find_slots(idx_TK, num_experts=num_experts, num_ranks=num_ranks)
    for rank in range(num_ranks):
        own = range(rank * num_local, (rank + 1) * num_local)
        goes = [any(expert in own for expert in token) for token in choices]
        wanted = [sum(goes[:token]) if goes[token] else -1 for token in range(len(choices))]
        assert slot_TR[:, rank].tolist() == wanted
        assert int(counts_R[rank]) == sum(goes)
    assert slot_TR.dtype == counts_R.dtype == torch.int32
