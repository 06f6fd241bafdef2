"""The contract of the exchange's kernels catches an order of memory that does not hold."""

import pytest

from dscoder.testing.contract import ARCHS
from dscoder.testing.contract_comm import COMM_KERNELS, broken_exchange

FENCE, COUNT, TELL = "MEMBAR.ALL.SYS", "ATOMG.E.ADD.STRONG.SYS", "STG.E.64.STRONG.SYS"
PROXY, LOAD, STORE, WAIT = "FENCE.VIEW.ASYNC.G", "UBLKCP.S.G", "UBLKCP.G.S", "DEPBAR.LE"
WORDS = ("LDG.E.64.STRONG.SYS", "LDG.E.128", "STG.E.128", FENCE, COUNT, "STG.E", FENCE, TELL)
BULK = (PROXY, LOAD, STORE, WAIT, WAIT, FENCE, COUNT, "STG.E", FENCE, TELL)


def without(opcodes: tuple[str, ...], position: int) -> tuple[str, ...]:
    return opcodes[:position] + opcodes[position + 1 :]


@pytest.mark.parametrize(
    ("opcodes", "wanted"),
    [
        (WORDS, []),
        (BULK, []),
        ((*WORDS, "LDG.E.128.CONSTANT"), ["LDG.E.128.CONSTANT: the read-only path"]),
        (without(WORDS, 3), [f"no {FENCE} between what was written and {COUNT}"]),
        (without(WORDS, 6), [f"no {FENCE} between what was written and {TELL}"]),
        ((*WORDS[:4], "STG.E.128", *WORDS[4:]), [f"no {FENCE} between what was written and {COUNT}"]),
        (without(BULK, 4), [f"no wait for bulk stores above {COUNT}"]),
        ((PROXY, LOAD, WAIT, WAIT, STORE, *BULK[5:]), [f"no wait for bulk stores above {COUNT}"]),
        (without(BULK, 0), [f"no {PROXY} above the first bulk copy"]),
        ((LOAD, PROXY, *BULK[2:]), [f"no {PROXY} above the first bulk copy"]),
    ],
)
def test_a_broken_order_is_caught(opcodes: tuple[str, ...], wanted: list[str]) -> None:
    assert broken_exchange(opcodes) == wanted


def test_every_kernel_that_moves_rows_is_held_to_the_order() -> None:
    held = {name for name, kernel in COMM_KERNELS.items() if kernel.reaches_peers}
    assert held == COMM_KERNELS.keys() - {"expert_routes_kernel", "dispatch_counts_kernel"}


def test_bulk_copies_are_of_sm_90a_alone() -> None:
    for name, kernel in COMM_KERNELS.items():
        assert kernel.archs == (("sm_90a",) if "BulkMover" in name else ARCHS), name
