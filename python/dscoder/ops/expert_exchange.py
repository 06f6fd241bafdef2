"""Autograd of the two movements of expert parallelism: spread and gather are each other's backward.

Each is a pair of nodes, one that starts and one that waits, joined by an empty tensor, the ticket. Backward
runs them the other way round: the gradient of a wait starts the reverse movement and the gradient of a start
waits for it, so what was computed between the two overlaps in both directions.

Routes are kept beside the graph, not as saved tensors: under activation checkpointing a recomputed forward
stops before the last combine, whose rows no gradient needs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dscoder.ops.exchange_statistics import Meter, row_bytes
from dscoder.ops.exchange_transport import COMBINE, DISPATCH, Choices, Gathered, Routes, Spread, Transport
from dscoder.ops.library import refuse_second_derivative
from dscoder.ops.roll_call import OP


class Exchange:
    """A transport whose movements are counted and timed."""

    def __init__(self, transport: Transport, meter: Meter) -> None:
        self.transport = transport
        self.meter = meter

    def start_spread(self, routes: Routes, x_TD: Tensor, choices: Choices | None) -> Callable[[], Spread]:
        """`Transport.start_spread`."""
        with self.meter.timed(DISPATCH):
            land = self.transport.start_spread(routes, x_TD, choices)
        carried = (None, None) if choices is None else (choices.idx_TK, choices.weight_TK)
        if choices is not None:
            self.meter.count_tokens(routes)
        self.meter.count_bytes(DISPATCH, routes, row_bytes(x_TD, *carried))

        def timed_land() -> Spread:
            with self.meter.timed(DISPATCH):
                return land()

        return timed_land

    def start_gather(
        self, routes: Routes, y_SD: Tensor | None, weight_SK: Tensor | None
    ) -> Callable[[], Gathered]:
        """`Transport.start_gather`."""
        with self.meter.timed(COMBINE):
            land = self.transport.start_gather(routes, y_SD, weight_SK)
        self.meter.count_bytes(COMBINE, routes, row_bytes(y_SD, weight_SK))

        def timed_land() -> Gathered:
            with self.meter.timed(COMBINE):
                return land()

        return timed_land


class Flight:
    """One movement between its start and its wait, and later its reverse between theirs."""

    def __init__(self, exchange: Exchange, routes: Routes) -> None:
        self.exchange = exchange
        self.routes = routes
        self.needs_rows = self.needs_weights = False  # gradients
        self._land: Callable[[], Any] | None = None

    def take_off(self, land: Callable[[], Any]) -> None:
        """Keeps what waits for the movement that was started."""
        self._land = land

    def land(self) -> Any:
        """Waits for it."""
        land, self._land = self._land, None
        if land is None:
            raise RuntimeError(f"{OP}: nothing is on its way: a start has one wait, and so has its gradient")
        return land()


# ---- dispatch ----


def start_spread(
    exchange: Exchange, routes: Routes, x_TD: Tensor, choices: Choices
) -> Callable[[], tuple[Tensor, Choices]]:
    """Sends tokens; what is returned waits for x_SD and the slots' choices.

    Differentiable in x and the choices' weights.
    """
    flight = Flight(exchange, routes)
    ticket = _start_spread(flight, x_TD, choices.weight_TK, choices.idx_TK)

    def wait() -> tuple[Tensor, Choices]:
        x_SD, idx_SK, weight_SK = _wait_spread(flight, ticket)
        return x_SD, Choices(idx_TK=idx_SK, weight_TK=weight_SK)

    return wait


class _StartSpread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flight: Flight, x_TD: Tensor, weight_TK: Tensor, idx_TK: Tensor) -> Tensor:
        _, flight.needs_rows, flight.needs_weights, _ = ctx.needs_input_grad
        ctx.flight = flight
        choices = Choices(idx_TK=idx_TK, weight_TK=weight_TK)
        flight.take_off(flight.exchange.start_spread(flight.routes, x_TD, choices))
        return x_TD.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _ticket: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative(OP)
        gathered = ctx.flight.land()
        return None, gathered.out_TD, gathered.weight_TK, None


class _WaitSpread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flight: Flight, ticket: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.flight = flight
        spread = flight.land()
        frozen = [spread.idx_SK]
        frozen += [] if flight.needs_rows else [spread.x_SD]
        frozen += [] if flight.needs_weights else [spread.weight_SK]
        ctx.mark_non_differentiable(*frozen)
        return spread.x_SD, spread.idx_SK, spread.weight_SK

    @staticmethod
    def backward(ctx: Any, grad_SD: Tensor, _idx: None, grad_SK: Tensor) -> tuple[Tensor | None, ...]:
        # A gradient that nobody asked for here is zeros: the other ranks wait for this one's rows.
        refuse_second_derivative(OP)
        flight = ctx.flight
        rows_SD = grad_SD if flight.needs_rows else None
        weight_SK = grad_SK if flight.needs_weights else None
        flight.take_off(flight.exchange.start_gather(flight.routes, rows_SD, weight_SK))
        return None, grad_SD.new_empty(0)


# ---- combine ----


def start_gather(exchange: Exchange, routes: Routes, y_SD: Tensor) -> Callable[[], Tensor]:
    """Sends slots' rows back; what is returned waits for their sums out_TD. Differentiable in y."""
    flight = Flight(exchange, routes)
    ticket = _start_gather(flight, y_SD)
    return lambda: _wait_gather(flight, ticket)


class _StartGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flight: Flight, y_SD: Tensor) -> Tensor:
        ctx.flight = flight
        flight.take_off(flight.exchange.start_gather(flight.routes, y_SD, None))
        return y_SD.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _ticket: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative(OP)
        return None, ctx.flight.land().x_SD


class _WaitGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flight: Flight, ticket: Tensor) -> Tensor:
        ctx.flight = flight
        out_TD: Tensor = flight.land().out_TD
        return out_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative(OP)
        flight = ctx.flight
        flight.take_off(flight.exchange.start_spread(flight.routes, grad_TD, None))
        return None, grad_TD.new_empty(0)


# Any: torch leaves apply untyped.
_start_spread: Any = _StartSpread.apply
_wait_spread: Any = _WaitSpread.apply
_start_gather: Any = _StartGather.apply
_wait_gather: Any = _WaitGather.apply
