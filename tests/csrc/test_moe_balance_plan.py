"""Into how many chunks and slices the balance kernels cut the tokens and the experts."""

from types import ModuleType

import pytest


def test_chunks_fill_a_gpu_and_stay_few(host_ops: ModuleType) -> None:
    def num_chunks(num_tokens: int, num_sequences: int) -> int:
        return host_ops.moe_balance_plan(num_tokens, 64, num_sequences, 1)[0]

    assert num_chunks(0, 1) == num_chunks(0, 9) == num_chunks(16, 1) == 1
    assert num_chunks(17, 1) == 2
    assert num_chunks(8192, 1) == num_chunks(131072, 1) == 512
    assert num_chunks(8192, 4) == 128
    assert num_chunks(8192, 2048) == num_chunks(4096, 4096) == 1
    with pytest.raises(ValueError, match="num_sequences >= 1, got 5 and 0"):
        num_chunks(5, 0)


def test_slices_share_the_chunks_out_until_there_are_blocks_enough(host_ops: ModuleType) -> None:
    def num_slices(num_experts: int, num_sequences: int, num_groups: int) -> int:
        return host_ops.moe_balance_plan(8192, num_experts, num_sequences, num_groups)[1]

    assert num_slices(64, 1, 1) == 8  # V2-Lite: 8 blocks, each with an eighth of the numbers
    assert num_slices(160, 1, 8) == 3  # V2
    assert num_slices(160, 8, 8) == 3
    assert num_slices(160, 16, 8) == 2
    assert num_slices(512, 2048, 1) == num_slices(1, 1, 1) == 1
    with pytest.raises(ValueError, match="num_experts must be >= 1, got 0"):
        num_slices(0, 1, 1)
