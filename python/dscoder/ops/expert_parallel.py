"""ExpertParallel: experts spread over the ranks of a process group (DeepSeek-V2 section 2.2).

Each rank holds num_experts / num_ranks experts, in order, and brings its own tokens. *Dispatch* sends every
token to the ranks that hold its experts, *combine* brings the results back and adds them up: the two
all-to-all exchanges of expert parallelism, named as in DeepEP. A token travels once to a rank however many of
its experts live there; what is sent grows with the ranks it goes to, which device-limited routing bounds.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from dscoder.ops.collective_transport import CollectiveTransport
from dscoder.ops.exchange_statistics import ExchangeStatistics, Meter
from dscoder.ops.exchange_transport import Choices, ExchangeSizes, Routes, Transport
from dscoder.ops.expert_exchange import Exchange, start_gather, start_spread
from dscoder.ops.library import (
    FLOATS,
    check_at_least,
    check_at_most,
    check_devices,
    check_shape,
    check_tensor,
)
from dscoder.ops.moe_permute import PermuteHandle, moe_permute, moe_permute_maps
from dscoder.ops.moe_unpermute import moe_unpermute
from dscoder.ops.peer_memory import connect_peers
from dscoder.ops.peer_transport import PeerTransport
from dscoder.ops.roll_call import OP, RollCall
from dscoder.runtime.log import get_logger

TRANSPORTS = ("auto", "peer", "collective")
MAX_TIMEOUT = 1e6  # seconds; more could not be told from no limit

_log = get_logger(__name__)

Result = TypeVar("Result")
Function = TypeVar("Function", bound=Callable[..., Any])


def _untraced(function: Function) -> Function:
    """torch.compile leaves these calls out of its graphs, in place of tracing into the transports."""
    untraced: Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return untraced


@dataclass(frozen=True, kw_only=True, slots=True)
class ExchangeOptions:
    """How an `ExpertParallel` moves rows; the same on every rank but for `device`."""

    # peer: kernels over peer memory; collective: all_to_all_single; auto: peer where it can be had.
    transport: str = "auto"
    exact: bool | None = None  # receive buffers of just the rows that come; default: on a CPU, not on a GPU
    timeout: float = 600.0  # seconds a rank waits for the others
    # Of the tensors; default: the current GPU if the group has NCCL, else the CPU.
    device: torch.device | None = None

    def __post_init__(self) -> None:
        if self.transport not in TRANSPORTS:
            raise ValueError(f"transport must be one of {', '.join(TRANSPORTS)}, got {self.transport!r}")
        if not 0 < self.timeout <= MAX_TIMEOUT:
            raise ValueError(f"timeout must be > 0 and <= {MAX_TIMEOUT:g}, got {self.timeout}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DispatchHandle:
    """What one dispatch did: combine goes back the same way.

    S slots hold the tokens that came, those of rank 0 first, each rank's in their order. Exact: S is how many
    came. Worst case: S = num_ranks * max_tokens, and rank r's begin at slot r * max_tokens.
    """

    maps: PermuteHandle  # from slots to rows in the order of this rank's experts
    idx_SK: Tensor  # int32, local expert; -1: dropped, another rank's, or nobody's slot
    weight_SK: Tensor  # float32, differentiable
    slot_TR: Tensor  # int32, place of an own token among those sent to rank R; -1: it did not go there
    counts_R: Tensor  # int32, own tokens sent to each rank, this one included
    routes: Routes  # the same, as the transport knows them


class Travel(Generic[Result]):
    """Rows on their way. What is computed before `wait` overlaps with them, and so does its gradient."""

    def __init__(self, arrive: Callable[[], Result]) -> None:
        self._arrive: Callable[[], Result] | None = arrive

    @_untraced
    def wait(self) -> Result:
        """What arrived; to be called once, on the stream of the start. ExchangeError if it does not come."""
        arrive, self._arrive = self._arrive, None
        if arrive is None:
            raise RuntimeError(f"{OP}: wait must be called once, got a second call")
        return arrive()


class ExpertParallel:
    """Dispatch and combine between the ranks of `process_group`.

    Every rank builds it with the same sizes and calls its methods in the same order, forward and backward:
    a rank without tokens calls them with T = 0, and an input that needs a gradient on one rank needs it on
    all. A wrong argument is refused before anything is sent.

    Attributes:
        rank, num_ranks: of the group, so not always the global ones.
        num_local_experts, first_expert: this rank holds experts first_expert to
            first_expert + num_local_experts.
        exact, transport, device: as `options` came out.

    Raises:
        ValueError: sizes that do not fit, or that differ between ranks (the rank and the field are named),
            or a transport that cannot be had.
        ExchangeError: a rank did not come within the timeout.
    """

    def __init__(
        self,
        process_group: ProcessGroup,
        *,
        num_experts: int,
        hidden: int,
        max_tokens: int,
        num_topk: int,
        dtype: torch.dtype,
        options: ExchangeOptions | None = None,
    ) -> None:
        """`hidden`: width of a token; `max_tokens`: the most that a rank brings to one dispatch."""
        options = ExchangeOptions() if options is None else options
        self.rank, self.num_ranks = process_group.rank(), process_group.size()
        self.device = _device_of(process_group, options)
        self.exact = self.device.type != "cuda" if options.exact is None else options.exact
        self._sizes = ExchangeSizes(
            rank=self.rank,
            num_ranks=self.num_ranks,
            num_experts=num_experts,
            hidden=hidden,
            max_tokens=max_tokens,
            num_topk=num_topk,
            dtype=dtype,
            exact=self.exact,
        )
        _check_sizes(self._sizes)
        self.num_local_experts = self._sizes.num_local_experts
        self.first_expert = self.rank * self.num_local_experts
        roll_call = RollCall(process_group, timeout=options.timeout)
        _check_agreement(roll_call, self._sizes, options, self.device)
        self._transport = _transport_of(process_group, roll_call, self._sizes, options, self.device)
        self.transport = self._transport.name
        self._meter = Meter(self._sizes, self.device)
        self._exchange = Exchange(self._transport, self._meter)

    @_untraced
    def dispatch(
        self, x_TD: Tensor, idx_TK: Tensor, weight_TK: Tensor
    ) -> tuple[Tensor, Tensor, DispatchHandle]:
        """Sends tokens to their experts; returns what this rank's experts got, in the order of the experts.

        Args as for `start_dispatch`.

        Returns:
            x_MD, offsets_E and the handle for `combine`. M = S * K rows, those of local expert e up to
            offsets_E[e] (int32, on the device), as `grouped_gemm` takes them; the rows from offsets_E[-1] on
            are zero. Differentiable in x and weight, once.
        """
        x_SD, choices, routes = self._start(x_TD, idx_TK, weight_TK)()
        x_MD, maps = moe_permute(x_SD, choices.idx_TK, num_experts=self.num_local_experts)
        return x_MD, maps.offsets_E, _handle_of(maps, choices, routes)

    @_untraced
    def combine(self, y_MD: Tensor, handle: DispatchHandle) -> Tensor:
        """Brings the experts' rows back: out[t] = sum over k of weight[t, k] * y of token t's k-th expert.

        `y_MD` has the rows that `dispatch` returned. Each rank sums its experts' share (float32 sums, rounded
        to y's dtype for the way), and the token's rank sums those in the order of the ranks: deterministic.
        A token of which all choices were dropped gets zeros. Differentiable in y and in the weights that
        `dispatch` was given, once.
        """
        _check_handle(handle)
        y_SD = moe_unpermute(y_MD, handle.weight_SK, handle.maps)
        return self.start_combine(y_SD, handle).wait()

    @_untraced
    def start_dispatch(
        self, x_TD: Tensor, idx_TK: Tensor, weight_TK: Tensor
    ) -> Travel[tuple[Tensor, DispatchHandle]]:
        """Starts sending tokens to the ranks of their experts.

        Args:
            x_TD: [T, hidden] in the dtype of this exchange, T <= max_tokens and not the same on every rank.
            idx_TK: int32 [T, num_topk], experts of all ranks as `moe_gate` returns them; an index outside
                [0, num_experts), -1 by custom, drops the choice. A token without any does not travel.
            weight_TK: float32 [T, num_topk].

        Returns:
            A travel whose wait gives (x_SD, handle): a token's row once in the slot it has here, whatever
            number of this rank's experts it chose. `moe_experts(x_SD, ..., handle.maps)` and
            `moe_unpermute(y_MD, handle.weight_SK, handle.maps)` take it from there, `start_combine` sends
            the result back. Differentiable in x and weight, once. Slots that no token has hold anything, NaN
            too, and no map names them.
        """
        arrive = self._start(x_TD, idx_TK, weight_TK)

        def with_maps() -> tuple[Tensor, DispatchHandle]:
            x_SD, choices, routes = arrive()
            maps = moe_permute_maps(choices.idx_TK, num_experts=self.num_local_experts)
            return x_SD, _handle_of(maps, choices, routes)

        return Travel(with_maps)

    @_untraced
    def start_combine(self, y_SD: Tensor, handle: DispatchHandle) -> Travel[Tensor]:
        """Starts sending rows of slots back to their tokens; the wait gives out_TD, their sum over ranks.

        No weights: `moe_unpermute` has applied them. Summed in float32 in the order of the ranks, rounded
        once. Differentiable in y, once; as x_SD the gradient means nothing in slots that no token has.
        """
        _check_handle(handle)
        op = f"{OP} combine"
        check_tensor(op, "y", y_SD, num_dims=2, dtypes=(self._sizes.dtype,))
        check_shape(op, "y", y_SD, (handle.idx_SK.shape[0], self._sizes.hidden))
        check_devices(op, idx=handle.idx_SK, y=y_SD)
        self.check()
        return Travel(start_gather(self._exchange, handle.routes, y_SD))

    def statistics(self) -> ExchangeStatistics:
        """Totals since this was built; reading them makes the host wait for the device."""
        return self._meter.read()

    def check(self) -> None:
        """Raises the ExchangeError of an exchange that failed, with what is known of it.

        `wait` does so by itself where the host waits. Where it does not (kernels), rows that did not come in
        time are NaN, and this, called now and then, says why.
        """
        self._transport.check()

    def close(self) -> None:
        """Gives buffers back; every rank calls it, after the last exchange. The process group stays open.

        With peer memory it meets the other ranks, but for one whose exchange failed. Without it, what they
        have mapped is kept until the process ends.
        """
        self._transport.close()

    def _start(
        self, x_TD: Tensor, idx_TK: Tensor, weight_TK: Tensor
    ) -> Callable[[], tuple[Tensor, Choices, Routes]]:
        self._check_tokens(x_TD, idx_TK, weight_TK)
        self.check()
        routes = self._transport.route(idx_TK)
        choices = Choices(idx_TK=idx_TK, weight_TK=weight_TK)
        arrive = start_spread(self._exchange, routes, x_TD, choices)
        return lambda: (*arrive(), routes)

    def _check_tokens(self, x_TD: Tensor, idx_TK: Tensor, weight_TK: Tensor) -> None:
        op, sizes = f"{OP} dispatch", self._sizes
        check_tensor(op, "x", x_TD, num_dims=2, dtypes=(sizes.dtype,))
        num_tokens = x_TD.shape[0]
        check_shape(op, "x", x_TD, (num_tokens, sizes.hidden))
        check_at_most(op, "number of tokens", num_tokens, sizes.max_tokens)
        check_tensor(op, "idx", idx_TK, num_dims=2, dtypes=(torch.int32,))
        check_shape(op, "idx", idx_TK, (num_tokens, sizes.num_topk))
        check_tensor(op, "weight", weight_TK, num_dims=2, dtypes=(torch.float32,))
        check_shape(op, "weight", weight_TK, (num_tokens, sizes.num_topk))
        check_devices(op, x=x_TD, idx=idx_TK, weight=weight_TK)
        if x_TD.device != self.device:
            raise ValueError(f"{op}: x must be on {self.device}, got {x_TD.device}")


def _device_of(process_group: ProcessGroup, options: ExchangeOptions) -> torch.device:
    """As asked for, else the GPU that NCCL would use, or the CPU where the group has no NCCL."""
    device = options.device
    if device is None:
        has_nccl = "nccl" in str(dist.get_backend_config(process_group))
        device = torch.device("cuda" if has_nccl else "cpu")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _check_sizes(sizes: ExchangeSizes) -> None:
    for name in ("num_experts", "hidden", "max_tokens", "num_topk"):
        check_at_least(OP, name, getattr(sizes, name), 1)
    if sizes.dtype not in FLOATS:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
        raise TypeError(f"{OP}: dtype must be {wanted}, got {sizes.dtype}")
    if sizes.num_experts % sizes.num_ranks:
        raise ValueError(
            f"{OP}: num_experts must be a multiple of the group's {sizes.num_ranks} ranks,"
            f" got {sizes.num_experts}"
        )


def _check_agreement(
    roll_call: RollCall, sizes: ExchangeSizes, options: ExchangeOptions, device: torch.device
) -> None:
    """ValueError, on every rank alike, where one was built otherwise than rank 0."""
    fields = ("num_experts", "hidden", "max_tokens", "num_topk", "dtype", "exact")
    own = {name: str(getattr(sizes, name)) for name in fields}
    own |= {"transport": options.transport, "device": device.type}
    everyone = roll_call.share("sizes", own)
    for rank, other in enumerate(everyone):
        for name, wanted in everyone[0].items():
            if other[name] != wanted:
                raise ValueError(
                    f"{OP}: {name} must be the same on every rank,"
                    f" got {wanted} on rank 0 and {other[name]} on rank {rank}"
                )


def _handle_of(maps: PermuteHandle, choices: Choices, routes: Routes) -> DispatchHandle:
    return DispatchHandle(
        maps=maps,
        idx_SK=choices.idx_TK,
        weight_SK=choices.weight_TK,
        slot_TR=routes.slot_TR,
        counts_R=routes.counts_R,
        routes=routes,
    )


def _transport_of(
    process_group: ProcessGroup,
    roll_call: RollCall,
    sizes: ExchangeSizes,
    options: ExchangeOptions,
    device: torch.device,
) -> Transport:
    """The transport asked for: the same on every rank."""
    if options.transport != "collective":
        peer = connect_peers(roll_call, sizes, device=device, timeout=options.timeout)
        if isinstance(peer, PeerTransport):
            return peer
        if options.transport == "peer":
            raise ValueError(f"{OP}: transport peer wants {peer}")
        if sizes.rank == 0:  # on GPUs kernels are what one expects
            level = logging.WARNING if device.type == "cuda" else logging.INFO
            _log.log(level, f"{OP}: rows travel by collectives, for transport peer wants {peer}")
    return CollectiveTransport(process_group, sizes, roll_call=roll_call, timeout=options.timeout)


def _check_handle(handle: DispatchHandle) -> None:
    if not isinstance(handle, DispatchHandle):
        raise TypeError(f"{OP} combine: handle must be a DispatchHandle, got {type(handle).__name__}")
