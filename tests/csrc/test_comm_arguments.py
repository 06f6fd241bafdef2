"""What the exchange's bindings refuse, and where things lie in a buffer."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from dscoder.runtime.native import _C
from dscoder.testing.virtual_ranks import VirtualRanks

NUM_RANKS, MAX_TOKENS, WIDTH, NUM_TOPK, NUM_TOKENS = 2, 4, 8, 3, 2
NUM_ROWS = NUM_RANKS * MAX_TOKENS
SHAPE: dict[str, Any] = {
    "num_ranks": NUM_RANKS,
    "max_tokens": MAX_TOKENS,
    "row_bytes": 4 * WIDTH,
    "num_topk": NUM_TOPK,
}


@pytest.fixture
def ranks(host_ops: ModuleType) -> VirtualRanks:
    return VirtualRanks(host_ops, **SHAPE)


def int32(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def floats(*shape: int) -> Tensor:
    return torch.zeros(shape)


# ---- buffers ----


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"num_ranks": 0}, "num_ranks must be 1 to 8, got 0"),
        ({"num_ranks": 9}, "num_ranks must be 1 to 8, got 9"),
        ({"rank": 2}, "rank must be 0 to 1, got 2"),
        ({"rank": -1}, "rank must be 0 to 1, got -1"),
        ({"max_tokens": 0}, "max_tokens must be 1 to 131072, got 0"),
        ({"max_tokens": 131073}, "max_tokens must be 1 to 131072, got 131073"),
        ({"row_bytes": 24}, "row_bytes must be a positive multiple of 16, got 24"),
        ({"row_bytes": 0}, "row_bytes must be a positive multiple of 16, got 0"),
        ({"num_topk": 17}, "num_topk must be 0 to 16, got 17"),
        ({"num_topk": -1}, "num_topk must be 0 to 16, got -1"),
        ({"timeout": 0.0}, "timeout must be above 0 s, at most 1e9 s, got 0"),
        ({"timeout": float("nan")}, "timeout must be above 0 s, at most 1e9 s, got nan"),
        ({"num_blocks": -1}, "num_blocks must be >= 0, got -1"),
        ({"copy": "fast"}, "copy must be auto, words or bulk, got fast"),
    ],
)
def test_a_buffer_of_wrong_sizes_is_refused(
    host_ops: ModuleType, change: dict[str, Any], wanted: str
) -> None:
    with pytest.raises(ValueError, match=f"CommBuffer: {wanted}"):
        host_ops.CommBuffer(**{**SHAPE, "rank": 0, "timeout": 1.0, **change})


def make(host_ops: ModuleType, rank: int, **change: Any) -> Any:
    return host_ops.CommBuffer(**{**SHAPE, "rank": rank, "timeout": 1.0, **change})


def test_peers_that_do_not_fit_are_refused(host_ops: ModuleType, ranks: VirtualRanks) -> None:
    first = make(host_ops, 0)
    with pytest.raises(ValueError, match="peer must be a rank below 2 other than 0, got 0"):
        first.connect(make(host_ops, 0))
    with pytest.raises(ValueError, match="the buffers of ranks 0 and 1 differ in shape"):
        first.connect(make(host_ops, 1, max_tokens=5))
    with pytest.raises(ValueError, match="peer 1 is connected already"):
        ranks.buffers[0].connect(ranks.buffers[1])
    with pytest.raises(ValueError, match="peer must be a rank below 2 other than 0, got 2"):
        first.open(2, b"")


def test_the_executor_has_no_memory_for_other_processes(host_ops: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="handle: memory of the host executor is for this process alone"):
        make(host_ops, 0).handle()
    with pytest.raises(RuntimeError, match="open: the host executor cannot reach another process's memory"):
        make(host_ops, 0).open(1, b"handle")


def test_a_closed_buffer_is_refused(host_ops: ModuleType, ranks: VirtualRanks) -> None:
    ranks.buffers[0].close()
    ranks.buffers[0].close()  # again: nothing
    with pytest.raises(ValueError, match="dispatch_counts: the buffer of rank 0 is closed"):
        host_ops.dispatch_counts([ranks.buffers[0]], [int32(NUM_RANKS)])
    with pytest.raises(ValueError, match="CommBuffer: handle: the buffer is closed"):
        ranks.buffers[0].handle()
    with pytest.raises(ValueError, match="CommBuffer: fail: the buffer is closed"):
        ranks.buffers[0].fail()
    with pytest.raises(ValueError, match="CommBuffer: connect: a buffer is closed"):
        make(host_ops, 1).connect(ranks.buffers[0])
    send(host_ops, [ranks.buffers[1]])  # the closed one's memory lives as long as a peer may write it


def test_a_buffer_that_lets_go_of_its_peers_keeps_its_own_memory(
    host_ops: ModuleType, ranks: VirtualRanks
) -> None:
    first, second = ranks.buffers
    address = first.address
    first.disconnect()
    with pytest.raises(ValueError, match="dispatch_counts: the buffer of rank 0 is not connected to rank 1"):
        host_ops.dispatch_counts([first], [int32(NUM_RANKS)])
    assert first.address == address
    send(host_ops, [second])
    first.connect(second)
    send(host_ops, [first])


def test_a_buffer_without_its_peers_is_refused(host_ops: ModuleType) -> None:
    with pytest.raises(ValueError, match="dispatch_counts: the buffer of rank 0 is not connected to rank 1"):
        host_ops.dispatch_counts([make(host_ops, 0)], [int32(NUM_RANKS)])


def test_buffers_that_are_no_group_are_refused(host_ops: ModuleType, ranks: VirtualRanks) -> None:
    first = ranks.buffers[0]
    with pytest.raises(ValueError, match="dispatch_counts: buffers must have 1 to 8 entries, got 0"):
        host_ops.dispatch_counts([], [])
    with pytest.raises(ValueError, match="dispatch_counts: rank 0 occurs twice in buffers"):
        host_ops.dispatch_counts([first, first], [int32(NUM_RANKS)] * 2)
    with pytest.raises(TypeError, match=r"must be CommBuffers, got None|incompatible function arguments"):
        host_ops.dispatch_counts([None], [int32(NUM_RANKS)])
    with pytest.raises(ValueError, match="the buffers of ranks 0 and 1 are not of one group"):
        host_ops.dispatch_counts([first, VirtualRanks(host_ops, **SHAPE).buffers[1]], [int32(NUM_RANKS)] * 2)
    with pytest.raises(ValueError, match="count must have an entry for each of the 1 buffers, got 0"):
        host_ops.dispatch_counts([first], [])


# ---- launches ----


def send(host_ops: ModuleType, buffers: list[Any], **change: Any) -> None:
    right = {
        "x": floats(NUM_TOKENS, WIDTH),
        "slot": int32(NUM_TOKENS, NUM_RANKS) - 1,
        "count": int32(NUM_RANKS),
        "idx": int32(NUM_TOKENS, NUM_TOPK),
        "weight": floats(NUM_TOKENS, NUM_TOPK),
    }
    host_ops.dispatch_send(buffers, **{name: [value] for name, value in {**right, **change}.items()})


def receive(host_ops: ModuleType, buffers: list[Any], **change: Any) -> None:
    right = {
        "x": floats(NUM_ROWS, WIDTH),
        "count": int32(NUM_RANKS),
        "idx": int32(NUM_ROWS, NUM_TOPK),
        "weight": floats(NUM_ROWS, NUM_TOPK),
    }
    num_local_experts = change.pop("num_local_experts", 2)
    lists = {name: [value] for name, value in {**right, **change}.items()}
    host_ops.dispatch_receive(buffers, **lists, num_local_experts=num_local_experts)


def send_back(host_ops: ModuleType, buffers: list[Any], **change: Any) -> None:
    right = {"y": floats(NUM_ROWS, WIDTH), "count": int32(NUM_RANKS), "weight": floats(NUM_ROWS, NUM_TOPK)}
    host_ops.combine_send(buffers, **{name: [value] for name, value in {**right, **change}.items()})


def add_up(host_ops: ModuleType, buffers: list[Any], **change: Any) -> None:
    right = {
        "out": floats(NUM_TOKENS, WIDTH),
        "slot": int32(NUM_TOKENS, NUM_RANKS),
        "count": int32(NUM_RANKS),
        "weight": floats(NUM_TOKENS, NUM_TOPK),
    }
    host_ops.combine_receive(buffers, **{name: [value] for name, value in {**right, **change}.items()})


def off_boundary(*shape: int) -> Tensor:
    memory = torch.zeros(torch.Size(shape).numel() + 1)
    return memory[1:].view(shape)


@pytest.mark.parametrize(
    ("launch", "change", "error", "wanted"),
    [
        (send, {"x": floats(3, WIDTH)}, ValueError, r"x must have shape \[2, any\], got \[3, 8\]"),
        (send, {"x": floats(2, 6)}, ValueError, "a row of x must be a positive multiple of 16 bytes, got 24"),
        (send, {"x": floats(2, 0)}, ValueError, "a row of x must be a positive multiple of 16 bytes, got 0"),
        (send, {"x": floats(2, 12)}, ValueError, "a row of x must have at most 32 bytes, .* got 48"),
        (send, {"x": int32(2, 8)}, TypeError, "x must be float32, bfloat16 or float16, got int32"),
        (send, {"x": off_boundary(2, 8)}, ValueError, "x must begin on a boundary of 16 bytes, got one"),
        (send, {"slot": int32(2, 3)}, ValueError, r"slot must have shape \[any, 2\], got \[2, 3\]"),
        (send, {"slot": int32(5, 2)}, ValueError, "at most 4 tokens fit the buffer, got 5"),
        (send, {"slot": floats(2, 2)}, TypeError, "slot must be int32, got float32"),
        (send, {"count": int32(3)}, ValueError, r"count must have shape \[2\], got \[3\]"),
        (send, {"idx": int32(2, 4)}, ValueError, r"idx must have shape \[2, 3\], got \[2, 4\]"),
        (send, {"weight": floats(1, 3)}, ValueError, r"weight must have shape \[2, 3\], got \[1, 3\]"),
        (send, {"weight": floats(3, 2).T}, ValueError, "weight must be contiguous"),
        (receive, {"x": floats(7, WIDTH)}, ValueError, r"x must have shape \[8, any\], got \[7, 8\]"),
        (receive, {"idx": int32(2, 3)}, ValueError, r"idx must have shape \[8, 3\], got \[2, 3\]"),
        (receive, {"num_local_experts": 0}, ValueError, "idx needs num_local_experts > 0, got 0"),
        (receive, {"num_local_experts": 2**28}, ValueError, "num_local_experts must be at most 268435455"),
        (receive, {"row_begin": [0, 8]}, ValueError, "row_begin must have 3 numbers, .* got 2"),
        (receive, {"row_begin": [1, 2, 8]}, ValueError, "row_begin must begin with 0, got 1"),
        (receive, {"row_begin": [0, 5, 4]}, ValueError, "row_begin must not fall, .* got 5 and then 4"),
        (receive, {"row_begin": [0, 5, 2**40]}, ValueError, "nor pass 1048576, got 5 and then 1099511627776"),
        (receive, {"row_begin": [0, 5, 9]}, ValueError, r"x must have shape \[9, any\], got \[8, 8\]"),
        (send_back, {"y": floats(7, WIDTH)}, ValueError, r"y must have shape \[8, any\], got \[7, 8\]"),
        (send_back, {"count": int32(1)}, ValueError, r"count must have shape \[2\], got \[1\]"),
        (send_back, {"weight": int32(8, 3)}, TypeError, "weight must be float32, got int32"),
        (add_up, {"out": floats(1, WIDTH)}, ValueError, r"out must have shape \[2, any\], got \[1, 8\]"),
        (add_up, {"slot": int32(2, 1)}, ValueError, r"slot must have shape \[any, 2\], got \[2, 1\]"),
        (add_up, {"weight": floats(2, 2)}, ValueError, r"weight must have shape \[2, 3\], got \[2, 2\]"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(
    host_ops: ModuleType,
    ranks: VirtualRanks,
    launch: Callable[..., None],
    change: dict[str, Any],
    error: type[Exception],
    wanted: str,
) -> None:
    op = {send: "dispatch_send", receive: "dispatch_receive", send_back: "combine_send"}.get(
        launch, "combine_receive"
    )
    with pytest.raises(error, match=f"{op}: .*{wanted}"):
        launch(host_ops, [ranks.buffers[0]], **change)


def test_ranks_of_one_launch_have_rows_alike(host_ops: ModuleType, ranks: VirtualRanks) -> None:
    slot, count = [int32(2, 2)] * 2, [int32(2)] * 2
    with pytest.raises(TypeError, match="x must be float32 like the other rows of the launch, got bfloat16"):
        host_ops.dispatch_send(ranks.buffers, [floats(2, 8), floats(2, 8).bfloat16()], slot, count)
    with pytest.raises(ValueError, match=r"x must have shape \[2, 8\], got \[2, 4\]"):
        host_ops.dispatch_send(ranks.buffers, [floats(2, 8), floats(2, 4)], slot, count)
    with pytest.raises(ValueError, match="x must have an entry for each of the 2 buffers, got 1"):
        host_ops.dispatch_send(ranks.buffers, [floats(2, 8)], slot, count)
    with pytest.raises(ValueError, match="idx must have an entry for each of the 2 buffers, got 1"):
        host_ops.dispatch_send(ranks.buffers, [floats(2, 8)] * 2, slot, count, [int32(2, 3)])


def test_a_buffer_without_room_for_choices_takes_none(host_ops: ModuleType) -> None:
    bare = VirtualRanks(host_ops, **{**SHAPE, "num_topk": 0})
    with pytest.raises(ValueError, match="dispatch_send: idx needs a buffer made for num_topk > 0"):
        send(host_ops, [bare.buffers[0]], idx=int32(2, 0), weight=floats(2, 0))


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"num_experts": 3}, "num_experts must be a positive multiple of the 2 ranks, got 3"),
        ({"num_experts": 0}, "num_experts must be a positive multiple of the 2 ranks, got 0"),
        ({"slot": [int32(3, 2)]}, r"slot must have shape \[2, any\], got \[3, 2\]"),
        ({"slot": [int32(2, 9)]}, "slot must have 1 to 8 columns, got 9"),
        ({"count": [int32(1)]}, r"count must have shape \[2\], got \[1\]"),
        ({"count": []}, "slot and count must have as many entries as idx, 1, got 1 and 0"),
        ({"idx": []}, "idx must have 1 to 8 entries, got 0"),
        ({"idx": [int32(131073, 1)]}, "idx must have at most 131072 rows, got 131073"),
    ],
)
def test_routes_refuse_by_name(host_ops: ModuleType, change: dict[str, Any], wanted: str) -> None:
    right = {"idx": [int32(2, 3)], "slot": [int32(2, 2)], "count": [int32(2)], "num_experts": 4}
    with pytest.raises(ValueError, match=f"expert_routes: {wanted}"):
        host_ops.expert_routes(**{**right, **change})


# ---- the layout and the plan, in any build ----


@pytest.mark.parametrize("num_topk", [0, 1, 6, 16])
@pytest.mark.parametrize("max_tokens", [1, 7, 4096])
@pytest.mark.parametrize("num_ranks", [1, 3, 8])
def test_the_parts_of_a_buffer_do_not_overlap(num_ranks: int, max_tokens: int, num_topk: int) -> None:
    row_bytes = 48
    layout = _C.comm_buffer_layout(num_ranks, max_tokens, row_bytes, num_topk)
    rows, topk = num_ranks * max_tokens * row_bytes, num_ranks * max_tokens * num_topk * 4
    sizes = {"dispatch_rows": rows, "dispatch_floats": topk, "combine_rows": rows, "combine_floats": topk}
    end = 328  # the control words
    for name, size in [*sizes.items(), ("idx", topk)]:
        assert layout[name] % 256 == 0, name
        assert end <= layout[name] < end + 256, name
        end = layout[name] + size
    assert end <= layout["num_bytes"] < end + 256


def test_a_large_buffer_is_not_cut_to_32_bits() -> None:
    layout = _C.comm_buffer_layout(8, 131072, 20480, 8)
    assert layout["num_bytes"] > 2 * 8 * 131072 * 20480 > 2**32


@pytest.mark.parametrize(
    ("num_sms", "num_launched", "num_roles", "wanted"),
    [(132, 1, 1, 24), (108, 1, 1, 24), (20, 1, 1, 10), (1, 1, 1, 1), (132, 8, 1, 33), (132, 8, 2, 16)],
)
def test_blocks_by_the_plan(num_sms: int, num_launched: int, num_roles: int, wanted: int) -> None:
    assert _C.comm_num_blocks(num_sms, num_launched, num_roles) == wanted


@pytest.mark.parametrize("num_sms", [1, 4, 108, 132])
def test_all_blocks_of_ranks_that_share_a_card_fit_it(num_sms: int) -> None:
    for num_launched in range(1, 9):
        for num_roles in (1, 2):
            num_blocks = _C.comm_num_blocks(num_sms, num_launched, num_roles)
            assert num_blocks >= 1
            assert num_blocks * num_launched * num_roles <= max(2 * num_sms, num_launched * num_roles)


def test_wrong_sizes_have_no_layout_and_no_plan() -> None:
    with pytest.raises(ValueError, match="comm_buffer_layout: sizes must be >= 0, got -1"):
        _C.comm_buffer_layout(1, -1, 16, 0)
    with pytest.raises(ValueError, match="comm_num_blocks: num_sms and num_launched must be > 0"):
        _C.comm_num_blocks(0, 1, 1)
