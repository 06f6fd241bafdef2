"""The exchange of tokens on a GPU: ranks that share one card, in one process and in several.

The checks of one process run on the host executor too (tests/csrc/test_virtual_exchange.py), those of several
over gloo (tests/testing/test_card_ranks.py). Between cards nothing is shown here.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dscoder.runtime import native
from dscoder.testing import card_ranks, gpu
from dscoder.testing.compare import assert_same
from dscoder.testing.expert_ranks import ExpertCase
from dscoder.testing.virtual_exchange import (
    HOW,
    Exchange,
    ExchangeCase,
    check_absence,
    check_epochs,
    check_received,
    check_repeats,
    check_summed,
    draw,
    results,
)
from dscoder.testing.virtual_ranks import Sent

LIMIT_S = 60.0  # of one check, which waits for peers for a third of that at most
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
COPIES = ["words", "bulk"] if gpu.has_hopper() else ["words"]
SMALL = ExchangeCase(num_ranks=3, max_tokens=9, width=136)
# The expert layers of the published models on one node: ranks, tokens of each, width, experts of each.
LAYERS = {
    "v2_lite": ExchangeCase(num_ranks=8, max_tokens=4096, width=2048, num_topk=6, num_local_experts=8),
    "v2": ExchangeCase(num_ranks=8, max_tokens=1024, width=5120, num_topk=6, num_local_experts=20),
}

Apart = Callable[..., None]


# ---- one process ----
# A wait that does not end must not take the other tests with it: each check runs in another process.


def epochs(_: str, case: ExchangeCase, num_epochs: int) -> None:
    gpu.poison_free_memory()
    check_epochs(native._C, case, gpu.DEVICE, num_epochs=num_epochs)


def repeats(_: str, case: ExchangeCase) -> None:
    check_repeats(native._C, case, gpu.DEVICE, num_epochs=20)


def absence(_: str, case: ExchangeCase, missing: int) -> None:
    check_absence(native._C, case, gpu.DEVICE, missing=missing)


@pytest.mark.sanitize("memcheck", "synccheck")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ["launches", "one_grid"])
@pytest.mark.parametrize("copy", COPIES)
def test_a_few_tokens(copy: str, how: str, dtype: torch.dtype, apart: Apart) -> None:
    apart(epochs, replace(SMALL, copy=copy, how=how, dtype=dtype), 2)


@pytest.mark.sanitize
def test_a_few_tokens_by_words(apart: Apart) -> None:
    apart(epochs, replace(SMALL, num_ranks=2, copy="words"), 2)


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("is_exact", [False, True])
@pytest.mark.parametrize(("how", "copy"), list(itertools.product(HOW, COPIES)))
def test_many_epochs(how: str, copy: str, is_exact: bool, num_ranks: int, apart: Apart) -> None:
    case = ExchangeCase(num_ranks=num_ranks, max_tokens=301, width=256, how=how, copy=copy, is_exact=is_exact)
    apart(epochs, case, 12)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("model", LAYERS)
def test_as_many_tokens_as_a_models_step_has(model: str, copy: str, how: str, apart: Apart) -> None:
    apart(epochs, replace(LAYERS[model], copy=copy, how=how), 2)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("copy", COPIES)
def test_dispatches_in_a_row_wait_for_their_slots(copy: str, how: str, apart: Apart) -> None:
    apart(repeats, ExchangeCase(num_ranks=4, max_tokens=257, width=512, copy=copy, how=how))


@pytest.mark.parametrize("missing", range(3))
@pytest.mark.parametrize("copy", COPIES)
def test_an_absent_rank_is_named_and_nothing_hangs(copy: str, missing: int, apart: Apart) -> None:
    apart(absence, replace(SMALL, copy=copy, timeout=0.05), missing)


def replays(_: str, case: ExchangeCase) -> None:
    """A captured exchange, replayed after each epoch's tokens were copied in."""
    ranks = case.ranks(native._C)
    exchange = Exchange(ranks, case)
    all_sent = [draw(ranks, case, seed, gpu.DEVICE) for seed in range(40)]
    begins = [ranks.worst_begin() for _ in range(case.num_ranks)]
    kept = padded(all_sent[0], case)

    def step() -> tuple[Tensor, ...]:
        kept.slot[:], kept.count[:] = ranks.routes(kept.idx, num_experts=case.num_experts)
        received = exchange.dispatch(kept, begins)
        y, weight = results(received)
        out, out_weight = exchange.combine(kept, received, y, weight, begins)
        groups = (received.x, received.count, received.idx, received.weight, y, weight, out, out_weight)
        return tuple(tensor for group in groups for tensor in group)

    replay = gpu.captured(step)
    for sent in all_sent:
        fresh = padded(sent, case)
        for name in ("x", "idx", "weight"):
            for place, value in zip(getattr(kept, name), getattr(fresh, name), strict=True):
                place.copy_(value)
        flat, count = list(replay()), case.num_ranks
        groups = [flat[i : i + count] for i in range(0, len(flat), count)]
        received = card_ranks.received_of(groups[:4])
        check_received(case, kept, received, begins)
        check_summed(kept, (groups[6], groups[7]), groups[4], groups[5], begins)
    assert ranks.status() == [None] * case.num_ranks


def padded(sent: Sent, case: ExchangeCase) -> Sent:
    """All ranks with max_tokens tokens, of which the last ones choose no expert: shapes of a graph stay."""

    def filled(tensors: list[Tensor], value: float) -> list[Tensor]:
        found = []
        for tensor in tensors:
            full = tensor.new_full((case.max_tokens, tensor.shape[1]), value)
            full[: len(tensor)] = tensor
            found.append(full)
        return found

    return Sent(
        x=filled(sent.x, 0),
        idx=filled(sent.idx, -1),
        weight=filled(sent.weight, 0),
        slot=list(sent.slot),
        count=list(sent.count),
    )


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("copy", COPIES)
def test_a_captured_graph_replays_for_many_epochs(copy: str, how: str, apart: Apart) -> None:
    apart(replays, ExchangeCase(num_ranks=4, max_tokens=129, width=256, copy=copy, how=how))


def same_bits(_: str, case: ExchangeCase) -> None:
    """Neither timing nor which blocks come first changes a bit."""
    ranks = case.ranks(native._C)
    exchange, sent = Exchange(ranks, case), draw(ranks, case, 2 * case.num_ranks - 1, gpu.DEVICE)
    begins = exchange.begins(sent.count)
    wanted = None
    for _ in range(10):
        received = exchange.dispatch(sent, begins)
        y, weight = results(received)
        sums = [*itertools.chain(*exchange.combine(sent, received, y, weight, begins))]
        wanted = sums if wanted is None else wanted
        for got, want in zip(sums, wanted, strict=True):
            assert_same(got, want)


@pytest.mark.parametrize("how", HOW)
def test_the_same_bits_every_time(how: str, apart: Apart) -> None:
    apart(same_bits, replace(LAYERS["v2_lite"], max_tokens=512, how=how))


def quiet(_: str, case: ExchangeCase) -> None:
    """The host is not made to wait by routes, dispatch or combine in the worst-case layout."""
    ranks = case.ranks(native._C)
    exchange, sent = Exchange(ranks, case), draw(ranks, case, 5, gpu.DEVICE)
    begins = [ranks.worst_begin() for _ in range(case.num_ranks)]

    def step(*_: Tensor) -> tuple[Tensor, ...]:
        ranks.routes(sent.idx, num_experts=case.num_experts)
        received = exchange.dispatch(sent, begins)
        return tuple(exchange.combine(sent, received, *results(received), begins)[0])

    step()
    gpu.assert_never_waits(step)


@pytest.mark.parametrize("how", HOW)
def test_it_never_waits_for_the_gpu(how: str, apart: Apart) -> None:
    apart(quiet, replace(SMALL, how=how))


# ---- several processes ----

CARD_CASES = tuple(
    ExpertCase(tokens=(7, 3), hidden=64, expert_width=64, dtype=dtype, exact=exact, routing=routing)
    for dtype in DTYPES
    for exact in (True, False)
    for routing in ("any", "dropped", "none")
)


def test_processes_that_share_a_card_compute_what_gloo_gives() -> None:
    """Buffers are opened by their cudaIpc handles; values and all gradients, float32, bfloat16, float16."""
    card_ranks.check_layers(CARD_CASES, device=gpu.DEVICE, transport="peer")


def test_four_processes_that_share_a_card() -> None:
    case = ExpertCase(tokens=(2, 0, 9, 5), hidden=64, expert_width=64, exact=False)
    card_ranks.check_layers((case,), device=gpu.DEVICE, transport="peer")


def test_a_process_that_dies_is_named_by_the_other() -> None:
    case = ExpertCase(tokens=(7, 3), hidden=64, expert_width=64, exact=False)
    card_ranks.check_lost(case, device=gpu.DEVICE, transport="peer")
