"""How the ranks of an exchange over peer memory part: a thread a rank, without any kernel."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dscoder.ops import ExchangeError, peer_memory, peer_transport
from dscoder.ops.exchange_transport import ExchangeSizes
from dscoder.ops.peer_transport import PeerTransport
from dscoder.ops.roll_call import RollCall
from dscoder.runtime import native

CPU = torch.device("cpu")
LATE = 0.2  # seconds
AT_ONCE = 5.0  # seconds at the most, where a wait would last a minute
FAILURE = {"rank": 0, "peer": 1, "phase": "dispatch_arrival", "expected": 3, "seen": 2}


class Memory:
    """Stands in for CommBuffer: tells what is done to it."""

    def __init__(self, log: list[tuple[str, int]], rank: int, status: dict[str, Any] | None = None) -> None:
        self.log, self.rank, self.failure = log, rank, status

    def handle(self) -> bytes:
        return b"handle"

    def open(self, peer: int, handle: bytes) -> None:
        if self.rank == 0:
            raise RuntimeError("mapping failed")

    def status(self) -> dict[str, Any] | None:
        return self.failure

    def fail(self) -> None:
        self.log.append(("fail", self.rank))

    def disconnect(self) -> None:
        time.sleep(LATE * self.rank)
        self.log.append(("disconnect", self.rank))

    def close(self) -> None:
        self.log.append(("close", self.rank))


@pytest.fixture
def roll_calls(monkeypatch: pytest.MonkeyPatch) -> list[RollCall]:
    """Of two ranks."""
    store = dist.HashStore()
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda _: [0, 1])
    groups: list[Any] = [
        SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: 2, get_group_store=lambda: store)
        for rank in (0, 1)
    ]
    return [RollCall(group, timeout=60.0) for group in groups]


def sizes_of(rank: int) -> ExchangeSizes:
    return ExchangeSizes(
        **{"rank": rank, "num_ranks": 2, "num_experts": 2, "hidden": 8, "max_tokens": 3, "num_topk": 1},
        **{"dtype": torch.float32, "exact": False},
    )


def transport_of(roll_call: RollCall, buffer: Memory) -> PeerTransport:
    return PeerTransport(sizes_of(roll_call.rank), buffer, device=CPU, roll_call=roll_call)


def on_each(function: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(function, (0, 1)))


def test_nobody_frees_memory_that_another_has_mapped(roll_calls: list[RollCall]) -> None:
    log: list[tuple[str, int]] = []
    on_each(lambda rank: transport_of(roll_calls[rank], Memory(log, rank)).close())
    assert log[:2] == [("disconnect", 0), ("disconnect", 1)]
    assert sorted(log[2:]) == [("close", 0), ("close", 1)]


def test_nor_does_it_where_the_connection_is_refused(
    roll_calls: list[RollCall], monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[tuple[str, int]] = []
    native_: Any = SimpleNamespace(CommBuffer=lambda *, rank, **_: Memory(log, rank))
    monkeypatch.setattr(native, "_C", native_)
    device = torch.device("cuda", 0)
    found = on_each(lambda rank: peer_memory._open(roll_calls[rank], sizes_of(rank), device, 60.0))
    assert found == ["the buffer of rank 1 to open (mapping failed), on rank 0"] * 2
    assert log[:2] == [("disconnect", 0), ("disconnect", 1)]
    assert sorted(log[2:]) == [("close", 0), ("close", 1)]


def test_a_failed_rank_waits_for_nobody_and_nobody_for_it(roll_calls: list[RollCall]) -> None:
    log: list[tuple[str, int]] = []
    failed = transport_of(roll_calls[0], Memory(log, 0, FAILURE))
    begin = time.monotonic()
    failed.close()
    assert log == [("disconnect", 0)], "the peer may have its memory mapped"
    transport_of(roll_calls[1], Memory(log, 1)).close()
    assert log[1:] == [("disconnect", 1), ("close", 1)]
    failed.close()
    assert log[3:] == [("disconnect", 0), ("close", 0)]
    assert time.monotonic() - begin < AT_ONCE


class Spinning:
    """Stands in for the lane of a GPU whose kernels wait until they are told that they failed."""

    log: list[tuple[str, int]]

    def __init__(self, device: torch.device) -> None:
        pass

    @contextmanager
    def after_caller(self) -> Iterator[None]:
        yield

    def record(self) -> "Spinning":
        return self

    def has_passed(self, event: "Spinning") -> bool:
        return ("fail", 1) in self.log


def test_what_waits_for_a_failed_rank_ends_when_it_is_closed(
    roll_calls: list[RollCall], monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[tuple[str, int]] = []
    failed = transport_of(roll_calls[0], Memory(log, 0, FAILURE))
    monkeypatch.setattr(Spinning, "log", log, raising=False)
    monkeypatch.setattr(peer_transport, "Lane", Spinning)
    waiting = transport_of(roll_calls[1], Memory(log, 1))
    begin = time.monotonic()
    with ThreadPoolExecutor(1) as threads:
        ending = threads.submit(waiting.close)
        time.sleep(LATE)
        assert log == [], "kernels whose peer has not failed are waited for"
        failed.close()
        ending.result()
    assert sorted(log[:2]) == [("disconnect", 0), ("fail", 1)]
    assert log[2:] == [("disconnect", 1), ("close", 1)]
    assert roll_calls[0].heard("end") == ["failed", "failed"]
    assert time.monotonic() - begin < AT_ONCE


def test_what_is_heard_is_not_waited_for(roll_calls: list[RollCall]) -> None:
    roll_calls[0].tell("weather", {"rain": 1})
    assert roll_calls[1].heard("weather") == [{"rain": 1}, None]


class Fading:
    """A store that ends once all have come."""

    def __getattr__(self, name: str) -> Any:
        def give(*_: Any) -> Any:
            if name == "get":
                raise RuntimeError("connection reset")
            return 1

        return give


def test_a_store_that_ends_in_a_meeting_is_an_error_of_the_exchange(
    roll_calls: list[RollCall], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roll_calls[1], "_store", Fading())
    wanted = "rank 1 waited for the places of all ranks, which the group's store did not give"
    with pytest.raises(ExchangeError, match=f"^expert_parallel: {wanted}$"):
        roll_calls[1].share("places", "")
