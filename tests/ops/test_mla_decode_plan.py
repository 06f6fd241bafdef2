"""mla_decode_plan: what the op says; the rule itself is tested in tests/csrc/test_mla_decode_plan.py."""

import importlib
from itertools import chain, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from dscoder import ops
from dscoder.runtime import native
from dscoder.testing.compare import assert_op_registered, assert_same
from dscoder.testing.poison import with_strides

BLOCK = 64
SIZES = {"num_new": 1, "num_heads": 16, "max_rows": 1 << 14}
LENGTHS = {
    "one": [1],
    "block_edges": [63, 64, 65, 128, 129],
    "with_empty_ones": [0, 700, 0, 0, 4097, 0],
    "all_empty": [0, 0, 0],
    "none": [],
    "long": [16384, 1, 16384],
    "wild": [-5, 2**31 - 1, -(2**31), 300],
}


@pytest.fixture(params=[1, 3, 7, 132])
def num_parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """As on a GPU that has room for so many."""
    module = importlib.import_module("dscoder.ops.mla_decode")
    monkeypatch.setattr(module, "_num_parts", lambda *_: request.param)
    return int(request.param)


def lens(lengths: list[int]) -> Tensor:
    return torch.tensor(lengths, dtype=torch.int32)


def blocks_by_part(plan: Tensor, num_parts: int, num_blocks: list[int]) -> list[list[tuple[int, int]]]:
    """The (sequence, block) that each part reads: from where it begins to where the next one does."""
    line = [(b, k) for b, count in enumerate(num_blocks) for k in range(count)]
    begins = [tuple(row) for row in plan[: num_parts + 1].tolist()]
    assert begins == sorted(begins)
    return [[at for at in line if begin <= at < end] for begin, end in pairwise(begins)]


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_every_block_has_one_part(lengths: list[int], num_parts: int) -> None:
    plan = ops.mla_decode_plan(lens(lengths), **SIZES)
    assert plan.shape == (num_parts + 1 + len(lengths), 2)
    assert plan.dtype == torch.int32
    num_blocks = [-(-min(max(n, 0), SIZES["max_rows"]) // BLOCK) for n in lengths]
    parts = blocks_by_part(plan, num_parts, num_blocks)
    assert list(chain(*parts)) == [(b, k) for b, count in enumerate(num_blocks) for k in range(count)]
    assert plan[num_parts].tolist() == [len(lengths), 0]
    # The parts that hold a piece of a sequence lie between its first and its last.
    for b, (first, last) in enumerate(plan[num_parts + 1 :].tolist()):
        holders = [p for p, blocks in enumerate(parts) if any(at[0] == b for at in blocks)]
        assert 0 <= first <= last < num_parts
        assert all(first <= p <= last for p in holders)


def test_the_parts_of_a_long_sequence_are_even(num_parts: int) -> None:
    plan = ops.mla_decode_plan(lens([16384]), **SIZES)
    counts = [len(part) for part in blocks_by_part(plan, num_parts, [16384 // BLOCK])]
    assert max(counts) <= -(-256 // num_parts) + 3


def test_a_cpu_has_one_part() -> None:
    plan = ops.mla_decode_plan(lens([5, 0, 900]), **SIZES)
    assert plan.tolist() == [[0, 0], [3, 0], [0, 0], [0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("num_new", "num_heads", "num_sms", "wanted"),
    [
        (1, 16, 132, 132),
        (4, 16, 132, 132),
        (1, 128, 132, 66),
        (4, 128, 132, 16),
        (999, 128, 132, 1),
        (1, 1, 0, 1),
    ],
)
def test_tiles_of_one_part_run_side_by_side(num_new: int, num_heads: int, num_sms: int, wanted: int) -> None:
    assert native._C.mla_decode_num_parts(num_new, num_heads, num_sms) == wanted


def test_strides_change_nothing() -> None:
    seq_lens = lens([5, 0, 900])
    strided = ops.mla_decode_plan(with_strides(seq_lens), **SIZES)
    assert_same(strided, ops.mla_decode_plan(seq_lens, **SIZES))


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_it_is_a_proper_op(lengths: list[int]) -> None:
    assert_op_registered(torch.ops.dscoder.mla_decode_plan.default, (lens(lengths), 1, 16, 1 << 14))


def test_it_compiles_whole() -> None:
    def step(seq_lens: Tensor, table: Tensor) -> Tensor:
        return ops.mla_decode_plan(seq_lens + 1, num_new=1, num_heads=16, max_rows=table.shape[1] * 64)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_sequences in (2, 3, 5):
        table = torch.zeros(num_sequences, 4 * num_sequences)
        seq_lens = torch.arange(num_sequences, dtype=torch.int32) * 100
        assert_same(compiled(seq_lens, table), step(seq_lens, table))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"seq_lens_B": [1]}, TypeError, "seq_lens must be a tensor, got list"),
        ({"seq_lens_B": torch.ones(2).long()}, TypeError, "seq_lens must be int32, got int64"),
        (
            {"seq_lens_B": torch.ones(2, 1).int()},
            ValueError,
            r"seq_lens must have 1 dimensions, got shape \(2, 1\)",
        ),
        ({"num_new": 0}, ValueError, "num_new must be >= 1, got 0"),
        ({"num_new": 1.0}, TypeError, "num_new must be int, got float"),
        ({"num_heads": 0}, ValueError, "num_heads must be >= 1, got 0"),
        ({"num_heads": True}, TypeError, "num_heads must be int, got bool"),
        (
            {"num_new": 2**20, "num_heads": 2**11},
            ValueError,
            r"num_new \* num_heads must be <= 2147483647, got 2147483648",
        ),
        ({"max_rows": -1}, ValueError, "max_rows must be >= 0, got -1"),
        ({"max_rows": None}, TypeError, "max_rows must be int, got NoneType"),
    ],
)
def test_wrong_arguments_are_named(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"seq_lens_B": lens([5]), **SIZES, **changed}
    with pytest.raises(error, match=f"^mla_decode_plan: {message}$"):
        ops.mla_decode_plan(arguments.pop("seq_lens_B"), **arguments)
