"""The transport over peer memory: our kernels write rows straight into buffers of the ranks of one node.

csrc/comm/comm.h holds the protocol. Launches run on a stream of their own, joined to the caller's by events;
epochs and counts live on the device, so a captured CUDA graph replays. In the worst case the host waits for
nothing; in the exact path it reads how many rows came before it makes room for them.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dscoder.ops.exchange_transport import (
    Choices,
    ExchangeSizes,
    Gathered,
    Routes,
    Spread,
)
from dscoder.ops.library import aligned
from dscoder.ops.roll_call import OP, ExchangeError, RollCall
from dscoder.runtime import native

ROW_GRANULE = 16  # bytes, of which a row must be a multiple

_END, _WHOLE, _FAILED = "end", "whole", "failed"  # what a rank tells when it closes: subject, values
_POLL = 0.05  # seconds between two looks


class Arrival:
    """What this rank received along some routes, known once the rows are there."""

    def __init__(self) -> None:
        self.counts_R: Tensor | None = None  # int32, rows from each rank
        self.row_begin: list[int] | None = None  # of each rank's rows, and their number; None: worst case


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerRoutes(Routes):
    """Routes, and what came in the other direction."""

    arrival: Arrival


class Lane:
    """The stream that exchanges run on beside the caller's. A CPU (the host executor) has none."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            # Rows should leave before the blocks of products that were launched earlier.
            self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    @property
    def is_aside(self) -> bool:
        """Whether what runs here overlaps with the caller's work."""
        return self._stream is not None

    def caller(self) -> torch.cuda.Stream | None:
        """The caller's stream."""
        return None if self._stream is None else torch.cuda.current_stream(self._stream.device)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Launches, and tensors that are made, go here, behind what was launched here."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield

    @contextmanager
    def after_caller(self) -> Iterator[None]:
        """Launches go here, behind all that the caller has launched."""
        caller = self.caller()
        if self._stream is not None and caller is not None:
            self._stream.wait_stream(caller)
        with self.alone():
            yield

    def record(self) -> torch.cuda.Event | None:
        """An event behind all that was launched here."""
        return None if self._stream is None else self._stream.record_event()

    def has_passed(self, event: torch.cuda.Event) -> bool:
        """Whether all before the event is done; nobody waits."""
        if torch.cuda.is_current_stream_capturing():  # no event of a capture can be asked
            return False
        return bool(event.query())  # type: ignore[no-untyped-call]

    def hold_caller(self, event: torch.cuda.Event) -> None:
        """What the caller launches from here on waits for the event."""
        assert self._stream is not None, "events are of a GPU"
        torch.cuda.current_stream(self._stream.device).wait_event(event)


class Movement:
    """One spread or gather that was sent, and how it is received."""

    def __init__(self, lane: Lane, receive: Callable[[], Any], kept: tuple[Any, ...]) -> None:
        self._lane = lane
        self._caller = lane.caller()
        self._receive: Callable[[], Any] | None = receive
        self._received: Any = None
        self._event: torch.cuda.Event | None = None
        self._kept = kept  # what the lane reads and writes, until it has

    def receive(self) -> None:
        """Launches the receiver, once."""
        if self._receive is None:
            return
        self._received, self._receive = self._receive(), None
        self._event = self._lane.record()

    def land(self) -> Any:
        """What was received, for the caller's stream; to be called once."""
        if self._lane.caller() != self._caller:  # whose memory is given back in the order of another stream
            raise RuntimeError(f"{OP}: a start and its wait must be on the same stream, got two")
        self.receive()
        if self._event is not None:
            self._lane.hold_caller(self._event)
        received, self._received, self._kept = self._received, None, ()
        return received

    def is_over(self) -> bool:
        """Whether nothing on the lane needs this any more."""
        if self._receive is not None:
            return False
        return not self._kept or self._event is None or self._lane.has_passed(self._event)


class PeerTransport:
    """Rows by kernels over `buffer`, a connected CommBuffer of this rank."""

    name = "peer"

    def __init__(
        self, sizes: ExchangeSizes, buffer: Any, *, device: torch.device, roll_call: RollCall | None = None
    ) -> None:
        self._sizes = sizes
        self._buffers = [buffer]
        self._device = device
        self._roll_call = roll_call
        self._lane = Lane(device)
        self._movements: list[Movement] = []
        self._failure: ExchangeError | None = None

    def route(self, idx_TK: Tensor) -> PeerRoutes:
        """Routes of these tokens, by one kernel."""
        slot_TR = idx_TK.new_empty(idx_TK.shape[0], self._sizes.num_ranks)
        counts_R = idx_TK.new_empty(self._sizes.num_ranks)
        native._C.expert_routes([idx_TK.contiguous()], [slot_TR], [counts_R], self._sizes.num_experts)
        return PeerRoutes(slot_TR=slot_TR, counts_R=counts_R, arrival=Arrival())

    def start_spread(self, routes: Routes, x_TD: Tensor, choices: Choices | None) -> Callable[[], Spread]:
        """Sends; on a GPU the receiver starts at once where its room is known, else in the wait."""
        own = _own(routes)
        x_TD = aligned(x_TD.detach())
        idx_TK = None if choices is None else choices.idx_TK.contiguous()
        weight_TK = None if choices is None else choices.weight_TK.detach().contiguous()
        self._finish_earlier()
        with self._lane.after_caller():
            native._C.dispatch_send(
                *(self._buffers, [x_TD], [own.slot_TR], [own.counts_R]),
                *(_listed(idx_TK), _listed(weight_TK)),
            )
        has_choices = choices is not None

        def receive() -> Spread:
            return self._receive_spread(own.arrival, width=x_TD.shape[1], has_choices=has_choices)

        waits_for_host = self._sizes.exact and own.arrival.row_begin is None
        return self._depart(receive, (x_TD, idx_TK, weight_TK, own), waits_for_host)

    def start_gather(
        self, routes: Routes, y_SD: Tensor | None, weight_SK: Tensor | None
    ) -> Callable[[], Gathered]:
        """Sends; on a GPU the receiver starts at once."""
        own = _own(routes)
        arrival, received_R = own.arrival, own.arrival.counts_R
        assert received_R is not None, "a gather goes back the way of a spread that has landed"
        # Floats travel with rows: where there are none, with the shortest that may be.
        rows = self._shortest_rows(self._num_slots(arrival)) if y_SD is None else aligned(y_SD.detach())
        floats = None if weight_SK is None else weight_SK.detach().contiguous()
        self._finish_earlier()
        with self._lane.after_caller():
            native._C.combine_send(
                self._buffers, [rows], [received_R], _listed(floats), _listed(arrival.row_begin)
            )

        def receive() -> Gathered:
            out = rows.new_empty(own.slot_TR.shape[0], rows.shape[1])
            weight_TK = None if floats is None else floats.new_empty(len(out), floats.shape[1])
            with self._lane.after_caller():
                native._C.combine_receive(
                    self._buffers, [out], [own.slot_TR], [own.counts_R], _listed(weight_TK)
                )
            return Gathered(out_TD=None if y_SD is None else out, weight_TK=weight_TK)

        return self._depart(receive, (rows, floats, own), False)

    def check(self) -> None:
        """ExchangeError if a kernel gave up waiting; the device is not waited for."""
        status = self._buffers[0].status()
        if self._failure is None and status is not None:
            found = "" if self._roll_call is None else f"; {self._roll_call.who_is_lost()[0]}"
            slot = f"{status['phase']}[{status['peer']}]"
            self._failure = ExchangeError(
                f"{OP}: rank {status['rank']} waited in vain for rank {status['peer']} at {slot}:"
                f" expected {status['expected']}, seen {status['seen']}{found}",
                slot=slot,
                **{name: status[name] for name in ("rank", "peer", "expected", "seen")},
            )
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Lets go of the peers' memory, meets them, and frees its own.

        After a failure a rank tells the others and meets nobody. Its memory is then freed if they have let go
        already, and else left to the end of the process, for they may have it mapped.
        """
        buffer = self._buffers[0]
        self._end_kernels()
        self._movements.clear()
        buffer.disconnect()
        if self._roll_call is None:
            buffer.close()
        elif self._failure is None and buffer.status() is None:
            self._roll_call.share(_END, _WHOLE)
            buffer.close()
        else:
            with suppress(ExchangeError):  # the store may be gone with the rank that served it
                self._roll_call.tell(_END, _FAILED)
                if None not in self._roll_call.heard(_END):
                    buffer.close()

    def _end_kernels(self) -> None:
        """Waits for this rank's kernels; they end at once where a peer has closed after a failure."""
        with self._lane.after_caller():
            last = self._lane.record()
        while last is not None and not self._lane.has_passed(last):
            if self._has_failed_peer():
                self._failure = ExchangeError(f"{OP}: rank {self._sizes.rank} was closed after a peer failed")
                self._buffers[0].fail()
                break
            time.sleep(_POLL)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _has_failed_peer(self) -> bool:
        if self._roll_call is None:
            return False
        try:
            return _FAILED in self._roll_call.heard(_END)
        except ExchangeError:  # the rank that served the store is gone
            return True

    def _depart(
        self, receive: Callable[[], Any], kept: tuple[Any, ...], waits_for_host: bool
    ) -> Callable[[], Any]:
        movement = Movement(self._lane, receive, kept)
        self._movements.append(movement)
        if self._lane.is_aside and not waits_for_host:
            movement.receive()
        return movement.land

    def _finish_earlier(self) -> None:
        """Receives what nobody waited for yet (a recomputation may stop there), so that epochs keep step."""
        for movement in self._movements:
            movement.receive()
        self._movements = [movement for movement in self._movements if not movement.is_over()]

    def _receive_spread(self, arrival: Arrival, *, width: int, has_choices: bool) -> Spread:
        sizes = self._sizes
        if sizes.exact and arrival.row_begin is None:
            arrival.row_begin = self._read_row_begin()
        num_slots = self._num_slots(arrival)
        x_SD = torch.empty(num_slots, width, dtype=sizes.dtype, device=self._device)
        if arrival.counts_R is None:  # later receivers write the same numbers there
            arrival.counts_R = torch.empty(sizes.num_ranks, dtype=torch.int32, device=self._device)
        counts_R = arrival.counts_R
        idx_SK = weight_SK = None
        if has_choices:
            idx_SK = counts_R.new_empty(num_slots, sizes.num_topk)
            weight_SK = torch.empty(num_slots, sizes.num_topk, device=self._device)
        with self._lane.after_caller():
            native._C.dispatch_receive(
                *(self._buffers, [x_SD], [counts_R], _listed(idx_SK), _listed(weight_SK)),
                *(_listed(arrival.row_begin), sizes.num_local_experts),
            )
        return Spread(x_SD=x_SD, idx_SK=idx_SK, weight_SK=weight_SK)

    def _read_row_begin(self) -> list[int]:
        with self._lane.alone():  # the send is ahead there; what the caller launched since is not waited for
            counts_R = torch.empty(self._sizes.num_ranks, dtype=torch.int32, device=self._device)
            native._C.dispatch_counts(self._buffers, [counts_R])
            counts = counts_R.tolist()  # the host waits here
        self.check()
        return [0, *itertools.accumulate(counts)]

    def _num_slots(self, arrival: Arrival) -> int:
        worst = self._sizes.num_ranks * self._sizes.max_tokens
        return worst if arrival.row_begin is None else arrival.row_begin[-1]

    def _shortest_rows(self, num_rows: int) -> Tensor:
        width = ROW_GRANULE // self._sizes.dtype.itemsize
        return torch.zeros(num_rows, width, dtype=self._sizes.dtype, device=self._device)


def _own(routes: Routes) -> PeerRoutes:
    assert isinstance(routes, PeerRoutes), "routes of another transport"
    return routes


def _listed(value: Any) -> list[Any] | None:
    """A launch takes lists with an entry for each of its ranks, of which a process has one."""
    return None if value is None else [value]
