"""The sm_90a kernel of mla_decode beside that of sm_80, on a Hopper GPU, whichever "auto" takes.

Each case first runs in another process, which is ended if it hangs: such a case, and what follows, is not
measured, and takes no other result with it.
"""

from collections.abc import Callable

import pytest
import torch

from benchmarks.bench_mla_decode import CALLS, UNEVEN, case_of, planned, problem_of, shape_of, tame_case
from benchmarks.shapes import peers_of
from dscoder import ops
from dscoder.testing import cases, gpu
from dscoder.testing.aside import Aside
from dscoder.testing.decode import SCALE, VALUE_DIM, DecodeCase, random_lengths

pytestmark = pytest.mark.skipif(not gpu.has_hopper(), reason="needs a GPU of compute capability 9.0")

LIMIT_S = 20.0  # of a first call, which takes some milliseconds
EVEN = [(model, num_sequences, num_new, str(num_rows)) for model, num_sequences, num_new, num_rows in CALLS]
ALL = [*EVEN, *((model, num_sequences, 1, f"1..{longest}") for model, num_sequences, longest in UNEVEN)]


def drawn(model: str, num_sequences: int, num_new: int, rows: str) -> DecodeCase:
    """`rows`: how many each sequence has, or 1..most."""
    shape = shape_of(model, num_sequences, num_new, rows)
    least, _, most = rows.partition("..")
    lengths = [int(least)] * num_sequences
    if most:
        lengths = [n + 1 for n in random_lengths(cases.generator(shape), num_sequences, int(most) - 1)]
    return tame_case(shape, model, lengths, num_new)


def call(model: str, num_sequences: int, num_new: int, rows: str) -> None:
    case = drawn(model, num_sequences, num_new, rows)
    ops.mla_decode(*case, value_dim=VALUE_DIM, scale=SCALE, arch="sm90")
    torch.cuda.synchronize()


@pytest.mark.parametrize(("model", "num_sequences", "num_new", "rows"), ALL)
def test_forward(
    measure: Callable[..., None], aside: Aside, model: str, num_sequences: int, num_new: int, rows: str
) -> None:
    aside.run(call, model, num_sequences, num_new, rows)
    case = drawn(model, num_sequences, num_new, rows)
    found = peers_of("mla_decode", "forward")
    peers = {name: peer for name, peer in found.items() if name in ("flash_mla", "flashinfer", "fa3")}
    shape = shape_of(model, num_sequences, num_new, rows)
    measure(
        case_of(model, case, "forward sm90", shape),
        problem_of(case),
        planned("sm90"),
        {"sm80": planned("sm80"), **peers},
    )
