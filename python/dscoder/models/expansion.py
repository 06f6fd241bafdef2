"""When the latents of a cache are expanded into keys and values of heads, and which of them at once.

New tokens attend a cache in one of two forms (mla.py) that compute the same. What a head multiplies, with n
new tokens behind m cached ones and p = n * (m + (n + 1) / 2) pairs of a token and a row that it sees:

    absorbed    n * C * (nope + value)       + p * (C + r + C)
    expanded    (m + n) * C * (nope + value) + p * (nope + r + value)

So expanding pays when m * C * (nope + value) < p * (2 * C - nope - value). Lengths are those the host knows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dscoder.config import MlaConfig

# Rows times heads that are expanded at once: 0.9 GiB in bfloat16 at 192/128, with the keys put together.
MOST_EXPANDED = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Cached rows that are expanded at once, side by side, sequence after sequence."""

    slots_M: Tensor  # int64, entries of the storage; those behind the last sequence's end mean nothing
    ends_k: Tensor  # int32 [B + 1]: where sequences end
    is_causal: bool  # the new tokens are its last rows; else they see all of it


@dataclass(frozen=True, kw_only=True, slots=True)
class Expansion:
    """The rows of all sequences in blocks, the one with the new tokens first; for all layers of a forward."""

    ends_q: Tensor  # int32 [B + 1], of the new tokens
    blocks: tuple[Block, ...]


def pays_to_expand(attention: MlaConfig, *, num_new: int, num_cached: int) -> bool:
    """Whether expanding cached latents takes fewer products; never for one new token, as steps decode."""
    expanded_dim, rank = attention.nope_dim + attention.value_dim, attention.kv_lora_rank
    num_pairs = num_new * num_cached + num_new * (num_new + 1) // 2
    return num_new > 1 and num_cached * rank * expanded_dim < num_pairs * (2 * rank - expanded_dim)


def plan_expansion(
    attention: MlaConfig,
    end_lens_B: Tensor,
    page_table_BN: Tensor,
    *,
    page_size: int,
    num_new: int,
    num_cached: int,
    most_expanded: int = MOST_EXPANDED,
) -> Expansion | None:
    """Blocks that together hold every row of every sequence; nothing waits for the device.

    Args:
        attention: of which the widths and the number of heads count.
        end_lens_B: int32, lengths with the `num_new` tokens of each sequence counted in.
        page_table_BN: int32, pages of `page_size` rows, wide enough for these lengths.
        page_size: rows of a page.
        num_new: tokens that each sequence appends, padding included.
        num_cached: at least what the longest sequence held before; shapes follow from it.
        most_expanded: rows times heads of a block, or more where the new tokens alone are more.

    Returns:
        None where nothing is cached or expanding does not pay.
    """
    if num_cached == 0 or not pays_to_expand(attention, num_new=num_new, num_cached=num_cached):
        return None
    num_sequences, max_len = len(end_lens_B), num_cached + num_new
    num_rows = min(max(most_expanded // (attention.num_heads * max(num_sequences, 1)), num_new), max_len)
    ends_q = torch.arange(num_sequences + 1, dtype=torch.int32, device=end_lens_B.device) * num_new
    blocks = []
    # Counted from the end, so that every sequence has its new tokens in the first block.
    for num_behind in range(0, max_len, num_rows):
        width = min(num_rows, max_len - num_behind)
        end_B = (end_lens_B - num_behind).clamp(min=0)
        start_B = (end_B - width).clamp(min=0)
        blocks.append(_block(start_B, end_B, page_table_BN, width, page_size, is_causal=num_behind == 0))
    return Expansion(ends_q=ends_q, blocks=tuple(blocks))


def _block(
    start_B: Tensor, end_B: Tensor, page_table_BN: Tensor, width: int, page_size: int, *, is_causal: bool
) -> Block:
    """Rows `start_B` to `end_B`, `width` at the most, of each sequence, without gaps between sequences."""
    num_sequences = len(start_B)
    ends_k = torch.zeros(num_sequences + 1, dtype=torch.int32, device=start_B.device)
    torch.cumsum(end_B - start_B, dim=0, dtype=torch.int32, out=ends_k[1:])
    row_M = torch.arange(num_sequences * width, device=start_B.device)
    # Rows behind the last end are some rows of the last sequence's table: read, and then by nobody.
    sequence_M = torch.searchsorted(ends_k[1:], row_M, right=True).clamp_(max=num_sequences - 1)
    position_M = row_M - ends_k[sequence_M] + start_B[sequence_M]
    position_M.clamp_(max=page_table_BN.shape[1] * page_size - 1)
    page_M = page_table_BN[sequence_M, position_M // page_size]
    slots_M = torch.add(position_M % page_size, page_M, alpha=page_size)
    return Block(slots_M=slots_M, ends_k=ends_k, is_causal=is_causal)


def merge(part: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Out and log-sum-exp over all keys from those over some and over the others, in the dtype of the latter.

    A part may have seen nothing (lse -inf), not both.
    """
    (out_THv, lse_TH), (other_out_THv, other_lse_TH) = part, other
    all_TH = torch.logaddexp(lse_TH, other_lse_TH)
    weight_TH1, other_weight_TH1 = ((lse - all_TH).exp_().unsqueeze(-1) for lse in (lse_TH, other_lse_TH))
    return out_THv * weight_TH1 + other_out_THv * other_weight_TH1, all_TH
