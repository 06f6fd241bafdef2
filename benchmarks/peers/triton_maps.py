"""moe_permute's maps in Triton, without a sort; no choice may be dropped.

Three launches: every chunk of choices counts its experts, the counts of each expert are summed over the
chunks, every chunk places its choices.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 128  # choices that a program counts and ranks
SUM_BLOCK = 1024  # chunks summed at once


@triton.jit
def count_kernel(idx, counts, num_choices, num_chunks, EXPERTS: tl.constexpr, CHUNK: tl.constexpr):
    PADDED: tl.constexpr = triton.next_power_of_2(EXPERTS)
    chunk = tl.program_id(0)
    choice = chunk * CHUNK + tl.arange(0, CHUNK)
    is_real = choice < num_choices
    expert = tl.load(idx + choice, mask=is_real, other=0)
    column = tl.arange(0, PADDED)
    count = tl.histogram(expert, PADDED, mask=is_real)
    tl.store(counts + column * num_chunks + chunk, count, mask=column < EXPERTS)


@triton.jit
def sum_kernel(counts, totals, num_chunks, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """counts [E, chunks] -> how many choices of the expert come in earlier chunks, in place; totals [E]."""
    expert = tl.program_id(0)
    running = 0
    for block in range(BLOCKS):
        chunk = block * BLOCK + tl.arange(0, BLOCK)
        place = counts + expert * num_chunks + chunk
        count = tl.load(place, mask=chunk < num_chunks, other=0)
        tl.store(place, running + tl.cumsum(count, axis=0) - count, mask=chunk < num_chunks)
        running += tl.sum(count, axis=0)
    tl.store(totals + expert, running)


@triton.jit
def place_kernel(tensors, num_choices, num_chunks, EXPERTS: tl.constexpr, CHUNK: tl.constexpr):
    idx, counts, totals, offsets, row = tensors
    PADDED: tl.constexpr = triton.next_power_of_2(EXPERTS)
    chunk = tl.program_id(0)
    column = tl.arange(0, PADDED)
    total = tl.load(totals + column, mask=column < EXPERTS, other=0)
    end = tl.cumsum(total, axis=0)
    if chunk == 0:
        tl.store(offsets + column, end, mask=column < EXPERTS)
    local = tl.arange(0, CHUNK)
    choice = chunk * CHUNK + local
    is_real = choice < num_choices
    expert = tl.load(idx + choice, mask=is_real, other=0)
    is_earlier = (expert[None, :] == expert[:, None]) & (local[None, :] < local[:, None])
    rank = tl.sum(is_earlier.to(tl.int32), axis=1)
    rank += tl.load(counts + expert * num_chunks + chunk, mask=is_real, other=0)
    tl.store(row + choice, tl.gather(end - total, expert, axis=0) + rank, mask=is_real)


def maps(idx_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(offsets_E, row_TK) in int32, an expert's rows in the order of the tokens."""
    num_choices = idx_TK.numel()
    num_chunks = triton.cdiv(num_choices, CHUNK)
    counts = idx_TK.new_empty(num_experts, num_chunks)
    totals, offsets_E = idx_TK.new_empty(2, num_experts)
    row_TK = torch.empty_like(idx_TK)
    sizes = {"EXPERTS": num_experts, "CHUNK": CHUNK}
    count_kernel[(num_chunks,)](idx_TK, counts, num_choices, num_chunks, **sizes)
    num_blocks = triton.cdiv(num_chunks, SUM_BLOCK)
    sum_kernel[(num_experts,)](counts, totals, num_chunks, BLOCKS=num_blocks, BLOCK=SUM_BLOCK)
    tensors = (idx_TK, counts, totals, offsets_E, row_TK)
    place_kernel[(num_chunks,)](tensors, num_choices, num_chunks, **sizes)
    return offsets_E, row_TK
