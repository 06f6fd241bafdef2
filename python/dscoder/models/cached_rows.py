"""How new tokens see the rows of a cache of keys and values: under a mask, or as packed sequences.

A mask has a number for every new token, cached entry and head that shares a key, made anew for each chunk of
a prompt. Packed, the lengths on the device say it all, and mla_prefill's kernels multiply nothing that a
mask would hide. One token a row, as in decoding, has nothing to hide but what is behind its row's end.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dscoder.ops.mla_prefill import kernel_refusal


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRows:
    """Two sequences for each row: what it holds, then the rest of its memory.

    The second has no query but padding that did not fit, which sees no key.
    """

    ends_q: Tensor  # int32 [2 B + 1], among the B * S columns
    ends_k: Tensor  # int32 [2 B + 1], among the B * max_positions entries


def pays_to_pack(keys: Tensor, values: Tensor, *, num_new: int) -> bool:
    """Whether `num_new` columns a row attend packed entries: by kernels, and not in steps.

    On a CPU the mask is the faster way: mla_prefill's reference reads the memory of all rows, used or not.
    """
    return num_new > 1 and keys.is_cuda and kernel_refusal(keys, values, scale=1.0) is None


def pack_rows(seq_lens_B: Tensor, *, num_new: int, max_positions: int) -> PackedRows:
    """Rows of `seq_lens_B` entries that take in `num_new` columns each; nothing waits for the device."""
    end_lens_B = (seq_lens_B + num_new).clamp(max=max_positions)
    row_B = torch.arange(len(seq_lens_B), dtype=torch.int32, device=seq_lens_B.device)
    ends = []
    for used_B, size in ((end_lens_B - seq_lens_B, num_new), (end_lens_B, max_positions)):
        ends_B2 = torch.stack([row_B * size + used_B, (row_B + 1) * size], dim=1)
        ends.append(F.pad(ends_B2.flatten(), (1, 0)))
    ends_q, ends_k = ends
    return PackedRows(ends_q=ends_q, ends_k=ends_k)


def mask_rows(positions_BS: Tensor, num_entries: int, *, num_sharing: int, dtype: torch.dtype) -> Tensor:
    """[B, 1, S * num_sharing, L]: 0 where a column at its position sees an entry, else -inf.

    A column stands there once for each of the `num_sharing` heads that share a key.
    """
    entries_L = torch.arange(num_entries, device=positions_BS.device)
    is_hidden_BSL = entries_L > positions_BS[:, :, None]
    # A number, not a truth value, which attention would turn into one in every layer.
    mask_BSL = torch.zeros(is_hidden_BSL.shape, dtype=dtype, device=positions_BS.device)
    return mask_BSL.masked_fill_(is_hidden_BSL, -torch.inf)[:, None].repeat(1, 1, num_sharing, 1)
