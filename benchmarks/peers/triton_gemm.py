"""grouped_gemm in Triton, as a short kernel of one's own would be: forward alone, any rows an expert.

A program makes one tile. The grid has as many as there can be; each finds its expert in the END offsets, so
nothing waits for the GPU. Tiles are tuned on the first call, for the rows an expert has on average.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import Config

from benchmarks.peers.triton_gate import clock, configs

# Rows, columns and depth of a tile, warps, stages.
_TILES = (
    (64, 128, 64, 4, 4),
    (128, 128, 64, 8, 4),
    (128, 256, 64, 8, 3),
    (16, 128, 64, 4, 5),
    (32, 128, 64, 4, 4),
)
CONFIGS = configs(
    [
        Config({"ROWS": rows, "COLUMNS": columns, "DEPTH": depth}, num_warps=warps, num_stages=stages)
        for rows, columns, depth, warps, stages in _TILES
    ]
)


@triton.autotune(CONFIGS, key=["num_rows", "num_columns", "depth"], do_bench=clock)
@triton.jit
def product_kernel(
    tensors,
    num_rows,
    num_columns,
    depth,
    SHAPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    x, w, y, offsets = tensors  # [M, K], [E, N, K], [M, N], [E]
    EXPERTS: tl.constexpr = SHAPE[0]
    PADDED: tl.constexpr = SHAPE[1]
    # Neighbouring programs share the weights of a column tile.
    tile, column = tl.program_id(0), tl.program_id(1) * COLUMNS
    e = tl.arange(0, PADDED)
    end_E = tl.load(offsets + e, mask=e < EXPERTS, other=0)
    begin_E = tl.load(offsets + e - 1, mask=(e > 0) & (e < EXPERTS), other=0)
    tiles_E = tl.where(e < EXPERTS, (end_E - begin_E + ROWS - 1) // ROWS, 0)
    last_E = tl.cumsum(tiles_E, axis=0)
    expert = tl.sum(((last_E <= tile) & (e < EXPERTS)).to(tl.int32), axis=0)
    if expert < EXPERTS:
        is_mine = e == expert
        first = tl.sum(tl.where(is_mine, last_E - tiles_E, 0), axis=0)
        begin = tl.sum(tl.where(is_mine, begin_E, 0), axis=0)
        end = tl.sum(tl.where(is_mine, end_E, 0), axis=0)
        row = begin + (tile - first) * ROWS + tl.arange(0, ROWS)
        n = column + tl.arange(0, COLUMNS)
        k = tl.arange(0, DEPTH)
        is_row, is_column = row[:, None] < end, n[None, :] < num_columns
        x_at = x + row.to(tl.int64)[:, None] * depth + k[None, :]
        w_at = w + expert.to(tl.int64) * num_columns * depth + n.to(tl.int64)[None, :] * depth + k[:, None]
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, depth, DEPTH):
            is_k = start + k < depth
            a = tl.load(x_at + start, mask=is_row & is_k[None, :], other=0.0)
            b = tl.load(w_at + start, mask=is_column & is_k[:, None], other=0.0)
            total = tl.dot(a, b, total)
        y_at = y + row.to(tl.int64)[:, None] * num_columns + n[None, :]
        tl.store(y_at, total.to(y.dtype.element_ty), mask=is_row & is_column)


def grouped_gemm(x_MK: Tensor, w_ENK: Tensor, offsets_E: Tensor) -> Tensor:
    """One launch; every row must belong to an expert."""
    (num_rows, depth), (num_experts, num_columns, _) = x_MK.shape, w_ENK.shape
    y_MN = torch.empty(num_rows, num_columns, dtype=x_MK.dtype, device=x_MK.device)

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        most_tiles = triton.cdiv(num_rows, meta["ROWS"]) + min(num_experts, num_rows)
        return most_tiles, triton.cdiv(num_columns, meta["COLUMNS"])

    shape = (num_experts, triton.next_power_of_2(num_experts))
    product_kernel[grid]((x_MK, w_ENK, y_MN, offsets_E), num_rows, num_columns, depth, SHAPE=shape)
    return y_MN
