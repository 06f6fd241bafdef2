"""dscoder.testing.decode: its cases are poisoned, and its checks see what is planted."""

import pytest
import torch
from torch import Tensor

from dscoder import ops
from dscoder.testing.cases import generator
from dscoder.testing.decode import SCALE, VALUE_DIM, DecodeCase, assert_decodes, decode_case

LENGTHS = [1, 0, 63, 64, 65, 300]


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    return generator(request.node.nodeid)


def reference(case: DecodeCase) -> tuple[Tensor, Tensor]:
    return ops.mla_decode(*case, value_dim=VALUE_DIM, scale=SCALE)


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("num_new", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_reference_is_exact_enough(
    dtype: torch.dtype, num_new: int, page_size: int, rng: torch.Generator
) -> None:
    case = decode_case(rng, LENGTHS, num_new=num_new, num_heads=4, page_size=page_size, dtype=dtype)
    assert_decodes(reference(case), case)


def test_unused_memory_is_poisoned(rng: torch.Generator) -> None:
    _, cache, table, seq_lens = decode_case(rng, [5, 0, 32], page_size=16, num_pages=9, num_slots=4)
    assert (cache.shape, table.shape) == ((9, 16, 576), (3, 4))
    assert seq_lens.tolist() == [5, 0, 32]
    assert int(cache.isnan().all(dim=2).sum()) == 9 * 16 - 37
    is_used = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
    used = table[is_used].tolist()
    assert len(set(used)) == 3
    assert set(used) <= set(range(9))
    assert bool(((table[~is_used] < 0) | (table[~is_used] >= 9)).all())


def test_no_sequences_are_a_case(rng: torch.Generator) -> None:
    case = decode_case(rng, [])
    assert_decodes(reference(case), case)


def planted(case: DecodeCase, fault: str) -> tuple[Tensor, Tensor]:
    q, cache, table, seq_lens = case
    out, lse = reference(case)
    if fault == "a row is left out":
        return ops.mla_decode(q, cache, table, (seq_lens - 1).clamp(min=0), value_dim=512, scale=SCALE)
    if fault == "a page is another":
        return reference((q, cache, table.index_copy(1, torch.tensor([1]), table[:, :1]), seq_lens))
    if fault == "another scale":
        return ops.mla_decode(*case, value_dim=512, scale=1.02 * SCALE)
    if fault == "one sum is off":
        out[5, 0, 0] *= 1.05
    elif fault == "an lse is off":
        lse[5, 0, 0] *= 1 + 4e-5
    elif fault == "lse of base 2":
        lse /= 0.6931
    elif fault == "an empty one is written":
        out[1, 0, 0, 0] = 1e-3
    elif fault == "an empty one has an lse":
        lse[1] = -1e30
    elif fault == "NaN":
        out[2, 0, 0, 7] = torch.nan
    return out, lse


FAULTS = {
    "a row is left out": "of 1 rows",
    "a page is another": "of 65 rows",
    "another scale": "sequence 0 of 1 rows: error of the log-sum-exp",
    "one sum is off": "sequence 5 of 300 rows: largest error",
    "an lse is off": "sequence 5 of 300 rows: error of the log-sum-exp",
    "lse of base 2": "error of the log-sum-exp",
    "an empty one is written": "the output of an empty sequence is not 0",
    "an empty one has an lse": "the log-sum-exp of an empty sequence is not -inf",
    "NaN": "sequence 2 of 63 rows: largest error of out is nan",
}


@pytest.mark.parametrize(("fault", "message"), FAULTS.items())
def test_a_planted_fault_is_found(fault: str, message: str, rng: torch.Generator) -> None:
    case = decode_case(rng, LENGTHS, num_heads=4)
    with pytest.raises(AssertionError, match=message):
        assert_decodes(planted(case, fault), case)
