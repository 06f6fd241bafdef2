"""The plan of mla_decode on a GPU: the one that the host makes, for all layers of a step."""

import pytest
import torch

from dscoder import ops
from dscoder.ops.library import gpu_of
from dscoder.runtime import native
from dscoder.testing import gpu
from dscoder.testing.cases import generator
from dscoder.testing.decode import SCALE, VALUE_DIM, assert_decodes, decode_case, plan_for, random_lengths

ARCHS = ["auto", "sm80"]
OPTIONS = {"value_dim": VALUE_DIM, "scale": SCALE}


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    """Cases are drawn where they are used."""
    return generator(request.node.nodeid, gpu.DEVICE)


@pytest.mark.sanitize
@pytest.mark.parametrize("num_heads", [16, 128])
@pytest.mark.parametrize(
    "lengths",
    [
        [],
        [0],
        [1],
        [1, 0, 63, 64, 65, 200],
        [0] * 300,
        [1 << 17],
        [5] * 1000,
        [-3, 2**31 - 1, 70, -(2**31), 2**31 - 1],
    ],
    ids=lambda lengths: f"{len(lengths)} from {lengths[0] if lengths else 0}",
)
def test_the_plan_is_the_hosts(lengths: list[int], num_heads: int) -> None:
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=gpu.DEVICE)
    plan = ops.mla_decode_plan(seq_lens, num_new=1, num_heads=num_heads, max_rows=1 << 20)
    _, _, num_sms = gpu_of(seq_lens.device)
    num_parts = native._C.mla_decode_num_parts(1, num_heads, num_sms)
    assert plan.tolist() == [list(row) for row in native._C.mla_decode_plan_of(lengths, num_parts, 1 << 20)]


def test_the_plan_of_many_random_lengths_is_the_hosts(rng: torch.Generator) -> None:
    for num_sequences in (3, 40, 129, 2049):
        lengths = random_lengths(rng, num_sequences, 9000)
        seq_lens = torch.tensor(lengths, dtype=torch.int32, device=gpu.DEVICE)
        plan = ops.mla_decode_plan(seq_lens, num_new=2, num_heads=16, max_rows=8192)
        num_parts = len(plan) - 1 - num_sequences
        wanted = native._C.mla_decode_plan_of(lengths, num_parts, 8192)
        assert plan.tolist() == [list(row) for row in wanted]


@pytest.mark.parametrize("arch", ARCHS)
def test_one_plan_serves_all_layers(arch: str, rng: torch.Generator) -> None:
    lengths = random_lengths(rng, 40, 3000)
    layers = [decode_case(rng, lengths, num_pages=2000, num_slots=64) for _ in range(3)]
    plan = plan_for(layers[0])
    for case in layers:
        got = ops.mla_decode(*case, **OPTIONS, plan=plan, arch=arch)
        gpu.assert_all_same(got, ops.mla_decode(*case, **OPTIONS, arch=arch))
        assert_decodes(got, case)


@pytest.mark.sanitize("memcheck")
@pytest.mark.parametrize("arch", ARCHS)
def test_a_plan_for_other_lengths_decodes_too(arch: str, rng: torch.Generator) -> None:
    case = decode_case(rng, [300, 0, 64, 5])
    others = [[0, 0, 0, 0], [5, 9000, 64, 300], [2**31 - 1] * 4]
    for lengths in others:
        seq_lens = torch.tensor(lengths, dtype=torch.int32, device=gpu.DEVICE)
        plan = ops.mla_decode_plan(seq_lens, num_new=1, num_heads=16, max_rows=1 << 14)
        assert_decodes(ops.mla_decode(*case, **OPTIONS, plan=plan, arch=arch), case)
