"""mla_prefill's forward pass in Triton: a program has a head and a tile of queries, and walks over keys.

Online softmax as FlashAttention-2 has it. A tile is as wide as a power of two, so keys of 192 come in two
products, of 128 and of 64; values stay at their own width. Blocks that all queries of the tile see whole are
not masked. Tile, block, warps and stages are tuned for each size on the first call.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import Config

from benchmarks.peers.triton_gate import clock, configs

LOG2_E = tl.constexpr(1.4426950408889634)
# Queries, keys, warps, stages; each costs seconds of compiling.
SIZES = ((128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (128, 32, 4, 3))
CONFIGS = configs([Config({"ROWS": m, "KEYS": n}, num_warps=w, num_stages=s) for m, n, w, s in SIZES])


@triton.autotune(CONFIGS, key=["SHAPE", "longest"], do_bench=clock)
@triton.jit
def attention_kernel(
    tensors, scale, longest, SHAPE: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr
):
    q, k, v, ends_q, ends_k, out, lse = tensors  # [T, H, d], [M, G, d], [M, G, v], [B + 1] twice, results
    HEADS: tl.constexpr = SHAPE[0]
    KEY_HEADS: tl.constexpr = SHAPE[1]
    WIDTH: tl.constexpr = SHAPE[2]  # of a key, FIRST and REST
    FIRST: tl.constexpr = SHAPE[3]
    REST: tl.constexpr = WIDTH - FIRST
    VALUE: tl.constexpr = SHAPE[4]
    head = tl.program_id(1)
    key_head = head // (HEADS // KEY_HEADS)
    start_q, start_k = tl.load(ends_q + tl.program_id(2)), tl.load(ends_k + tl.program_id(2))
    num_q = tl.load(ends_q + tl.program_id(2) + 1) - start_q
    num_k = tl.load(ends_k + tl.program_id(2) + 1) - start_k
    # Tiles that see the most keys begin first.
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    if first_row >= num_q:
        return
    row = first_row + tl.arange(0, ROWS)
    is_row = (row < num_q)[:, None]
    place = (start_q + row).to(tl.int64) * HEADS + head
    column, rest_column, value_column = (
        tl.arange(0, FIRST),
        FIRST + tl.arange(0, REST or 1),
        tl.arange(0, VALUE),
    )
    query = tl.load(q + place[:, None] * WIDTH + column[None, :], mask=is_row, other=0.0)
    if REST > 0:
        query_rest = tl.load(q + place[:, None] * WIDTH + rest_column[None, :], mask=is_row, other=0.0)
    best = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, VALUE), tl.float32)
    last_key = num_k - num_q + first_row if CAUSAL else num_k  # that the first query sees
    whole = tl.minimum(num_k, tl.maximum(last_key + 1, 0)) // KEYS * KEYS
    seen = tl.minimum(num_k, tl.maximum(last_key + ROWS, 0))
    for IS_CUT in tl.static_range(2):
        for first_key in range(whole if IS_CUT else 0, seen if IS_CUT else whole, KEYS):
            key = first_key + tl.arange(0, KEYS)
            is_key = (key < num_k)[:, None]
            key_place = ((start_k + key).to(tl.int64) * KEY_HEADS + key_head)[:, None]
            block = tl.load(k + key_place * WIDTH + column[None, :], mask=is_key, other=0.0)
            scores = tl.dot(query, tl.trans(block))
            if REST > 0:
                block = tl.load(k + key_place * WIDTH + rest_column[None, :], mask=is_key, other=0.0)
                scores = tl.dot(query_rest, tl.trans(block), scores)
            scores = scores * scale
            if IS_CUT:
                is_seen = (key[None, :] <= (last_key + row - first_row)[:, None]) & (key < num_k)[None, :]
                scores = tl.where(is_seen, scores, -float("inf"))
            new_best = tl.maximum(best, tl.max(scores, axis=1))
            # A query that has seen nothing has best -inf, and -inf - -inf would be NaN.
            base = tl.where(new_best == -float("inf"), 0.0, new_best)
            weight, kept = tl.exp2(scores - base[:, None]), tl.exp2(best - base)
            values = tl.load(v + key_place * VALUE + value_column[None, :], mask=is_key, other=0.0)
            sums = tl.dot(weight.to(values.dtype), values, sums * kept[:, None])
            total, best = total * kept + tl.sum(weight, axis=1), new_best
    result = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + place[:, None] * VALUE + value_column[None, :], result, mask=is_row)
    tl.store(lse + place, (best + tl.log2(total)) / LOG2_E, mask=row < num_q)


def attention(
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGv: Tensor,
    ends_q: Tensor,
    ends_k: Tensor,
    *,
    longest: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """One launch, for contiguous tensors; `longest` is that of the sequences of q."""
    num_tokens, num_heads, width = q_THd.shape
    value_width = v_TGv.shape[2]
    first = 1 << (width.bit_length() - 1)
    out_THv = q_THd.new_empty(num_tokens, num_heads, value_width)
    lse_TH = torch.empty(num_tokens, num_heads, dtype=torch.float32, device=q_THd.device)
    shape = (num_heads, k_TGd.shape[1], width, first, value_width)

    def grid(meta: Any) -> tuple[int, int, int]:
        return triton.cdiv(longest, meta["ROWS"]), num_heads, len(ends_q) - 1

    tensors = (q_THd, k_TGd, v_TGv, ends_q, ends_k, out_THv, lse_TH)
    attention_kernel[grid](tensors, scale * LOG2_E.value, longest, SHAPE=shape, CAUSAL=causal)
    return out_THv, lse_TH
